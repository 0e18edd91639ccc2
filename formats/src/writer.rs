//! Building a cache so that a kill at any instant leaves an unfinished build that resumes, or a finished cache.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::FORMAT_VERSION;
use crate::cache::{Columns, Io};
use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::frame::Compared;
use crate::head::{self, HeadWeights};
use crate::manifest::{HeadInfo, Manifest, ShardInfo};
use crate::sequence::Sequence;
use crate::shard::{self, Shard, Workspace, encode_shard};
use crate::spec::{CacheSpec, CodeSpec, Tier};
use crate::store::{Guard, LOCK, MANIFEST, PLAN, SHARDS, Storage, Store, is_temporary};
use crate::transform::{self, Basis};

mod work;

pub use work::{SharedBuild, TaskInfo, Work};

/// A build under way; holds an exclusive lock on the folder that dies with the process.
#[derive(Debug)]
pub struct CacheWriter {
    store: Store,
    spec: CacheSpec,
    shards: BTreeMap<usize, ShardInfo>,
    head: Option<HeadInfo>,
    basis: Option<Arc<Basis>>,
    fidelity: Option<Fidelity>,
    /// The manifest, where the folder holds a finished cache.
    published: Option<Manifest>,
    /// Dropped last, after everything that it protects.
    lock: Box<dyn Guard>,
}

impl CacheWriter {
    /// Begins a cache in `dir` (created if need be), or with `resume` goes on with the unfinished one in it: shards
    /// whose digest matches their name are kept. Resuming a finished cache of the same plan is harmless.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`], [`Error::Locked`] where another process is building, [`Error::CacheExists`] where the
    /// folder holds something else, [`Error::PlanDiffers`] where the build in it had another spec.
    pub fn open(dir: &Path, spec: &CacheSpec, resume: bool) -> Result<CacheWriter> {
        CacheWriter::begin(Store::local(dir), spec, resume)
    }

    /// Refuses early what [`CacheWriter::open`] would refuse later: a folder that holds something else, or that another
    /// process is building in.
    ///
    /// # Errors
    /// [`Error::CacheExists`], [`Error::Locked`].
    pub fn check_folder(dir: &Path, resume: bool) -> Result<()> {
        let store = Store::local(dir);
        let contents = contents(&store)?;
        if contents == Contents::Unfinished {
            drop(store.lock()?);
        }
        let what = match contents {
            Contents::Foreign => "other files",
            Contents::Finished if !resume => "a finished cache",
            Contents::Unfinished if !resume => "an unfinished build",
            _ => return Ok(()),
        };
        Err(Error::CacheExists {
            dir: dir.to_owned(),
            what,
        })
    }

    /// The same in any storage.
    pub fn open_in(
        storage: Arc<dyn Storage>,
        spec: &CacheSpec,
        resume: bool,
    ) -> Result<CacheWriter> {
        CacheWriter::begin(Store::new(storage), spec, resume)
    }

    fn begin(store: Store, spec: &CacheSpec, resume: bool) -> Result<CacheWriter> {
        spec.check()?;
        // Nothing is put into a folder that is not ours; the lock file shows a build by someone else.
        let before = contents(&store)?;
        if before == Contents::Foreign {
            return Err(Error::CacheExists {
                dir: store.root().to_owned(),
                what: "other files",
            });
        }
        if before == Contents::Finished && !resume {
            return Err(Error::CacheExists {
                dir: store.root().to_owned(),
                what: "a finished cache",
            });
        }
        store.create_folder("")?;
        let lock = store.lock()?;
        // What another build did between the first look and the lock counts.
        match contents(&store)? {
            Contents::Empty => store.publish(PLAN, &[&plan(spec)])?,
            Contents::Unfinished if !resume => {
                return Err(Error::CacheExists {
                    dir: store.root().to_owned(),
                    what: "an unfinished build",
                });
            }
            Contents::Finished if !resume => {
                return Err(Error::CacheExists {
                    dir: store.root().to_owned(),
                    what: "a finished cache",
                });
            }
            Contents::Foreign => {
                return Err(Error::CacheExists {
                    dir: store.root().to_owned(),
                    what: "other files",
                });
            }
            Contents::Unfinished => compare_plan(&store, spec)?,
            Contents::Finished => {
                let manifest = Manifest::load(&store)?;
                compare(
                    &store,
                    &plan_value(&manifest.spec(), &manifest.caskd_version),
                    &current_plan(spec),
                )?;
                let shards = manifest.shards.iter().cloned().enumerate().collect();
                let head = manifest.head.clone();
                return Ok(CacheWriter {
                    store,
                    spec: spec.clone(),
                    shards,
                    head,
                    basis: None,
                    fidelity: None,
                    published: Some(manifest),
                    lock,
                });
            }
        }
        store.create_folder(SHARDS)?;
        let shards = done_shards(&store, spec)?;
        Ok(CacheWriter {
            store,
            spec: spec.clone(),
            shards,
            head: None,
            basis: None,
            fidelity: None,
            published: None,
            lock,
        })
    }

    /// Whether this shard is already on disk, whole.
    pub fn is_done(&self, shard: usize) -> bool {
        self.shards.contains_key(&shard)
    }

    /// Writes one shard under a name that contains its digest. In a finished cache it only compares.
    ///
    /// # Errors
    /// [`Error::InvalidSequence`] where a sequence does not fit the spec or holds NaN; [`Error::DiskFull`].
    pub fn write_shard(&mut self, shard: usize, sequences: &[Sequence]) -> Result<ShardInfo> {
        let (bytes, info) = whole_shard(&self.spec, self.basis.as_deref(), shard, sequences)?;
        if let Some(before) = self.shards.get(&shard).filter(|before| **before == info) {
            return Ok(before.clone());
        }
        self.refuse_published(&info.file)?;
        self.store.publish(&info.file, &[&bytes])?;
        self.shards.insert(shard, info.clone());
        Ok(info)
    }

    /// Writes the LM head. In a finished cache it only compares.
    pub fn write_head(&mut self, head: &HeadWeights<'_>) -> Result<()> {
        let expected = head
            .vocab_size
            .checked_mul(head.width)
            .and_then(|size| size.checked_mul(head.dtype.bytes()));
        if head.vocab_size != self.spec.vocab_size || expected != Some(head.bytes.len()) {
            return Err(Error::InvalidRequest(format!(
                "a head of {} x {} {:?} with {} bytes does not fit the vocabulary of {}",
                head.vocab_size,
                head.width,
                head.dtype,
                head.bytes.len(),
                self.spec.vocab_size
            )));
        }
        let last = self
            .spec
            .layers
            .last()
            .filter(|last| last.layer == self.spec.teacher.num_layers);
        if last.is_some_and(|last| last.width != head.width) {
            return Err(Error::InvalidRequest(format!(
                "a head of width {} does not fit the last layer",
                head.width
            )));
        }
        let preamble = head::preamble(head);
        let digest = blake3::Hasher::new()
            .update(&preamble)
            .update(head.bytes)
            .finalize()
            .to_hex()
            .to_string();
        let info = HeadInfo {
            file: head::file_name(&digest),
            digest,
            bytes: (preamble.len() + head.bytes.len()) as u64,
            dtype: head.dtype,
            vocab_size: head.vocab_size,
            width: head.width,
        };
        if self.head.as_ref() == Some(&info) {
            return Ok(());
        }
        self.put(&info.file, &info.digest, &[&preamble, head.bytes])?;
        self.head = Some(info);
        Ok(())
    }

    /// Writes the basis of a compact cache, the one that the spec names. In a finished cache it only compares.
    pub fn write_basis(&mut self, basis: Basis) -> Result<()> {
        let (bytes, info) = basis.to_file();
        if self.spec.code.as_ref().map(|code| &code.basis) != Some(&info) {
            let message = format!("`{}` is not the basis of the plan", info.file);
            return Err(Error::InvalidRequest(message));
        }
        self.put(&info.file, &info.digest, &[&bytes])?;
        self.basis = Some(Arc::new(basis));
        Ok(())
    }

    /// Decodes a row of a shard that is on disk.
    ///
    /// # Errors
    /// As [`crate::Cache::read`]; [`Error::InvalidRequest`] for a shard that is not done.
    pub fn read_back(&self, shard: usize, row: u32, columns: &Columns) -> Result<Sequence> {
        let Some(info) = self.shards.get(&shard) else {
            let message = format!("shard {shard} is not written yet");
            return Err(Error::InvalidRequest(message));
        };
        read_row(
            &self.store,
            &self.spec,
            self.basis.clone(),
            (shard, info, row),
            columns,
        )
    }

    /// What the shards are to hold.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The basis of a compact cache, once it is written.
    pub fn basis(&self) -> Option<&Arc<Basis>> {
        self.basis.as_ref()
    }

    /// The report that the manifest will carry; a finished cache keeps its own.
    pub fn set_fidelity(&mut self, fidelity: Fidelity) {
        self.fidelity = Some(fidelity);
    }

    /// Whether the folder holds the finished cache already.
    pub fn is_finished(&self) -> bool {
        self.published.is_some()
    }

    /// Publishes the cache: everything else is on disk before the manifest is.
    ///
    /// # Errors
    /// [`Error::Incomplete`] where a shard or the exact tier's head was not written.
    pub fn finish(self) -> Result<Manifest> {
        let manifest = match &self.published {
            Some(manifest) => manifest.clone(),
            None => self.publish()?,
        };
        self.store.remove(PLAN)?;
        work::remove(&self.store)?;
        // Removed while locked: who opened it meanwhile finds out and tries again.
        self.store.remove(LOCK)?;
        self.store.sync("")?;
        drop(self.lock);
        Ok(manifest)
    }

    fn publish(&self) -> Result<Manifest> {
        let incomplete = |missing: String| {
            Err(Error::Incomplete {
                dir: self.store.root().to_owned(),
                missing,
            })
        };
        let missing: Vec<String> = (0..self.spec.num_shards())
            .filter(|shard| !self.is_done(*shard))
            .map(|shard| shard.to_string())
            .collect();
        if !missing.is_empty() {
            return incomplete(format!("shards {} are missing", missing.join(", ")));
        }
        if self.spec.tier != Tier::Sparse && self.head.is_none() {
            return incomplete("the exact and the compact tier need the LM head".to_owned());
        }
        if self.spec.code.is_some() && self.basis.is_none() {
            return incomplete("the compact tier needs its basis".to_owned());
        }
        let positions: u64 = self.shards.values().map(|info| info.positions).sum();
        if positions != self.spec.data.positions {
            return incomplete(format!(
                "the shards hold {positions} positions of {}",
                self.spec.data.positions
            ));
        }
        self.remove_strays()?;
        self.store.sync(SHARDS)?;
        let spec = self.spec.clone();
        let mut manifest = Manifest {
            format_version: FORMAT_VERSION,
            caskd_version: env!("CARGO_PKG_VERSION").to_owned(),
            columns: shard::column_infos(&spec),
            tier: spec.tier,
            top_k: spec.top_k,
            vocab_size: spec.vocab_size,
            layers: spec.layers,
            code: spec.code,
            sequences_per_shard: spec.sequences_per_shard,
            max_len: spec.max_len,
            teacher: spec.teacher,
            origin: spec.origin,
            tokenizer: spec.tokenizer,
            data: spec.data,
            shards: self.shards.values().cloned().collect(),
            head: self.head.clone(),
            fidelity: self.fidelity.clone(),
            checksum: String::new(),
        };
        let bytes = manifest.to_bytes()?;
        self.store.publish(MANIFEST, &[&bytes])?;
        manifest = Manifest::load(&self.store)?;
        Ok(manifest)
    }

    /// Files of our own making that the manifest will not name: torn temporary files, shards of a damaged build.
    fn remove_strays(&self) -> Result<()> {
        for name in self.store.list(SHARDS)? {
            let path = format!("{SHARDS}/{name}");
            let is_ours = is_temporary(&name) || shard_number(&name).is_some();
            if is_ours && !self.shards.values().any(|info| info.file == path) {
                self.store.remove(&path)?;
            }
        }
        for name in self.store.list("")? {
            let is_tensors = (name.starts_with("head-") || name.starts_with("basis-"))
                && name.ends_with(".safetensors");
            let is_ours = is_temporary(&name) || is_tensors;
            let is_head = self.head.as_ref().is_some_and(|head| head.file == name);
            let code = self.spec.code.as_ref();
            let is_basis = code.is_some_and(|code| code.basis.file == name);
            if is_ours && !is_head && !is_basis {
                self.store.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Publishes a file that is named by its digest, unless an interrupted build has left it whole.
    fn put(&self, file: &str, digest: &str, parts: &[&[u8]]) -> Result<()> {
        if is_whole(&self.store, file, digest)? {
            return Ok(());
        }
        self.refuse_published(file)?;
        self.store.remove(file)?;
        self.store.publish(file, parts)
    }

    fn refuse_published(&self, file: &str) -> Result<()> {
        match self.published {
            Some(_) => Err(Error::CacheExists {
                dir: self.store.path(file),
                what: "another published file",
            }),
            None => Ok(()),
        }
    }
}

/// Whether a file that is named by its digest is on disk, unchanged.
fn is_whole(store: &Store, file: &str, digest: &str) -> Result<bool> {
    Ok(store.length(file)?.is_some() && store.digest(file)? == digest)
}

/// A shard's bytes, and what the manifest will say of them.
fn whole_shard(
    spec: &CacheSpec,
    basis: Option<&Basis>,
    shard: usize,
    sequences: &[Sequence],
) -> Result<(Vec<u8>, ShardInfo)> {
    let expected = spec.sequences_in_shard(shard);
    if sequences.len() != expected || expected == 0 {
        return Err(Error::InvalidRequest(format!(
            "shard {shard} must hold {expected} sequences, not {}",
            sequences.len()
        )));
    }
    if spec.code.is_some() && basis.is_none() {
        let message = "the basis must be written before the shards".to_owned();
        return Err(Error::InvalidRequest(message));
    }
    let encoded = encode_shard(spec, basis, shard, sequences)?;
    let digest = blake3::hash(&encoded.bytes).to_hex().to_string();
    let info = ShardInfo {
        file: shard::file_name(shard, &digest),
        digest,
        bytes: encoded.bytes.len() as u64,
        sequences: sequences.len() as u64,
        positions: encoded.positions,
        footer: encoded.footer,
    };
    Ok((encoded.bytes, info))
}

/// Decodes a row of a shard that is on disk.
fn read_row(
    store: &Store,
    spec: &CacheSpec,
    basis: Option<Arc<Basis>>,
    (number, info, row): (usize, &ShardInfo, u32),
    columns: &Columns,
) -> Result<Sequence> {
    let source = store.open(&info.file, info.bytes, Io::Read)?;
    let shard = Shard::open(&Arc::new(spec.clone()), number, info, &source, basis)?;
    let mut workspace = Workspace::new(Compared::Page).map_err(|error| Error::Io {
        action: "make a zstd context for",
        path: store.root().to_owned(),
        error,
    })?;
    let mut read = Vec::new();
    shard.read(&mut workspace, &[row], columns, &mut read)?;
    read.pop()
        .ok_or_else(|| Error::damaged(&info.file, "a row is missing"))
}

/// Bytes a position of sequences in a shard of this spec, without the footer: what a fit tries out.
///
/// # Errors
/// As [`CacheWriter::write_shard`].
pub fn trial_bytes_per_position(
    spec: &CacheSpec,
    basis: &Basis,
    sequences: &[Sequence],
) -> Result<f64> {
    let encoded = encode_shard(spec, Some(basis), 0, sequences)?;
    let bytes = encoded.bytes.len() as u64 - encoded.footer.bytes;
    Ok(bytes as f64 / encoded.positions.max(1) as f64)
}

/// The transform code of the cache in `dir`, finished or not, with its basis: a build that goes on need not fit again.
/// `None` where there is none, or where it is not whole.
///
/// # Errors
/// Only where the disk refuses.
pub fn stored_code(dir: &Path) -> Result<Option<(CodeSpec, Basis)>> {
    let store = Store::local(dir);
    let spec = match Manifest::load(&store) {
        Ok(manifest) => Some(manifest.spec()),
        Err(Error::Unfinished { .. }) => {
            let plan: Option<Value> = store
                .read_small(PLAN, 64 << 20)?
                .and_then(|bytes| serde_json::from_slice(&bytes).ok());
            plan.and_then(|mut plan| serde_json::from_value(plan["spec"].take()).ok())
        }
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(_) => None,
    };
    let Some(spec) = spec.filter(|spec: &CacheSpec| spec.check().is_ok()) else {
        return Ok(None);
    };
    let Some(code) = spec.code.clone() else {
        return Ok(None);
    };
    let named = code.basis.file == transform::basis::file_name(&code.basis.digest);
    if !named || store.length(&code.basis.file)? != Some(code.basis.bytes) {
        return Ok(None);
    }
    let basis = transform::basis::load(&store, &code.basis, Io::Read, &spec);
    Ok(basis.ok().map(|basis| (code, basis)))
}

#[derive(Debug, PartialEq, Eq)]
enum Contents {
    Empty,
    Unfinished,
    Finished,
    Foreign,
}

fn contents(store: &Store) -> Result<Contents> {
    let names = store.list("")?;
    let has = |name: &str| names.iter().any(|other| other == name);
    Ok(if has(MANIFEST) {
        Contents::Finished
    } else if has(PLAN) {
        Contents::Unfinished
    } else if names.iter().all(|name| name == LOCK || is_temporary(name)) {
        Contents::Empty
    } else {
        Contents::Foreign
    })
}

fn plan_value(spec: &CacheSpec, caskd_version: &str) -> Value {
    json!({ "format_version": FORMAT_VERSION, "caskd_version": caskd_version, "spec": spec })
}

fn current_plan(spec: &CacheSpec) -> Value {
    plan_value(spec, env!("CARGO_PKG_VERSION"))
}

fn plan(spec: &CacheSpec) -> Vec<u8> {
    format!("{:#}\n", current_plan(spec)).into_bytes()
}

fn compare_plan(store: &Store, spec: &CacheSpec) -> Result<()> {
    let bytes = store.read_small(PLAN, 64 << 20)?.unwrap_or_default();
    let found: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::damaged(PLAN, error.to_string()))?;
    compare(store, &found, &current_plan(spec))
}

fn compare(store: &Store, found: &Value, expected: &Value) -> Result<()> {
    match first_difference(found, expected, "") {
        None => Ok(()),
        Some((field, found, expected)) => Err(Error::PlanDiffers {
            dir: store.root().to_owned(),
            field: field
                .trim_start_matches('.')
                .trim_start_matches("spec.")
                .to_owned(),
            found,
            expected,
        }),
    }
}

/// Dotted name and both values of the first field that differs.
fn first_difference(
    found: &Value,
    expected: &Value,
    path: &str,
) -> Option<(String, String, String)> {
    let text = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
    match (found, expected) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            keys.map(|key| (key, a.get(key), b.get(key)))
                .find_map(|(key, a, b)| match (a, b) {
                    (Some(a), Some(b)) => first_difference(a, b, &format!("{path}.{key}")),
                    _ => Some((format!("{path}.{key}"), text(a), text(b))),
                })
        }
        _ if found == expected => None,
        _ => Some((path.to_owned(), text(Some(found)), text(Some(expected)))),
    }
}

/// The number in a shard's file name; `None` for other names.
fn shard_number(name: &str) -> Option<usize> {
    let (number, digest) = name.strip_suffix(".parquet")?.split_once('-')?;
    let plain = number.len() >= 5
        && number.bytes().all(|digit| digit.is_ascii_digit())
        && digest.len() == 16;
    if plain { number.parse().ok() } else { None }
}

/// Shards on disk whose digest matches their name; others of that form are removed.
fn done_shards(store: &Store, spec: &CacheSpec) -> Result<BTreeMap<usize, ShardInfo>> {
    let mut done = BTreeMap::new();
    for name in store.list(SHARDS)? {
        let file = format!("{SHARDS}/{name}");
        let Some(number) = shard_number(&name) else {
            continue;
        };
        let digest = store.digest(&file)?;
        let info = if shard::file_name(number, &digest) == file && number < spec.num_shards() {
            shard::describe(store, spec, number, &file, digest)?
        } else {
            None
        };
        match info {
            Some(info) => {
                done.insert(number, info);
            }
            None => store.remove(&file)?,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests;
