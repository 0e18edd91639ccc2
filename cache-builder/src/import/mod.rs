//! The stage: values that another program computed, checked and written as a sparse cache.
//!
//! Two passes over the files. The survey reads every token, checks what it reads, counts, and finds out whether the
//! values fit the labels; only then is anything written. The second pass writes shard by shard. Neither holds more than
//! a shard in memory. Each foreign format is one flat file that knows its layout and where its off-by-one lies; all of
//! them hand on [`Foreign`] sequences, whose row t says what follows token t.

mod axolotl;
mod chat;
mod dense;
mod detect;
mod distillkit;
mod foreign;
mod jsonl;
mod llama_cpp;
mod numpy;
mod safetensors;
mod served;
mod survey;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::{
    Alignment, CacheSpec, CacheWriter, DataFile, DataInfo, KnownPositions, Manifest, Origin,
    Preparation, Sequence, Statistic, TeacherInfo, Tier, TokenizerInfo, ValueKind,
};
use caskd_models::LoadedTokenizer;
use serde::Serialize;

use self::chat::Texts;
use self::foreign::{Foreign, Layout};
use self::jsonl::JsonlReader;
use self::survey::{Survey, survey};
use crate::data::{DataOptions, Encoder, OnError, file_name};
use crate::options::USUAL_TOP_K;
use crate::{Error, Result};

pub use self::detect::Format;

/// The prompt form that stands in the manifest of an imported cache.
const PROMPT_FORM: &str = "imported";

/// Bytes of values that one shard may hold in memory.
const SHARD_BYTES: usize = 256 << 20;

/// Sequences in a shard at most.
const SHARD_SEQUENCES: usize = 256;

/// What the numbers of the files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GivenValues {
    /// Found out: log-probabilities must add up to 1 at most.
    #[default]
    Auto,
    /// Log-probabilities over the whole vocabulary.
    LogProbabilities,
    /// Log-probabilities that were normalised over the kept tokens only.
    Renormalised,
    /// Logits, up to a constant for each position.
    Logits,
}

/// The token that a program put before each window without recording it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WindowStart {
    /// Where the recorded text begins with the tokenizer's BOS token, so did every window.
    #[default]
    Auto,
    /// Windows begin with the recorded token.
    Recorded,
    /// Every window began with this token.
    Token(u32),
}

/// Everything that [`import`] needs to know.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The files, in this order.
    pub files: Vec<PathBuf>,
    /// Their format; `None`: found out from the first of them.
    pub format: Option<Format>,
    /// What made the token ids: a Hugging Face folder or a GGUF file.
    pub tokenizer: PathBuf,
    /// Token ids of `.npy` logits.
    pub tokens: Option<PathBuf>,
    /// DistillKit's compression configuration (YAML or JSON).
    pub compression: Option<PathBuf>,
    /// The teacher's name, for people.
    pub teacher: Option<String>,
    /// Rows of the teacher's LM head; `None`: the file's, or the tokenizer's tokens.
    pub vocab_size: Option<usize>,
    /// Kept entries K; `None`: all that every position has, or 64 of a whole vocabulary.
    pub top_k: Option<usize>,
    /// Longest sequence in tokens; `None`: the longest of the data.
    pub max_len: Option<usize>,
    /// Only the first so many sequences.
    pub limit: Option<usize>,
    /// The temperature that the values were computed at.
    pub temperature: f64,
    /// What the values are.
    pub values: GivenValues,
    /// By how many positions the values are moved; `None`: 0, and refused where another offset fits better.
    pub shift: Option<i64>,
    /// The first token of llama.cpp's windows.
    pub window_start: WindowStart,
    /// One of the tokenizer's chat templates by name, or a file with another one (Jinja), for records of messages without
    /// token ids.
    pub chat_template: Option<PathBuf>,
    /// The date that chat templates are told, in place of [`crate::USUAL_CHAT_DATE`].
    pub chat_date: Option<chrono::NaiveDate>,
    /// What a bad record does.
    pub on_error: OnError,
    /// The cache's folder.
    pub out: PathBuf,
    /// Go on with an interrupted import.
    pub resume: bool,
}

/// What the import is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImportStage {
    /// Everything is read and checked once.
    Reading,
    /// The cache is written.
    Writing,
}

/// A record that was passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadPlace {
    /// The file.
    pub file: PathBuf,
    /// `line 17`, `row 3`, `window 2`, or the name of an array.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
}

/// How far the import is; counts are those of its stage.
#[derive(Debug, Clone, Copy)]
pub struct ImportProgress<'a> {
    /// What it is at.
    pub stage: ImportStage,
    /// Bytes of the files read.
    pub bytes_done: u64,
    /// All their bytes.
    pub bytes_total: u64,
    /// Positions read.
    pub positions: u64,
    /// A record that is passed over just now.
    pub bad_record: Option<&'a BadPlace>,
}

/// What an import did.
#[derive(Debug, Clone, Serialize)]
pub struct ImportReport {
    /// False when it was stopped and can be resumed.
    pub completed: bool,
    /// The format that was read.
    pub format: Format,
    /// Sequences in the cache.
    pub sequences: u64,
    /// Positions in the cache.
    pub positions: u64,
    /// Positions that a loss may ask for.
    pub targets: u64,
    /// Tokens marked as targets before which the files hold no values; they are no targets in the cache.
    pub targets_without_values: u64,
    /// Sequences cut at the longest length.
    pub truncated: u64,
    /// Sequences without a target, left out.
    pub skipped: u64,
    /// Records, or single sequences of them, that could not be used and were passed over.
    pub bad_records: u64,
    /// The first [`crate::NAMED_BAD_RECORDS`] of them.
    pub bad: Vec<BadPlace>,
    /// Kept entries K.
    pub top_k: usize,
    /// What the manifest says of the values.
    pub origin: Origin,
    /// By how many positions the values were moved.
    pub shift: i64,
    /// How well the values fit the labels, and labels beside them; `None` where there are too few.
    pub alignment: Option<Alignment>,
    /// Things to know.
    pub notes: Vec<String>,
    /// Shards of the cache.
    pub shards: usize,
    /// Shards that an earlier, interrupted import had finished.
    pub shards_reused: usize,
    /// Seconds from start to end.
    pub seconds: f64,
    /// Size of the cache's shards; 0 while it is not complete.
    pub cache_bytes: u64,
}

/// One source of sequences, read from front to back.
pub(crate) trait Reader {
    /// The next sequence; `None` at the end. Where `values` is false, a reader of a whole vocabulary passes over them.
    /// An error that names a place in the file is about what stands there; the next call reads on behind it.
    fn next(&mut self, values: bool) -> Result<Option<Foreign>>;

    /// Bytes read so far, of all files.
    fn bytes_read(&self) -> u64;

    /// V, where the files tell.
    fn vocab_size(&self) -> Option<usize> {
        None
    }

    /// The teacher's name, where the files tell.
    fn teacher(&self) -> Option<String> {
        None
    }

    /// What is worth telling of how the files were read.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What readers are opened with.
pub(crate) struct Setup<'a> {
    pub(crate) options: &'a ImportOptions,
    pub(crate) tokenizer: &'a LoadedTokenizer,
    pub(crate) texts: &'a Texts<'a>,
    /// K of readers that summarise a whole vocabulary.
    pub(crate) top_k: usize,
}

fn open<'a>(format: Format, setup: &Setup<'a>) -> Result<Box<dyn Reader + 'a>> {
    let lines = |interpret| JsonlReader::new(&setup.options.files, interpret, setup.texts);
    Ok(match format {
        Format::Vllm => Box::new(lines(served::sequences)),
        Format::Axolotl => Box::new(lines(axolotl::sequences)),
        Format::LlamaCpp => Box::new(llama_cpp::LlamaCppReader::open(setup)?),
        Format::Distillkit => Box::new(distillkit::DistillkitReader::open(setup)?),
        Format::Numpy => Box::new(numpy::open(setup)?),
        Format::Safetensors => Box::new(safetensors::open(setup)?),
    })
}

/// Imports foreign values as a sparse cache. Stops between sequences once `stop` is set; the same call with `resume`
/// then completes it to the same bytes.
///
/// # Errors
/// Files that are not of their format (the record is named), values that contradict themselves or the labels, options
/// that don't fit, a folder or disk that can't take the cache. Nothing is written before the files were read once.
pub fn import(
    options: &ImportOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&ImportProgress<'_>),
) -> Result<ImportReport> {
    let started = Instant::now();
    check_options(options)?;
    CacheWriter::check_folder(&options.out, options.resume)?;
    let format = match options.format {
        Some(format) => format,
        None => detect::detect(&options.files[0])?,
    };
    let tokenizer = caskd_models::load_tokenizer(&options.tokenizer)?;
    let encoder = Encoder::new(
        &tokenizer,
        tokenizer.tokenizer.get_vocab_size(true),
        usize::MAX,
        &DataOptions {
            chat_template: options.chat_template.clone(),
            chat_date: options.chat_date,
            ..DataOptions::default()
        },
    )?;
    let texts = Texts::new(encoder, options.shift);
    let setup = Setup {
        options,
        tokenizer: &tokenizer,
        texts: &texts,
        top_k: options.top_k.unwrap_or(USUAL_TOP_K),
    };
    let files = describe_files(options)?;
    let bytes_total = files.iter().map(|file| file.bytes).sum();
    let mut report = |stage, reader: &dyn Reader, positions, bad_record: Option<&BadPlace>| {
        progress(&ImportProgress {
            stage,
            bytes_done: reader.bytes_read().min(bytes_total),
            bytes_total,
            positions,
            bad_record,
        });
    };

    let mut reader = open(format, &setup)?;
    let found = survey(
        format,
        reader.as_mut(),
        &setup,
        stop,
        &mut |reader, positions, bad| report(ImportStage::Reading, reader, positions, bad),
    )?;
    let Some(found) = found else {
        return Err(Error::Stopped);
    };
    let notes = [found.notes.clone(), reader.notes()].concat();
    let spec = cache_spec(format, &setup, &found, reader.as_ref(), files)?;
    drop(reader);

    let mut reader = open(
        format,
        &Setup {
            top_k: spec.top_k,
            ..setup
        },
    )?;
    let written = write(
        &spec,
        &found,
        reader.as_mut(),
        options,
        stop,
        &mut |reader, positions| report(ImportStage::Writing, reader, positions, None),
    )?;
    Ok(ImportReport {
        completed: written.manifest.is_some(),
        format,
        sequences: spec.data.sequences,
        positions: spec.data.positions,
        targets: spec.data.targets,
        targets_without_values: found.targets_without_values,
        truncated: spec.data.truncated,
        skipped: spec.data.skipped,
        bad_records: found.bad.len() as u64,
        bad: found.named,
        top_k: spec.top_k,
        origin: found.origin,
        shift: found.layout.shift,
        alignment: found.alignment,
        notes,
        shards: spec.num_shards(),
        shards_reused: written.reused,
        seconds: started.elapsed().as_secs_f64(),
        cache_bytes: written.manifest.map_or(0, |manifest| {
            manifest.shards.iter().map(|shard| shard.bytes).sum()
        }),
    })
}

struct Written {
    /// `None` when stopped.
    manifest: Option<Manifest>,
    reused: usize,
}

/// The second pass: sequences in the order of the survey, shard by shard.
fn write(
    spec: &CacheSpec,
    found: &Survey,
    reader: &mut dyn Reader,
    options: &ImportOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&dyn Reader, u64),
) -> Result<Written> {
    let mut writer = CacheWriter::open(&options.out, spec, options.resume)?;
    let done: Vec<bool> = (0..spec.num_shards())
        .map(|shard| writer.is_done(shard))
        .collect();
    let reused = done.iter().filter(|done| **done).count();
    let last_pending = done.iter().rposition(|done| !done);
    let (mut positions, mut item) = (0, 0);
    let pending = last_pending.map_or(0, |last| last + 1);
    for (shard, &is_done) in done.iter().enumerate().take(pending) {
        let count = spec.sequences_in_shard(shard);
        let mut sequences: Vec<Sequence> = Vec::with_capacity(if is_done { 0 } else { count });
        let mut taken = 0;
        while taken < count {
            if stop.load(Ordering::Relaxed) {
                return Ok(Written {
                    manifest: None,
                    reused,
                });
            }
            let next = reader.next(!is_done);
            item += 1;
            if found.bad.contains(&(item - 1)) {
                continue;
            }
            let Some(foreign) = next? else {
                return Err(Error::Changed {
                    path: options.files[0].clone(),
                });
            };
            let Some(placed) = foreign.place(&found.layout) else {
                continue;
            };
            taken += 1;
            positions += placed.positions() as u64;
            if !is_done {
                sequences.push(placed.into_sequence(&found.layout)?);
            }
            progress(reader, positions);
        }
        if !is_done {
            writer.write_shard(shard, &sequences)?;
        }
    }
    Ok(Written {
        manifest: Some(writer.finish()?),
        reused,
    })
}

fn check_options(options: &ImportOptions) -> Result<()> {
    let refuse = |problem: String, hint: &str| {
        Err(Error::Option {
            problem,
            hint: hint.into(),
        })
    };
    if options.files.is_empty() {
        return refuse("there is no file to import".into(), "name at least one");
    }
    if options.top_k == Some(0) {
        return refuse("--top-k 0 keeps nothing".into(), "give at least 1");
    }
    if options.max_len.is_some_and(|longest| longest < 2) {
        return refuse(
            "--max-len is too short".into(),
            "a sequence needs two tokens: one to predict from and one to predict",
        );
    }
    if options.limit == Some(0) {
        return refuse("--limit 0 leaves no sequence".into(), "give at least 1");
    }
    if !(options.temperature.is_finite() && options.temperature > 0.0) {
        return refuse(
            format!(
                "--temperature {} is not a positive number",
                options.temperature
            ),
            "give the temperature that the values were computed at; 1 is usual",
        );
    }
    Ok(())
}

/// Name, size and digest of every file.
fn describe_files(options: &ImportOptions) -> Result<Vec<DataFile>> {
    let companions = options.tokens.iter().chain(&options.compression);
    options
        .files
        .iter()
        .chain(companions)
        .map(|path| describe_file(path))
        .collect()
}

fn describe_file(path: &Path) -> Result<DataFile> {
    let failed = |source| Error::DataFile {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut digest = blake3::Hasher::new();
    digest.update_reader(&file).map_err(failed)?;
    Ok(DataFile {
        name: file_name(path),
        bytes: digest.count(),
        digest: digest.finalize().to_hex().to_string(),
    })
}

fn cache_spec(
    format: Format,
    setup: &Setup<'_>,
    found: &Survey,
    reader: &dyn Reader,
    files: Vec<DataFile>,
) -> Result<CacheSpec> {
    let (options, tokenizer) = (setup.options, setup.tokenizer);
    let layout: &Layout = &found.layout;
    let (chat_template, chat_date) = setup.texts.used_template();
    let bytes_a_sequence = found.longest * (layout.top_k * 16 + 32);
    if found.sequences == 0 {
        return Err(Error::EmptyData {
            records: found.read,
            bad_records: found.bad.len() as u64,
            skipped: found.skipped,
            max_len: found.longest,
        });
    }
    Ok(CacheSpec {
        tier: Tier::Sparse,
        top_k: layout.top_k,
        vocab_size: layout.vocab_size,
        layers: Vec::new(),
        code: None,
        sequences_per_shard: (SHARD_BYTES / bytes_a_sequence.max(1)).clamp(1, SHARD_SEQUENCES),
        max_len: options.max_len.unwrap_or(found.longest).max(1),
        teacher: TeacherInfo {
            name: options
                .teacher
                .clone()
                .or_else(|| reader.teacher())
                .unwrap_or_else(|| "unknown".to_owned()),
            architecture: "unknown".to_owned(),
            digest: "unknown".to_owned(),
            compute_dtype: "unknown".to_owned(),
            num_layers: 0,
            hidden_size: 0,
            num_parameters: 0,
        },
        origin: Some(Origin {
            format: format.name().to_owned(),
            ..found.origin.clone()
        }),
        tokenizer: TokenizerInfo {
            fingerprint: tokenizer.fingerprint.clone(),
            vocab_size: tokenizer.tokenizer.get_vocab_size(true),
        },
        data: DataInfo {
            digest: found.digest.clone(),
            files,
            sequences: found.sequences,
            positions: found.positions,
            targets: found.targets,
            truncated: found.truncated,
            skipped: found.skipped,
            prompt_form: PROMPT_FORM.to_owned(),
            preparation: Preparation {
                bad_records: found.bad.len() as u64,
                chat_template,
                chat_date,
                ..Preparation::default()
            },
        },
    })
}

/// The statistics that follow from what was given.
fn known_statistics(format: Format, values: ValueKind) -> Vec<Statistic> {
    let everything = [
        Statistic::Mean,
        Statistic::Std,
        Statistic::Min,
        Statistic::Max,
        Statistic::LogSumExp,
    ];
    match (format, values) {
        (Format::Numpy | Format::Safetensors, _) => everything.to_vec(),
        // Everything 16 nats below the largest was clipped.
        (Format::LlamaCpp, _) | (_, ValueKind::LogProbabilities) => {
            vec![Statistic::Max, Statistic::LogSumExp]
        }
        (_, ValueKind::RenormalisedLogProbabilities | ValueKind::Logits) => vec![Statistic::Max],
    }
}

/// Where values are, seen over a whole import.
fn known_positions(all: bool) -> KnownPositions {
    if all {
        KnownPositions::All
    } else {
        KnownPositions::Targets
    }
}
