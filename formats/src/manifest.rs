//! `manifest.json`: what a cache holds. Written last, so a folder with a manifest is complete.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::spec::{CacheSpec, DataInfo, HeadDtype, LayerSpec, TeacherInfo, Tier, TokenizerInfo};

/// Codec of one bulk column; stands in the manifest, in every shard's metadata and in the Arrow field.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct ColumnInfo {
    /// Column name, `top_k` or `hidden.{layer}`.
    pub name: String,
    /// Codec name.
    pub codec: String,
    /// Codec version.
    pub version: u32,
    /// What the codec needs to know: `k` and `vocab_size`, or `width`.
    pub parameters: BTreeMap<String, u64>,
}

/// Where a shard's Parquet footer lies, so that it is checked before a parser sees it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct FooterInfo {
    /// Length of the tail of the file: page indexes, footer, footer length and magic.
    pub bytes: u64,
    /// xxh3-64 of that tail, 16 hexadecimal digits.
    pub checksum: String,
}

/// One shard.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// Path in the cache, `shards/00003-<16 hex>.parquet`.
    pub file: String,
    /// blake3, 64 hexadecimal digits; the first 16 stand in the name.
    pub digest: String,
    /// Length of the file.
    pub bytes: u64,
    /// Rows.
    pub sequences: u64,
    /// Sum of the rows' positions.
    pub positions: u64,
    /// The tail of the file.
    pub footer: FooterInfo,
}

/// The teacher's LM head.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct HeadInfo {
    /// Path in the cache, `head-<16 hex>.safetensors`.
    pub file: String,
    /// blake3, 64 hexadecimal digits; the first 16 stand in the name.
    pub digest: String,
    /// Length of the file.
    pub bytes: u64,
    /// Element type.
    pub dtype: HeadDtype,
    /// Rows V.
    pub vocab_size: usize,
    /// Columns D.
    pub width: usize,
}

/// `manifest.json`: the fields of the [`CacheSpec`], the codecs, the files, and a checksum of itself.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`crate::FORMAT_VERSION`].
    pub format_version: u32,
    /// Version of the program that wrote it.
    pub caskd_version: String,
    /// See [`CacheSpec::tier`].
    pub tier: Tier,
    /// See [`CacheSpec::top_k`].
    pub top_k: usize,
    /// See [`CacheSpec::vocab_size`].
    pub vocab_size: usize,
    /// See [`CacheSpec::layers`].
    pub layers: Vec<LayerSpec>,
    /// See [`CacheSpec::sequences_per_shard`].
    pub sequences_per_shard: usize,
    /// See [`CacheSpec::max_len`].
    pub max_len: usize,
    /// See [`CacheSpec::teacher`].
    pub teacher: TeacherInfo,
    /// See [`CacheSpec::tokenizer`].
    pub tokenizer: TokenizerInfo,
    /// See [`CacheSpec::data`].
    pub data: DataInfo,
    /// Codecs of the bulk columns.
    pub columns: Vec<ColumnInfo>,
    /// The shards in order.
    pub shards: Vec<ShardInfo>,
    /// The LM head, where there is one.
    pub head: Option<HeadInfo>,
    /// blake3 of the manifest's bytes without these 64 hexadecimal digits.
    pub checksum: String,
}

impl Manifest {
    /// The spec that the cache was built from.
    pub fn spec(&self) -> CacheSpec {
        CacheSpec {
            tier: self.tier,
            top_k: self.top_k,
            vocab_size: self.vocab_size,
            layers: self.layers.clone(),
            sequences_per_shard: self.sequences_per_shard,
            max_len: self.max_len,
            teacher: self.teacher.clone(),
            tokenizer: self.tokenizer.clone(),
            data: self.data.clone(),
        }
    }
}
