//! Building a cache.

use std::path::Path;

use crate::error::Result;
use crate::head::HeadWeights;
use crate::manifest::{Manifest, ShardInfo};
use crate::sequence::Sequence;
use crate::spec::CacheSpec;

/// A build under way; holds an exclusive lock on the folder that dies with the process.
#[derive(Debug)]
pub struct CacheWriter {}

impl CacheWriter {
    /// Begins a cache in `dir` (created if need be), or with `resume` goes on with the unfinished one in it.
    pub fn open(dir: &Path, spec: &CacheSpec, resume: bool) -> Result<CacheWriter> {
        let _ = (dir, spec, resume);
        unimplemented!()
    }

    /// Whether this shard is already on disk, whole.
    pub fn is_done(&self, shard: usize) -> bool {
        let _ = shard;
        unimplemented!()
    }

    /// Writes one shard under a name that contains its digest.
    pub fn write_shard(&mut self, shard: usize, sequences: &[Sequence]) -> Result<ShardInfo> {
        let _ = (shard, sequences);
        unimplemented!()
    }

    /// Writes the LM head.
    pub fn write_head(&mut self, head: &HeadWeights<'_>) -> Result<()> {
        let _ = head;
        unimplemented!()
    }

    /// Publishes the cache: the manifest is written last.
    pub fn finish(self) -> Result<Manifest> {
        unimplemented!()
    }
}
