//! Checkpoints: `checkpoints/step-000050/{adapters,optimizer}.safetensors` and `cursor.json`.
//!
//! A checkpoint gets its name only when it is whole on disk. `cursor.json` holds the digests of the
//! other two files and of itself; a damaged checkpoint is passed over for the one before it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::losses::MissingLogits;
use crate::optimizer::{AdamW, read_tensors, write_tensors};
use crate::{Error, Result};

const KEPT: usize = 2;
const ADAPTERS: &str = "adapters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const CURSOR: &str = "cursor.json";

/// How far a run is. The next batch follows from `step` alone; epoch and batch say it for people.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Cursor {
    /// Optimizer steps made.
    pub(crate) step: u64,
    /// Epoch of the next step, from 0.
    pub(crate) epoch: u64,
    /// First batch of the next step in its epoch.
    pub(crate) batch: u64,
    /// Positions trained on.
    pub(crate) tokens: u64,
    /// Seconds spent in steps.
    pub(crate) seconds: f64,
    /// Of them, waiting for data.
    pub(crate) data_wait_seconds: f64,
    /// Total loss of the last step.
    pub(crate) loss: f64,
    /// Value of each term at the last step.
    pub(crate) terms: Vec<(String, f64)>,
    /// Teacher logits that student-led losses looked up, and did not find.
    #[serde(default)]
    pub(crate) missing: MissingLogits,
}

#[derive(Serialize, Deserialize)]
struct CursorFile {
    cursor: Cursor,
    /// blake3 of the tensor files by name.
    files: BTreeMap<String, String>,
    /// blake3 of this JSON with an empty digest.
    digest: String,
}

/// A checkpoint that was taken up.
pub(crate) struct Restored {
    /// Where the run goes on.
    pub(crate) cursor: Cursor,
    /// What was wrong with newer checkpoints.
    pub(crate) passed_over: Vec<String>,
}

/// Writes a checkpoint into `dir` and removes all but the newest two. Returns its folder.
pub(crate) fn save(
    dir: &Path,
    cursor: &Cursor,
    trainable: &[(String, Tensor)],
    optimizer: &AdamW,
) -> Result<PathBuf> {
    let target = dir.join(format!("step-{:06}", cursor.step));
    let building = dir.join(".unfinished");
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    remove_if_there(&building)?;
    fs::create_dir(&building).map_err(io("create", &building))?;
    write_tensors(trainable, &building.join(ADAPTERS))?;
    optimizer.save(&building.join(OPTIMIZER))?;
    let mut files = BTreeMap::new();
    for file in [ADAPTERS, OPTIMIZER] {
        let path = building.join(file);
        sync(&path)?;
        files.insert(file.to_owned(), digest_of_file(&path)?);
    }
    let mut cursor = CursorFile {
        cursor: cursor.clone(),
        files,
        digest: String::new(),
    };
    cursor.digest = digest_of_cursor(&cursor);
    let path = building.join(CURSOR);
    fs::write(&path, to_json(&cursor)).map_err(io("write", &path))?;
    sync(&path)?;
    sync(&building)?;
    remove_if_there(&target)?;
    fs::rename(&building, &target).map_err(io("write", &target))?;
    sync(dir)?;
    for old in newest_first(dir)?.into_iter().skip(KEPT) {
        remove_if_there(&old)?;
    }
    Ok(target)
}

/// Takes up the newest whole checkpoint in `dir`; `None` where there is none at all.
pub(crate) fn restore(
    dir: &Path,
    trainable: &[(String, Tensor)],
    optimizer: &mut AdamW,
) -> Result<Option<Restored>> {
    let mut passed_over = Vec::new();
    for path in newest_first(dir)? {
        match restore_one(&path, trainable, optimizer) {
            Ok(cursor) => {
                return Ok(Some(Restored {
                    cursor,
                    passed_over,
                }));
            }
            Err(error) => passed_over.push(format!(
                "checkpoint `{}` is damaged: {error}",
                path.display()
            )),
        }
    }
    match passed_over.first() {
        Some(reason) => Err(Error::NoCheckpoint {
            path: dir.to_owned(),
            reason: reason.clone(),
        }),
        None => Ok(None),
    }
}

/// The newest checkpoint's folder.
pub(crate) fn newest(dir: &Path) -> Option<PathBuf> {
    newest_first(dir).ok()?.into_iter().next()
}

fn restore_one(
    path: &Path,
    trainable: &[(String, Tensor)],
    optimizer: &mut AdamW,
) -> Result<Cursor> {
    let cursor_path = path.join(CURSOR);
    let text = fs::read_to_string(&cursor_path).map_err(io("read", &cursor_path))?;
    let mut file: CursorFile = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: cursor_path.clone(),
        source,
    })?;
    let damaged = |path: PathBuf| Error::DamagedCheckpoint {
        path,
        reason: "its checksum is wrong".to_owned(),
    };
    let digest = std::mem::take(&mut file.digest);
    if digest != digest_of_cursor(&file) {
        return Err(damaged(cursor_path));
    }
    for (name, digest) in &file.files {
        if digest_of_file(&path.join(name))? != *digest {
            return Err(damaged(path.join(name)));
        }
    }
    restore_adapters(path, trainable)?;
    optimizer.load(&path.join(OPTIMIZER))?;
    Ok(file.cursor)
}

/// Copies a checkpoint's adapters into the network's.
pub(crate) fn restore_adapters(path: &Path, trainable: &[(String, Tensor)]) -> Result<()> {
    let adapters_path = path.join(ADAPTERS);
    let adapters = read_tensors(&adapters_path)?;
    for (name, tensor) in trainable {
        let saved = adapters
            .iter()
            .find(|(of, saved)| of == name && saved.size() == tensor.size());
        let (_, saved) = saved.ok_or_else(|| Error::DamagedCheckpoint {
            path: adapters_path.clone(),
            reason: format!("it has no `{name}` of the network's size"),
        })?;
        tch::no_grad(|| tensor.shallow_clone().copy_(saved));
    }
    Ok(())
}

/// The step in a checkpoint's name.
pub(crate) fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .parse()
        .ok()
}

/// Finished checkpoints by falling step.
fn newest_first(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io("read", dir)(error)),
    };
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for entry in entries {
        let path = entry.map_err(io("read", dir))?.path();
        if let Some(step) = step_of(&path) {
            found.push((step, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn digest_of_cursor(cursor: &CursorFile) -> String {
    blake3::hash(&to_json(cursor)).to_hex().to_string()
}

fn digest_of_file(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(io("read", path))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    // Numbers, strings and maps with string keys: nothing that JSON could not express.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(io("write", path))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}
