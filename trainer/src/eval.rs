//! Perplexity on text, and perplexity, KL and agreement against a cached teacher.

use std::time::Instant;

use caskd_formats::{Cache, Columns, RowInfo};
use caskd_models::{LoadedModel, Network};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::head::{chunks, logits, rows_per_chunk};
use crate::losses::divergence;
use crate::objective::check_fit;
use crate::reader::read_batch;
use crate::teacher_logits::{LinearCode, gold_log_probabilities};
use crate::{Error, Result};

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
    /// Words of the text, separated by white space.
    pub words: u64,
    /// Bytes of the text in UTF-8.
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

/// A model's score against a cached teacher, over the target positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheScore {
    /// The model's perplexity.
    pub perplexity: f64,
    /// The teacher's on the same targets, from the cache alone (see [`teacher_perplexity`]).
    pub teacher_perplexity: f64,
    /// Mean KL(teacher ‖ model) at T = 1 over the whole vocabulary; `None` on a sparse cache.
    pub kl: Option<f64>,
    /// Share of targets where both put the same token first.
    pub top1_agreement: f64,
    /// Target positions.
    pub targets: u64,
    /// Positions read.
    pub tokens: u64,
    /// Wall time.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
}

/// Scores a text by rolling windows, as lm-evaluation-harness defines them (0.4.13,
/// `get_rolling_token_windows`): every token is scored once. The first window holds `max_len` tokens
/// after the tokenizer's BOS (else its EOS); each later one scores `stride` further tokens with as
/// many before them as `max_len` positions can hold. `stride` = `max_len` is the harness's choice; a
/// smaller one gives every token more context, at more passes. Without BOS and EOS the first
/// token is not scored. `progress` hears (tokens done, all tokens).
///
/// # Errors
/// A text without a token to score, a `stride` that is 0 or above `max_len`.
pub fn evaluate_text(
    model: &LoadedModel,
    text: &str,
    max_len: usize,
    stride: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<TextScore> {
    if stride == 0 || stride > max_len {
        return Err(Error::BadValue {
            key: "stride".to_owned(),
            value: stride.to_string(),
            message: format!("it must be at least 1 and at most the window, {max_len}"),
        });
    }
    let started = Instant::now();
    let encoding = model
        .tokenizer
        .encode(text, false)
        .map_err(|error| Error::Tokenizer {
            message: error.to_string(),
        })?;
    let tokens = encoding.get_ids();
    let vocabulary = model.network.vocab_size();
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::TokenOutOfRange {
            sequence: "the text".to_owned(),
            token,
            vocabulary,
        });
    }
    // One row of tokens ahead of which stands the first context; a window is a range of it.
    let prefix = model.bos.or(model.eos);
    let row: Vec<u32> = prefix.into_iter().chain(tokens.iter().copied()).collect();
    let windows = rolling_windows(row.len(), max_len, stride);
    let (mut nats, mut scored) = (0.0, 0u64);
    for windows in windows.chunks((TEXT_BATCH_TOKENS / max_len).max(1)) {
        let (input_ids, positions, labels) = text_batch(&row, windows);
        let device = model.network.device();
        let hidden = hidden_rows(&model.network, &input_ids, &Tensor::from_slice(&positions));
        nats += gold_nats(
            &model.network,
            &hidden,
            &Tensor::from_slice(&labels).to_device(device),
        );
        scored += labels.len() as u64;
        progress(scored, row.len() as u64 - 1);
    }
    if scored == 0 {
        return Err(Error::NoSequences {
            reason: "the text holds no token that could be scored".to_owned(),
        });
    }
    let (words, bytes) = (text.split_whitespace().count() as u64, text.len() as u64);
    let seconds = started.elapsed().as_secs_f64();
    Ok(TextScore {
        perplexity: (nats / scored as f64).exp(),
        nats,
        tokens: scored,
        words,
        bytes,
        word_perplexity: (nats / words as f64).exp(),
        byte_perplexity: (nats / bytes as f64).exp(),
        bits_per_byte: nats / bytes as f64 / std::f64::consts::LN_2,
        seconds,
        tokens_per_second: scored as f64 / seconds,
    })
}

/// Scores a model on the target positions of a cache: all its sequences, or `rows` of them, in
/// batches of at most `batch_tokens` padded tokens. `progress` hears (tokens done, all tokens).
///
/// # Errors
/// A model that does not fit the cache, unreadable files, no target at all.
pub fn evaluate_cache(
    model: &LoadedModel,
    cache: &Cache,
    rows: Option<&[RowInfo]>,
    batch_tokens: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CacheScore> {
    check_fit(model, cache)?;
    let started = Instant::now();
    let vocabulary = model.network.vocab_size().min(cache.manifest().vocab_size);
    let device = model.network.device();
    let code = LinearCode::of(cache, vocabulary, model.network.kind(), device)?;
    let columns = columns_of(cache);
    let head = model.network.head().narrow(0, 0, vocabulary as i64);
    let batches = length_batches(cache, rows, batch_tokens)?;
    let total_tokens = tokens_in(batches.iter().flatten());
    let mut sums = Sums::default();
    for rows in &batches {
        let batch = read_batch(cache, rows, &columns, vocabulary)?.to_device(device);
        sums.teacher_nats += teacher_nats(&batch, code.as_ref(), vocabulary)?;
        let hidden = hidden_rows(&model.network, &batch.input_ids, &batch.targets);
        tch::no_grad(|| sums.add(&hidden, &batch, &head, code.as_ref()));
        sums.tokens += batch.num_positions() as u64;
        progress(sums.tokens, total_tokens);
    }
    let seconds = started.elapsed().as_secs_f64();
    let mean = |sum: f64| sum / sums.targets as f64;
    Ok(CacheScore {
        perplexity: mean(sums.nats).exp(),
        teacher_perplexity: mean(sums.teacher_nats).exp(),
        kl: code.is_some().then(|| mean(sums.kl)),
        top1_agreement: mean(sums.agreements),
        targets: sums.targets,
        tokens: sums.tokens,
        seconds,
        tokens_per_second: sums.tokens as f64 / seconds,
    })
}

/// The teacher's perplexity on the targets of a cache, without any model: the gold token's logit
/// (cached where it is among the top K, else rebuilt from the last hidden state) less the cached
/// log-sum-exp. On a sparse cache a gold token outside the top K gets an equal share of the mass
/// that the top K leave.
pub fn teacher_perplexity(cache: &Cache) -> Result<f64> {
    const BATCH_TOKENS: usize = 8192;
    let vocabulary = cache.manifest().vocab_size;
    let code = LinearCode::of(cache, vocabulary, Kind::Float, Device::Cpu)?;
    let columns = columns_of(cache);
    let (mut nats, mut targets) = (0.0, 0);
    for rows in length_batches(cache, None, BATCH_TOKENS)? {
        let batch = read_batch(cache, &rows, &columns, vocabulary)?;
        nats += teacher_nats(&batch, code.as_ref(), vocabulary)?;
        targets += batch.num_targets();
    }
    Ok((nats / targets as f64).exp())
}

#[derive(Default)]
struct Sums {
    nats: f64,
    teacher_nats: f64,
    kl: f64,
    agreements: f64,
    targets: u64,
    tokens: u64,
}

impl Sums {
    /// Adds what follows from the logits of a batch's target positions, chunk by chunk.
    fn add(&mut self, hidden: &Tensor, batch: &Batch, head: &Tensor, code: Option<&LinearCode>) {
        let of_teacher = code.map(|code| (code, code.rows(batch)));
        for (first, rows) in chunks(hidden.size()[0], rows_per_chunk(head.size()[0])) {
            let student = logits(&hidden.narrow(0, first, rows), head);
            let labels = batch.labels.narrow(0, first, rows);
            self.nats += student
                .cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0)
                .double_value(&[]);
            let teacher = of_teacher
                .as_ref()
                .map(|(code, all)| code.logits_at_one(&all.narrow(first, rows)));
            let teacher_first = match (&batch.top_k, &teacher) {
                (Some(top_k), _) => top_k.ids.narrow(0, first, rows).select(1, 0),
                (None, Some(teacher)) => teacher.argmax(-1, false),
                (None, None) => continue, // A cache holds at least one of the two.
            };
            let agree = student.argmax(-1, false).eq_tensor(&teacher_first);
            self.agreements += agree.sum(Kind::Double).double_value(&[]);
            if let Some(teacher) = &teacher {
                let kl = divergence(teacher, &student);
                self.kl += kl.sum(Kind::Double).double_value(&[]);
            }
        }
        self.targets += batch.num_targets() as u64;
    }
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

/// Last hidden states [N, D] at positions given as indices into B·T.
fn hidden_rows(network: &Network, input_ids: &Tensor, positions: &Tensor) -> Tensor {
    let device = network.device();
    tch::no_grad(|| {
        let hidden = network
            .forward(&input_ids.to_device(device), &[], false)
            .last_hidden;
        let width = *hidden.size().last().unwrap_or(&0);
        hidden
            .view([-1, width])
            .index_select(0, &positions.to_device(device))
    })
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

fn teacher_nats(batch: &Batch, code: Option<&LinearCode>, vocabulary: usize) -> Result<f64> {
    let log_p = gold_log_probabilities(batch, code, vocabulary);
    let missing = || Error::NoSequences {
        reason: "the cache holds neither top-k logits nor a last hidden state".to_owned(),
    };
    Ok(-log_p
        .ok_or_else(missing)?
        .sum(Kind::Double)
        .double_value(&[]))
}

fn columns_of(cache: &Cache) -> Columns {
    let manifest = cache.manifest();
    Columns {
        statistics: true,
        top_k: manifest.top_k > 0,
        ..Columns::for_logits(manifest).unwrap_or_default()
    }
}

/// Rows that have a target, by length, cut into batches of at most `batch_tokens` padded tokens.
fn length_batches(
    cache: &Cache,
    rows: Option<&[RowInfo]>,
    batch_tokens: usize,
) -> Result<Vec<Vec<RowInfo>>> {
    let mut rows: Vec<RowInfo> = rows.map_or_else(|| cache.rows(), |rows| Ok(rows.to_vec()))?;
    rows.retain(|row| row.targets > 0);
    if rows.is_empty() {
        return Err(Error::NoSequences {
            reason: "none of the cache's has a target".to_owned(),
        });
    }
    rows.sort_by_key(|row| row.positions);
    let mut batches: Vec<Vec<RowInfo>> = Vec::new();
    for row in rows {
        match batches.last_mut() {
            // Ascending lengths: the newest row is the one the batch is padded to.
            Some(batch) if (batch.len() + 1) * row.positions as usize <= batch_tokens => {
                batch.push(row);
            }
            _ => batches.push(vec![row]),
        }
    }
    Ok(batches)
}

fn tokens_in<'a>(rows: impl Iterator<Item = &'a RowInfo>) -> u64 {
    rows.map(|row| u64::from(row.positions)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

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
