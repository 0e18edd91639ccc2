//! Data files to token sequences with their loss masks.

mod chat;
mod encode;
mod file;
mod jinja;
mod options;
mod pack;
mod record;
mod stream;
mod templates;
mod text;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::{DataFile, DataInfo, Preparation, TokenDigest, token_digest};
use caskd_models::ModelFiles;
use rayon::prelude::*;

pub use encode::alpaca_prompt;
pub use options::{DataOptions, OnError, PromptForm, USUAL_CHAT_DATE};

pub(crate) use encode::Encoder;
pub(crate) use file::BYTE_ORDER_MARK;
pub(crate) use record::{Problem, RecordBody, message_fields, not_json};
pub(crate) use stream::{READ_BYTES, Stream, file_name};

use encode::EncodedRecord;
use file::{FileKind, RawBody, RawRecord, Records, TextBlocks};
use record::{parse_json, parse_record, response_mark};
use text::TextEncoder;

use crate::{Error, Result};

/// A sequence ready for the teacher. T ≥ 1 tokens; at least one target beyond the first token.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TokenizedSequence {
    /// Where it comes from: `train.jsonl:17`, `book.txt:3` for the third window of a text, `a.jsonl:1+a.jsonl:9` for
    /// packed records.
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
    /// The first [`NAMED_BAD_RECORDS`] bad records.
    pub bad_records: Vec<BadRecord>,
}

/// Bad records that are kept by name; the others are counted only.
pub const NAMED_BAD_RECORDS: usize = 100;

/// A record that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BadRecord {
    /// The data file.
    pub file: PathBuf,
    /// `line`, `row` or `record`.
    pub unit: &'static str,
    /// 1-based.
    pub number: u64,
    /// What is wrong with it.
    pub problem: String,
}

/// What happens while data are read.
#[derive(Debug, Clone, Copy)]
pub enum DataEvent<'a> {
    /// So far.
    Progress {
        /// Bytes of the data files that have been read.
        bytes: u64,
        /// All of them.
        total: u64,
        /// Tokens made a second.
        tokens_per_second: f64,
    },
    /// A record is passed over.
    BadRecord(&'a BadRecord),
}

/// Text that is encoded at a time, in bytes of JSON.
const BATCH_BYTES: usize = 4 << 20;

/// Records that are encoded at a time.
const BATCH_RECORDS: usize = 4096;

/// Reads and tokenizes all data files; `None` when stopped.
///
/// Files are streams: beside the finished sequences only a few megabytes of text are in memory. Records are encoded on
/// all cores, and their order is that of the files. Sequences that lose all their targets at `max_len` are dropped and
/// counted, as are those whose token digest has come before. With a limit nothing is read behind the last sequence, but
/// for the digest of its file.
///
/// # Errors
/// A file that can't be read, a bad record (unless those are skipped), data without a sequence to learn from.
pub fn tokenize(
    teacher: &ModelFiles,
    files: &[PathBuf],
    max_len: usize,
    options: &DataOptions,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(DataEvent<'_>),
) -> Result<Option<TokenizedData>> {
    let encoder = Encoder::new(
        &teacher.tokenizer,
        teacher.config().vocab_size(),
        max_len,
        options,
    )?;
    let mut total = 0;
    for path in files {
        FileKind::of(path)?;
        let data = std::fs::metadata(path).map_err(|source| Error::DataFile {
            path: path.clone(),
            source,
        })?;
        total += data.len();
    }
    let mut reading = Reading {
        encoder: &encoder,
        options,
        max_len,
        stop,
        watch,
        started: Instant::now(),
        bytes_before: 0,
        total,
        seen: HashSet::new(),
        tokens: 0,
        sequences: Vec::new(),
        bad_records: Vec::new(),
        info: DataInfo::default(),
    };
    for path in files {
        if reading.is_full() {
            break;
        }
        let kind = FileKind::of(path)?;
        let read = match kind {
            FileKind::Text => reading.read_text(path)?,
            _ => reading.read_records(path, kind)?,
        };
        let Some(identity) = read else {
            return Ok(None);
        };
        reading.bytes_before += identity.bytes;
        reading.info.files.push(identity);
    }
    reading.finish().map(Some)
}

/// The state of one [`tokenize`].
struct Reading<'a> {
    encoder: &'a Encoder<'a>,
    options: &'a DataOptions,
    max_len: usize,
    stop: &'a AtomicBool,
    watch: &'a mut dyn FnMut(DataEvent<'_>),
    started: Instant,
    /// Bytes of the files that are done, and of all.
    bytes_before: u64,
    total: u64,
    seen: HashSet<TokenDigest>,
    tokens: u64,
    sequences: Vec<TokenizedSequence>,
    bad_records: Vec<BadRecord>,
    /// What is counted on the way.
    info: DataInfo,
}

impl Reading<'_> {
    fn counts(&mut self) -> &mut Preparation {
        &mut self.info.preparation
    }

    /// Whether to go on.
    fn progress(&mut self, bytes_of_file: u64) -> bool {
        (self.watch)(DataEvent::Progress {
            bytes: self.bytes_before + bytes_of_file,
            total: self.total,
            tokens_per_second: self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9),
        });
        !self.stop.load(Ordering::Relaxed)
    }

    /// A whole text, cut into windows. `None` when stopped.
    fn read_text(&mut self, path: &Path) -> Result<Option<DataFile>> {
        let name = file_name(path);
        let refused = |message| Error::Tokenizer {
            source_name: name.clone(),
            message,
        };
        let (before, after) = self.encoder.surroundings().map_err(refused)?;
        let mut blocks = TextBlocks::open(path)?;
        let mut text = TextEncoder::new(self.encoder.tokenizer);
        let mut waiting = before;
        let mut window = 0;
        self.counts().records += 1;
        while !self.is_full()
            && let Some(block) = blocks.next_block(text.block())?
        {
            waiting.append(&mut text.push(block).map_err(refused)?);
            self.take_windows(&name, &mut waiting, &mut window, false);
            if !self.progress(blocks.bytes_done()) {
                return Ok(None);
            }
        }
        waiting.append(&mut text.finish().map_err(refused)?);
        waiting.extend(after);
        self.take_windows(&name, &mut waiting, &mut window, true);
        self.progress(blocks.bytes_done());
        Ok(Some(blocks.identity()?))
    }

    /// Whether there are as many sequences as were asked for.
    fn is_full(&self) -> bool {
        let limit = self.options.limit;
        limit.is_some_and(|limit| self.sequences.len() >= limit)
    }

    /// Takes whole windows off the front of `tokens`, or with `all` every token.
    fn take_windows(&mut self, name: &str, tokens: &mut Vec<u32>, window: &mut u64, all: bool) {
        let whole = if all {
            tokens.len()
        } else {
            tokens.len() / self.max_len * self.max_len
        };
        let rest = tokens.split_off(whole);
        for ids in tokens.chunks(self.max_len) {
            *window += 1;
            self.take(TokenizedSequence {
                source: format!("{name}:{window}"),
                token_ids: ids.to_vec(),
                loss_mask: vec![true; ids.len()],
            });
        }
        *tokens = rest;
    }

    /// The records of a file. `None` when stopped.
    fn read_records(&mut self, path: &Path, kind: FileKind) -> Result<Option<DataFile>> {
        let mut records = Records::open(path, kind, self.options)?;
        let name = file_name(path);
        loop {
            let mut batch = Vec::new();
            let mut bytes = 0;
            while bytes < BATCH_BYTES && batch.len() < BATCH_RECORDS {
                let Some(record) = records.next_record()? else {
                    break;
                };
                bytes += record.body.bytes();
                batch.push(record);
            }
            if batch.is_empty() {
                return Ok(Some(records.identity()?));
            }
            let (encoder, options) = (self.encoder, self.options);
            let encoded: Vec<(u64, std::result::Result<EncodedRecord, Problem>)> = batch
                .into_par_iter()
                .map(|record| (record.number, encode(encoder, options, &name, record)))
                .collect();
            for (number, encoded) in encoded {
                if self.is_full() {
                    return Ok(Some(records.identity()?));
                }
                self.counts().records += 1;
                match encoded {
                    Ok(record) => self.take_record(record),
                    Err(problem) => self.refuse(path, records.unit(), number, problem)?,
                }
            }
            if !self.progress(records.bytes_done()) {
                return Ok(None);
            }
        }
    }

    /// A bad record stops the build, or is named and counted.
    fn refuse(
        &mut self,
        path: &Path,
        unit: &'static str,
        number: u64,
        problem: Problem,
    ) -> Result<()> {
        if self.options.on_error == OnError::Stop {
            return Err(Error::Record {
                path: path.into(),
                unit,
                number,
                problem: problem.message,
                hint: format!(
                    "{}; to pass over bad records: --on-error skip",
                    problem.hint
                ),
            });
        }
        let bad = BadRecord {
            file: path.into(),
            unit,
            number,
            problem: problem.message,
        };
        (self.watch)(DataEvent::BadRecord(&bad));
        self.counts().bad_records += 1;
        if self.bad_records.len() < NAMED_BAD_RECORDS {
            self.bad_records.push(bad);
        }
        Ok(())
    }

    fn take_record(&mut self, record: EncodedRecord) {
        if record.cut_tokens > 0 {
            self.info.truncated += 1;
            self.counts().truncated_tokens += record.cut_tokens;
        }
        for sequence in record.sequences {
            self.take(sequence);
        }
    }

    fn take(&mut self, sequence: TokenizedSequence) {
        if self.is_full() {
            return;
        }
        self.tokens += sequence.token_ids.len() as u64;
        if targets(&sequence) == 0 {
            self.info.skipped += 1;
        } else if !self.options.keep_duplicates
            && !self.seen.insert(token_digest(&sequence.token_ids))
        {
            self.counts().duplicates += 1;
        } else {
            self.sequences.push(sequence);
        }
    }

    fn finish(mut self) -> Result<TokenizedData> {
        if self.sequences.is_empty() {
            let counts = &self.info.preparation;
            return Err(Error::EmptyData {
                records: counts.records,
                bad_records: counts.bad_records,
                skipped: self.info.skipped,
                max_len: self.max_len,
            });
        }
        let options = self.options;
        let mut sequences = std::mem::take(&mut self.sequences);
        if options.pack {
            sequences = pack::pack(sequences, self.max_len);
        }
        let (chat_template, chat_date) = self.encoder.used_template();
        let info = DataInfo {
            digest: digest(&sequences),
            sequences: sequences.len() as u64,
            positions: sequences
                .iter()
                .map(|sequence| sequence.token_ids.len() as u64)
                .sum(),
            targets: sequences.iter().map(targets).sum(),
            prompt_form: options.prompt.name().into(),
            preparation: Preparation {
                keep_duplicates: options.keep_duplicates,
                loss_on: options.loss_on,
                packed: options.pack,
                validation_millionths: options.validation_millionths,
                chat_template,
                chat_date,
                columns: options.columns.clone(),
                limit: options.limit.unwrap_or(0) as u64,
                ..self.info.preparation
            },
            ..self.info
        };
        check_split(&sequences, &info)?;
        Ok(TokenizedData {
            sequences,
            info,
            bad_records: self.bad_records,
        })
    }
}

fn encode(
    encoder: &Encoder<'_>,
    options: &DataOptions,
    name: &str,
    record: RawRecord,
) -> std::result::Result<EncodedRecord, Problem> {
    let value = match record.body {
        RawBody::Json(json) => parse_json(&json)?,
        RawBody::Parsed(value) => value,
        RawBody::NotText => {
            return Err(Problem::new("not UTF-8 text", "save the file as UTF-8"));
        }
    };
    let body = parse_record(&value, options)?;
    let mark = response_mark(&value, options)?;
    encoder.encode(format!("{name}:{}{mark}", record.number), body)
}

/// Tokens of a sequence that something predicts and the loss asks for.
fn targets(sequence: &TokenizedSequence) -> u64 {
    let later = sequence.loss_mask.iter().skip(1);
    later.filter(|&&target| target).count() as u64
}

/// Adds a sequence to the digest of tokenised data: its length, then each token with its mask.
pub(crate) fn hash_sequence(digest: &mut blake3::Hasher, token_ids: &[u32], loss_mask: &[bool]) {
    digest.update(&(token_ids.len() as u64).to_le_bytes());
    for (id, &target) in token_ids.iter().zip(loss_mask) {
        digest.update(&id.to_le_bytes());
        digest.update(&[u8::from(target)]);
    }
}

fn digest(sequences: &[TokenizedSequence]) -> String {
    let mut digest = blake3::Hasher::new();
    for sequence in sequences {
        hash_sequence(&mut digest, &sequence.token_ids, &sequence.loss_mask);
    }
    digest.finalize().to_hex().to_string()
}

/// A validation split must leave something on both sides.
fn check_split(sequences: &[TokenizedSequence], info: &DataInfo) -> Result<()> {
    if info.preparation.validation_millionths == 0 {
        return Ok(());
    }
    let validation = validation_sequences(sequences, info);
    let side = match validation {
        0 => "into the validation split",
        count if count == sequences.len() as u64 => "outside of the validation split",
        _ => return Ok(()),
    };
    Err(Error::Option {
        problem: format!(
            "--validation {}: none of {} sequences falls {side}",
            info.preparation.validation(),
            sequences.len()
        ),
        hint: "give another share, or more data".into(),
    })
}

/// Sequences of the validation split.
pub(crate) fn validation_sequences(sequences: &[TokenizedSequence], info: &DataInfo) -> u64 {
    let hashes = sequences
        .iter()
        .map(|sequence| caskd_formats::split_hash(&sequence.token_ids));
    hashes.filter(|&hash| info.is_validation(hash)).count() as u64
}
