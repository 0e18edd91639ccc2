//! A cached sequence in the tokens of a student with another tokenizer, for losses that compare distributions without
//! matching tokens (`uld`).
//!
//! The teacher's tokens are decoded and encoded again by the student's tokenizer. Two positions are *paired* when the
//! tokens that they predict begin at the same byte of the text; there the teacher's row stands beside the student's.
//! The ULD paper pairs by order and cuts the longer side off; where tokenizers differ that compares different places of
//! the text after the first difference, and pairing by place does not.

use caskd_formats::{Coefficients, HiddenState, Sequence, Statistics, TopK};
use caskd_models::{LoadedModel, LoadedTokenizer};

use crate::{Error, Result};

/// Both tokenizers.
#[derive(Debug)]
pub(crate) struct Retokenizer {
    teacher: LoadedTokenizer,
    student: LoadedTokenizer,
}

/// A sequence in the student's tokens.
#[derive(Debug, PartialEq)]
pub(crate) struct Retokenized {
    /// The teacher's columns are those of the paired positions, and anything elsewhere.
    pub(crate) sequence: Sequence,
    /// Whether a position has a row of the teacher's \[T\].
    pub(crate) paired: Vec<bool>,
}

/// Tokens over a text.
struct Spans {
    ids: Vec<u32>,
    /// Byte at which each token begins; `None` for special tokens, which stand for no text.
    starts: Vec<Option<usize>>,
}

impl Retokenizer {
    /// From the teacher's tokenizer to that of `student`.
    pub(crate) fn new(teacher: LoadedTokenizer, student: &LoadedModel) -> Retokenizer {
        Retokenizer {
            teacher,
            student: LoadedTokenizer {
                tokenizer: student.tokenizer.clone(),
                fingerprint: student.fingerprint.clone(),
                bos: student.bos,
                eos: student.eos,
                tokenizer_config: student.tokenizer_config.clone(),
            },
        }
    }

    /// A token of the student's is a target when it begins in the text of the teacher's targets, the end of the
    /// sequence included. At most as many tokens are kept as `max_tokens`.
    pub(crate) fn retokenize(&self, sequence: &Sequence, max_tokens: usize) -> Result<Retokenized> {
        let (text, of_teacher) = self.teacher_spans(&sequence.token_ids)?;
        let mut of_student = self.student_spans(&text)?;
        let ended = self.teacher.eos.is_some()
            && sequence.token_ids.len() > 1
            && sequence.token_ids.last().copied() == self.teacher.eos;
        if let Some(eos) = self.student.eos.filter(|_| ended) {
            of_student.ids.push(eos);
            of_student.starts.push(Some(text.len()));
        }
        of_student.ids.truncate(max_tokens);
        of_student.starts.truncate(max_tokens);

        // Where the teacher's tokens begin, with their places.
        let mut begun: Vec<(usize, usize)> = Vec::new();
        for (t, start) in of_teacher.iter().enumerate() {
            let last = t + 1 == of_teacher.len();
            let start = start.or_else(|| (ended && last).then_some(text.len()));
            begun.extend(start.map(|start| (start, t)));
        }
        let tokens = of_student.ids.len();
        let mut loss_mask = vec![false; tokens];
        let mut rows = vec![0; tokens];
        let mut paired = vec![false; tokens];
        for (t, start) in of_student.starts.iter().enumerate().skip(1) {
            let Some(start) = *start else {
                continue;
            };
            // The teacher's token that this one begins in says whether it is a target.
            let after = begun.partition_point(|(of, _)| *of <= start);
            let Some((_, within)) = after.checked_sub(1).map(|place| begun[place]) else {
                continue;
            };
            loss_mask[t] = sequence.loss_mask[within];
            // Several tokens can begin at one byte, where a letter's bytes are split: the first one speaks for it.
            let place = begun.partition_point(|(of, _)| *of < start);
            let first_there = of_student.starts[..t].iter().all(|of| *of != Some(start));
            if let Some((_, of_teacher)) = begun.get(place).filter(|(of, _)| *of == start)
                && *of_teacher > 0
                && sequence.loss_mask[*of_teacher]
                && first_there
            {
                rows[t - 1] = of_teacher - 1;
                paired[t - 1] = true;
            }
        }
        Ok(Retokenized {
            sequence: gathered(sequence, of_student.ids, loss_mask, &rows),
            paired,
        })
    }

    /// The text of the teacher's tokens without the special ones, and where each token begins in it.
    fn teacher_spans(&self, ids: &[u32]) -> Result<(String, Vec<Option<usize>>)> {
        let tokenizer = &self.teacher.tokenizer;
        let decode = |ids: &[u32]| tokenizer.decode(ids, true).map_err(refuse);
        let added = tokenizer.get_added_tokens_decoder();
        let special = |id: u32| added.get(&id).is_some_and(|token| token.special);
        let text = decode(ids)?;
        let plain: Vec<u32> = ids.iter().copied().filter(|id| !special(*id)).collect();
        let encoding = tokenizer.encode(text.as_str(), false).map_err(refuse)?;
        let spans: Vec<(usize, usize)> = if encoding.get_ids() == plain.as_slice() {
            encoding.get_offsets().to_vec()
        } else {
            // The tokens are not what the tokenizer makes of their text: ask for every beginning of it.
            let ends: Vec<usize> = (0..=plain.len())
                .map(|count| Ok(decode(&plain[..count])?.trim_end_matches('\u{fffd}').len()))
                .collect::<Result<_>>()?;
            ends.windows(2).map(|pair| (pair[0], pair[1])).collect()
        };
        let starts: Vec<usize> = spans.iter().map(|span| beginning(&text, *span)).collect();
        let mut starts = starts.into_iter();
        let all = ids
            .iter()
            .map(|id| if special(*id) { None } else { starts.next() })
            .collect();
        Ok((text, all))
    }

    fn student_spans(&self, text: &str) -> Result<Spans> {
        let encoding = self.student.tokenizer.encode(text, true).map_err(refuse)?;
        let starts = encoding
            .get_offsets()
            .iter()
            .zip(encoding.get_special_tokens_mask())
            .map(|(of, special)| (*special == 0).then(|| beginning(text, *of)))
            .collect();
        Ok(Spans {
            ids: encoding.get_ids().to_vec(),
            starts,
        })
    }
}

/// Where a token's own text begins: some tokenizers count the space before a word to it and some do not.
fn beginning(text: &str, (start, end): (usize, usize)) -> usize {
    match text.get(start..end).map(str::trim_start) {
        Some(own) if !own.is_empty() => end - own.len(),
        _ => start,
    }
}

fn refuse(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer {
        message: error.to_string(),
    }
}

/// The sequence with other tokens, and the teacher's row `rows[t]` at position t.
fn gathered(
    sequence: &Sequence,
    token_ids: Vec<u32>,
    loss_mask: Vec<bool>,
    rows: &[usize],
) -> Sequence {
    let pick = |values: &[f32], width: usize| -> Vec<f32> {
        rows.iter()
            .flat_map(|row| &values[row * width..(row + 1) * width])
            .copied()
            .collect()
    };
    Sequence {
        source: sequence.source.clone(),
        token_ids,
        loss_mask,
        statistics: sequence.statistics.as_ref().map(|of| Statistics {
            mean: pick(&of.mean, 1),
            std: pick(&of.std, 1),
            min: pick(&of.min, 1),
            max: pick(&of.max, 1),
            log_sum_exp: pick(&of.log_sum_exp, 1),
        }),
        top_k: sequence.top_k.as_ref().map(|of| TopK {
            k: of.k,
            ids: rows
                .iter()
                .flat_map(|row| &of.ids[row * of.k..(row + 1) * of.k])
                .copied()
                .collect(),
            logits: pick(&of.logits, of.k),
        }),
        hidden: sequence
            .hidden
            .iter()
            .map(|of| HiddenState {
                layer: of.layer,
                width: of.width,
                values: pick(&of.values, of.width),
            })
            .collect(),
        coefficients: sequence.coefficients.as_ref().map(|of| Coefficients {
            rank: of.rank,
            levels: rows
                .iter()
                .flat_map(|row| &of.levels[row * of.rank..(row + 1) * of.rank])
                .copied()
                .collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(words: &[&str], split: &serde_json::Value) -> LoadedTokenizer {
        let vocabulary: serde_json::Map<String, serde_json::Value> = words
            .iter()
            .enumerate()
            .map(|(id, word)| ((*word).to_owned(), id.into()))
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": split, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}
        });
        let tokenizer: tokenizers::Tokenizer = json.to_string().parse().unwrap();
        LoadedTokenizer {
            fingerprint: String::new(),
            tokenizer,
            bos: None,
            eos: None,
            tokenizer_config: serde_json::json!({}),
        }
    }

    fn sequence(token_ids: &[u32], targets_from: usize) -> Sequence {
        let positions = token_ids.len();
        Sequence {
            source: "x:1".to_owned(),
            token_ids: token_ids.to_vec(),
            loss_mask: (0..positions).map(|t| t >= targets_from).collect(),
            hidden: vec![HiddenState {
                layer: 1,
                width: 1,
                values: (0..positions).map(|t| t as f32).collect(),
            }],
            ..Sequence::default()
        }
    }

    /// Words against letters and single digits: predictions are paired where both begin a token at the same place.
    #[test]
    fn positions_meet_where_tokens_begin() {
        let spaces = serde_json::json!({"type": "WhitespaceSplit"});
        let pieces = serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, {"type": "Digits", "individual_digits": true}]});
        let retokenizer = Retokenizer {
            teacher: LoadedTokenizer {
                eos: Some(4),
                ..tokenizer(&["?", "w1", "w23", "w4", "end"], &spaces)
            },
            student: LoadedTokenizer {
                eos: Some(6),
                ..tokenizer(&["?", "w", "1", "2", "3", "4", "stop"], &pieces)
            },
        };
        // w1 w23 w4, all but the first a target.
        let crossed = retokenizer
            .retokenize(&sequence(&[1, 2, 3], 1), 99)
            .unwrap();
        assert_eq!(crossed.sequence.token_ids, [1, 2, 1, 3, 4, 1, 5]);
        let (yes, no) = (true, false);
        assert_eq!(
            crossed.sequence.loss_mask,
            [no, no, yes, yes, yes, yes, yes]
        );
        // The positions before "w" of w23 and of w4 predict what the teacher's positions 0 and 1 predict.
        assert_eq!(crossed.paired, [no, yes, no, no, yes, no, no]);
        let rows = &crossed.sequence.hidden[0].values;
        assert_eq!((rows[1], rows[4]), (0.0, 1.0));
        assert_eq!(rows.len(), 7);

        let mut gap = sequence(&[1, 2, 3], 1);
        gap.loss_mask[2] = false;
        let crossed = retokenizer.retokenize(&gap, 99).unwrap();
        assert_eq!(crossed.sequence.loss_mask, [no, no, yes, yes, yes, no, no]);
        assert_eq!(crossed.paired, [no, yes, no, no, no, no, no]);

        let short = retokenizer.retokenize(&sequence(&[1, 2, 3], 1), 4).unwrap();
        assert_eq!(short.sequence.token_ids, [1, 2, 1, 3]);
        assert_eq!(short.paired, [no, yes, no, no]);
    }
}
