//! The networks of caskd on tch: loading from Hugging Face folders and GGUF files, the forward
//! pass, LoRA adapters, structured pruning, saving.
//!
//! Letters in every shape comment:
//!
//! | letter | means |
//! |---|---|
//! | B | batch: sequences |
//! | T | positions of a sequence |
//! | D | hidden width (`hidden_size`) |
//! | H, G | query heads and key/value heads of a layer (a *group* is one key/value head with its H/G query heads) |
//! | d | width of one head (`head_dim`) |
//! | F | FFN channels of a layer (`intermediate_size`) |
//! | L | layers (blocks) |
//! | V | vocabulary: rows of the LM head |
//! | r | LoRA rank |
//!
//! Hidden layers are numbered as in Hugging Face transformers: 0 is the embedding, `i` the output
//! of block `i`, L the output of the last block *after* the final norm.
//!
//! What this crate never does: use a global random generator, touch the network, write anything
//! under a final name before it is complete, or accept a configuration key that changes the
//! numbers and that it does not implement.

mod activation;
mod error;
mod gguf;
mod gguf_tokenizer;
mod hf;
mod linear;
mod llama;
mod lora;
mod prune;
mod rng;
mod save;
mod tokenizer;
mod weights;

use std::path::Path;

use tch::{Device, Kind};
use tokenizers::Tokenizer;

pub use activation::{ActivationNorms, activation_norms};
pub use error::{Error, Result};
pub use llama::{Forward, LayerShape, Llama, LlamaConfig, RopeScaling};
pub use lora::{LORA_TARGETS, LoraConfig, load_adapters, save_adapters};
pub use prune::{LayerPruning, PruneOptions, PruneReport, prune};
pub use rng::SeededRng;
pub use save::save_model;
pub use tokenizer::{LoadedTokenizer, fingerprint, load_tokenizer};

/// Where the weights go and in which type they compute.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Device of the weights.
    pub device: Device,
    /// `Kind::Float` or `Kind::BFloat16`. Norms and softmax reduce in f32 either way.
    pub kind: Kind,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            device: Device::Cpu,
            kind: Kind::Float,
        }
    }
}

/// A network with its tokenizer, as read from one path.
#[derive(Debug)]
pub struct LoadedModel {
    /// The network.
    pub network: Llama,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// blake3 (hex) over the id-ordered `(id, token)` pairs of the tokenizer; the same for the GGUF
    /// and the Hugging Face form of one tokenizer.
    pub fingerprint: String,
    /// blake3 (hex) of the weight files' bytes: all safetensors files in name order, or the GGUF.
    /// Pruning derives a new one; adapters do not change it.
    pub digest: String,
    /// The folder's or file's name, without its path.
    pub name: String,
    /// Token that starts a sequence, when the tokenizer names one.
    pub bos: Option<u32>,
    /// Token that ends a sequence, when the tokenizer names one.
    pub eos: Option<u32>,
    /// `tokenizer_config.json`: as it was read, or made from the GGUF's metadata (special tokens,
    /// chat template).
    pub tokenizer_config: serde_json::Value,
}

impl LoadedModel {
    /// Puts a network and a tokenizer together (tests, tiny random models).
    pub fn new(network: Llama, tokenizer: Tokenizer, name: &str) -> LoadedModel {
        let fingerprint = fingerprint(&tokenizer);
        LoadedModel {
            network,
            tokenizer,
            fingerprint,
            digest: String::new(),
            name: name.to_owned(),
            bos: None,
            eos: None,
            tokenizer_config: serde_json::json!({}),
        }
    }
}

/// Loads a Hugging Face folder or a GGUF file.
///
/// # Errors
/// A path that is neither, an architecture or `model_type` this crate does not know (named in the
/// error), a configuration it does not implement, missing or misshapen tensors, damaged files.
pub fn load(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    let _ = (path, options);
    unimplemented!("under construction")
}
