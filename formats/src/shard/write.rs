//! Sequences to the bytes of a shard.

use std::io::Write;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, FixedSizeBinaryArray, Float32Array, ListArray,
    RecordBatch, StringArray, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::DataType;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::{
    FileMetaData, KeyValue, ParquetMetaData, ParquetMetaDataBuilder, ParquetMetaDataWriter,
    RowGroupMetaData,
};
use parquet::file::writer::TrackedWrite;
use twox_hash::XxHash3_64;

use super::footer::chunk_range;
use super::pages::{PAGES_KEY, checksum, table};
use super::schema::{
    COEFFICIENTS, METADATA_KEY, ShardMetadata, TOP_K, arrow_schema, element, hidden_column,
    keys_checksum, scales_key, statistics_checksum, tokens_checksum, writer_properties,
};
use crate::error::{Error, Result};
use crate::frame::Encoder;
use crate::manifest::FooterInfo;
use crate::sequence::{Sequence, Statistics, count_targets, token_digest};
use crate::spec::{CacheSpec, HiddenCodec};
use crate::transform::{Basis, coefficients, ranked};
use crate::{hidden, topk};

/// A shard in memory, not yet named.
pub(crate) struct EncodedShard {
    pub(crate) bytes: Vec<u8>,
    pub(crate) positions: u64,
    pub(crate) footer: FooterInfo,
}

/// Encodes shard number `shard`; every sequence is checked first.
pub(crate) fn encode_shard(
    spec: &CacheSpec,
    basis: Option<&Basis>,
    shard: usize,
    sequences: &[Sequence],
) -> Result<EncodedShard> {
    for sequence in sequences {
        check(spec, sequence)?;
    }
    let positions = sequences
        .iter()
        .map(|sequence| sequence.token_ids.len() as u64)
        .sum();
    let scales: Vec<Vec<f32>> = spec
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| match layer.codec {
            HiddenCodec::Int8 => {
                let states: Vec<_> = sequences
                    .iter()
                    .map(|sequence| &sequence.hidden[index])
                    .collect();
                hidden::channel_scales(&states, layer.width)
            }
            HiddenCodec::F16 => Vec::new(),
        })
        .collect();

    let (data, metadata) =
        write_rows(spec, basis, sequences, &scales).map_err(|error| Error::Encode {
            shard,
            message: error.to_string(),
        })?;
    let own = ShardMetadata::new(spec, shard, sequences.len() as u64, positions);
    let (tail, bytes) =
        add_metadata(spec, data, &metadata, &own, &scales).map_err(|error| Error::Encode {
            shard,
            message: error.to_string(),
        })?;
    let footer = FooterInfo {
        bytes: (bytes.len() - tail) as u64,
        checksum: format!("{:016x}", XxHash3_64::oneshot(&bytes[tail..])),
    };
    Ok(EncodedShard {
        bytes,
        positions,
        footer,
    })
}

type Failure = Box<dyn std::error::Error>;

/// A Parquet file without our metadata.
fn write_rows(
    spec: &CacheSpec,
    basis: Option<&Basis>,
    sequences: &[Sequence],
    scales: &[Vec<f32>],
) -> Result<(Vec<u8>, ParquetMetaData), Failure> {
    let mut bytes = Vec::new();
    let schema = arrow_schema(spec, &DataType::Binary);
    let mut writer =
        ArrowWriter::try_new(&mut bytes, schema.clone(), Some(writer_properties(spec)))?;
    let mut encoder = Encoder::new()?;
    for sequence in sequences {
        let columns = columns(spec, basis, sequence, scales, &mut encoder)?;
        writer.write(&RecordBatch::try_new(schema.clone(), columns)?)?;
    }
    let metadata = writer.close()?;
    Ok((bytes, metadata))
}

/// The same file with a footer that carries our metadata, and where its tail begins. The checksums of pages are not known
/// before all pages are written, so the library's own footer is replaced.
fn add_metadata(
    spec: &CacheSpec,
    mut data: Vec<u8>,
    metadata: &ParquetMetaData,
    own: &ShardMetadata,
    scales: &[Vec<f32>],
) -> Result<(usize, Vec<u8>), Failure> {
    let tail = data_end(metadata).min(data.len());
    let file = metadata.file_metadata();
    let mut pairs = file.key_value_metadata().cloned().unwrap_or_default();
    pairs.push(KeyValue::new(
        METADATA_KEY.to_owned(),
        serde_json::to_string(own)?,
    ));
    for (layer, scales) in spec
        .layers
        .iter()
        .zip(scales)
        .filter(|(_, scales)| !scales.is_empty())
    {
        let text = STANDARD.encode(bytemuck::cast_slice::<f32, u8>(scales));
        pairs.push(KeyValue::new(scales_key(layer.layer), text));
    }
    let checksums = page_checksums(&data, metadata).ok_or("the library wrote no page index")?;
    pairs.push(KeyValue::new(PAGES_KEY.to_owned(), table(checksums)));
    let file = FileMetaData::new(
        file.version(),
        file.num_rows(),
        file.created_by().map(str::to_owned),
        Some(pairs),
        file.schema_descr_ptr(),
        file.column_orders().cloned(),
    );
    let metadata = ParquetMetaDataBuilder::new(file)
        .set_row_groups(metadata.row_groups().to_vec())
        .set_page_index(metadata.page_index().cloned())
        .build();
    data.truncate(tail);
    let mut bytes = Vec::with_capacity(tail + (64 << 10));
    let mut tracked = TrackedWrite::new(&mut bytes);
    tracked.write_all(&data)?;
    ParquetMetaDataWriter::new_with_tracked(tracked, &metadata).finish()?;
    Ok((tail, bytes))
}

/// Checksums of all pages, columns in file order; `None` where the library's index makes no sense.
fn page_checksums(data: &[u8], metadata: &ParquetMetaData) -> Option<Vec<u32>> {
    let index = metadata.page_index_for_row_group(0);
    let mut checksums = Vec::new();
    for column in 0..metadata.row_groups().first()?.num_columns() {
        for location in index.page_locations(column)? {
            let start = usize::try_from(location.offset).ok()?;
            let length = usize::try_from(location.compressed_page_size).ok()?;
            checksums.push(checksum(data.get(start..start.checked_add(length)?)?));
        }
    }
    Some(checksums)
}

/// Where the last column chunk ends and the tail begins.
pub(super) fn data_end(metadata: &ParquetMetaData) -> usize {
    let chunks = metadata
        .row_groups()
        .iter()
        .flat_map(RowGroupMetaData::columns);
    let ends = chunks.filter_map(|chunk| Some(chunk_range(chunk)?.end as usize));
    ends.max().unwrap_or(0)
}

fn check(spec: &CacheSpec, sequence: &Sequence) -> Result<()> {
    let positions = sequence.token_ids.len();
    let wrong =
        |column: &str, message: String| Err(Error::invalid(&sequence.source, column, message));
    if positions == 0 || positions > spec.max_len {
        return wrong(
            "token_ids",
            format!("{positions} positions, expected 1..={}", spec.max_len),
        );
    }
    if let Some(id) = sequence
        .token_ids
        .iter()
        .find(|id| **id as usize >= spec.vocab_size)
    {
        return wrong(
            "token_ids",
            format!(
                "token id {id} is beyond the vocabulary of {}",
                spec.vocab_size
            ),
        );
    }
    if sequence.loss_mask.len() != positions {
        return wrong(
            "loss_mask",
            format!(
                "{} entries for {positions} tokens",
                sequence.loss_mask.len()
            ),
        );
    }
    let Some(statistics) = &sequence.statistics else {
        return wrong("statistics", "absent".to_owned());
    };
    check_statistics(sequence, statistics)?;
    match &sequence.top_k {
        Some(top_k) if spec.top_k > 0 => {
            topk::check(top_k, &statistics.max, spec.top_k, spec.vocab_size)
                .map_err(|message| Error::invalid(&sequence.source, TOP_K, message))?;
            // The grid of the compact tier makes ties of its own, so there they mean nothing.
            if spec.code.is_none() {
                topk::check_ties(top_k).or_else(|message| wrong(TOP_K, message))?;
            }
        }
        None if spec.top_k == 0 => {}
        Some(_) => return wrong(TOP_K, "present, but the plan keeps none".to_owned()),
        None => return wrong(TOP_K, "absent".to_owned()),
    }
    check_coefficients(spec, sequence)?;
    let found: Vec<u32> = sequence.hidden.iter().map(|state| state.layer).collect();
    let planned: Vec<u32> = spec.layers.iter().map(|layer| layer.layer).collect();
    if found != planned {
        return wrong(
            "hidden",
            format!("layers {found:?}, the plan keeps {planned:?}"),
        );
    }
    for (state, layer) in sequence.hidden.iter().zip(&spec.layers) {
        hidden::check(state, layer, positions).map_err(|message| {
            Error::invalid(&sequence.source, hidden_column(layer.layer), message)
        })?;
    }
    Ok(())
}

fn check_coefficients(spec: &CacheSpec, sequence: &Sequence) -> Result<()> {
    let wrong =
        |column: &str, message: String| Err(Error::invalid(&sequence.source, column, message));
    match (&spec.code, &sequence.coefficients) {
        (None, None) => Ok(()),
        (None, Some(_)) => wrong(COEFFICIENTS, "present, but the plan keeps none".to_owned()),
        (Some(_), None) => wrong(COEFFICIENTS, "absent".to_owned()),
        (Some(code), Some(found)) => {
            // The grid of this tier has no place for an infinity.
            let logits = sequence.top_k.iter().flat_map(|top_k| &top_k.logits);
            if logits.into_iter().any(|logit| !logit.is_finite()) {
                return wrong(TOP_K, "a logit is not finite".to_owned());
            }
            coefficients::check(found, code.basis.rank, sequence.token_ids.len())
                .or_else(|message| wrong(COEFFICIENTS, message))
        }
    }
}

fn check_statistics(sequence: &Sequence, statistics: &Statistics) -> Result<()> {
    for (name, values) in super::schema::STATISTICS
        .into_iter()
        .zip(statistics.columns())
    {
        let wrong = |message: String| Err(Error::invalid(&sequence.source, name, message));
        if values.len() != sequence.token_ids.len() {
            return wrong(format!(
                "{} values for {} tokens",
                values.len(),
                sequence.token_ids.len()
            ));
        }
        let must_be_finite = matches!(name, "max" | "log_sum_exp");
        let refused = |value: &f32| value.is_nan() || must_be_finite && !value.is_finite();
        if let Some(position) = values.iter().position(refused) {
            return wrong(format!("{} at position {position}", values[position]));
        }
    }
    Ok(())
}

/// The arrays of one checked sequence, in the order of the schema.
fn columns(
    spec: &CacheSpec,
    basis: Option<&Basis>,
    sequence: &Sequence,
    scales: &[Vec<f32>],
    encoder: &mut Encoder,
) -> Result<Vec<ArrayRef>, Failure> {
    let digest = token_digest(&sequence.token_ids);
    let split_hash = crate::split_hash(&sequence.token_ids);
    let positions = sequence.token_ids.len() as u32;
    let targets = count_targets(&sequence.loss_mask);
    let statistics = sequence
        .statistics
        .as_ref()
        .ok_or("statistics are absent")?;

    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec![sequence.source.as_str()])),
        Arc::new(FixedSizeBinaryArray::try_from_iter([digest].into_iter())?),
        Arc::new(UInt64Array::from(vec![split_hash])),
        Arc::new(UInt32Array::from(vec![positions])),
        Arc::new(UInt32Array::from(vec![targets])),
        one_list(Arc::new(UInt32Array::from(sequence.token_ids.clone())))?,
        one_list(Arc::new(BooleanArray::from(sequence.loss_mask.clone())))?,
    ];
    for values in statistics.columns() {
        columns.push(one_list(Arc::new(Float32Array::from(values.to_vec())))?);
    }
    for checksum in [
        keys_checksum(&digest, split_hash, positions, targets),
        tokens_checksum(&sequence.source, &sequence.token_ids, &sequence.loss_mask),
        statistics_checksum(statistics),
    ] {
        columns.push(Arc::new(UInt64Array::from(vec![checksum])));
    }
    if let Some(top_k) = &sequence.top_k {
        columns.push(blobs(&match basis {
            Some(basis) => ranked::encode(encoder, basis, top_k),
            None => topk::encode(encoder, top_k, spec.vocab_size, topk::favour(spec))?,
        })?);
    }
    if let (Some(basis), Some(found)) = (basis, &sequence.coefficients) {
        columns.push(blobs(&coefficients::encode(encoder, basis, found))?);
    }
    for ((state, layer), scales) in sequence.hidden.iter().zip(&spec.layers).zip(scales) {
        columns.push(blobs(&hidden::encode(encoder, state, layer, scales)?)?);
    }
    Ok(columns)
}

fn one_list(values: ArrayRef) -> Result<ArrayRef, arrow::error::ArrowError> {
    let offsets = OffsetBuffer::from_lengths([values.len()]);
    Ok(Arc::new(ListArray::try_new(
        element(values.data_type().clone()),
        offsets,
        values,
        None,
    )?))
}

fn blobs(blobs: &[Vec<u8>]) -> Result<ArrayRef, arrow::error::ArrowError> {
    one_list(Arc::new(BinaryArray::from_iter_values(blobs)))
}
