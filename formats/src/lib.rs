//! The teacher cache on disk: what a teacher said about every position of a text, kept so that students train
//! without the teacher.
//!
//! A cache is a folder: `manifest.json`, immutable Parquet shards named by their digest with a row per sequence,
//! and (exact and compact tier) the teacher's LM head as safetensors. `docs/FORMAT.md` is the byte layout; this crate follows
//! its order. [`CacheWriter`] builds a cache, [`Cache`] reads one, [`verify`] proves that not one bit has changed.
//!
//! Letters used in shapes: T positions (tokens of one sequence), V vocabulary (rows of the LM head), K kept entries
//! of the top-k, D hidden width, L layers.
//!
//! What this crate never does: it knows no tensor library, no tokenizer and no loss; it never overwrites a published
//! file; it never allocates from a length that it has not bounded; it never panics on the content of a file.

#![cfg_attr(test, allow(clippy::unwrap_used))]

// The tests' sample caches name this crate as its users do.
#[cfg(test)]
extern crate self as caskd_formats;

mod alignment;
mod cache;
mod error;
mod exp;
mod fidelity;
mod frame;
#[cfg(test)]
mod fuzz;
mod head;
mod hidden;
mod logits;
mod manifest;
mod sequence;
mod shard;
mod source;
mod spec;
mod store;
mod topk;
mod transform;
mod unchecked;
mod verify;
mod widen;
mod writer;

pub use alignment::{Alignment, AlignmentCheck, OFFSETS};
pub use cache::{Cache, Columns, Io, RowInfo};
pub use error::{Error, Result};
pub use exp::exp_nonpositive;
pub use fidelity::{Fidelity, TEMPERATURES};
pub use head::{Head, HeadWeights};
pub use manifest::{ColumnInfo, FooterInfo, HeadInfo, Manifest, ShardInfo};
pub use sequence::{
    Coefficients, HiddenState, Sequence, Statistics, TokenDigest, TopK, in_fraction, in_validation,
    split_hash, token_digest,
};
pub use source::Source;
pub use spec::{
    BasisInfo, CacheSpec, CodeSpec, CodeTarget, DataFile, DataInfo, HeadDtype, HiddenCodec,
    KnownPositions, LayerSpec, LossOn, Origin, Preparation, Statistic, TeacherInfo, Tier,
    TokenizerInfo, ValueKind,
};
pub use store::{Guard, Local, Memory, Spread, Storage};
pub use transform::{Basis, BasisParts, SymbolCounts, TOP_K_STEPS};
pub use verify::{Problem, VerifyReport, verify, verify_in};
pub use writer::{CacheWriter, SharedBuild, TaskInfo, Work, stored_code, trial_bytes_per_position};

/// Version of the folder, the manifest and the shard schema. A reader refuses every other number.
pub const FORMAT_VERSION: u32 = 1;
