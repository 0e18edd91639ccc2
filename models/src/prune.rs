//! Structured pruning.
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{ActivationNorms, LoadedModel, Result};

/// How much goes, and from where.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// Share of groups and channels removed in every layer of the scope, in [0, 1).
    pub ratio: f64,
    /// Layers pruned; by default all but the first four and the last two (all but the first and
    /// the last below eight layers).
    pub scope: Option<Range<usize>>,
    /// Norms of the inputs of `o_proj` and `down_proj`; with them importance is weighted by
    /// activation.
    pub activation: Option<ActivationNorms>,
}

/// What pruning did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PruneReport {
    /// Parameters before.
    pub parameters_before: u64,
    /// Parameters after.
    pub parameters_after: u64,
    /// Every layer of the network.
    pub layers: Vec<LayerPruning>,
    /// What the user should know, for instance that no KV group was removed.
    pub notes: Vec<String>,
}

/// One layer's sizes before and after.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerPruning {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Query heads before.
    pub heads_before: usize,
    /// Query heads after.
    pub heads_after: usize,
    /// Key/value heads before.
    pub kv_heads_before: usize,
    /// Key/value heads after.
    pub kv_heads_after: usize,
    /// FFN channels before.
    pub channels_before: usize,
    /// FFN channels after.
    pub channels_after: usize,
}

/// Removes the least important KV groups (floor(ratio · groups)) and FFN channels
/// (round(ratio · channels)) of every layer in scope.
pub fn prune(model: &mut LoadedModel, options: &PruneOptions) -> Result<PruneReport> {
    let _ = (model, options);
    unimplemented!("under construction")
}
