//! Everything that decides the bytes of a cache. Stored as `plan.json` while a cache is being built, inside
//! `manifest.json` afterwards.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Largest vocabulary, width and sequence length that the format can say; all far above any known model, and small
/// enough that no product of two of them overflows 64 bits.
pub(crate) const MAX_DIMENSION: usize = 1 << 24;

/// How much of the teacher's distribution the cache can give back.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Top-k logits and statistics of the whole vocabulary: exact on the kept entries at T = 1 only.
    Sparse,
    /// The last hidden state by a transform code, top-k logits over it, and the LM head: logits of the whole vocabulary
    /// at every temperature, as near as the chosen rate allows.
    Compact,
    /// The last hidden state and the LM head: logits of the whole vocabulary at every temperature.
    Exact,
}

/// How the values of a hidden state are stored.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenCodec {
    /// One signed byte per value, one scale per channel and shard.
    Int8,
    /// IEEE 754 half precision.
    F16,
}

impl HiddenCodec {
    /// Bytes per value before entropy coding.
    pub(crate) fn bytes(self) -> usize {
        match self {
            HiddenCodec::Int8 => 1,
            HiddenCodec::F16 => 2,
        }
    }
}

/// Element type of the stored LM head.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum HeadDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl HeadDtype {
    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            HeadDtype::F32 => 4,
            HeadDtype::F16 | HeadDtype::Bf16 => 2,
        }
    }
}

/// What the fit of a transform code aimed at.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum CodeTarget {
    /// Bytes a position, of everything that a logit loss reads.
    Rate(u32),
    /// KL(teacher ‖ rebuilt) at temperature 1, in millionths of a nat.
    DistortionMicronats(u32),
}

/// The basis file of a compact cache.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct BasisInfo {
    /// Path in the cache, `basis-<16 hex>.safetensors`.
    pub file: String,
    /// blake3, 64 hexadecimal digits; the first 16 stand in the name.
    pub digest: String,
    /// Length of the file.
    pub bytes: u64,
    /// Coefficients r of a position.
    pub rank: usize,
}

/// The transform code of a compact cache.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct CodeSpec {
    /// What the fit aimed at.
    pub target: CodeTarget,
    /// Positions that basis and tables were fitted on.
    pub fitted_positions: u64,
    /// What the fit gave.
    pub basis: BasisInfo,
}

/// One hidden state to keep.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// Number in the convention of `output_hidden_states`: 0 the embeddings, i after block i, L after the last block
    /// and the final norm.
    pub layer: u32,
    /// Channels D.
    pub width: usize,
    /// How the values are stored.
    pub codec: HiddenCodec,
}

/// The model that was asked.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct TeacherInfo {
    /// Name for people.
    pub name: String,
    /// Architecture name, as in the model's configuration.
    pub architecture: String,
    /// blake3 of the weight files, hexadecimal.
    pub digest: String,
    /// Element type of the forward pass, for instance `f32` or `bf16`.
    pub compute_dtype: String,
    /// Blocks L.
    pub num_layers: u32,
    /// Width D of the last hidden state.
    pub hidden_size: usize,
    /// Number of parameters.
    pub num_parameters: u64,
}

/// The tokenizer that made the token ids.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct TokenizerInfo {
    /// Digest over the id-ordered vocabulary; a student must have the same.
    pub fingerprint: String,
    /// Tokens, added ones included; may be below V where the head is padded.
    pub vocab_size: usize,
}

/// One input file.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// File name without folders.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// blake3, hexadecimal.
    pub digest: String,
}

/// Which tokens of a record are targets.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// The response: an instruction's output, a completion, the assistant's turns. Text without a prompt counts whole.
    #[default]
    Response,
    /// Every token.
    All,
}

/// How records became sequences, and how many did not. A build that used no choice of this kind leaves it out of its
/// manifest.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Preparation {
    /// Records read, bad ones included; a text file is one.
    #[serde(skip_serializing_if = "is_default")]
    pub records: u64,
    /// Records that could not be used and were passed over.
    #[serde(skip_serializing_if = "is_default")]
    pub bad_records: u64,
    /// Sequences left out because their token digest had come before.
    #[serde(skip_serializing_if = "is_default")]
    pub duplicates: u64,
    /// Whether repeated sequences were kept.
    #[serde(skip_serializing_if = "is_default")]
    pub keep_duplicates: bool,
    /// Tokens beyond `max_len` that were cut off.
    #[serde(skip_serializing_if = "is_default")]
    pub truncated_tokens: u64,
    /// Which tokens are targets.
    #[serde(skip_serializing_if = "is_default")]
    pub loss_on: LossOn,
    /// Whether several records share a sequence.
    #[serde(skip_serializing_if = "is_default")]
    pub packed: bool,
    /// Share of the hash range, in millionths, that no training may see; see [`crate::in_validation`].
    #[serde(skip_serializing_if = "is_default")]
    pub validation_millionths: u32,
    /// blake3 of the chat template, where a record used one.
    #[serde(skip_serializing_if = "is_default")]
    pub chat_template: Option<String>,
    /// The date that the chat template wrote into the prompts (`2026-11-26`), where it asked for one.
    #[serde(skip_serializing_if = "is_default")]
    pub chat_date: Option<String>,
    /// Columns that were named: field of the record form to column of the file.
    #[serde(skip_serializing_if = "is_default")]
    pub columns: BTreeMap<String, String>,
    /// Sequences that were taken at most, before packing; 0: all.
    #[serde(skip_serializing_if = "is_default")]
    pub limit: u64,
}

impl Preparation {
    /// The share of the hash range that is kept for validation, 0 to 1.
    pub fn validation(&self) -> f64 {
        f64::from(self.validation_millionths) / 1e6
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The text that the teacher read.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
#[serde(deny_unknown_fields)]
pub struct DataInfo {
    /// Digest over the tokenised data.
    pub digest: String,
    /// The input files in order.
    pub files: Vec<DataFile>,
    /// Sequences in the whole cache.
    pub sequences: u64,
    /// Positions in the whole cache.
    pub positions: u64,
    /// Positions whose token is a target.
    pub targets: u64,
    /// Sequences that were cut to `max_len`.
    pub truncated: u64,
    /// Records that were left out.
    pub skipped: u64,
    /// Name of the prompt form.
    pub prompt_form: String,
    /// How the records were prepared.
    #[serde(default, skip_serializing_if = "is_default")]
    pub preparation: Preparation,
}

impl DataInfo {
    /// Whether the sequence of this hash belongs to the validation split, which no training may see.
    pub fn is_validation(&self, split_hash: u64) -> bool {
        crate::in_validation(split_hash, self.preparation.validation())
    }
}

/// One of the five statistics of a position.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Statistic {
    /// Mean over the vocabulary.
    Mean,
    /// Standard deviation over the vocabulary.
    Std,
    /// Smallest value of the vocabulary.
    Min,
    /// Largest value of the vocabulary.
    Max,
    /// ln Σ exp over the vocabulary.
    LogSumExp,
}

/// What another program gave for every token.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum ValueKind {
    /// ln p, normalised over the whole vocabulary.
    LogProbabilities,
    /// ln p, normalised over the kept entries only: what the others weigh is lost.
    RenormalisedLogProbabilities,
    /// Logits, up to a constant that may differ from position to position.
    Logits,
}

/// Which positions of an imported cache hold values.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum KnownPositions {
    /// All but the last of a sequence.
    All,
    /// At least those before a target. Where nothing is known the kept entries are the tokens 0 … K−1, each with
    /// value −ln V.
    Targets,
}

/// What is known of values that another program computed; absent where caskd ran the teacher.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The format that was read, for instance `vllm`.
    pub format: String,
    /// What its numbers are.
    pub values: ValueKind,
    /// Temperature at which the other program gave them. What is stored is at temperature 1.
    pub temperature: f64,
    /// The statistics that are known, ascending; the others hold placeholders (see `docs/FORMAT.md`).
    pub statistics: Vec<Statistic>,
    /// Where there are values.
    pub positions: KnownPositions,
}

/// Everything that decides the bytes of a cache: the same spec and the same sequences give the same files.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// What the cache can give back.
    pub tier: Tier,
    /// Kept entries K per position; 0 (no `top_k` column) only in the exact tier.
    pub top_k: usize,
    /// V: rows of the LM head.
    pub vocab_size: usize,
    /// Hidden states, ascending by layer.
    pub layers: Vec<LayerSpec>,
    /// The transform code, in the compact tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<CodeSpec>,
    /// Rows of every shard but the last.
    pub sequences_per_shard: usize,
    /// Longest sequence in positions.
    pub max_len: usize,
    /// The model that was asked.
    pub teacher: TeacherInfo,
    /// Where the values come from, if not from a teacher that caskd ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The tokenizer that made the token ids.
    pub tokenizer: TokenizerInfo,
    /// The text that the teacher read.
    pub data: DataInfo,
}

impl CacheSpec {
    /// Whether a statistic's column says what its name does; in an imported cache it may hold placeholders.
    pub fn knows(&self, statistic: Statistic) -> bool {
        knows(self.origin.as_ref(), statistic)
    }

    /// Number of shards: sequences divided by `sequences_per_shard`, rounded up.
    pub fn num_shards(&self) -> usize {
        self.data
            .sequences
            .div_ceil(self.sequences_per_shard.max(1) as u64) as usize
    }

    /// Sequences that shard number `shard` must hold.
    pub fn sequences_in_shard(&self, shard: usize) -> usize {
        let first = shard as u64 * self.sequences_per_shard as u64;
        self.data
            .sequences
            .saturating_sub(first)
            .min(self.sequences_per_shard as u64) as usize
    }

    /// Whether the fields fit together.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |field: &str, message: String| {
            Err(Error::InvalidSpec {
                field: field.to_owned(),
                message,
            })
        };
        if self.vocab_size == 0 || self.vocab_size > MAX_DIMENSION {
            return wrong(
                "vocab_size",
                format!("{} is not in 1..={MAX_DIMENSION}", self.vocab_size),
            );
        }
        if self.top_k > self.vocab_size {
            return wrong(
                "top_k",
                format!(
                    "{} entries are more than the vocabulary of {}",
                    self.top_k, self.vocab_size
                ),
            );
        }
        if self.top_k == 0 && self.tier != Tier::Exact {
            return wrong(
                "top_k",
                "the sparse and the compact tier keep at least one entry".to_owned(),
            );
        }
        self.check_code()?;
        self.check_origin()?;
        if self.max_len == 0 || self.max_len > MAX_DIMENSION {
            return wrong(
                "max_len",
                format!("{} is not in 1..={MAX_DIMENSION}", self.max_len),
            );
        }
        if self.sequences_per_shard == 0 || self.sequences_per_shard > MAX_DIMENSION {
            return wrong(
                "sequences_per_shard",
                format!("{} is not in 1..={MAX_DIMENSION}", self.sequences_per_shard),
            );
        }
        if self.data.sequences == 0 {
            return wrong("data.sequences", "the data holds no sequence".to_owned());
        }
        if self.data.preparation.validation_millionths > 1_000_000 {
            return wrong(
                "data.preparation.validation_millionths",
                "more than the whole".to_owned(),
            );
        }
        if self.num_shards() > 100_000 {
            return wrong(
                "sequences_per_shard",
                format!("would make {} shards, at most 100000", self.num_shards()),
            );
        }
        for (index, spec) in self.layers.iter().enumerate() {
            if spec.width == 0 || spec.width > MAX_DIMENSION {
                return wrong(
                    "layers",
                    format!("layer {} has width {}", spec.layer, spec.width),
                );
            }
            if spec.layer > self.teacher.num_layers || spec.layer > u32::from(u16::MAX) {
                return wrong(
                    "layers",
                    format!(
                        "layer {} is beyond the teacher's {}",
                        spec.layer, self.teacher.num_layers
                    ),
                );
            }
            if index > 0 && self.layers[index - 1].layer >= spec.layer {
                return wrong("layers", "not ascending, or one layer twice".to_owned());
            }
        }
        if self.tier == Tier::Exact
            && self.layers.last().map(|last| last.layer) != Some(self.teacher.num_layers)
        {
            return wrong(
                "layers",
                format!(
                    "the exact tier needs the last hidden state, layer {}",
                    self.teacher.num_layers
                ),
            );
        }
        Ok(())
    }

    fn check_origin(&self) -> Result<()> {
        let wrong = |message: &str| {
            Err(Error::InvalidSpec {
                field: "origin".to_owned(),
                message: message.to_owned(),
            })
        };
        let Some(origin) = &self.origin else {
            return Ok(());
        };
        if self.tier != Tier::Sparse || !self.layers.is_empty() {
            return wrong("imported values fill the sparse tier, without hidden states");
        }
        if !(origin.temperature.is_finite() && origin.temperature > 0.0) {
            return wrong("its temperature is not a positive number");
        }
        let ascend = origin.statistics.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascend || !origin.statistics.contains(&Statistic::Max) {
            return wrong("its statistics must ascend and contain the maximum");
        }
        Ok(())
    }

    fn check_code(&self) -> Result<()> {
        let wrong = |message: String| {
            Err(Error::InvalidSpec {
                field: "code".to_owned(),
                message,
            })
        };
        let Some(code) = &self.code else {
            return match self.tier {
                Tier::Compact => wrong("the compact tier needs its basis".to_owned()),
                Tier::Sparse | Tier::Exact => Ok(()),
            };
        };
        if self.tier != Tier::Compact {
            return wrong("only the compact tier has one".to_owned());
        }
        if code.basis.rank == 0 || code.basis.rank > self.teacher.hidden_size {
            return wrong(format!(
                "rank {} is not in 1..={}",
                code.basis.rank, self.teacher.hidden_size
            ));
        }
        Ok(())
    }
}

/// Whether a statistic is known, given what an importer said.
pub(crate) fn knows(origin: Option<&Origin>, statistic: Statistic) -> bool {
    origin.is_none_or(|origin| origin.statistics.contains(&statistic))
}
