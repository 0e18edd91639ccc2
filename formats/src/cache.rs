//! Reading a cache.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::frame::Compared;
use crate::head::Head;
use crate::manifest::{Manifest, ShardInfo};
use crate::sequence::{Sequence, TokenDigest};
use crate::shard::{Shard, Workspace};
use crate::spec::{CacheSpec, Tier};
use crate::store::{Storage, Store};
use crate::transform::Basis;

/// How files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Io {
    /// Memory-mapped: nothing is copied before it is decoded. For local disks; nobody may cut the files short while
    /// they are read.
    #[default]
    Mmap,
    /// Positional reads: a file cut short by someone else is an error instead of a signal. For network disks.
    Read,
}

/// Which columns to decode; source, token ids and mask always are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// The five statistics.
    pub statistics: bool,
    /// The top-k (reads the statistics too: it is stored relative to the maximum).
    pub top_k: bool,
    /// Hidden states by layer number.
    pub layers: Vec<u32>,
    /// The coefficients of the compact tier.
    pub coefficients: bool,
}

impl Columns {
    /// What logits of the whole vocabulary are rebuilt from; `None` where the tier cannot.
    pub fn for_logits(manifest: &Manifest) -> Option<Columns> {
        match manifest.tier {
            Tier::Sparse => None,
            Tier::Compact => Some(Columns {
                statistics: true,
                top_k: true,
                coefficients: true,
                layers: Vec::new(),
            }),
            Tier::Exact => Some(Columns {
                statistics: true,
                top_k: manifest.top_k > 0,
                layers: vec![manifest.teacher.num_layers],
                coefficients: false,
            }),
        }
    }

    /// Everything that the cache holds.
    pub fn all(manifest: &Manifest) -> Columns {
        Columns {
            statistics: true,
            top_k: manifest.top_k > 0,
            layers: manifest.layers.iter().map(|spec| spec.layer).collect(),
            coefficients: manifest.code.is_some(),
        }
    }
}

/// What is known of a sequence without decoding it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowInfo {
    /// Shard number.
    pub shard: u32,
    /// Row in the shard.
    pub row: u32,
    /// T.
    pub positions: u32,
    /// Trues in the loss mask, the first token not counted.
    pub targets: u32,
    /// See [`crate::split_hash`].
    pub split_hash: u64,
    /// See [`crate::token_digest`].
    pub token_digest: TokenDigest,
}

/// An open cache; `Send + Sync`, share it in an `Arc`.
#[derive(Debug)]
pub struct Cache {
    store: Store,
    io: Io,
    compared: Compared,
    manifest: Manifest,
    spec: Arc<CacheSpec>,
    shelf: Mutex<Shelf>,
    /// One for every thread that has read at the same time as others.
    workspaces: Mutex<Vec<Workspace>>,
    /// Read with the first shard of a compact cache.
    basis: OnceLock<Arc<Basis>>,
}

impl Cache {
    /// Opens the cache in `dir`: validates the manifest, and the existence and length of every file.
    ///
    /// # Errors
    /// [`Error::NotACache`], [`Error::Unfinished`], [`Error::UnknownVersion`], [`Error::UnknownCodec`],
    /// [`Error::Missing`], [`Error::WrongLength`], [`Error::Damaged`].
    pub fn open(dir: &Path, io: Io) -> Result<Cache> {
        Cache::checked(Store::local(dir), io)
    }

    /// The same in any storage: [`crate::Spread`] where shards lie in other folders.
    pub fn open_in(storage: Arc<dyn Storage>, io: Io) -> Result<Cache> {
        Cache::checked(Store::new(storage), io)
    }

    fn checked(store: Store, io: Io) -> Result<Cache> {
        let manifest = Manifest::load(&store)?;
        for (file, expected) in files(&manifest) {
            store.check(file, expected)?;
        }
        Ok(Cache::new(store, io, Compared::Page, manifest))
    }

    /// For [`crate::verify`], which looks at each file itself and compares everything.
    pub(crate) fn for_verification(store: Store, manifest: Manifest) -> Cache {
        // Read, not mapped: what changes files once may do it again meanwhile.
        Cache::new(store, Io::Read, Compared::Nothing, manifest)
    }

    fn new(store: Store, io: Io, compared: Compared, manifest: Manifest) -> Cache {
        Cache {
            store,
            io,
            compared,
            spec: Arc::new(manifest.spec()),
            manifest,
            shelf: Mutex::default(),
            workspaces: Mutex::default(),
            basis: OnceLock::new(),
        }
    }

    /// What the cache holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.store.root()
    }

    /// What messages call a file.
    pub(crate) fn called(&self, name: &str) -> String {
        self.store.called(name)
    }

    /// Every sequence in cache order, from the small native columns.
    pub fn rows(&self) -> Result<Vec<RowInfo>> {
        let mut rows = Vec::new();
        for index in 0..self.manifest.shards.len() {
            rows.extend(self.shard_rows(index)?);
        }
        Ok(rows)
    }

    /// The sequences of one shard, as [`Cache::rows`] has them.
    pub fn shard_rows(&self, index: usize) -> Result<Vec<RowInfo>> {
        let shard = self.shard(index)?;
        let keys = self.with_workspace(|workspace| shard.keys(workspace))?;
        let positions: u64 = keys.iter().map(|key| u64::from(key.positions)).sum();
        let info = &self.manifest.shards[index];
        if positions != info.positions {
            let message = format!(
                "its rows have {positions} positions, the manifest says {}",
                info.positions
            );
            return Err(Error::damaged(&self.store.called(&info.file), message));
        }
        let rows = keys.into_iter().enumerate().map(|(row, key)| RowInfo {
            shard: index as u32,
            row: row as u32,
            positions: key.positions,
            targets: key.targets,
            split_hash: key.split_hash,
            token_digest: key.digest,
        });
        Ok(rows.collect())
    }

    /// Decodes rows of one shard, in the order asked; checks the checksums of everything that it reads. Callable from
    /// many threads.
    ///
    /// # Errors
    /// [`Error::Damaged`] names shard, column and row; [`Error::NoColumn`] where the cache lacks a column;
    /// [`Error::InvalidRequest`] for a shard or row that does not exist.
    pub fn read(&self, shard: u32, rows: &[u32], columns: &Columns) -> Result<Vec<Sequence>> {
        let mut sequences = Vec::new();
        self.read_into(shard, rows, columns, &mut sequences)?;
        Ok(sequences)
    }

    /// The same into sequences that the caller has: `out` ends up with one for each row, and the memory of those that it
    /// began with is used again, so a loop over a cache allocates nothing.
    ///
    /// # Errors
    /// As [`Cache::read`]; what `out` then holds is of no use.
    pub fn read_into(
        &self,
        shard: u32,
        rows: &[u32],
        columns: &Columns,
        out: &mut Vec<Sequence>,
    ) -> Result<()> {
        let shard = self.shard(shard as usize)?;
        self.with_workspace(|workspace| shard.read(workspace, rows, columns, out))
    }

    /// The LM head, its digest checked; `None` where the cache has none.
    pub fn head(&self) -> Result<Option<Head>> {
        let Some(info) = &self.manifest.head else {
            return Ok(None);
        };
        let source = self.store.open(&info.file, info.bytes, self.io)?;
        let bytes = source
            .range(0, usize::try_from(info.bytes).unwrap_or(usize::MAX))
            .map_err(|error| Error::damaged(&info.file, format!("it cannot be read: {error}")))?;
        if blake3::hash(&bytes).to_hex().as_str() != info.digest {
            return Err(Error::damaged(&info.file, "its digest does not match"));
        }
        crate::head::parse(info, &bytes).map(Some)
    }

    /// Logits \[T·V\] in f32 of a sequence that was read with [`Columns::for_logits`]. For export and witnesses;
    /// allocates them all.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] where the sequence lacks a column, as those of a sparse cache do.
    pub fn rebuild_logits(&self, head: &Head, sequence: &Sequence) -> Result<Vec<f32>> {
        let last = self.manifest.teacher.num_layers;
        crate::logits::rebuild(head, self.basis()?.as_deref(), last, sequence)
    }

    /// The basis of a compact cache, its digest checked; `None` in the other tiers.
    pub fn basis(&self) -> Result<Option<Arc<Basis>>> {
        let Some(code) = &self.manifest.code else {
            return Ok(None);
        };
        if let Some(basis) = self.basis.get() {
            return Ok(Some(basis.clone()));
        }
        let basis = crate::transform::basis::load(&self.store, &code.basis, self.io, &self.spec)?;
        Ok(Some(self.basis.get_or_init(|| Arc::new(basis)).clone()))
    }

    /// Bytes on disk per column over all shards, and `footer` for what is no column; together the shards' lengths.
    pub fn bytes_by_column(&self) -> Result<BTreeMap<String, u64>> {
        let mut totals = BTreeMap::new();
        for (index, info) in self.manifest.shards.iter().enumerate() {
            self.shard(index)?.bytes_by_column(info.bytes, &mut totals);
        }
        Ok(totals)
    }

    fn shard(&self, index: usize) -> Result<Arc<Shard>> {
        let Some(info) = self.manifest.shards.get(index) else {
            let message = format!(
                "the cache has {} shards, not shard {index}",
                self.manifest.shards.len()
            );
            return Err(Error::InvalidRequest(message));
        };
        if let Some(shard) = held(&self.shelf).get(index) {
            return Ok(shard);
        }
        // Two threads may both open it; one result is dropped, which costs less than to wait for each other.
        let source = self.store.open(&info.file, info.bytes, self.io)?;
        let called = ShardInfo {
            file: self.store.called(&info.file),
            ..info.clone()
        };
        let shard = Arc::new(Shard::open(
            &self.spec,
            index,
            &called,
            &source,
            self.basis()?,
        )?);
        held(&self.shelf).put(index, &shard);
        Ok(shard)
    }

    fn with_workspace<T>(&self, work: impl FnOnce(&mut Workspace) -> Result<T>) -> Result<T> {
        let taken = held(&self.workspaces).pop();
        let mut workspace = match taken {
            Some(workspace) => workspace,
            None => Workspace::new(self.compared).map_err(|error| Error::Io {
                action: "make a zstd context for",
                path: self.store.root().to_owned(),
                error,
            })?,
        };
        let result = work(&mut workspace);
        held(&self.workspaces).push(workspace);
        result
    }
}

/// Nothing that holds these locks can panic half way.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What open shards may take in private memory: a few thousand of the usual size. However large a cache is, its reader
/// stays small.
const SHELF_BYTES: usize = 16 << 20;

/// The shards that are open.
#[derive(Debug, Default)]
struct Shelf {
    shards: BTreeMap<usize, Arc<Shard>>,
    /// In the order of their opening.
    order: VecDeque<usize>,
    bytes: usize,
}

impl Shelf {
    fn get(&self, index: usize) -> Option<Arc<Shard>> {
        self.shards.get(&index).cloned()
    }

    /// Adds a shard and closes the longest open ones beyond the limit; who reads them still has them.
    fn put(&mut self, index: usize, shard: &Arc<Shard>) {
        if self.shards.insert(index, shard.clone()).is_some() {
            return;
        }
        self.order.push_back(index);
        self.bytes += shard.footprint();
        while self.bytes > SHELF_BYTES && self.order.len() > 1 {
            let oldest = self.order.pop_front();
            if let Some(closed) = oldest.and_then(|index| self.shards.remove(&index)) {
                self.bytes -= closed.footprint();
            }
        }
    }
}

/// The files that a manifest names, with their lengths.
pub(crate) fn files(manifest: &Manifest) -> impl Iterator<Item = (&str, u64)> {
    let shards = manifest
        .shards
        .iter()
        .map(|info| (info.file.as_str(), info.bytes));
    let head = manifest
        .head
        .iter()
        .map(|info| (info.file.as_str(), info.bytes));
    let basis = manifest
        .code
        .iter()
        .map(|code| (code.basis.file.as_str(), code.basis.bytes));
    shards.chain(head).chain(basis)
}
