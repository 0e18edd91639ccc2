//! One sequence of the cache, decoded.

/// blake3 over a sequence's token ids as little-endian u32.
pub type TokenDigest = [u8; 32];

/// One sequence. When read, columns that were not asked for are `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    /// Where it came from, `file.jsonl:17`: file name and 1-based line (or window).
    pub source: String,
    /// Token ids \[T\].
    pub token_ids: Vec<u32>,
    /// \[T\]; true: this token is a target, predicted by the position before it.
    pub loss_mask: Vec<bool>,
    /// Statistics of the whole vocabulary's logits.
    pub statistics: Option<Statistics>,
    /// The largest logits.
    pub top_k: Option<TopK>,
    /// Hidden states, ascending by layer.
    pub hidden: Vec<HiddenState>,
    /// The quantised transform of the last hidden state, in the compact tier.
    pub coefficients: Option<Coefficients>,
}

/// Per position over the whole vocabulary's raw logits at temperature 1; every field is \[T\].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Mean.
    pub mean: Vec<f32>,
    /// Population standard deviation (divided by V).
    pub std: Vec<f32>,
    /// Smallest logit.
    pub min: Vec<f32>,
    /// Largest logit.
    pub max: Vec<f32>,
    /// ln Σ exp(logit), natural logarithm.
    pub log_sum_exp: Vec<f32>,
}

/// The K largest logits of every position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// K.
    pub k: usize,
    /// Token ids \[T·K\], row-major.
    pub ids: Vec<u32>,
    /// Raw logits \[T·K\], row-major, descending in each row; of those equal to the largest the lower id comes first.
    pub logits: Vec<f32>,
}

/// One hidden state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HiddenState {
    /// Layer number (see [`crate::LayerSpec::layer`]).
    pub layer: u32,
    /// Channels D.
    pub width: usize,
    /// \[T·D\], row-major.
    pub values: Vec<f32>,
}

/// The last hidden state as integers; see [`crate::Basis`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coefficients {
    /// Coefficients r of a position.
    pub rank: usize,
    /// \[T·r\], row-major.
    pub levels: Vec<i16>,
}

/// blake3 over the token ids as little-endian u32: the identity of a sequence.
pub fn token_digest(token_ids: &[u32]) -> TokenDigest {
    let bytes: Vec<u8> = token_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    *blake3::hash(&bytes).as_bytes()
}

/// The first eight bytes of [`token_digest`], little-endian. `--fraction f` keeps the sequences whose hash is below
/// f·2⁶⁴, so a subset is the same in every cache of the same tokens, and a larger one contains the smaller.
pub fn split_hash(token_ids: &[u32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = token_digest(token_ids);
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Whether a sequence belongs to the fraction f: its hash is below f·2⁶⁴.
pub fn in_fraction(split_hash: u64, fraction: f64) -> bool {
    u128::from(split_hash) < (fraction * 2f64.powi(64)) as u128
}

/// Whether a sequence belongs to the validation share v: its hash is (1 − v)·2⁶⁴ or more. Fractions fill the hash range
/// from below and validation from above, so the two never meet unless together they are more than the whole.
pub fn in_validation(split_hash: u64, share: f64) -> bool {
    share > 0.0 && split_hash as f64 >= (1.0 - share) * 2f64.powi(64)
}

impl Statistics {
    /// The five columns in the order of the file: mean, std, min, max, log_sum_exp.
    pub(crate) fn columns(&self) -> [&[f32]; 5] {
        [
            &self.mean,
            &self.std,
            &self.min,
            &self.max,
            &self.log_sum_exp,
        ]
    }
}

/// Trues in a loss mask, the first token not counted: nothing predicts it.
pub(crate) fn count_targets(loss_mask: &[bool]) -> u32 {
    loss_mask.iter().skip(1).filter(|target| **target).count() as u32
}
