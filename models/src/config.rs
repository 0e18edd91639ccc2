//! The configuration of any network this crate knows: what callers ask, whatever the architecture.

use std::path::Path;

use serde_json::Value;

use crate::bloom::BloomConfig;
use crate::llama::{AttentionBias, Family, LayerShape, LlamaConfig};
use crate::{Error, Result};

/// Architectures, by Hugging Face's `model_type`.
pub(crate) const ARCHITECTURES: [&str; 4] = ["llama", "qwen2", "mistral", "bloom"];

/// A network's configuration.
#[derive(Debug, Clone, PartialEq)]
pub enum Config {
    /// Llama, Qwen2, Mistral: the same blocks under other settings.
    Llama(LlamaConfig),
    /// BLOOM.
    Bloom(BloomConfig),
}

impl From<BloomConfig> for Config {
    fn from(config: BloomConfig) -> Self {
        Config::Bloom(config)
    }
}

impl From<LlamaConfig> for Config {
    fn from(config: LlamaConfig) -> Self {
        Config::Llama(config)
    }
}

impl From<&LlamaConfig> for Config {
    fn from(config: &LlamaConfig) -> Self {
        Config::Llama(config.clone())
    }
}

impl Config {
    /// Reads `config.json`; an unknown `model_type` is refused by name.
    pub(crate) fn from_json(path: &Path, value: &Value) -> Result<Config> {
        let model_type = value
            .get("model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| Error::MissingField {
                path: path.to_owned(),
                field: "model_type".to_owned(),
            })?;
        match model_type {
            "llama" => LlamaConfig::from_json(path, value, Family::Llama).map(Config::Llama),
            "qwen2" => LlamaConfig::from_json(path, value, Family::Qwen2).map(Config::Llama),
            "mistral" => LlamaConfig::from_json(path, value, Family::Mistral).map(Config::Llama),
            "bloom" => BloomConfig::from_json(path, value).map(Config::Bloom),
            other => Err(Error::UnknownArchitecture {
                path: path.to_owned(),
                name: other.to_owned(),
            }),
        }
    }

    /// Writes `config.json`.
    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        match self {
            Config::Llama(config) => config.to_json(dtype),
            Config::Bloom(config) => config.to_json(dtype),
        }
    }

    /// Hugging Face's `model_type`.
    pub fn architecture(&self) -> &'static str {
        match self {
            Config::Llama(config) => match config.family {
                Family::Llama => "llama",
                Family::Qwen2 => "qwen2",
                Family::Mistral => "mistral",
            },
            Config::Bloom(_) => "bloom",
        }
    }

    /// V: rows of embedding and head.
    pub fn vocab_size(&self) -> usize {
        match self {
            Config::Llama(config) => config.vocab_size,
            Config::Bloom(config) => config.vocab_size,
        }
    }

    /// D.
    pub fn hidden_size(&self) -> usize {
        match self {
            Config::Llama(config) => config.hidden_size,
            Config::Bloom(config) => config.hidden_size,
        }
    }

    /// d.
    pub fn head_dim(&self) -> usize {
        match self {
            Config::Llama(config) => config.head_dim,
            Config::Bloom(config) => config.head_dim(),
        }
    }

    /// L.
    pub fn num_layers(&self) -> usize {
        self.layers().len()
    }

    /// Sizes of a block before any pruning.
    pub fn dense(&self) -> LayerShape {
        match self {
            Config::Llama(config) => config.dense,
            Config::Bloom(config) => config.dense,
        }
    }

    /// True when some block is smaller than the architecture's own sizes.
    pub fn is_pruned(&self) -> bool {
        self.layers().iter().any(|layer| *layer != self.dense())
    }

    /// Sizes of every block.
    pub fn layers(&self) -> &[LayerShape] {
        match self {
            Config::Llama(config) => &config.layers,
            Config::Bloom(config) => &config.layers,
        }
    }

    /// Longest sequence the network was trained for.
    pub fn max_position_embeddings(&self) -> usize {
        match self {
            Config::Llama(config) => config.max_position_embeddings,
            Config::Bloom(config) => config.seq_length,
        }
    }

    /// The positions beyond which logits lose their sense: those that the network was trained for. `None` for BLOOM,
    /// whose attention knows distances only.
    pub fn last_position(&self) -> Option<usize> {
        match self {
            Config::Llama(config) => Some(config.max_position_embeddings),
            Config::Bloom(_) => None,
        }
    }

    /// The LM head is the embedding.
    pub fn tie_word_embeddings(&self) -> bool {
        match self {
            Config::Llama(config) => config.tie_word_embeddings,
            Config::Bloom(config) => config.tie_word_embeddings,
        }
    }

    /// First token of a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        match self {
            Config::Llama(config) => config.bos_token_id,
            Config::Bloom(config) => config.bos_token_id,
        }
    }

    /// Tokens that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        match self {
            Config::Llama(config) => &config.eos_token_ids,
            Config::Bloom(config) => &config.eos_token_ids,
        }
    }

    /// Elements of block `index`, counted from the configuration alone.
    pub(crate) fn block_elements(&self, index: usize) -> u64 {
        let (width, d) = (self.hidden_size() as u64, self.head_dim() as u64);
        let shape = self.layers()[index];
        let (q, kv) = (shape.heads as u64 * d, shape.kv_heads as u64 * d);
        let channels = shape.intermediate_size as u64;
        match self {
            Config::Llama(config) => {
                let attention = 2 * width * (q + kv)
                    + match config.attention_bias {
                        AttentionBias::None => 0,
                        AttentionBias::Qkv => q + 2 * kv,
                        AttentionBias::All => q + 2 * kv + width,
                    };
                let biases = if config.mlp_bias {
                    2 * channels + width
                } else {
                    0
                };
                attention + 3 * width * channels + biases + 2 * width
            }
            Config::Bloom(config) => config.block_elements(shape),
        }
    }

    /// Elements of embedding, head and the norms outside the blocks.
    pub(crate) fn num_parameters(&self) -> u64 {
        let table = (self.vocab_size() * self.hidden_size()) as u64;
        let tables = if self.tie_word_embeddings() { 1 } else { 2 };
        let (embedding_norm, norm) = self.norm_elements();
        let blocks: u64 = (0..self.num_layers())
            .map(|index| self.block_elements(index))
            .sum();
        tables * table + embedding_norm + norm + blocks
    }

    /// Elements of the embedding's norm and of the final one.
    pub(crate) fn norm_elements(&self) -> (u64, u64) {
        let width = self.hidden_size() as u64;
        match self {
            Config::Llama(_) => (0, width),
            Config::Bloom(_) => (2 * width, 2 * width),
        }
    }

    /// Path of block `index` in the checkpoint.
    pub(crate) fn block_path(&self, index: usize) -> String {
        match self {
            Config::Llama(_) => format!("model.layers.{index}"),
            Config::Bloom(_) => format!("transformer.h.{index}"),
        }
    }

    /// Path of the embedding in the checkpoint.
    pub(crate) fn embedding_path(&self) -> &'static str {
        match self {
            Config::Llama(_) => "model.embed_tokens",
            Config::Bloom(_) => "transformer.word_embeddings",
        }
    }

    /// Path of the final norm in the checkpoint.
    pub(crate) fn norm_path(&self) -> &'static str {
        match self {
            Config::Llama(_) => "model.norm",
            Config::Bloom(_) => "transformer.ln_f",
        }
    }

    /// Records new block sizes after the weights were cut.
    pub(crate) fn set_layers(&mut self, layers: Vec<LayerShape>) {
        match self {
            Config::Llama(config) => config.layers = layers,
            Config::Bloom(config) => config.set_layers(layers),
        }
    }

    /// Where the key/value heads of block `index` lie among the dense ones; those of Llama may lie anywhere.
    pub(crate) fn head_places(&self, index: usize) -> Vec<usize> {
        match self {
            Config::Llama(config) => (0..config.layers[index].kv_heads).collect(),
            Config::Bloom(config) => config.head_places[index].clone(),
        }
    }

    /// Records which of its heads, or of its key/value heads with their query heads, block `index` keeps.
    pub(crate) fn keep_heads(&mut self, index: usize, kept: &[i64]) {
        match self {
            // Positions are in queries and keys: a head's place is nothing to it.
            Config::Llama(_) => {}
            Config::Bloom(config) => config.keep_heads(index, kept),
        }
    }
}
