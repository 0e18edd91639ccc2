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

        // Where the teacher's predicted tokens begin, with the position that predicts them.
        let mut predicted: Vec<(usize, usize)> = Vec::new();
        for (t, start) in of_teacher.iter().enumerate().skip(1) {
            let last = t + 1 == of_teacher.len();
            let start = start.or_else(|| (ended && last).then_some(text.len()));
            if sequence.loss_mask[t]
                && let Some(start) = start
            {
                predicted.push((start, t - 1));
            }
        }
        let from = predicted.first().map_or(usize::MAX, |(start, _)| *start);
        let tokens = of_student.ids.len();
        let mut loss_mask = vec![false; tokens];
        let mut rows = vec![0; tokens];
        let mut paired = vec![false; tokens];
        for t in 1..tokens {
            let Some(start) = of_student.starts[t] else {
                continue;
            };
            loss_mask[t] = start >= from;
            // Several tokens can begin at one byte, where a letter's bytes are split: the first one speaks for it.
            let place = predicted.partition_point(|(of, _)| *of < start);
            let first_there = of_student.starts[..t].iter().all(|of| *of != Some(start));
            if let Some((_, row)) = predicted.get(place).filter(|(of, _)| *of == start)
                && first_there
            {
                rows[t - 1] = *row;
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
        let special = |id: u32| {
            let token = tokenizer.get_added_tokens_decoder();
            token.get(&id).is_some_and(|token| token.special)
        };
        let text = decode(ids)?;
        let plain: Vec<u32> = ids.iter().copied().filter(|id| !special(*id)).collect();
        let encoding = tokenizer.encode(text.as_str(), false).map_err(refuse)?;
        let starts: Vec<usize> = if encoding.get_ids() == plain.as_slice() {
            encoding.get_offsets().iter().map(|of| of.0).collect()
        } else {
            // The tokens are not what the tokenizer makes of their text: ask for every beginning of it.
            (0..plain.len())
                .map(|count| Ok(decode(&plain[..count])?.trim_end_matches('\u{fffd}').len()))
                .collect::<Result<_>>()?
        };
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
            .map(|(of, special)| (*special == 0).then_some(of.0))
            .collect();
        Ok(Spans {
            ids: encoding.get_ids().to_vec(),
            starts,
        })
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
