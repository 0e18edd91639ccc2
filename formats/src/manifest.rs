//! `manifest.json`: what a cache holds. Written last, so a folder with a manifest is complete.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::FORMAT_VERSION;
use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::frame::CODECS;
use crate::shard;
use crate::spec::{
    CacheSpec, CodeSpec, DataInfo, HeadDtype, LayerSpec, Origin, Statistic, TeacherInfo, Tier,
    TokenizerInfo, knows,
};
use crate::store::{MANIFEST, Store};

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
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
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
    /// See [`CacheSpec::code`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<CodeSpec>,
    /// See [`CacheSpec::sequences_per_shard`].
    pub sequences_per_shard: usize,
    /// See [`CacheSpec::max_len`].
    pub max_len: usize,
    /// See [`CacheSpec::teacher`].
    pub teacher: TeacherInfo,
    /// See [`CacheSpec::origin`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
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
    /// How near the cache is to its teacher, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<Fidelity>,
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
            code: self.code.clone(),
            sequences_per_shard: self.sequences_per_shard,
            max_len: self.max_len,
            teacher: self.teacher.clone(),
            origin: self.origin.clone(),
            tokenizer: self.tokenizer.clone(),
            data: self.data.clone(),
        }
    }

    /// See [`CacheSpec::knows`].
    pub fn knows(&self, statistic: Statistic) -> bool {
        knows(self.origin.as_ref(), statistic)
    }

    /// The file's bytes, with the checksum filled in.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let empty = Manifest {
            checksum: String::new(),
            ..self.clone()
        };
        let text = serde_json::to_string_pretty(&empty)
            .map_err(|error| Error::damaged(MANIFEST, error.to_string()))?;
        let Some(front) = text.strip_suffix("\"\n}") else {
            return Err(Error::damaged(
                MANIFEST,
                "the checksum is not its last field",
            ));
        };
        let checksum = checksum(front.as_bytes());
        Ok(format!("{front}{checksum}{TAIL}").into_bytes())
    }

    /// Reads and validates the manifest of a cache.
    pub(crate) fn load(store: &Store) -> Result<Manifest> {
        let Some(bytes) = store.read_small(MANIFEST, SIZE_LIMIT)? else {
            let dir = store.root().to_owned();
            return match store.length(crate::store::PLAN)? {
                Some(_) => Err(Error::Unfinished { dir }),
                None => Err(Error::NotACache { dir }),
            };
        };
        let manifest = Manifest::parse(&bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn parse(bytes: &[u8]) -> Result<Manifest> {
        let damaged = |message: String| Error::damaged(MANIFEST, message);
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| damaged(format!("no JSON: {error}")))?;
        // The version comes first: a later format may keep its checksum elsewhere.
        let version = value
            .get("format_version")
            .and_then(serde_json::Value::as_u64);
        let version = version.ok_or_else(|| damaged("it has no format_version".to_owned()))?;
        let sound = is_sound(bytes);
        if version != u64::from(FORMAT_VERSION) {
            return Err(if sound == Some(false) {
                damaged("its checksum does not match".to_owned())
            } else {
                Error::UnknownVersion {
                    file: MANIFEST.to_owned(),
                    found: version,
                    expected: FORMAT_VERSION,
                }
            });
        }
        if sound != Some(true) {
            return Err(damaged("its checksum does not match".to_owned()));
        }
        serde_json::from_value(value).map_err(|error| damaged(error.to_string()))
    }

    /// Parses and checks a manifest without its checksum, as if an attacker had repaired it.
    #[cfg(test)]
    pub(crate) fn parse_forged(bytes: &[u8]) -> Result<Manifest> {
        let manifest: Manifest = serde_json::from_slice(bytes)
            .map_err(|error| Error::damaged(MANIFEST, error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Whether the fields fit together; a checksum proves nothing against someone who can compute one.
    fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::damaged(MANIFEST, message));
        for column in &self.columns {
            let known = CODECS.iter().any(|codec| {
                codec.name == column.codec && u32::from(codec.version) == column.version
            });
            if !known {
                return Err(Error::UnknownCodec {
                    file: MANIFEST.to_owned(),
                    column: column.name.clone(),
                    codec: column.codec.clone(),
                    version: column.version,
                });
            }
        }
        let spec = self.spec();
        spec.check().or_else(|error| wrong(error.to_string()))?;
        if self.columns != shard::column_infos(&spec) {
            return wrong("its columns contradict its layers and top_k".to_owned());
        }
        if self.shards.len() != spec.num_shards() {
            return wrong(format!(
                "{} shards, {} sequences need {}",
                self.shards.len(),
                spec.data.sequences,
                spec.num_shards()
            ));
        }
        let mut positions = 0_u64;
        for (index, info) in self.shards.iter().enumerate() {
            check_name(
                &info.file,
                &info.digest,
                &shard::file_name(index, &info.digest),
            )?;
            let most = info.sequences.saturating_mul(self.max_len as u64);
            if info.sequences != spec.sequences_in_shard(index) as u64 || info.positions > most {
                return wrong(format!(
                    "`{}` has {} sequences and {} positions, the data has {} for it",
                    info.file,
                    info.sequences,
                    info.positions,
                    spec.sequences_in_shard(index)
                ));
            }
            positions = positions.saturating_add(info.positions);
        }
        if positions != self.data.positions {
            return wrong(format!(
                "the shards have {positions} positions, the data {}",
                self.data.positions
            ));
        }
        if let Some(code) = &self.code {
            let expected = crate::transform::basis::file_name(&code.basis.digest);
            check_name(&code.basis.file, &code.basis.digest, &expected)?;
        }
        let width = match self.tier {
            Tier::Sparse => None,
            Tier::Compact => Some(self.teacher.hidden_size),
            Tier::Exact => self.layers.last().map(|last| last.width),
        };
        match (&self.head, width) {
            (None, Some(_)) => wrong("the exact and the compact tier need the LM head".to_owned()),
            (None, None) => Ok(()),
            (Some(head), width) => {
                check_name(
                    &head.file,
                    &head.digest,
                    &crate::head::file_name(&head.digest),
                )?;
                if head.vocab_size != self.vocab_size
                    || width.is_some_and(|width| width != head.width)
                {
                    return wrong(format!(
                        "a head of {} x {} does not fit",
                        head.vocab_size, head.width
                    ));
                }
                Ok(())
            }
        }
    }
}

/// Far above the manifest of any cache that fits on a disk.
const SIZE_LIMIT: u64 = 64 << 20;

/// What follows the checksum's digits.
const TAIL: &str = "\"\n}\n";

const CHECKSUM_FIELD: &[u8] = b"  \"checksum\": \"";

/// blake3 of the manifest without the digits.
fn checksum(front: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(front).update(TAIL.as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// `None`: there is no checksum where this version has it.
fn is_sound(bytes: &[u8]) -> Option<bool> {
    let body = bytes.strip_suffix(TAIL.as_bytes())?;
    let (front, digits) = body.split_at_checked(body.len().checked_sub(64)?)?;
    front
        .ends_with(CHECKSUM_FIELD)
        .then(|| checksum(front).as_bytes() == digits)
}

/// A file's name must be the one that follows from its digest, so no name leads out of the folder.
fn check_name(file: &str, digest: &str, expected: &str) -> Result<()> {
    let plain = !file.starts_with('/')
        && !file.contains(['\\', ':', '\0'])
        && !file.split('/').any(|part| part == "..");
    if !plain {
        return Err(Error::damaged(
            MANIFEST,
            format!("the path `{}` leads out of the cache", file.escape_debug()),
        ));
    }
    if digest.len() != 64
        || !digest
            .bytes()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err(Error::damaged(
            MANIFEST,
            format!("`{}` has no blake3 digest", file.escape_debug()),
        ));
    }
    if file != expected {
        return Err(Error::damaged(
            MANIFEST,
            format!("`{}` should be named `{expected}`", file.escape_debug()),
        ));
    }
    Ok(())
}
