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

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float32Type, Int64Type, UInt8Type, UInt64Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde::Deserialize;

use super::foreign::{Foreign, NOTHING, Place, Problem, Row, Values};
use super::{Reader, Setup, file_name};
use crate::{Error, Result};

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
            let of_position = |problem: Problem| {
                Problem::new(
                    format!("position {position}: {}", problem.problem),
                    problem.hint,
                )
            };
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

/// The codec's parameters.
#[derive(Debug)]
enum Codec {
    Current(Compression),
    Legacy(LegacyCompression),
}

/// DistillKit's `DistributionQuantizationConfig`.
#[derive(Debug, Deserialize)]
struct Compression {
    d: usize,
    k: usize,
    exact_k: usize,
    #[serde(default)]
    exact_dtype: Float,
    #[serde(default)]
    polynomial_terms: Option<Vec<Term>>,
    #[serde(default)]
    term_dtype: Float,
    residual_bins: Vec<Bin>,
    #[serde(default = "yes")]
    delta_encoding: bool,
    #[serde(default)]
    normalize_t: bool,
}

/// DistillKit's `QuantizationBin`.
#[derive(Debug, Deserialize)]
struct Bin {
    scale_dtype: Float,
    element_bits: usize,
    num_elements: usize,
}

/// DistillKit's `LegacyLogitCompressionConfig`.
#[derive(Debug, Deserialize)]
struct LegacyCompression {
    k: usize,
    exact_k: usize,
    polynomial_degree: usize,
    vocab_size: usize,
    #[serde(default = "yes")]
    invert_polynomial: bool,
    #[serde(default)]
    with_sqrt_term: bool,
}

fn yes() -> bool {
    true
}

/// A term of the polynomial in the rank.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Term {
    Power(i32),
    Special(Special),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Special {
    Sqrt,
    Exp,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Float {
    Float16,
    Bfloat16,
    #[default]
    Float32,
    Float64,
}

impl Float {
    fn bytes(self) -> usize {
        match self {
            Float::Float16 | Float::Bfloat16 => 2,
            Float::Float32 => 4,
            Float::Float64 => 8,
        }
    }

    /// To the nearest value of the type: PyTorch rounds after every operation.
    fn round(self, value: f64) -> f64 {
        match self {
            Float::Float16 => half::f16::from_f64(value).to_f64(),
            Float::Bfloat16 => half::bf16::from_f64(value).to_f64(),
            Float::Float32 => f64::from(value as f32),
            Float::Float64 => value,
        }
    }

    fn read(self, bytes: &[u8]) -> f64 {
        let mut eight = [0; 8];
        eight[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(eight);
        match self {
            Float::Float16 => half::f16::from_bits(bits as u16).to_f64(),
            Float::Bfloat16 => half::bf16::from_bits(bits as u16).to_f64(),
            Float::Float32 => f64::from(f32::from_bits(bits as u32)),
            Float::Float64 => f64::from_bits(bits),
        }
    }
}

impl Compression {
    fn check(&self) -> Checked<()> {
        let in_bins: usize = self.residual_bins.iter().map(|bin| bin.num_elements).sum();
        let bits_fit = self
            .residual_bins
            .iter()
            .all(|bin| (1..=64).contains(&bin.element_bits));
        if self.k == 0
            || self.k > self.d
            || self.exact_k > self.k
            || in_bins > self.k - self.exact_k
            || !bits_fit
        {
            return Err(Problem::new(
                format!(
                    "k = {}, exact_k = {} and {in_bins} elements in bins do not fit together",
                    self.k, self.exact_k
                ),
                "give the configuration that the file was sampled with",
            ));
        }
        Ok(())
    }

    /// Bytes of a position's values.
    fn bytes(&self) -> usize {
        let terms = self.polynomial_terms.as_ref().map_or(0, Vec::len) * self.term_dtype.bytes();
        let bins = self
            .residual_bins
            .iter()
            .map(|bin| bin.scale_dtype.bytes() + (bin.element_bits * bin.num_elements).div_ceil(8));
        self.exact_k * self.exact_dtype.bytes() + terms + bins.sum::<usize>()
    }

    /// The values of one position, largest first \[k\].
    fn values(&self, bytes: &[u8]) -> Checked<Vec<f32>> {
        if bytes.len() != self.bytes() {
            return Err(Problem::new(
                format!(
                    "{} bytes of values, the compression configuration makes {}",
                    bytes.len(),
                    self.bytes()
                ),
                "give the configuration that the file was sampled with",
            ));
        }
        let mut rest = bytes;
        let mut take = |count: usize| {
            let (taken, after) = rest.split_at(count);
            rest = after;
            taken
        };
        let exact = take(self.exact_k * self.exact_dtype.bytes());
        let mut values: Vec<f64> = exact
            .chunks_exact(self.exact_dtype.bytes())
            .map(|value| self.exact_dtype.read(value))
            .collect();
        let terms = self.polynomial_terms.as_deref().unwrap_or_default();
        let coefficients = take(terms.len() * self.term_dtype.bytes());
        let coefficients: Vec<f64> = coefficients
            .chunks_exact(self.term_dtype.bytes())
            .map(|value| self.term_dtype.read(value))
            .collect();
        let mut residuals = Vec::with_capacity(self.k - self.exact_k);
        for bin in &self.residual_bins {
            let scale = bin.scale_dtype.read(take(bin.scale_dtype.bytes()));
            let packed = take((bin.element_bits * bin.num_elements).div_ceil(8));
            let lowest = if bin.element_bits == 1 {
                0.0
            } else {
                -(2f64.powi(bin.element_bits as i32 - 1))
            };
            for element in unpack_from_highest(packed, bin.element_bits, bin.num_elements) {
                let level = if bin.element_bits == 1 {
                    element as f64 * 2.0 - 1.0
                } else {
                    element as f64 + lowest
                };
                residuals.push(f64::from((level as f32) * scale as f32));
            }
        }
        let approximated = self.k - self.exact_k;
        residuals.resize(approximated, 0.0);
        for (rank, residual) in residuals.into_iter().enumerate() {
            let residual = self.exact_dtype.round(residual);
            values.push(if terms.is_empty() {
                residual
            } else {
                self.polynomial(terms, &coefficients, rank, approximated) + residual
            });
        }
        if self.delta_encoding {
            let mut sum = 0f32;
            for value in &mut values {
                sum += *value as f32;
                *value = self.exact_dtype.round(f64::from(sum));
            }
        }
        Ok(values.into_iter().map(|value| value as f32).collect())
    }

    /// Σ coefficient · term at a rank of `count`, rounded where PyTorch rounds.
    fn polynomial(&self, terms: &[Term], coefficients: &[f64], rank: usize, count: usize) -> f64 {
        let round = |value: f64| self.term_dtype.round(value);
        let point = if self.normalize_t {
            round(rank as f64 / (count.max(2) - 1) as f64)
        } else {
            round(rank as f64)
        };
        let sum: f64 = terms
            .iter()
            .zip(coefficients)
            .map(|(term, coefficient)| {
                let value = match term {
                    Term::Power(power) => point.powi(*power),
                    Term::Special(Special::Sqrt) => point.sqrt(),
                    Term::Special(Special::Exp) => point.exp(),
                };
                round(round(value) * coefficient)
            })
            .sum();
        round(sum)
    }

    /// The token ids of one position \[k\].
    fn indices(&self, packed: &[u8]) -> Checked<Vec<u32>> {
        // DistillKit's sampler may have set d to its tokenizer's size; the length tells how wide an index is.
        let fits = |bits: &usize| (self.k * bits).div_ceil(8) == packed.len();
        let bits = Some(index_bits(self.d))
            .filter(fits)
            .or_else(|| (1..=32).find(fits));
        let Some(bits) = bits else {
            return Err(Problem::new(
                format!("{} bytes of token ids for k = {}", packed.len(), self.k),
                "give the configuration that the file was sampled with",
            ));
        };
        Ok(unpack_from_highest(packed, bits, self.k)
            .map(|id| id as u32)
            .collect())
    }
}

impl LegacyCompression {
    fn indices(&self, words: &[u64]) -> Checked<Vec<u32>> {
        let bits = index_bits(self.vocab_size);
        let in_a_word = 64 / bits;
        if words.len() != self.k.div_ceil(in_a_word) {
            return Err(Problem::new(
                format!("{} words of token ids for k = {}", words.len(), self.k),
                "give the configuration that the file was sampled with",
            ));
        }
        let of_word = |word: &u64| {
            (0..in_a_word)
                .map(move |place| (word >> (bits * place) & ((1 << bits) - 1)) as u32)
                .collect::<Vec<_>>()
        };
        let mut ids: Vec<u32> = words.iter().flat_map(of_word).collect();
        ids.truncate(self.k);
        Ok(ids)
    }

    fn values(&self, exact: &[f32], coefficients: &[f32]) -> Checked<Vec<f32>> {
        let terms = self.polynomial_degree + 1 + usize::from(self.with_sqrt_term);
        let expected = if self.exact_k < self.k { terms } else { 0 };
        if exact.len() != self.exact_k || coefficients.len() != expected {
            return Err(Problem::new(
                format!(
                    "{} exact values and {} coefficients, the compression configuration makes {} and {expected}",
                    exact.len(),
                    coefficients.len(),
                    self.exact_k
                ),
                "give the configuration that the file was sampled with",
            ));
        }
        let mut values = exact.to_vec();
        for rank in 0..self.k - self.exact_k {
            let point = (rank + 1) as f32;
            let sum: f32 = coefficients
                .iter()
                .enumerate()
                .map(|(index, coefficient)| {
                    let power = if self.invert_polynomial {
                        -(index as i32)
                    } else {
                        index as i32
                    };
                    let term = if index > self.polynomial_degree {
                        point.sqrt()
                    } else {
                        point.powi(power)
                    };
                    term * coefficient
                })
                .sum();
            values.push(sum);
        }
        Ok(values)
    }
}

/// ⌈log₂ d⌉, at least 1.
fn index_bits(d: usize) -> usize {
    (usize::BITS - d.saturating_sub(1).leading_zeros()).max(1) as usize
}

/// Numbers of `bits` bits, from the highest bit of the first byte on.
fn unpack_from_highest(bytes: &[u8], bits: usize, count: usize) -> impl Iterator<Item = u64> {
    (0..count).map(move |index| {
        (index * bits..(index + 1) * bits).fold(0u64, |value, bit| {
            value << 1 | u64::from(bytes[bit / 8] >> (7 - bit % 8) & 1)
        })
    })
}

/// The mapping with `exact_k` in a YAML or JSON file: a compression configuration, or a training configuration around it.
fn read_codec(path: &Path) -> Result<Codec> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::DataFile {
        path: path.to_owned(),
        source,
    })?;
    let place = Place {
        path: path.to_owned(),
        place: String::new(),
    };
    let hint = "a compression configuration holds k, exact_k, polynomial_terms and residual_bins, or the older form's polynomial_degree";
    let whole: serde_json::Value = serde_saphyr::from_str(&text)
        .map_err(|error| place.error(Problem::new(format!("no YAML: {error}"), hint)))?;
    let Some(found) = with_exact_k(&whole) else {
        return Err(place.error(Problem::new("it holds no compression configuration", hint)));
    };
    let wrong = |error: serde_json::Error| place.error(Problem::new(error.to_string(), hint));
    if found.get("polynomial_degree").is_some() {
        let codec: LegacyCompression = serde_json::from_value(found.clone()).map_err(wrong)?;
        if codec.k == 0 || codec.exact_k > codec.k || codec.vocab_size < codec.k {
            return Err(place.error(Problem::new(
                "k, exact_k and vocab_size do not fit together",
                hint,
            )));
        }
        return Ok(Codec::Legacy(codec));
    }
    let codec: Compression = serde_json::from_value(found.clone()).map_err(wrong)?;
    codec.check().map_err(|problem| place.error(problem))?;
    Ok(Codec::Current(codec))
}

fn with_exact_k(value: &serde_json::Value) -> Option<&serde_json::Value> {
    let fields = value.as_object()?;
    if fields.contains_key("exact_k") {
        return Some(value);
    }
    fields.values().find_map(with_exact_k)
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
