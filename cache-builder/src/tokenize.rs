//! Records to token sequences with their loss masks.

use std::path::PathBuf;

use caskd_formats::{DataFile, DataInfo};
use caskd_models::ModelFiles;

use crate::records::{Record, RecordBody, read_records};
use crate::{Error, Result};

/// The prompt form that instruction records get; named in the manifest.
pub const PROMPT_FORM: &str = "alpaca-v1";

/// A sequence ready for the teacher. T ≥ 1 tokens; at least one target beyond the first token.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TokenizedSequence {
    /// Where it comes from: `train.jsonl:17`, or `book.txt:3` for the third window of a text.
    pub source: String,
    /// Token ids, `[T]`.
    pub token_ids: Vec<u32>,
    /// Targets, `[T]`: true where the loss asks for this token (position t−1 predicts it).
    pub loss_mask: Vec<bool>,
}

/// All sequences of a build in data order, with the account of where they come from.
#[derive(Debug, Clone)]
pub struct TokenizedData {
    /// The sequences.
    pub sequences: Vec<TokenizedSequence>,
    /// Files, digests and counts for the manifest.
    pub info: DataInfo,
}

/// The prompt of an instruction record, as Stanford Alpaca words it; the response follows directly.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

/// Reads and tokenizes all data files.
///
/// Instruction records become prompt + output + end-of-sequence token, with the loss on what
/// follows the prompt. Texts are cut into windows of `max_len` tokens, every token a target.
/// Longer records are cut at `max_len` and counted; those that lose all their targets are dropped
/// and counted.
pub fn tokenize(teacher: &ModelFiles, files: &[PathBuf], max_len: usize) -> Result<TokenizedData> {
    let vocab_size = teacher.config().vocab_size();
    let mut sequences = Vec::new();
    let mut data_files: Vec<DataFile> = Vec::new();
    let (mut truncated, mut skipped, mut records_read) = (0, 0, 0);
    for path in files {
        let (records, file) = read_records(path)?;
        data_files.push(file);
        records_read += records.len();
        for record in records {
            if let RecordBody::Tokens { input_ids, .. } = &record.body
                && let Some(id) = input_ids.iter().find(|&&id| id as usize >= vocab_size)
            {
                return Err(Error::Record {
                    path: path.clone(),
                    line: record.line,
                    problem: format!(
                        "token id {id} is beyond the teacher's vocabulary of {vocab_size}"
                    ),
                    hint: "were the ids made with another tokenizer?".into(),
                });
            }
            for mut sequence in encode(teacher, record, max_len)? {
                if sequence.token_ids.len() > max_len {
                    sequence.token_ids.truncate(max_len);
                    sequence.loss_mask.truncate(max_len);
                    truncated += 1;
                }
                if sequence.loss_mask.iter().skip(1).any(|&target| target) {
                    sequences.push(sequence);
                } else {
                    skipped += 1;
                }
            }
        }
    }
    if sequences.is_empty() {
        return Err(Error::EmptyData {
            records: records_read,
            skipped,
            max_len,
        });
    }
    let info = account(&sequences, data_files, truncated, skipped);
    Ok(TokenizedData { sequences, info })
}

fn account(
    sequences: &[TokenizedSequence],
    files: Vec<DataFile>,
    truncated: u64,
    skipped: u64,
) -> DataInfo {
    let mut digest = blake3::Hasher::new();
    for sequence in sequences {
        digest.update(&(sequence.token_ids.len() as u64).to_le_bytes());
        for (id, &target) in sequence.token_ids.iter().zip(&sequence.loss_mask) {
            digest.update(&id.to_le_bytes());
            digest.update(&[u8::from(target)]);
        }
    }
    DataInfo {
        digest: digest.finalize().to_hex().to_string(),
        files,
        sequences: sequences.len() as u64,
        positions: sequences
            .iter()
            .map(|sequence| sequence.token_ids.len() as u64)
            .sum(),
        targets: sequences
            .iter()
            .map(|sequence| {
                sequence
                    .loss_mask
                    .iter()
                    .skip(1)
                    .filter(|&&target| target)
                    .count() as u64
            })
            .sum(),
        truncated,
        skipped,
        prompt_form: PROMPT_FORM.into(),
    }
}

/// One record gives one sequence, a text gives its windows.
fn encode(teacher: &ModelFiles, record: Record, max_len: usize) -> Result<Vec<TokenizedSequence>> {
    let Record { source, body, .. } = record;
    Ok(match body {
        RecordBody::Tokens {
            input_ids,
            loss_mask,
        } => vec![TokenizedSequence {
            source,
            token_ids: input_ids,
            loss_mask,
        }],
        RecordBody::Instruction {
            instruction,
            input,
            output,
        } => {
            let prompt = alpaca_prompt(&instruction, &input);
            let (mut token_ids, starts) =
                encode_text(teacher, &source, &format!("{prompt}{output}"))?;
            // A token belongs to the response when it begins there; BOS begins at 0.
            let mut loss_mask: Vec<bool> =
                starts.iter().map(|&start| start >= prompt.len()).collect();
            if let Some(eos) = teacher.tokenizer.eos {
                token_ids.push(eos);
                loss_mask.push(true);
            }
            vec![TokenizedSequence {
                source,
                token_ids,
                loss_mask,
            }]
        }
        RecordBody::Text(text) => {
            let (token_ids, _) = encode_text(teacher, &source, &text)?;
            token_ids
                .chunks(max_len)
                .enumerate()
                .map(|(window, ids)| TokenizedSequence {
                    source: format!("{source}:{}", window + 1),
                    token_ids: ids.to_vec(),
                    loss_mask: vec![true; ids.len()],
                })
                .collect()
        }
    })
}

/// Token ids and the byte where each token begins.
fn encode_text(teacher: &ModelFiles, source: &str, text: &str) -> Result<(Vec<u32>, Vec<usize>)> {
    let encoding = teacher
        .tokenizer
        .tokenizer
        .encode(text, true)
        .map_err(|error| Error::Tokenizer {
            source_name: source.into(),
            message: error.to_string(),
        })?;
    Ok((
        encoding.get_ids().to_vec(),
        encoding
            .get_offsets()
            .iter()
            .map(|offsets| offsets.0)
            .collect(),
    ))
}
