//! DistillKit's Parquet: a sequence a row, `input_ids` \[T\] beside the teacher's k largest values of each position.
//!
//! | columns | a position is |
//! |---|---|
//! | `compressed_logprobs`, `bytepacked_indices` (lists of lists of u8) | see below |
//! | `packed_indices` (u64), `exact_values`, `coeffs` (f32) | the older form: exact logits, then a polynomial of the rank |
//! | `token_ids`, `top_values` | plain |
//!
//! Position t is about token t + 1; the last may be missing. The codec's parameters do not stand in the file: they are
//! DistillKit's compression configuration. With them the bytes of `compressed_logprobs` are, in this order: `exact_k`
//! values; one coefficient for each of `polynomial_terms`; for each of `residual_bins` a scale and its elements, packed
//! from the highest bit. The others are Σ coefficient · term(rank) + element · scale, and with `delta_encoding` every
//! value is the difference to the one before. Indices have ⌈log₂ d⌉ bits each, packed from the highest bit; in the older
//! form from the lowest bit of 64-bit words. The older form centres logits at the mean of the vocabulary, so what the
//! kept tokens weigh among all is lost.

mod codec;

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use self::codec::{Codec, read_codec};
use super::foreign::{Foreign, NOTHING, Place, Row, Values};
use super::{Reader, Setup};
use crate::data::{Problem, file_name};
use crate::{Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float32Type, Int64Type, UInt8Type, UInt64Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

type Checked<T> = std::result::Result<T, Problem>;

/// Rows decoded at a time.
const BATCH: usize = 8;

/// The columns that are looked at.
const COLUMNS: [&str; 11] = [
    "input_ids",
    "labels",
    "loss_mask",
    "attention_mask",
    "compressed_logprobs",
    "bytepacked_indices",
    "packed_indices",
    "exact_values",
    "coeffs",
    "token_ids",
    "top_values",
];

/// Reads files one after the other.
pub(crate) struct DistillkitReader {
    files: VecDeque<PathBuf>,
    codec: Option<Codec>,
    current: Option<OpenFile>,
    bytes: u64,
}

struct OpenFile {
    path: PathBuf,
    batches: ParquetRecordBatchReader,
    batch: Option<RecordBatch>,
    row_in_batch: usize,
    /// From 1, in the file.
    row: usize,
    rows: usize,
    bytes: u64,
}

impl DistillkitReader {
    pub(crate) fn open(setup: &Setup<'_>) -> Result<Self> {
        Ok(Self {
            files: setup.options.files.iter().cloned().collect(),
            codec: setup
                .options
                .compression
                .as_deref()
                .map(read_codec)
                .transpose()?,
            current: None,
            bytes: 0,
        })
    }
}

impl OpenFile {
    fn open(path: PathBuf) -> Result<Self> {
        let failed = |source| Error::DataFile {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)
            .map_err(|error| damaged(&path, &error))?;
        let rows = builder.metadata().file_metadata().num_rows().max(0) as usize;
        let schema = builder.parquet_schema();
        let wanted = schema.root_schema().get_fields().iter().enumerate();
        let roots: Vec<usize> = wanted
            .filter(|(_, field)| COLUMNS.contains(&field.name()))
            .map(|(index, _)| index)
            .collect();
        let mask = ProjectionMask::roots(schema, roots);
        let batches = builder
            .with_projection(mask)
            .with_batch_size(BATCH)
            .build()
            .map_err(|error| damaged(&path, &error))?;
        Ok(Self {
            path,
            batches,
            batch: None,
            row_in_batch: 0,
            row: 0,
            rows,
            bytes,
        })
    }

    /// The batch that holds the next row, and its place there.
    fn next_row(&mut self) -> Result<Option<(RecordBatch, usize)>> {
        if self
            .batch
            .as_ref()
            .is_none_or(|batch| self.row_in_batch >= batch.num_rows())
        {
            let Some(batch) = self.batches.next() else {
                return Ok(None);
            };
            self.batch = Some(batch.map_err(|error| damaged(&self.path, &error))?);
            self.row_in_batch = 0;
        }
        self.row_in_batch += 1;
        self.row += 1;
        Ok(self
            .batch
            .clone()
            .map(|batch| (batch, self.row_in_batch - 1)))
    }
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Foreign {
        path: path.to_owned(),
        place: String::new(),
        problem: format!("can't be read as Parquet: {error}"),
        hint: "the file is damaged, or was not written to its end".to_owned(),
    }
}

impl Reader for DistillkitReader {
    fn next(&mut self, _values: bool) -> Result<Option<Foreign>> {
        loop {
            if self.current.is_none() {
                let Some(path) = self.files.pop_front() else {
                    return Ok(None);
                };
                self.current = Some(OpenFile::open(path)?);
            }
            let Some(file) = &mut self.current else {
                return Ok(None);
            };
            let Some((batch, at)) = file.next_row()? else {
                self.bytes += file.bytes;
                self.current = None;
                continue;
            };
            let place = Place {
                path: file.path.clone(),
                place: format!("row {}", file.row),
            };
            let source = format!("{}:{}", file_name(&file.path), file.row);
            return sequence(&batch, at, self.codec.as_ref(), source, place.clone())
                .map(Some)
                .map_err(|problem| place.error(problem));
        }
    }

    fn bytes_read(&self) -> u64 {
        let of_file = |file: &OpenFile| {
            (file.bytes as f64 * file.row as f64 / file.rows.max(1) as f64) as u64
        };
        self.bytes + self.current.as_ref().map_or(0, of_file)
    }
}

fn sequence(
    batch: &RecordBatch,
    at: usize,
    codec: Option<&Codec>,
    source: String,
    place: Place,
) -> Checked<Foreign> {
    let Some(given) = batch.column_by_name("input_ids") else {
        return Err(Problem::new(
            "there is no column `input_ids`",
            "DistillKit writes `input_ids` beside `compressed_logprobs` and `bytepacked_indices`",
        ));
    };
    let ids: Checked<Vec<u32>> = integers(given, at, "input_ids")?
        .into_iter()
        .map(|id| {
            u32::try_from(id).map_err(|_| {
                Problem::new(
                    format!("`input_ids` holds {id}"),
                    "token ids are whole numbers",
                )
            })
        })
        .collect();
    let mut token_ids = ids?;
    let mut loss_mask = vec![true; token_ids.len()];
    for (name, is_labels) in [("loss_mask", false), ("labels", true)] {
        if let Some(column) = batch.column_by_name(name) {
            let flags = integers(column, at, name)?;
            if flags.len() != token_ids.len() {
                return Err(Problem::new(
                    format!(
                        "`{name}` has {} entries for {} token ids",
                        flags.len(),
                        token_ids.len()
                    ),
                    "it has an entry for each token",
                ));
            }
            loss_mask = flags
                .iter()
                .map(|flag| if is_labels { *flag != -100 } else { *flag != 0 })
                .collect();
            break;
        }
    }
    if let Some(column) = batch.column_by_name("attention_mask") {
        let mask = integers(column, at, "attention_mask")?;
        let real = mask.iter().take_while(|flag| **flag == 1).count();
        if mask[real..].iter().any(|flag| *flag != 0) {
            return Err(Problem::new(
                "several sequences are packed into the row",
                "import the file from before distillkit-pack-logits",
            ));
        }
        token_ids.truncate(real);
        loss_mask.truncate(real);
    }
    let mut rows = position_rows(batch, at, codec)?;
    if rows.len() > token_ids.len() && batch.column_by_name("attention_mask").is_none()
        || rows.len() + 1 < token_ids.len()
    {
        return Err(Problem::new(
            format!("{} positions for {} token ids", rows.len(), token_ids.len()),
            "there is one for each token, or for each but the last",
        ));
    }
    rows.truncate(token_ids.len());
    Ok(Foreign {
        source,
        place,
        token_ids,
        loss_mask,
        values: Values::Kept(rows),
    })
}

/// The entries of every position, whichever columns hold them.
fn position_rows(
    batch: &RecordBatch,
    at: usize,
    codec: Option<&Codec>,
) -> Checked<Vec<Option<Row>>> {
    let column = |name: &str| batch.column_by_name(name);
    let no_codec = || {
        Problem::new(
            "the codec's parameters do not stand in the file",
            "give DistillKit's compression configuration with --compression-config FILE.yml",
        )
    };
    if let (Some(values), Some(packed)) =
        (column("compressed_logprobs"), column("bytepacked_indices"))
    {
        let Some(Codec::Current(codec)) = codec else {
            return Err(no_codec());
        };
        let (values, packed) = (
            bytes(values, at, "compressed_logprobs")?,
            bytes(packed, at, "bytepacked_indices")?,
        );
        same_length(values.len(), packed.len())?;
        let mut rows = Vec::with_capacity(values.len());
        for (position, (values, packed)) in values.iter().zip(&packed).enumerate() {
            let of_position = |problem: Problem| problem.at(format!("position {position}"));
            let ids = codec.indices(packed).map_err(of_position)?;
            rows.push(as_row(&ids, &codec.values(values).map_err(of_position)?));
        }
        return Ok(rows);
    }
    if let (Some(packed), Some(exact), Some(coefficients)) = (
        column("packed_indices"),
        column("exact_values"),
        column("coeffs"),
    ) {
        let Some(Codec::Legacy(codec)) = codec else {
            return Err(no_codec());
        };
        let packed = words(packed, at, "packed_indices")?;
        let (exact, coefficients) = (
            floats(exact, at, "exact_values")?,
            floats(coefficients, at, "coeffs")?,
        );
        same_length(packed.len(), exact.len())?;
        same_length(packed.len(), coefficients.len())?;
        let mut rows = Vec::with_capacity(packed.len());
        for ((packed, exact), coefficients) in packed.iter().zip(&exact).zip(&coefficients) {
            rows.push(as_row(
                &codec.indices(packed)?,
                &codec.values(exact, coefficients)?,
            ));
        }
        return Ok(rows);
    }
    if let (Some(of_tokens), Some(values)) = (column("token_ids"), column("top_values")) {
        let (of_tokens, values) = (
            words(of_tokens, at, "token_ids")?,
            floats(values, at, "top_values")?,
        );
        same_length(of_tokens.len(), values.len())?;
        let mut rows = Vec::with_capacity(values.len());
        for (of_tokens, values) in of_tokens.iter().zip(&values) {
            same_length(of_tokens.len(), values.len())?;
            let ids: Vec<u32> = of_tokens
                .iter()
                .map(|id| u32::try_from(*id).unwrap_or(u32::MAX))
                .collect();
            rows.push(as_row(&ids, values));
        }
        return Ok(rows);
    }
    Err(Problem::new(
        "there are no columns of values",
        "DistillKit writes `compressed_logprobs` and `bytepacked_indices`, or `packed_indices`, `exact_values` and `coeffs`",
    ))
}

fn same_length(one: usize, other: usize) -> Checked<()> {
    if one == other {
        return Ok(());
    }
    Err(Problem::new(
        format!("lists of {one} and {other} entries belong together"),
        "the file is damaged",
    ))
}

fn as_row(ids: &[u32], values: &[f32]) -> Option<Row> {
    // A NaN stays and is refused later, by name.
    let has_probability = |value: f32| value.is_nan() || value > NOTHING;
    let row: Row = ids
        .iter()
        .copied()
        .zip(values.iter().copied())
        .filter(|(_, value)| has_probability(*value))
        .collect();
    (!row.is_empty()).then_some(row)
}

/// Row `at` of a list column.
fn list(column: &ArrayRef, at: usize, name: &str) -> Checked<ArrayRef> {
    if column.is_null(at) {
        return Err(Problem::new(
            format!("`{name}` is null"),
            "every row needs it",
        ));
    }
    if let Some(lists) = column.as_list_opt::<i32>() {
        return Ok(lists.value(at));
    }
    if let Some(lists) = column.as_list_opt::<i64>() {
        return Ok(lists.value(at));
    }
    Err(Problem::new(
        format!("`{name}` holds {} and not lists", column.data_type()),
        "is it a file of DistillKit?",
    ))
}

fn numbers(column: &ArrayRef, wanted: &DataType, name: &str) -> Checked<ArrayRef> {
    let wrong = || {
        Problem::new(
            format!("`{name}` holds {} instead of {wanted}", column.data_type()),
            "is it a file of DistillKit?",
        )
    };
    let numbers = cast(column, wanted).map_err(|_| wrong())?;
    if numbers.null_count() > 0 {
        return Err(wrong());
    }
    Ok(numbers)
}

fn integers(column: &ArrayRef, at: usize, name: &str) -> Checked<Vec<i64>> {
    let values = numbers(&list(column, at, name)?, &DataType::Int64, name)?;
    Ok(values.as_primitive::<Int64Type>().values().to_vec())
}

/// Lists of lists of one type.
macro_rules! nested {
    ($name:ident, $type:ty, $data:expr, $native:ty) => {
        fn $name(column: &ArrayRef, at: usize, name: &str) -> Checked<Vec<Vec<$native>>> {
            let positions = list(column, at, name)?;
            (0..positions.len())
                .map(|position| {
                    let values = numbers(&list(&positions, position, name)?, &$data, name)?;
                    Ok(values.as_primitive::<$type>().values().to_vec())
                })
                .collect()
        }
    };
}

nested!(bytes, UInt8Type, DataType::UInt8, u8);
nested!(words, UInt64Type, DataType::UInt64, u64);
nested!(floats, Float32Type, DataType::Float32, f32);
