//! The bytes of a shard to sequences.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, AsArray, GenericListArray, RecordBatch};
use arrow::datatypes::{DataType, Float32Type, UInt32Type, UInt64Type};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder, RowSelection, RowSelectionPolicy, RowSelector,
};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader, RowGroupMetaData};
use xxhash_rust::xxh3::xxh3_64;

use super::pages::{PAGES_KEY, PageFault, PageReader, Pages};
use super::schema::{
    COEFFICIENTS, KEYS_CHECKSUM, LOSS_MASK, METADATA_KEY, POSITIONS, SOURCE, SPLIT_HASH,
    STATISTICS, STATISTICS_CHECKSUM, ShardMetadata, TARGETS, TOKEN_DIGEST, TOKEN_IDS,
    TOKENS_CHECKSUM, TOP_K, arrow_schema, hidden_column, keys_checksum, scales_key,
    statistics_checksum, tokens_checksum,
};
use super::write::data_end;
use crate::cache::{Columns, Io};
use crate::error::{Error, Result};
use crate::frame::Decoder;
use crate::manifest::{FooterInfo, ShardInfo};
use crate::sequence::{Sequence, Statistics, TokenDigest};
use crate::source::Source;
use crate::spec::{CacheSpec, HiddenCodec};
use crate::store::Store;
use crate::transform::{Basis, coefficients, ranked};
use crate::{hidden, topk};

/// Rows decoded together: enough to share the set-up, few enough to bound the memory of `Io::Read`.
const ROWS_PER_BATCH: usize = 32;

/// The small columns of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) digest: TokenDigest,
    pub(crate) split_hash: u64,
    pub(crate) positions: u32,
    pub(crate) targets: u32,
}

/// An open shard with its footer parsed.
#[derive(Debug)]
pub(crate) struct Shard {
    file: String,
    rows: usize,
    source: Source,
    metadata: ArrowReaderMetadata,
    pages: Arc<Pages>,
    spec: CacheSpec,
    /// Per layer of the spec; empty for f16.
    scales: Vec<Vec<f32>>,
    /// In the compact tier.
    basis: Option<Arc<Basis>>,
}

impl Shard {
    /// Checks the tail of the file, then parses it.
    pub(crate) fn open(
        spec: &CacheSpec,
        index: usize,
        info: &ShardInfo,
        source: &Source,
        basis: Option<Arc<Basis>>,
    ) -> Result<Shard> {
        let file = info.file.clone();
        let tail = usize::try_from(info.footer.bytes)
            .ok()
            .filter(|tail| *tail as u64 <= info.bytes);
        let Some(tail) = tail else {
            return Err(Error::damaged(
                &file,
                "the manifest's footer is longer than the file",
            ));
        };
        let bytes = source
            .range(info.bytes - tail as u64, tail)
            .map_err(|error| {
                Error::damaged(&file, format!("the footer cannot be read: {error}"))
            })?;
        if format!("{:016x}", xxh3_64(&bytes)) != info.footer.checksum {
            return Err(Error::damaged(
                &file,
                "the footer's checksum does not match",
            ));
        }
        guarded(&file, || {
            let list = DataType::BinaryView;
            let options = ArrowReaderOptions::new()
                .with_offset_index_policy(PageIndexPolicy::Required)
                .with_column_index_policy(PageIndexPolicy::Skip)
                .with_schema(arrow_schema(spec, &list));
            let metadata = ArrowReaderMetadata::load(source, options)
                .map_err(|error| Error::damaged(&file, error.to_string()))?;
            check_metadata(spec, index, info, &metadata)?;
            let scales = scales(spec, &file, &metadata)?;
            let pages = Pages::load(&file, metadata.metadata(), value(&metadata, PAGES_KEY))?;
            Ok(Shard {
                file: file.clone(),
                rows: info.sequences as usize,
                source: source.clone(),
                metadata,
                pages: Arc::new(pages),
                spec: spec.clone(),
                scales,
                basis,
            })
        })
    }

    /// The small columns of every row.
    pub(crate) fn keys(&self) -> Result<Vec<Key>> {
        let mut keys = Vec::with_capacity(self.rows);
        let wanted = [TOKEN_DIGEST, SPLIT_HASH, POSITIONS, TARGETS, KEYS_CHECKSUM];
        self.for_each_batch(&wanted, None, 8192, |batch| {
            let digests = self.column(batch, TOKEN_DIGEST)?.as_fixed_size_binary_opt();
            let digests =
                digests.ok_or_else(|| self.damaged("column token_digest has another type"))?;
            let splits = self.column(batch, SPLIT_HASH)?.as_primitive::<UInt64Type>();
            let positions = self.column(batch, POSITIONS)?.as_primitive::<UInt32Type>();
            let targets = self.column(batch, TARGETS)?.as_primitive::<UInt32Type>();
            let checksums = self
                .column(batch, KEYS_CHECKSUM)?
                .as_primitive::<UInt64Type>();
            for row in 0..batch.num_rows() {
                let digest = digests.value(row).try_into();
                let digest =
                    digest.map_err(|_| self.damaged("column token_digest has another width"))?;
                let key = Key {
                    digest,
                    split_hash: splits.value(row),
                    positions: positions.value(row),
                    targets: targets.value(row),
                };
                let found = keys_checksum(&key.digest, key.split_hash, key.positions, key.targets);
                if found != checksums.value(row) {
                    let column = "token_digest, split_hash, positions, targets";
                    return Err(self.damaged_at(
                        column,
                        keys.len() as u64,
                        "the checksum does not match",
                    ));
                }
                keys.push(key);
            }
            Ok(())
        })?;
        if keys.len() != self.rows {
            return Err(self.damaged(&format!("{} rows instead of {}", keys.len(), self.rows)));
        }
        Ok(keys)
    }

    /// Rows in the order asked, each decoded once.
    pub(crate) fn read(&self, rows: &[u32], columns: &Columns) -> Result<Vec<Sequence>> {
        let mut sorted = rows.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if let Some(last) = sorted.last().filter(|last| **last as usize >= self.rows) {
            return Err(Error::InvalidRequest(format!(
                "`{}` has {} rows, not row {last}",
                self.file, self.rows
            )));
        }
        let mut decoded = self.read_sorted(&sorted, columns)?;
        if rows.windows(2).all(|pair| pair[0] < pair[1]) {
            return Ok(decoded);
        }
        let mut uses = vec![0_u32; sorted.len()];
        let places: Vec<usize> = rows
            .iter()
            .map(|row| sorted.partition_point(|other| other < row))
            .collect();
        for place in &places {
            uses[*place] += 1;
        }
        Ok(places
            .into_iter()
            .map(|place| {
                uses[place] -= 1;
                if uses[place] == 0 {
                    std::mem::take(&mut decoded[place])
                } else {
                    decoded[place].clone()
                }
            })
            .collect())
    }

    fn read_sorted(&self, rows: &[u32], columns: &Columns) -> Result<Vec<Sequence>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let layers = self.layers(columns)?;
        let names: Vec<String> = layers
            .iter()
            .map(|index| hidden_column(self.spec.layers[*index].layer))
            .collect();
        let mut wanted = vec![SOURCE, TOKEN_IDS, LOSS_MASK, TOKENS_CHECKSUM];
        // The top-k is stored relative to the maximum, which is a statistic.
        if columns.statistics || columns.top_k {
            wanted.extend(STATISTICS);
            wanted.push(STATISTICS_CHECKSUM);
        }
        if columns.top_k {
            wanted.push(TOP_K);
        }
        if columns.coefficients {
            wanted.push(COEFFICIENTS);
        }
        wanted.extend(names.iter().map(String::as_str));

        let mut decoder = Decoder::new().map_err(|error| self.damaged(&error.to_string()))?;
        let mut sequences = Vec::with_capacity(rows.len());
        self.for_each_batch(&wanted, Some(rows), ROWS_PER_BATCH, |batch| {
            for row in 0..batch.num_rows() {
                let place = RowOf {
                    batch,
                    row,
                    number: u64::from(rows[sequences.len().min(rows.len() - 1)]),
                };
                sequences.push(self.decode(&place, columns, &layers, &mut decoder)?);
            }
            Ok(())
        })?;
        if sequences.len() != rows.len() {
            return Err(self.damaged(&format!(
                "{} rows came instead of {}",
                sequences.len(),
                rows.len()
            )));
        }
        Ok(sequences)
    }

    fn decode(
        &self,
        row: &RowOf<'_>,
        columns: &Columns,
        layers: &[usize],
        decoder: &mut Decoder,
    ) -> Result<Sequence> {
        let source = self
            .column(row.batch, SOURCE)?
            .as_string::<i32>()
            .value(row.row)
            .to_owned();
        let token_ids = self
            .list(row, TOKEN_IDS)?
            .as_primitive::<UInt32Type>()
            .values()
            .to_vec();
        let loss_mask: Vec<bool> = self
            .list(row, LOSS_MASK)?
            .as_boolean()
            .values()
            .iter()
            .collect();
        let stored = self
            .column(row.batch, TOKENS_CHECKSUM)?
            .as_primitive::<UInt64Type>()
            .value(row.row);
        if token_ids.len() != loss_mask.len()
            || tokens_checksum(&source, &token_ids, &loss_mask) != stored
        {
            return Err(self.damaged_at(
                "source, token_ids, loss_mask",
                row.number,
                "the checksum does not match",
            ));
        }
        let positions = token_ids.len();
        let mut sequence = Sequence {
            source,
            token_ids,
            loss_mask,
            ..Sequence::default()
        };
        if columns.statistics || columns.top_k {
            sequence.statistics = Some(self.decode_statistics(row, positions)?);
        }
        if let (true, Some(statistics)) = (columns.top_k, &sequence.statistics) {
            let blobs = self.list(row, TOP_K)?;
            let blobs = blobs.as_binary_view().iter().flatten();
            let (k, vocab_size) = (self.spec.top_k, self.spec.vocab_size);
            let top_k = match &self.basis {
                Some(basis) => ranked::decode(blobs, basis, &statistics.max),
                None => topk::decode(decoder, blobs, &statistics.max, k, vocab_size),
            }
            .map_err(|fault| fault.at(&self.file, TOP_K, row.number))?;
            sequence.top_k = Some(top_k);
        }
        if let (true, Some(basis)) = (columns.coefficients, &self.basis) {
            let blobs = self.list(row, COEFFICIENTS)?;
            let blobs = blobs.as_binary_view().iter().flatten();
            let found = coefficients::decode(blobs, basis, positions)
                .map_err(|fault| fault.at(&self.file, COEFFICIENTS, row.number))?;
            sequence.coefficients = Some(found);
        }
        if !columns.statistics {
            sequence.statistics = None;
        }
        for index in layers {
            let layer = &self.spec.layers[*index];
            let name = hidden_column(layer.layer);
            let blobs = self.list(row, &name)?;
            let blobs = blobs.as_binary_view().iter().flatten();
            let state = hidden::decode(decoder, blobs, layer, &self.scales[*index], positions)
                .map_err(|fault| fault.at(&self.file, &name, row.number))?;
            sequence.hidden.push(state);
        }
        Ok(sequence)
    }

    fn decode_statistics(&self, row: &RowOf<'_>, positions: usize) -> Result<Statistics> {
        let values = |name: &str| -> Result<Vec<f32>> {
            Ok(self
                .list(row, name)?
                .as_primitive::<Float32Type>()
                .values()
                .to_vec())
        };
        let statistics = Statistics {
            mean: values(STATISTICS[0])?,
            std: values(STATISTICS[1])?,
            min: values(STATISTICS[2])?,
            max: values(STATISTICS[3])?,
            log_sum_exp: values(STATISTICS[4])?,
        };
        let stored = self
            .column(row.batch, STATISTICS_CHECKSUM)?
            .as_primitive::<UInt64Type>()
            .value(row.row);
        if statistics
            .columns()
            .iter()
            .any(|column| column.len() != positions)
            || statistics_checksum(&statistics) != stored
        {
            return Err(self.damaged_at(
                &STATISTICS.join(", "),
                row.number,
                "the checksum does not match",
            ));
        }
        Ok(statistics)
    }

    /// Compressed bytes per column; what is no column counts as `footer`.
    pub(crate) fn bytes_by_column(&self, file_bytes: u64, totals: &mut BTreeMap<String, u64>) {
        let mut left = file_bytes;
        for chunk in self
            .metadata
            .metadata()
            .row_groups()
            .iter()
            .flat_map(RowGroupMetaData::columns)
        {
            let bytes = u64::try_from(chunk.compressed_size())
                .unwrap_or(0)
                .min(left);
            let name = chunk
                .column_path()
                .parts()
                .first()
                .cloned()
                .unwrap_or_default();
            *totals.entry(name).or_default() += bytes;
            left -= bytes;
        }
        *totals.entry("footer".to_owned()).or_default() += left;
    }

    /// Positions of the asked layers in the spec, ascending.
    fn layers(&self, columns: &Columns) -> Result<Vec<usize>> {
        let available = || {
            let names = super::column_infos(&self.spec)
                .into_iter()
                .map(|column| column.name);
            names
                .chain(["statistics".to_owned()])
                .collect::<Vec<_>>()
                .join(", ")
        };
        if columns.top_k && self.spec.top_k == 0 {
            return Err(Error::NoColumn {
                column: TOP_K.to_owned(),
                available: available(),
            });
        }
        if columns.coefficients && self.spec.code.is_none() {
            return Err(Error::NoColumn {
                column: COEFFICIENTS.to_owned(),
                available: available(),
            });
        }
        let mut found = Vec::with_capacity(columns.layers.len());
        for layer in &columns.layers {
            match self
                .spec
                .layers
                .iter()
                .position(|spec| spec.layer == *layer)
            {
                Some(index) => found.push(index),
                None => {
                    return Err(Error::NoColumn {
                        column: hidden_column(*layer),
                        available: available(),
                    });
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn for_each_batch(
        &self,
        wanted: &[&str],
        rows: Option<&[u32]>,
        batch_size: usize,
        mut each: impl FnMut(&RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let fault = Arc::new(OnceLock::new());
        let failed = |message: String| match fault.get() {
            Some(fault) => self.page_damaged(fault),
            None => self.damaged(&message),
        };
        guarded(&self.file, || {
            let reader = self.reader(wanted, rows, batch_size, fault.clone());
            for batch in reader.map_err(|error| failed(error.to_string()))? {
                each(&batch.map_err(|error| failed(error.to_string()))?)?;
            }
            Ok(())
        })
    }

    fn page_damaged(&self, fault: &PageFault) -> Error {
        let columns = self.metadata.parquet_schema().columns();
        let parts = columns
            .get(fault.column)
            .and_then(|column| column.path().parts().first());
        let is_one = fault.end_row - fault.first_row == 1;
        Error::Damaged {
            file: self.file.clone(),
            column: parts.cloned(),
            row: is_one.then_some(fault.first_row),
            message: if is_one {
                "the page's checksum does not match".to_owned()
            } else {
                format!(
                    "the checksum of the page with rows {} to {} does not match",
                    fault.first_row,
                    fault.end_row - 1
                )
            },
        }
    }

    fn reader(
        &self,
        wanted: &[&str],
        rows: Option<&[u32]>,
        batch_size: usize,
        fault: Arc<OnceLock<PageFault>>,
    ) -> parquet::errors::Result<ParquetRecordBatchReader> {
        let fields = self.metadata.schema().fields();
        let roots = fields
            .iter()
            .enumerate()
            .filter(|(_, field)| wanted.contains(&field.name().as_str()));
        let mask = ProjectionMask::roots(
            self.metadata.parquet_schema(),
            roots.map(|(index, _)| index),
        );
        let source = PageReader {
            source: self.source.clone(),
            pages: self.pages.clone(),
            fault,
        };
        let builder =
            ParquetRecordBatchReaderBuilder::new_with_metadata(source, self.metadata.clone())
                .with_projection(mask)
                .with_batch_size(batch_size)
                // A mask would decode whole pages to drop most of them again.
                .with_row_selection_policy(RowSelectionPolicy::Selectors);
        match rows {
            Some(rows) if rows.len() < self.rows => {
                builder.with_row_selection(selection(rows)).build()
            }
            _ => builder.build(),
        }
    }

    fn column<'a>(&self, batch: &'a RecordBatch, name: &str) -> Result<&'a dyn Array> {
        match batch.column_by_name(name) {
            Some(column) if column.null_count() == 0 => Ok(column.as_ref()),
            _ => Err(self.damaged(&format!("column {name} is absent or has nulls"))),
        }
    }

    fn list(&self, row: &RowOf<'_>, name: &str) -> Result<arrow::array::ArrayRef> {
        let column = self.column(row.batch, name)?;
        let lists: Option<&GenericListArray<i32>> = column.as_list_opt();
        match lists {
            Some(lists) if lists.values().null_count() == 0 => Ok(lists.value(row.row)),
            _ => Err(self.damaged(&format!("column {name} is no list, or has nulls"))),
        }
    }

    fn damaged(&self, message: &str) -> Error {
        Error::damaged(&self.file, message)
    }

    fn damaged_at(&self, column: &str, row: u64, message: &str) -> Error {
        Error::Damaged {
            file: self.file.clone(),
            column: Some(column.to_owned()),
            row: Some(row),
            message: message.to_owned(),
        }
    }
}

/// One row of a batch, and its number in the shard.
struct RowOf<'a> {
    batch: &'a RecordBatch,
    row: usize,
    number: u64,
}

/// Ascending distinct rows as runs to skip and to select.
fn selection(rows: &[u32]) -> RowSelection {
    let mut selectors: Vec<RowSelector> = Vec::new();
    let mut next = 0;
    for run in rows.chunk_by(|a, b| a + 1 == *b) {
        let first = run[0] as usize;
        if first > next {
            selectors.push(RowSelector::skip(first - next));
        }
        selectors.push(RowSelector::select(run.len()));
        next = first + run.len();
    }
    selectors.into()
}

/// Runs code that hands bytes from the disk to the Parquet library, which panics on some kinds of garbage.
fn guarded<T>(file: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::damaged(
            file,
            "the Parquet library cannot make sense of it",
        ))
    })
}

fn check_metadata(
    spec: &CacheSpec,
    index: usize,
    info: &ShardInfo,
    metadata: &ArrowReaderMetadata,
) -> Result<()> {
    let wrong = |message: String| Err(Error::damaged(&info.file, message));
    let groups = metadata.metadata().row_groups();
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

fn value<'a>(metadata: &'a ArrowReaderMetadata, key: &str) -> Option<&'a str> {
    let pairs = metadata.metadata().file_metadata().key_value_metadata()?;
    pairs.iter().find(|pair| pair.key == key)?.value.as_deref()
}

fn scales(spec: &CacheSpec, file: &str, metadata: &ArrowReaderMetadata) -> Result<Vec<Vec<f32>>> {
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
    let parsed = guarded(file, || {
        ParquetMetaDataReader::new()
            .parse_and_finish(&source)
            .map_err(|error| Error::damaged(file, error.to_string()))
    });
    let Ok(parsed) = parsed else { return Ok(None) };
    let pairs = parsed.file_metadata().key_value_metadata();
    let text = pairs
        .into_iter()
        .flatten()
        .find(|pair| pair.key == METADATA_KEY)
        .and_then(|pair| pair.value.as_deref());
    let Some(found) = text.and_then(|text| serde_json::from_str::<ShardMetadata>(text).ok()) else {
        return Ok(None);
    };
    let sequences = spec.sequences_in_shard(index) as u64;
    if found != ShardMetadata::new(spec, index, sequences, found.positions) {
        return Ok(None);
    }
    let tail = data_end(&parsed).min(bytes as usize);
    let footer = source
        .range(tail as u64, bytes as usize - tail)
        .map_err(|error| Error::damaged(file, error.to_string()))?;
    Ok(Some(ShardInfo {
        file: file.to_owned(),
        digest,
        bytes,
        sequences,
        positions: found.positions,
        footer: FooterInfo {
            bytes: footer.len() as u64,
            checksum: format!("{:016x}", xxh3_64(&footer)),
        },
    }))
}
