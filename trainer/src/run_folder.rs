//! The run folder: `config.toml`, `run.json`, `log.jsonl`, `checkpoints/`, `adapter/` or `model/`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use caskd_models::{LoadOptions, LoadedModel, load, load_adapters, save_model};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::checkpoint;
use crate::config::Quantize;
use crate::mix::CacheMix;
use crate::optimizer::write_tensors;
use crate::train::{StepReport, TrainSummary};
use crate::train::{load_base, prepare};
use crate::{Error, Result, TrainConfig};

const CONFIG: &str = "config.toml";
const RECORD: &str = "run.json";
const LOG: &str = "log.jsonl";
const ADAPTER: &str = "adapter";
const MODEL: &str = "model";
const PROJECTIONS: &str = "projections.safetensors";
const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = ".lock";

/// `run.json`: what the run trained on what, and how it ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// Version of the program.
    pub(crate) caskd_version: String,
    /// The student's path.
    pub(crate) student: PathBuf,
    /// Digest of its weights.
    pub(crate) student_digest: String,
    /// What it trains on.
    pub(crate) caches: Vec<RunCache>,
    /// Further folders of their shards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) shards: Vec<PathBuf>,
    /// Once the run is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) summary: Option<TrainSummary>,
}

/// One cache of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunCache {
    /// Its folder.
    pub(crate) path: PathBuf,
    /// Checksum of its manifest.
    pub(crate) digest: String,
    /// Times that an epoch goes through it.
    pub(crate) weight: f64,
}

/// An open run folder.
pub(crate) struct RunFolder {
    path: PathBuf,
    pub(crate) record: RunRecord,
    log: Option<File>,
    /// Held as long as the folder is open; dies with the process.
    _lock: File,
}

/// Whether a folder is a run's.
pub fn is_run(path: &Path) -> bool {
    path.join(RECORD).is_file()
}

/// The caches that a run was trained on, and further folders of their shards.
pub fn run_caches(run: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let RunRecord { caches, shards, .. } = read_record(run)?;
    Ok((caches.into_iter().map(|cache| cache.path).collect(), shards))
}

/// A finished run's student with the trained adapters attached.
///
/// # Errors
/// A folder that is no run, a run that is not finished, a student that has changed or moved.
pub fn load_run(run: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let record = read_record(run)?;
    if record.summary.is_none() {
        let reason = "it has not finished; go on with `--resume`".to_owned();
        return Err(Error::NotARun {
            path: run.to_owned(),
            reason,
        });
    }
    let trained = run.join(MODEL);
    if trained.is_dir() {
        return Ok(load(&trained, options)?);
    }
    let quantize = read_config(run)?.quantize;
    let mut model =
        load_base(&record.student, options, quantize).map_err(|source| match source {
            Error::Model(source) => Error::StudentLost {
                run: run.to_owned(),
                source,
            },
            other => other,
        })?;
    if model.digest != record.student_digest {
        return Err(Error::StudentChanged {
            path: record.student,
            run: run.to_owned(),
        });
    }
    attach_trained(&mut model, run)?;
    Ok(model)
}

/// Puts a finished run's adapters on the base that they were trained on: in 8 bits, where it was.
fn attach_trained(model: &mut LoadedModel, run: &Path) -> Result<()> {
    if read_config(run)?.quantize == Quantize::Int8 && !model.network.is_quantized() {
        model.network.quantize()?;
    }
    Ok(load_adapters(&mut model.network, &run.join(ADAPTER))?)
}

fn read_config(run: &Path) -> Result<TrainConfig> {
    let path = run.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(io("read", &path))?;
    TrainConfig::from_toml(&text)
}

/// A run's student on base weights that are loaded already: with the trained adapters of a finished run, or those
/// of the newest checkpoint of a run that was paused.
///
/// # Errors
/// A folder that is no run, a run without a checkpoint, another student than the run's.
pub fn load_run_onto(base: &LoadedModel, run: &Path) -> Result<LoadedModel> {
    let record = read_record(run)?;
    if base.digest != record.student_digest {
        return Err(Error::StudentChanged {
            path: record.student,
            run: run.to_owned(),
        });
    }
    let trained = run.join(MODEL);
    if record.summary.is_some() && trained.is_dir() {
        let options = LoadOptions {
            device: base.network.device(),
            kind: base.network.kind(),
        };
        return Ok(load(&trained, &options)?);
    }
    let mut model = base.share();
    if record.summary.is_some() {
        attach_trained(&mut model, run)?;
        return Ok(model);
    }
    let checkpoint = checkpoint::newest(&run.join(CHECKPOINTS)).ok_or_else(|| Error::NotARun {
        path: run.to_owned(),
        reason: "it has no checkpoint yet".to_owned(),
    })?;
    let config = read_config(run)?;
    prepare(&mut model.network, &config)?;
    checkpoint::restore_adapters(&checkpoint, &model.network.trainable())?;
    if model.network.trains_all() {
        model.network.freeze();
    }
    Ok(model)
}

/// Steps of the newest checkpoint of a run that is not finished; `None` where there is none.
pub fn paused_at(run: &Path) -> Option<u64> {
    let newest = checkpoint::newest(&run.join(CHECKPOINTS))?;
    checkpoint::step_of(&newest)
}

impl RunRecord {
    /// The record of a run that begins.
    pub(crate) fn new(
        student: &LoadedModel,
        student_path: &Path,
        caches: &CacheMix,
        shards: &[PathBuf],
    ) -> RunRecord {
        let absolute = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let caches = caches.iter().map(|(cache, weight)| RunCache {
            path: absolute(cache.dir()),
            digest: cache.manifest().checksum.clone(),
            weight: *weight,
        });
        RunRecord {
            caskd_version: env!("CARGO_PKG_VERSION").to_owned(),
            student: absolute(student_path),
            student_digest: student.digest.clone(),
            caches: caches.collect(),
            shards: shards.iter().map(|folder| absolute(folder)).collect(),
            summary: None,
        }
    }
}

impl RunFolder {
    /// Makes the folder, or with `resume` opens the one there is after checking that nothing which
    /// decides the result has changed.
    pub(crate) fn open(
        path: &Path,
        config: &TrainConfig,
        record: RunRecord,
        resume: bool,
    ) -> Result<RunFolder> {
        let exists = path.exists();
        if exists && !resume {
            return Err(Error::OutputExists {
                path: path.to_owned(),
            });
        }
        // A folder without a record was cut off before its first step, or is someone else's.
        let begun = is_run(path) || path.join(CONFIG).exists() || path.join(LOCK).exists();
        if exists && !begun && !is_empty(path)? {
            return Err(Error::NotARun {
                path: path.to_owned(),
                reason: "it holds something else".to_owned(),
            });
        }
        fs::create_dir_all(path).map_err(io("create", path))?;
        let lock = lock(path)?;
        let record = if is_run(path) {
            resumable(path, config, record)?
        } else {
            write_whole(&path.join(CONFIG), config.to_toml()?.as_bytes())?;
            write_json(&path.join(RECORD), &record)?;
            record
        };
        Ok(RunFolder {
            path: path.to_owned(),
            record,
            log: None,
            _lock: lock,
        })
    }

    /// Folder of the checkpoints.
    pub(crate) fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// Folder of the final adapters.
    pub(crate) fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    /// Writes the student whose weights all trained, in place of one that a run cut off here has left.
    pub(crate) fn save_model(&self, model: &LoadedModel) -> Result<()> {
        let path = self.path.join(MODEL);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        }
        Ok(save_model(model, &path)?)
    }

    /// Keeps the projections between widths that trained with the student; nothing loads them again.
    pub(crate) fn save_projections(&self, projections: &[(String, Tensor)]) -> Result<()> {
        let path = self.path.join(PROJECTIONS);
        let unfinished = path.with_extension("unfinished");
        write_tensors(projections, &unfinished)?;
        fs::rename(&unfinished, &path).map_err(io("write", &path))
    }

    /// Opens the log, without the lines of steps that a resumed run makes again.
    pub(crate) fn open_log(&mut self, steps_made: u64) -> Result<()> {
        #[derive(Deserialize)]
        struct Line {
            step: u64,
        }
        let path = self.path.join(LOG);
        let old = match fs::read_to_string(&path) {
            Ok(old) => old,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(io("read", &path)(error)),
        };
        let made =
            |line: &&str| serde_json::from_str(line).is_ok_and(|Line { step }| step <= steps_made);
        let kept: String = old
            .lines()
            .filter(made)
            .flat_map(|line| [line, "\n"])
            .collect();
        write_whole(&path, kept.as_bytes())?;
        self.log = Some(
            OpenOptions::new()
                .append(true)
                .open(&path)
                .map_err(io("write", &path))?,
        );
        Ok(())
    }

    /// Adds a step's line to the log.
    pub(crate) fn log(&mut self, report: &StepReport) -> Result<()> {
        let path = self.path.join(LOG);
        let Some(log) = &mut self.log else {
            return Ok(());
        };
        let mut line = serde_json::to_vec(report).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        line.push(b'\n');
        log.write_all(&line).map_err(io("write", &path))
    }

    /// Records that the run is complete: from now on it can be loaded.
    pub(crate) fn finish(&mut self, summary: &TrainSummary) -> Result<()> {
        self.record.summary = Some(summary.clone());
        write_json(&self.path.join(RECORD), &self.record)
    }
}

fn is_empty(folder: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(folder).map_err(io("read", folder))?;
    Ok(entries.next().is_none())
}

/// Takes the folder for this process.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::RunBusy {
            path: folder.to_owned(),
        }),
        Err(fs::TryLockError::Error(error)) => Err(io("lock", &path)(error)),
    }
}

/// The record of the run that is there, when it may be resumed.
fn resumable(path: &Path, config: &TrainConfig, now: RunRecord) -> Result<RunRecord> {
    let then = read_record(path)?;
    let config_path = path.join(CONFIG);
    let text = fs::read_to_string(&config_path).map_err(io("read", &config_path))?;
    let differs = |what: &str, then: String, now: String| Error::ResumeDiffers {
        path: path.to_owned(),
        what: what.to_owned(),
        then,
        now,
    };
    if let Some((key, then, now)) = TrainConfig::from_toml(&text)?.first_difference(config) {
        return Err(differs(&format!("`{key}`"), then, now));
    }
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    if then.student_digest != now.student_digest {
        let shown = |record: &RunRecord| {
            let digest = short(&record.student_digest);
            format!("`{}` ({digest})", record.student.display())
        };
        return Err(differs("the student", shown(&then), shown(&now)));
    }
    // Where a cache lies does not matter, only what is in it.
    let identity = |record: &RunRecord| -> Vec<(String, u64)> {
        let caches = record.caches.iter();
        caches
            .map(|cache| (cache.digest.clone(), cache.weight.to_bits()))
            .collect()
    };
    if identity(&then) != identity(&now) {
        let shown = |record: &RunRecord| {
            let caches: Vec<String> = record
                .caches
                .iter()
                .map(
                    |RunCache {
                         path,
                         digest,
                         weight,
                     }| {
                        format!("`{}`={weight} ({})", path.display(), short(digest))
                    },
                )
                .collect();
            caches.join(", ")
        };
        return Err(differs("the cache", shown(&then), shown(&now)));
    }
    Ok(RunRecord {
        summary: then.summary,
        ..now
    })
}

fn read_record(run: &Path) -> Result<RunRecord> {
    let path = run.join(RECORD);
    let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::NotARun {
            path: run.to_owned(),
            reason: format!("it has no `{RECORD}`"),
        },
        _ => io("read", &path)(error),
    })?;
    serde_json::from_str(&text).map_err(|source| Error::Json { path, source })
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })?;
    text.push(b'\n');
    write_whole(path, &text)
}

/// Writes a file that has its name only when it is complete.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        path.parent()
            .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(io("write", path))
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}
