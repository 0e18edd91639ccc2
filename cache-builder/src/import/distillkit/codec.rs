//! DistillKit's codecs of top-k values: bytes to log-probabilities, and token ids out of packed bits.

use std::path::Path;

use serde::Deserialize;

use crate::data::Problem;
use crate::import::foreign::Place;
use crate::{Error, Result};

type Checked<T> = std::result::Result<T, Problem>;

/// The codec's parameters.
#[derive(Debug)]
pub(super) enum Codec {
    Current(Compression),
    Legacy(LegacyCompression),
}

/// DistillKit's `DistributionQuantizationConfig`.
#[derive(Debug, Deserialize)]
pub(super) struct Compression {
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
pub(super) struct LegacyCompression {
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
    pub(super) fn values(&self, bytes: &[u8]) -> Checked<Vec<f32>> {
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
    pub(super) fn indices(&self, packed: &[u8]) -> Checked<Vec<u32>> {
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
    pub(super) fn indices(&self, words: &[u64]) -> Checked<Vec<u32>> {
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

    pub(super) fn values(&self, exact: &[f32], coefficients: &[f32]) -> Checked<Vec<f32>> {
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
pub(super) fn read_codec(path: &Path) -> Result<Codec> {
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
