//! The file that llama.cpp's `llama-perplexity --save-all-logits` writes, the base of its `--kl-divergence`.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `_logits_` |
//! | 4 | i32 `n_ctx`: tokens of a window |
//! | 4 | i32 `n_vocab`: V |
//! | 4 | i32 `n_chunk`: windows |
//! | 4 · n_chunk · n_ctx | i32 tokens |
//! | 2 · (2⌈V/2⌉ + 4) each | for each window its positions ⌊n_ctx/2⌋ … n_ctx − 2 |
//!
//! A position is a f32 scale, a f32 minimum, and V numbers q of 16 bits (one more where V is odd): ln p = scale · q +
//! minimum. Position t is about token t + 1. Before it quantised, llama.cpp raised everything more than 16 nats below the
//! largest to that floor, so there q is 0, and mean, deviation and minimum are unknown. A tokenizer that begins texts
//! with a BOS token began every window with it, in place of the recorded token.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::foreign::{Foreign, Place, Values};
use super::whole::Whole;
use super::{Reader, Setup, WindowStart};
use crate::data::{Problem, file_name};
use crate::{Error, Result};

/// What the file begins with.
pub(crate) const MAGIC: &[u8; 8] = b"_logits_";

/// Bytes before the tokens.
const HEADER: u64 = 20;

/// Positions whose logits exist at one time.
const ROWS: usize = 256;

/// Positions of a window that are looked at before they are brought to temperature 1.
const LOOKED_AT: usize = 16;

/// One file; its windows are read from front to back.
struct Windows {
    path: PathBuf,
    file: BufReader<File>,
    context: usize,
    vocab_size: usize,
    /// Tokens of all windows, the first of each as the teacher saw it.
    tokens: Vec<u32>,
    next: usize,
}

/// Reads files one after the other.
pub(crate) struct LlamaCppReader {
    windows: VecDeque<Windows>,
    vocab_size: usize,
    top_k: usize,
    temperature: f32,
    bytes: u64,
    buffer: Vec<u8>,
    values: Vec<f32>,
    note: Option<String>,
}

impl LlamaCppReader {
    pub(crate) fn open(setup: &Setup<'_>) -> Result<Self> {
        let options = setup.options;
        let mut windows = VecDeque::new();
        let mut bytes = 0;
        let mut note = None;
        for path in &options.files {
            let mut of_file = Windows::open(path, options.limit)?;
            bytes += HEADER + 4 * of_file.tokens.len() as u64;
            let start = match options.window_start {
                WindowStart::Recorded => None,
                WindowStart::Token(token) => Some(token),
                WindowStart::Auto => setup
                    .tokenizer
                    .bos
                    .filter(|bos| of_file.tokens.first() == Some(bos)),
            };
            if let Some(token) = start {
                note = Some(format!(
                    "every window begins with token {token}, as the teacher saw it"
                ));
                of_file
                    .tokens
                    .chunks_mut(of_file.context)
                    .for_each(|window| window[0] = token);
            }
            windows.push_back(of_file);
        }
        let vocab_size = windows.front().map_or(1, |windows| windows.vocab_size);
        if let Some(other) = windows.iter().find(|other| other.vocab_size != vocab_size) {
            return Err(other.place(None).error(Problem::new(
                format!(
                    "{} values a position, others {vocab_size}",
                    other.vocab_size
                ),
                "all files must come from one teacher",
            )));
        }
        Ok(Self {
            windows,
            vocab_size,
            top_k: setup.top_k.min(vocab_size),
            temperature: options.temperature as f32,
            bytes,
            buffer: Vec::new(),
            values: Vec::new(),
            note,
        })
    }
}

impl Windows {
    fn open(path: &Path, limit: Option<usize>) -> Result<Self> {
        let place = Place {
            path: path.to_owned(),
            place: String::new(),
        };
        let failed = |source| Error::DataFile {
            path: path.to_owned(),
            source,
        };
        let wrong = |problem: String| {
            place.error(Problem::new(
                problem,
                "is it what `llama-perplexity --save-all-logits` wrote?",
            ))
        };
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut header = [0; HEADER as usize];
        file.read_exact(&mut header)
            .map_err(|_| wrong("the file is shorter than its header".into()))?;
        if &header[..8] != MAGIC {
            return Err(wrong("it does not begin with `_logits_`".into()));
        }
        let field = |at: usize| {
            i32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let positive = |name: &str, value: i32| {
            u64::try_from(value)
                .ok()
                .filter(|value| *value > 0)
                .ok_or_else(|| wrong(format!("its {name} is {value}")))
        };
        let context = positive("n_ctx", field(8))?;
        let vocab_size = positive("n_vocab", field(12))?;
        let chunks = positive("n_chunk", field(16))?;
        if context < 4 {
            return Err(wrong(format!("windows of {context} tokens hold no values")));
        }
        let token_bytes = chunks.saturating_mul(4 * context);
        let window_bytes = rows(context as usize) as u64 * row_bytes(vocab_size as usize);
        let wanted = chunks.min(limit.map_or(u64::MAX, |limit| limit as u64));
        let whole = length.saturating_sub(HEADER.saturating_add(token_bytes)) / window_bytes;
        if token_bytes > length - HEADER || whole < wanted {
            return Err(place.error(Problem::new(
                format!("the file holds {whole} of its {chunks} windows"),
                if whole == 0 {
                    "let llama-perplexity run to its end".to_owned()
                } else {
                    format!("let llama-perplexity run to its end, or import what is there with --limit {whole}")
                },
            )));
        }
        let mut bytes = vec![0; token_bytes as usize];
        file.read_exact(&mut bytes).map_err(failed)?;
        let tokens: Option<Vec<u32>> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|token| u32::try_from(i32::from_le_bytes(*token)).ok())
            .collect();
        let mut tokens = tokens.ok_or_else(|| wrong("a token id is negative".into()))?;
        tokens.truncate((wanted * context) as usize);
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(1 << 20, file),
            context: context as usize,
            vocab_size: vocab_size as usize,
            tokens,
            next: 0,
        })
    }

    fn place(&self, window: Option<usize>) -> Place {
        Place {
            path: self.path.clone(),
            place: window.map_or_else(String::new, |window| format!("window {}", window + 1)),
        }
    }
}

/// Positions of a window that hold values.
fn rows(context: usize) -> usize {
    context - 1 - context / 2
}

/// Bytes of a position.
fn row_bytes(vocab_size: usize) -> u64 {
    2 * (2 * vocab_size.div_ceil(2) as u64 + 4)
}

impl Reader for LlamaCppReader {
    fn next(&mut self, values: bool) -> Result<Option<Foreign>> {
        let Some(windows) = self.windows.front_mut() else {
            return Ok(None);
        };
        let window = windows.next;
        let tokens = window * windows.context..(window + 1) * windows.context;
        let Some(token_ids) = windows.tokens.get(tokens).map(<[u32]>::to_vec) else {
            self.windows.pop_front();
            return self.next(values);
        };
        windows.next += 1;
        let (first, count) = (windows.context / 2, rows(windows.context));
        let stride = row_bytes(windows.vocab_size) as usize;
        let place = windows.place(Some(window));
        let failed = |source| Error::DataFile {
            path: place.path.clone(),
            source,
        };
        self.bytes += (count * stride) as u64;
        let mut whole = None;
        if values {
            let mut read = Ok(Whole::new(self.top_k));
            for start in (0..count).step_by(ROWS) {
                let rows = ROWS.min(count - start);
                self.buffer.resize(rows * stride, 0);
                windows.file.read_exact(&mut self.buffer).map_err(failed)?;
                self.values.clear();
                for row in self.buffer.chunks_exact(stride) {
                    dequantize(row, windows.vocab_size, &mut self.values);
                }
                let looked_at = if start == 0 { LOOKED_AT } else { 0 };
                // Behind a bad row the window is read on: the next one may be whole.
                read = read.and_then(|mut read: Whole| {
                    read.add(
                        &mut self.values,
                        windows.vocab_size,
                        self.temperature,
                        looked_at,
                    )
                    .map(|()| read)
                    .map_err(|(row, problem)| {
                        place.error(Problem::new(
                            format!("position {}: {problem}", first + start + row),
                            "the file is damaged, or the model that computed it is at fault",
                        ))
                    })
                });
            }
            whole = Some(read?);
        } else {
            let bytes = (count * stride) as i64;
            windows.file.seek_relative(bytes).map_err(failed)?;
        }
        let mut loss_mask = vec![false; windows.context];
        loss_mask[first + 1..].fill(true);
        Ok(Some(Foreign {
            source: format!("{}:{}", file_name(&windows.path), window + 1),
            place,
            token_ids,
            loss_mask,
            values: Values::Whole {
                first,
                count,
                log_mass: whole.as_ref().map_or(0.0, |whole| whole.log_mass),
                summary: whole.map(|whole| (whole.statistics, whole.top_k)),
            },
        }))
    }

    fn bytes_read(&self) -> u64 {
        self.bytes
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(self.vocab_size)
    }

    fn notes(&self) -> Vec<String> {
        self.note.iter().cloned().collect()
    }
}

/// Appends the log-probabilities \[V\] of one position.
fn dequantize(row: &[u8], vocab_size: usize, out: &mut Vec<f32>) {
    let number = |at: usize| f32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]);
    let (scale, minimum) = (number(0), number(4));
    let quantised = row[8..].as_chunks().0.iter().take(vocab_size);
    out.extend(quantised.map(|q| scale * f32::from(u16::from_le_bytes(*q)) + minimum));
}
