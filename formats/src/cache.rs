//! Reading a cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::head::Head;
use crate::manifest::Manifest;
use crate::sequence::{HiddenState, Sequence, TokenDigest};

/// How files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Io {
    /// Memory-mapped: nothing is copied before it is decoded. For local disks.
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
    /// The top-k.
    pub top_k: bool,
    /// Hidden states by layer number.
    pub layers: Vec<u32>,
}

impl Columns {
    /// Everything that the cache holds.
    pub fn all(manifest: &Manifest) -> Columns {
        Columns {
            statistics: true,
            top_k: manifest.top_k > 0,
            layers: manifest.layers.iter().map(|spec| spec.layer).collect(),
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
    dir: PathBuf,
    manifest: Manifest,
}

impl Cache {
    /// Opens the cache in `dir`: validates the manifest, and the existence and length of every file.
    pub fn open(dir: &Path, io: Io) -> Result<Cache> {
        let _ = (dir, io);
        unimplemented!()
    }

    /// What the cache holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every sequence in cache order, from the small native columns.
    pub fn rows(&self) -> Result<Vec<RowInfo>> {
        unimplemented!()
    }

    /// Decodes rows of one shard, in the order asked; checks every checksum on the way. Callable from many threads.
    pub fn read(&self, shard: u32, rows: &[u32], columns: &Columns) -> Result<Vec<Sequence>> {
        let _ = (shard, rows, columns);
        unimplemented!()
    }

    /// The LM head; `None` where the cache has none.
    pub fn head(&self) -> Result<Option<Head>> {
        unimplemented!()
    }

    /// Logits \[T·V\] = hidden · headᵀ in f32.
    pub fn rebuild_logits(&self, head: &Head, hidden: &HiddenState) -> Result<Vec<f32>> {
        let _ = (head, hidden);
        unimplemented!()
    }

    /// Bytes on disk per column, and `footer` for the rest of the shards.
    pub fn bytes_by_column(&self) -> Result<BTreeMap<String, u64>> {
        unimplemented!()
    }
}
