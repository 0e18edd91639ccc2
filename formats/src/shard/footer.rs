//! The tail of a shard: what the file says about itself.
//!
//! The Parquet library parses the footer, from bytes whose checksum was compared. What it would read besides, the offset
//! index, is parsed here, because the library allocates what a forged index claims.

use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::datatypes::DataType;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parquet::arrow::ArrowSchemaConverter;
use parquet::file::metadata::{
    ColumnChunkMetaData, KeyValue, ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData,
};
use twox_hash::XxHash3_64;

use super::page::Layout;
use super::pages::{PAGES_KEY, Page, fill_checksums, parse_offset_index};
use super::schema::{METADATA_KEY, ShardMetadata, arrow_schema, layouts, scales_key};
use super::write::data_end;
use crate::cache::Io;
use crate::error::{Error, Result};
use crate::manifest::{FooterInfo, ShardInfo};
use crate::source::Source;
use crate::spec::{CacheSpec, HiddenCodec};
use crate::store::Store;

/// Length of the footer's length and the magic number, with which every Parquet file ends.
const END: usize = 8;

/// One column of a shard.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) layout: Layout,
    /// Ascending by row, without gap.
    pub(super) pages: Vec<Page>,
    /// Length of its part of the file.
    pub(super) bytes: u64,
}

/// Everything that reading rows needs of a footer.
#[derive(Debug)]
pub(super) struct Footer {
    /// In file order.
    pub(super) columns: Vec<Column>,
    /// Per layer of the spec; empty for f16.
    pub(super) scales: Vec<Vec<f32>>,
}

impl Footer {
    /// Compares the tail of the file with the manifest, then parses it.
    pub(super) fn load(
        spec: &CacheSpec,
        index: usize,
        info: &ShardInfo,
        source: &Source,
    ) -> Result<Footer> {
        let wrong = |message: &str| Error::damaged(&info.file, message);
        let tail = usize::try_from(info.footer.bytes)
            .ok()
            .filter(|tail| *tail as u64 <= info.bytes)
            .ok_or_else(|| wrong("the manifest's footer is longer than the file"))?;
        let start = info.bytes - tail as u64;
        let bytes = source.range(start, tail).map_err(|error| {
            Error::damaged(&info.file, format!("the footer cannot be read: {error}"))
        })?;
        if format!("{:016x}", XxHash3_64::oneshot(&bytes)) != info.footer.checksum {
            return Err(wrong("the footer's checksum does not match"));
        }
        let metadata = parse(&bytes).map_err(|message| Error::damaged(&info.file, message))?;
        check_metadata(spec, index, info, &metadata)?;
        let columns = columns(spec, &metadata, start, &bytes)
            .ok_or_else(|| wrong("its columns or pages are not those of a shard"))?;
        Ok(Footer {
            columns,
            scales: scales(spec, &info.file, &metadata)?,
        })
    }
}

/// The Parquet footer at the end of `tail`. The library panics on some kinds of garbage.
fn parse(tail: &[u8]) -> Result<ParquetMetaData, String> {
    let Some((front, end)) = tail.split_last_chunk::<END>() else {
        return Err("it ends early".to_owned());
    };
    let length = u32::from_le_bytes([end[0], end[1], end[2], end[3]]) as usize;
    let footer = front.len().checked_sub(length).map(|start| &front[start..]);
    let (Some(footer), b"PAR1") = (footer, &end[4..]) else {
        return Err("it does not end as a Parquet file".to_owned());
    };
    catch_unwind(AssertUnwindSafe(|| {
        ParquetMetaDataReader::decode_metadata(footer).map_err(|error| error.to_string())
    }))
    .unwrap_or_else(|_| Err("the Parquet library cannot make sense of it".to_owned()))
}

fn check_metadata(
    spec: &CacheSpec,
    index: usize,
    info: &ShardInfo,
    metadata: &ParquetMetaData,
) -> Result<()> {
    let wrong = |message: String| Err(Error::damaged(&info.file, message));
    let groups = metadata.row_groups();
    let rows = groups.first().map_or(0, RowGroupMetaData::num_rows);
    if groups.len() != 1 || u64::try_from(rows) != Ok(info.sequences) {
        return wrong(format!(
            "{} row groups, {rows} rows in the first, expected {}",
            groups.len(),
            info.sequences
        ));
    }
    let Some(text) = value(metadata, METADATA_KEY) else {
        return wrong("it is no caskd shard".to_owned());
    };
    let found: ShardMetadata = match serde_json::from_str(text) {
        Ok(found) => found,
        Err(error) => return wrong(format!("its metadata cannot be parsed: {error}")),
    };
    if found != ShardMetadata::new(spec, index, info.sequences, info.positions) {
        return wrong("its metadata contradicts the manifest".to_owned());
    }
    Ok(())
}

/// The columns with their pages; `None` where they are not those of the spec. `tail` begins at byte `start` of the file.
fn columns(
    spec: &CacheSpec,
    metadata: &ParquetMetaData,
    start: u64,
    tail: &[u8],
) -> Option<Vec<Column>> {
    let expected = ArrowSchemaConverter::new()
        .convert(&arrow_schema(spec, &DataType::Binary))
        .ok()?;
    let group = metadata.row_groups().first()?;
    let rows = u32::try_from(group.num_rows()).ok()?;
    let layouts = layouts(spec);
    if group.num_columns() != expected.num_columns() || layouts.len() != expected.num_columns() {
        return None;
    }
    let mut columns = Vec::with_capacity(layouts.len());
    for ((chunk, expected), (name, layout)) in
        group.columns().iter().zip(expected.columns()).zip(layouts)
    {
        let found = chunk.column_descr();
        let is_same = found.path() == expected.path()
            && found.physical_type() == expected.physical_type()
            && found.type_length() == expected.type_length()
            && found.max_rep_level() == expected.max_rep_level()
            && found.max_def_level() == expected.max_def_level();
        if !is_same || is_compressed(chunk)? != layout.is_compressed {
            return None;
        }
        let index_start = u64::try_from(chunk.offset_index_offset()?).ok()?;
        let index_start = usize::try_from(index_start.checked_sub(start)?).ok()?;
        let index_length = usize::try_from(chunk.offset_index_length()?).ok()?;
        let index = tail.get(index_start..index_start.checked_add(index_length)?)?;
        let range = chunk_range(chunk)?;
        if range.end > start {
            return None;
        }
        columns.push(Column {
            name,
            layout,
            bytes: range.end - range.start,
            pages: parse_offset_index(index, range, rows)?,
        });
    }
    let table = value(metadata, PAGES_KEY)?;
    let mut pages: Vec<Vec<Page>> = columns
        .iter_mut()
        .map(|column| std::mem::take(&mut column.pages))
        .collect();
    fill_checksums(&mut pages, table)?;
    for (column, pages) in columns.iter_mut().zip(pages) {
        column.pages = pages;
    }
    Some(columns)
}

/// The library's own `byte_range` asserts what a forged footer need not fulfil.
pub(super) fn chunk_range(chunk: &ColumnChunkMetaData) -> Option<std::ops::Range<u64>> {
    let start = u64::try_from(chunk.data_page_offset()).ok()?;
    let length = u64::try_from(chunk.compressed_size()).ok()?;
    Some(start..start.checked_add(length)?)
}

fn is_compressed(chunk: &ColumnChunkMetaData) -> Option<bool> {
    use parquet::basic::Compression;
    match chunk.compression() {
        Compression::UNCOMPRESSED => Some(false),
        Compression::ZSTD(_) => Some(true),
        _ => None,
    }
}

fn value<'a>(metadata: &'a ParquetMetaData, key: &str) -> Option<&'a str> {
    let pairs: &[KeyValue] = metadata.file_metadata().key_value_metadata()?;
    pairs.iter().find(|pair| pair.key == key)?.value.as_deref()
}

fn scales(spec: &CacheSpec, file: &str, metadata: &ParquetMetaData) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(spec.layers.len());
    for layer in &spec.layers {
        if layer.codec == HiddenCodec::F16 {
            all.push(Vec::new());
            continue;
        }
        let bytes =
            value(metadata, &scales_key(layer.layer)).and_then(|text| STANDARD.decode(text).ok());
        let scales: Vec<f32> = bytes
            .unwrap_or_default()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        if scales.len() != layer.width || scales.iter().any(|scale| !scale.is_finite()) {
            return Err(Error::damaged(
                file,
                format!("the scales of layer {} are absent or wrong", layer.layer),
            ));
        }
        all.push(scales);
    }
    Ok(all)
}

/// What the manifest will say of a shard that an earlier process wrote; `None` if it does not belong to this spec.
pub(crate) fn describe(
    store: &Store,
    spec: &CacheSpec,
    index: usize,
    file: &str,
    digest: String,
) -> Result<Option<ShardInfo>> {
    let Some(bytes) = store.length(file)? else {
        return Ok(None);
    };
    let source = store.open(file, bytes, Io::Read)?;
    let tail = |length: u64| {
        let length = length.min(bytes);
        source
            .range(bytes - length, length as usize)
            .map_err(|error| Error::damaged(file, error.to_string()))
    };
    let end = tail(END as u64)?;
    let length = end
        .first_chunk::<4>()
        .map_or(0, |length| u32::from_le_bytes(*length));
    let Ok(parsed) = parse(&tail(u64::from(length) + END as u64)?) else {
        return Ok(None);
    };
    let Some(found) = value(&parsed, METADATA_KEY)
        .and_then(|text| serde_json::from_str::<ShardMetadata>(text).ok())
    else {
        return Ok(None);
    };
    let sequences = spec.sequences_in_shard(index) as u64;
    if found != ShardMetadata::new(spec, index, sequences, found.positions) {
        return Ok(None);
    }
    let footer = tail(bytes.saturating_sub(data_end(&parsed) as u64))?;
    Ok(Some(ShardInfo {
        file: file.to_owned(),
        digest,
        bytes,
        sequences,
        positions: found.positions,
        footer: FooterInfo {
            bytes: footer.len() as u64,
            checksum: format!("{:016x}", XxHash3_64::oneshot(&footer)),
        },
    }))
}
