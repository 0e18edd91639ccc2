//! Columns, encodings and metadata of a shard, and the checksums of its native columns.

use std::collections::HashMap;
use std::hash::Hasher;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::page::{Layout, Values};
use crate::FORMAT_VERSION;
use crate::frame::{Codec, TOP_K_F16_STEPS, TOP_K_RANKED, TRANSFORM_RANS};
use crate::hidden::codec_of;
use crate::manifest::ColumnInfo;
use crate::sequence::{Statistics, TokenDigest};
use crate::spec::CacheSpec;

pub(super) const SOURCE: &str = "source";
pub(super) const TOKEN_DIGEST: &str = "token_digest";
pub(super) const SPLIT_HASH: &str = "split_hash";
pub(super) const POSITIONS: &str = "positions";
pub(super) const TARGETS: &str = "targets";
pub(super) const TOKEN_IDS: &str = "token_ids";
pub(super) const LOSS_MASK: &str = "loss_mask";
pub(super) const STATISTICS: [&str; 5] = ["mean", "std", "min", "max", "log_sum_exp"];
pub(super) const KEYS_CHECKSUM: &str = "keys_checksum";
pub(super) const TOKENS_CHECKSUM: &str = "tokens_checksum";
pub(super) const STATISTICS_CHECKSUM: &str = "statistics_checksum";
pub(super) const TOP_K: &str = "top_k";
pub(super) const COEFFICIENTS: &str = "coefficients";

/// Key of our metadata in the file, and in the Arrow fields of bulk columns.
pub(super) const METADATA_KEY: &str = "caskd";

/// Pages of native lists: small enough that one row costs little, large enough for many short rows.
const NATIVE_PAGE: usize = 4 << 10;

/// Column name of a layer's hidden state.
pub(crate) fn hidden_column(layer: u32) -> String {
    format!("hidden.{layer}")
}

/// The one name that a shard of this number and digest may have.
pub(crate) fn file_name(shard: usize, digest: &str) -> String {
    format!(
        "{}/{shard:05}-{}.parquet",
        crate::store::SHARDS,
        digest.get(..16).unwrap_or(digest)
    )
}

pub(super) fn scales_key(layer: u32) -> String {
    format!("caskd.scales.{}", hidden_column(layer))
}

/// What a shard says about itself under [`METADATA_KEY`].
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct ShardMetadata {
    pub(super) format_version: u32,
    pub(super) shard: usize,
    pub(super) sequences: u64,
    pub(super) positions: u64,
    pub(super) columns: Vec<ColumnInfo>,
    /// Name of the basis file that `columns` are coded with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) basis: Option<String>,
}

impl ShardMetadata {
    pub(super) fn new(
        spec: &CacheSpec,
        shard: usize,
        sequences: u64,
        positions: u64,
    ) -> ShardMetadata {
        ShardMetadata {
            format_version: FORMAT_VERSION,
            shard,
            sequences,
            positions,
            columns: column_infos(spec),
            basis: spec.code.as_ref().map(|code| code.basis.file.clone()),
        }
    }
}

/// The bulk columns in file order, with their codecs.
pub(crate) fn column_infos(spec: &CacheSpec) -> Vec<ColumnInfo> {
    let column = |name: &str, codec: Codec, parameters: &[(&str, u64)]| ColumnInfo {
        name: name.to_owned(),
        codec: codec.name.to_owned(),
        version: u32::from(codec.version),
        parameters: parameters
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect(),
    };
    let mut columns = Vec::new();
    if spec.top_k > 0 {
        let codec = match spec.code {
            Some(_) => TOP_K_RANKED,
            None => TOP_K_F16_STEPS,
        };
        let (k, vocab_size) = (spec.top_k as u64, spec.vocab_size as u64);
        columns.push(column(
            TOP_K,
            codec,
            &[("k", k), ("vocab_size", vocab_size)],
        ));
    }
    if let Some(code) = &spec.code {
        let rank = code.basis.rank as u64;
        columns.push(column(COEFFICIENTS, TRANSFORM_RANS, &[("rank", rank)]));
    }
    for layer in &spec.layers {
        let name = hidden_column(layer.layer);
        let width = layer.width as u64;
        columns.push(column(&name, codec_of(layer.codec), &[("width", width)]));
    }
    columns
}

fn list_of(data_type: DataType) -> DataType {
    DataType::List(element(data_type))
}

pub(super) fn element(data_type: DataType) -> Arc<Field> {
    Arc::new(Field::new("element", data_type, false))
}

/// The Arrow schema; `blob` is the type of bulk columns.
pub(super) fn arrow_schema(spec: &CacheSpec, blob: &DataType) -> SchemaRef {
    let mut fields = vec![
        Field::new(SOURCE, DataType::Utf8, false),
        Field::new(TOKEN_DIGEST, DataType::FixedSizeBinary(32), false),
        Field::new(SPLIT_HASH, DataType::UInt64, false),
        Field::new(POSITIONS, DataType::UInt32, false),
        Field::new(TARGETS, DataType::UInt32, false),
        Field::new(TOKEN_IDS, list_of(DataType::UInt32), false),
        Field::new(LOSS_MASK, list_of(DataType::Boolean), false),
    ];
    for name in STATISTICS {
        fields.push(Field::new(name, list_of(DataType::Float32), false));
    }
    for name in [KEYS_CHECKSUM, TOKENS_CHECKSUM, STATISTICS_CHECKSUM] {
        fields.push(Field::new(name, DataType::UInt64, false));
    }
    for column in column_infos(spec) {
        // A string map of a plain struct always serialises.
        let codec = serde_json::to_string(&column).unwrap_or_default();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), codec)]);
        fields.push(Field::new(&column.name, list_of(blob.clone()), false).with_metadata(metadata));
    }
    Arc::new(Schema::new(fields))
}

/// Name of every column in file order, and how its values stand in pages.
pub(super) fn layouts(spec: &CacheSpec) -> Vec<(String, Layout)> {
    let values = |data_type: &DataType| match data_type {
        DataType::Boolean => Values::Bits,
        DataType::Float32 => Values::Split,
        DataType::UInt64 => Values::Fixed(8),
        DataType::FixedSizeBinary(width) => Values::Fixed(*width as usize),
        DataType::Utf8 | DataType::Binary => Values::Binary,
        _ => Values::Fixed(4),
    };
    let schema = arrow_schema(spec, &DataType::Binary);
    let fields = schema.fields().iter().map(|field| {
        let (is_list, element) = match field.data_type() {
            DataType::List(element) => (true, element.data_type()),
            other => (false, other),
        };
        let layout = Layout {
            values: values(element),
            is_list,
            is_compressed: *element != DataType::Binary,
        };
        (field.name().clone(), layout)
    });
    fields.collect()
}

pub(super) fn writer_properties(spec: &CacheSpec) -> WriterProperties {
    let list = |name: &str| {
        ColumnPath::new(vec![
            name.to_owned(),
            "list".to_owned(),
            "element".to_owned(),
        ])
    };
    let mut properties = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_created_by("caskd".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_max_row_group_row_count(None)
        // Rows are cut into pages one by one.
        .set_write_batch_size(1)
        .set_data_page_size_limit(NATIVE_PAGE);
    for name in [SPLIT_HASH, POSITIONS, TARGETS] {
        properties = properties
            .set_column_statistics_enabled(ColumnPath::from(name), EnabledStatistics::Chunk);
    }
    for name in STATISTICS {
        properties = properties.set_column_encoding(list(name), Encoding::BYTE_STREAM_SPLIT);
    }
    for column in column_infos(spec) {
        let path = list(&column.name);
        properties = properties
            .set_column_compression(path.clone(), Compression::UNCOMPRESSED)
            .set_column_data_page_row_count_limit(path.clone(), 1)
            // One row is one page however long it is.
            .set_column_data_page_size_limit(path, usize::MAX);
    }
    properties.build()
}

pub(super) fn keys_checksum(
    digest: &TokenDigest,
    split_hash: u64,
    positions: u32,
    targets: u32,
) -> u64 {
    let mut bytes = [0; 48];
    bytes[..32].copy_from_slice(digest);
    bytes[32..40].copy_from_slice(&split_hash.to_le_bytes());
    bytes[40..44].copy_from_slice(&positions.to_le_bytes());
    bytes[44..].copy_from_slice(&targets.to_le_bytes());
    XxHash3_64::oneshot(&bytes)
}

pub(super) fn tokens_checksum(source: &str, token_ids: &[u32], loss_mask: &[bool]) -> u64 {
    let mut hasher = XxHash3_64::new();
    hasher.write(&(source.len() as u32).to_le_bytes());
    hasher.write(source.as_bytes());
    hasher.write(&(token_ids.len() as u32).to_le_bytes());
    hasher.write(bytemuck::cast_slice(token_ids));
    hasher.write(bytemuck::cast_slice(loss_mask));
    hasher.finish()
}

pub(super) fn statistics_checksum(statistics: &Statistics) -> u64 {
    let mut hasher = XxHash3_64::new();
    for column in statistics.columns() {
        hasher.write(bytemuck::cast_slice(column));
    }
    hasher.finish()
}
