//! Llama.
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{LoadOptions, LoraConfig, Result};

/// Sizes of one block; pruned students have blocks of different sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// H: query heads.
    pub heads: usize,
    /// G: key/value heads.
    pub kv_heads: usize,
    /// F: FFN channels.
    pub intermediate_size: usize,
}

/// Rotary scaling of Llama 3 (`rope_type` "llama3").
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// Frequencies of long wavelength are divided by this.
    pub factor: f64,
    /// Wavelengths above `original / low_freq_factor` are scaled wholly.
    pub low_freq_factor: f64,
    /// Wavelengths below `original / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length the model was trained at first.
    pub original_max_position_embeddings: usize,
}

/// Configuration, with Hugging Face's field names.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// d.
    pub head_dim: usize,
    /// Context length the model was trained for.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Llama 3's scaled rotary embedding.
    pub rope_scaling: Option<RopeScaling>,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Sizes of every block; L is its length.
    pub layers: Vec<LayerShape>,
}

/// What a forward pass returns.
#[derive(Debug)]
pub struct Forward {
    /// [B, T, D] after the final norm.
    pub last_hidden: Tensor,
    /// The layers asked for, ascending, each [B, T, D].
    pub hidden: Vec<(u32, Tensor)>,
}

/// A Llama network.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    head: Tensor,
}

impl Llama {
    /// Random weights (normal, standard deviation 0.02) from a seed, for tests.
    pub fn random(config: &LlamaConfig, seed: u64, options: &LoadOptions) -> Result<Llama> {
        let _ = (config, seed, options);
        unimplemented!("under construction")
    }

    /// Runs the network. `input_ids` [B, T] i64, padded on the right; attention is causal, so
    /// padding never reaches real positions. `keep` names the layers to return (0..=L).
    /// Builds an autograd graph only for attached adapters and outside `tch::no_grad`.
    pub fn forward(&self, input_ids: &Tensor, keep: &[u32], train: bool) -> Forward {
        let _ = (input_ids, keep, train);
        unimplemented!("under construction")
    }

    /// Logits of hidden states after the final norm: [.., D] → [.., V].
    pub fn logits(&self, last_hidden: &Tensor) -> Tensor {
        last_hidden.matmul(&self.head.tr())
    }

    /// The configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// L.
    pub fn num_layers(&self) -> usize {
        self.config.layers.len()
    }

    /// LM head [V, D] (the embedding when tied).
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Attaches fresh adapters: A kaiming-uniform from the seed, B zero, both f32.
    pub fn attach_lora(&mut self, lora: &LoraConfig, seed: u64) -> Result<()> {
        let _ = (lora, seed);
        unimplemented!("under construction")
    }

    /// The attached adapters' configuration.
    pub fn lora(&self) -> Option<&LoraConfig> {
        unimplemented!("under construction")
    }

    /// Dropout masks of the next `forward(train = true)` are a pure function of this seed; set it
    /// before every training pass (for instance from seed and step).
    pub fn set_dropout_seed(&mut self, seed: u64) {
        let _ = seed;
        unimplemented!("under construction")
    }

    /// Adapter tensors by name (shallow clones that require gradients), ordered by name.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        unimplemented!("under construction")
    }

    /// Adds the adapters to the base weights and removes them.
    pub fn merge_lora(&mut self) {
        unimplemented!("under construction")
    }

    /// Parameters of the base network; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        unimplemented!("under construction")
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.head.device()
    }

    /// Compute type of the weights.
    pub fn kind(&self) -> Kind {
        self.head.kind()
    }
}
