//! Perplexity of running text and of wikitext's pages, as lm-evaluation-harness 0.4.13 defines it.

use std::path::Path;
use std::time::Instant;

use caskd_models::{LoadedModel, Network, passes_at_once, side_by_side};
use serde::Serialize;
use tch::Tensor;

use crate::eval::hidden_rows;
use crate::head::{chunks, logits, rows_per_chunk};
use crate::loglikelihood::{is_space, prefix, tokens};
use crate::{Error, Result, wikitext};

/// Padded tokens of one forward pass over text.
const TEXT_BATCH_TOKENS: usize = 2048;

/// A model's score on a text. All of it follows from `nats`, the summed −ln p of the scored tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextScore {
    /// exp(nats / tokens).
    pub perplexity: f64,
    /// Σ −ln p.
    pub nats: f64,
    /// Scored tokens.
    pub tokens: u64,
    /// Words, as the harness counts them: the pieces between runs of white space, an empty piece before or after
    /// the text among them. On wikitext, of the pages before they are detokenised.
    pub words: u64,
    /// Bytes in UTF-8, of the same text.
    pub bytes: u64,
    /// exp(nats / words).
    pub word_perplexity: f64,
    /// exp(nats / bytes).
    pub byte_perplexity: f64,
    /// nats / (bytes · ln 2).
    pub bits_per_byte: f64,
    /// Wall time, tokenizing included.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
}

/// How windows roll over a text: every token is scored once. The first window holds `max_len` tokens after the
/// tokenizer's BOS (else its EOS); each later one scores `stride` further tokens with as many before them as
/// `max_len` positions can hold. `stride` = `max_len` is the harness's choice; a smaller one gives every token more
/// context, at more passes. Without BOS and EOS the first token is not scored. A BOS that the tokenizer puts before
/// every text follows the first one and is scored, as the harness does it.
#[derive(Debug, Clone, Copy)]
pub struct Rolling {
    /// Input tokens of a window.
    pub max_len: usize,
    /// Tokens that each further window scores.
    pub stride: usize,
}

/// Scores a text. `progress` hears (tokens done, all tokens).
///
/// # Errors
/// A text without a token to score, a stride that is 0 or above the window, log-probabilities that are not finite.
pub fn evaluate_text(
    model: &LoadedModel,
    text: &str,
    rolling: Rolling,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<TextScore> {
    let started = Instant::now();
    let mut sums = TextSums::default();
    sums.add(model, text, text, rolling, progress)?;
    sums.score(started)
}

/// Scores wikitext page by page, the first `limit` pages where given: the log-likelihood is that of the detokenised
/// page, words and bytes are those of the page as it stands. The file is JSONL with a `page` a line, as the harness
/// loads it (`EleutherAI/wikitext_document_level`), or wikitext's running text, whose pages begin at headings of the
/// first level (` = Title = `). `progress` hears (pages done, all pages).
///
/// # Errors
/// A file that cannot be read, a line without a page, and what [`evaluate_text`] refuses.
pub fn evaluate_wikitext(
    model: &LoadedModel,
    path: &Path,
    limit: Option<usize>,
    rolling: Rolling,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(TextScore, usize)> {
    let started = Instant::now();
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let mut pages = wikitext::pages(path, &text)?;
    pages.truncate(limit.unwrap_or(usize::MAX));
    if pages.is_empty() {
        return Err(Error::NoItems {
            path: path.to_owned(),
        });
    }
    let mut sums = TextSums::default();
    for (index, page) in pages.iter().enumerate() {
        sums.add(
            model,
            &wikitext::detokenized(page),
            page,
            rolling,
            &mut |_, _| {},
        )?;
        progress(index as u64 + 1, pages.len() as u64);
    }
    Ok((sums.score(started)?, pages.len()))
}

/// What several texts add up to.
#[derive(Default)]
struct TextSums {
    nats: f64,
    tokens: u64,
    words: u64,
    bytes: u64,
}

impl TextSums {
    /// Adds the log-likelihood of `scored`, and the words and bytes of `counted`.
    fn add(
        &mut self,
        model: &LoadedModel,
        scored: &str,
        counted: &str,
        rolling: Rolling,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let (nats, tokens) = rolling_nats(model, scored, rolling, progress)?;
        self.nats += nats;
        self.tokens += tokens;
        self.words += counted_words(counted);
        self.bytes += counted.len() as u64;
        Ok(())
    }

    fn score(&self, started: Instant) -> Result<TextScore> {
        let TextSums {
            nats,
            tokens,
            words,
            bytes,
        } = *self;
        if tokens == 0 {
            return Err(Error::NoSequences {
                reason: "the text holds no token that could be scored".to_owned(),
            });
        }
        if !nats.is_finite() {
            return Err(Error::ScoreNotFinite {
                what: "the text".to_owned(),
            });
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(TextScore {
            perplexity: (nats / tokens as f64).exp(),
            nats,
            tokens,
            words,
            bytes,
            word_perplexity: (nats / words as f64).exp(),
            byte_perplexity: (nats / bytes as f64).exp(),
            bits_per_byte: nats / bytes as f64 / std::f64::consts::LN_2,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
        })
    }
}

/// Pieces between runs of white space, also an empty one at either end.
fn counted_words(text: &str) -> u64 {
    let mut words = 1;
    let mut inside_space = false;
    for letter in text.chars() {
        let space = is_space(letter);
        words += u64::from(space && !inside_space);
        inside_space = space;
    }
    words
}

/// Σ −ln p of a text's tokens, and how many were scored.
fn rolling_nats(
    model: &LoadedModel,
    text: &str,
    Rolling { max_len, stride }: Rolling,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(f64, u64)> {
    if stride == 0 || stride > max_len {
        return Err(Error::BadValue {
            key: "stride".to_owned(),
            value: stride.to_string(),
            message: format!("it must be at least 1 and at most the window, {max_len}"),
        });
    }
    let tokens = tokens(model, text)?;
    let vocabulary = model.network.vocab_size();
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::TokenOutOfRange {
            sequence: "the text".to_owned(),
            token,
            vocabulary,
        });
    }
    // One row of tokens ahead of which stands the first context; a window is a range of it.
    let row: Vec<u32> = prefix(model).into_iter().chain(tokens).collect();
    let windows = rolling_windows(row.len(), max_len, stride);
    let share = windows.len().div_ceil(passes_at_once(&model.network));
    let batches: Vec<&[Window]> = windows
        .chunks((TEXT_BATCH_TOKENS / max_len).clamp(1, share.max(1)))
        .collect();
    let score = |network: &Network, windows: &&[Window]| {
        let (input_ids, positions, labels) = text_batch(&row, windows);
        let hidden = hidden_rows(network, &input_ids, &Tensor::from_slice(&positions));
        let on_device = Tensor::from_slice(&labels).to_device(network.device());
        (gold_nats(network, &hidden, &on_device), labels.len() as u64)
    };
    let (mut nats, mut scored) = (vec![0.0; batches.len()], 0);
    side_by_side(&model.network, &batches, score, |batch, (found, count)| {
        nats[batch] = found;
        scored += count;
        progress(scored, row.len() as u64 - 1);
    });
    Ok((nats.iter().sum(), scored))
}

/// Input tokens `start..end` of a row; those from `first_scored` on predict a token to score.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    start: usize,
    first_scored: usize,
    end: usize,
}

/// Windows over a row of `len` tokens, of which the first is only context: together they score each
/// of the others once.
fn rolling_windows(len: usize, max_len: usize, stride: usize) -> Vec<Window> {
    let inputs = len.saturating_sub(1);
    let mut windows = Vec::new();
    let mut scored = 0;
    while scored < inputs {
        let step = if scored == 0 { max_len } else { stride };
        let end = inputs.min(scored + step);
        windows.push(Window {
            start: end.saturating_sub(max_len),
            first_scored: scored,
            end,
        });
        scored = end;
    }
    windows
}

/// Inputs padded to one length [B, T], positions to score as indices into B·T, their next tokens.
fn text_batch(row: &[u32], windows: &[Window]) -> (Tensor, Vec<i64>, Vec<i64>) {
    let lengths = windows.iter().map(|window| window.end - window.start);
    let longest = lengths.max().unwrap_or(0);
    let mut input_ids = vec![0i64; windows.len() * longest];
    let (mut positions, mut labels) = (Vec::new(), Vec::new());
    for (b, window) in windows.iter().enumerate() {
        for t in window.start..window.end {
            let place = b * longest + t - window.start;
            input_ids[place] = i64::from(row[t]);
            if t >= window.first_scored {
                positions.push(place as i64);
                labels.push(i64::from(row[t + 1]));
            }
        }
    }
    (
        Tensor::from_slice(&input_ids).view([windows.len() as i64, longest as i64]),
        positions,
        labels,
    )
}

fn gold_nats(network: &Network, hidden: &Tensor, labels: &Tensor) -> f64 {
    let head = network.head();
    tch::no_grad(|| {
        chunks(hidden.size()[0], rows_per_chunk(head.size()[0]))
            .map(|(first, rows)| {
                let labels = labels.narrow(0, first, rows);
                logits(&hidden.narrow(0, first, rows), head)
                    .cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0)
                    .double_value(&[])
            })
            .sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_a_split_at_white_space_gives() {
        for (text, words) in [("", 1), ("a", 1), ("a b", 2), ("a  b\n", 3), ("\n a", 2)] {
            assert_eq!(counted_words(text), words, "{text:?}");
        }
    }

    /// The windows of lm-evaluation-harness's own example in `get_rolling_token_windows`: ten tokens
    /// after a prefix, windows of 4, once without and once with overlap.
    #[test]
    fn windows_roll_as_the_harness_rolls_them() {
        let check = |stride: usize, expected: &[(usize, usize, usize)]| {
            let windows: Vec<_> = rolling_windows(11, 4, stride)
                .iter()
                .map(|window| (window.start, window.first_scored, window.end))
                .collect();
            assert_eq!(windows, expected, "stride {stride}");
        };
        check(4, &[(0, 0, 4), (4, 4, 8), (6, 8, 10)]);
        check(
            1,
            &[
                (0, 0, 4),
                (1, 4, 5),
                (2, 5, 6),
                (3, 6, 7),
                (4, 7, 8),
                (5, 8, 9),
                (6, 9, 10),
            ],
        );
        assert_eq!(rolling_windows(1, 4, 4), []);
        assert_eq!(rolling_windows(0, 4, 4), []);
    }
}
