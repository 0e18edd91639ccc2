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
//! What this crate never does: use a global random generator, touch the network outside `hub.rs`, write anything
//! under a final name before it is complete, or accept a configuration key that changes the
//! numbers and that it does not implement.

mod activation;
mod allocator;
mod attention;
mod bf16_product;
mod block;
mod bloom;
mod config;
mod error;
mod files;
mod gguf;
mod gguf_config;
mod gguf_tokenizer;
mod hf;
mod hub;
mod importance;
mod linear;
mod llama;
mod lora;
mod mapped;
mod mistral;
mod network;
mod norm;
mod pad;
mod prune;
mod qwen2;
mod rng;
mod row_kernels;
mod saliency;
mod save;
mod side_by_side;
mod sparsity;
mod tokenizer;
mod training;
#[doc(hidden)]
pub mod unchecked;
mod weights;
mod wide_head;

use std::path::Path;

use tch::{Device, Kind};
use tokenizers::Tokenizer;

pub use activation::{ActivationNorms, activation_norms};
pub use allocator::keep_freed_memory;
pub use block::{Block, Context};
pub use bloom::BloomConfig;
pub use config::Config;
pub use error::{Error, Result};
pub use files::{Embedding, ModelFiles, PartBytes};
pub use importance::{Criterion, Method};
pub use linear::{linear, through_onednn};
pub use llama::{
    AttentionBias, Family, LayerShape, Llama3Scaling, LlamaConfig, RopeScaling, SlidingWindow,
};
pub use lora::{ALL_LINEAR, LoraConfig, load_adapters, save_adapters};
pub use network::{Forward, Network};
pub use norm::Norm;
pub use pad::pad_to_dense;
pub use prune::{
    LayerPruning, Parts, PruneOptions, PruneReport, default_scope, prune, prune_block,
};
pub use rng::SeededRng;
pub use saliency::{Saliencies, saliencies};
pub use save::{save_model, save_peft};
pub use side_by_side::{Shared, passes_at_once, side_by_side};
pub use sparsity::{MaskOptions, MaskReport, Pattern, Sparsity, mask};
pub use tokenizer::{LoadedTokenizer, fingerprint, load_tokenizer};
pub use training::Tape;
pub use wide_head::WideHead;

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
    pub network: Network,
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
    /// `generation_config.json`, where the folder has one: how transformers samples, and where it stops.
    pub generation_config: Option<serde_json::Value>,
}

impl LoadedModel {
    /// Puts a network and a tokenizer together (tests, tiny random models).
    pub fn new(network: Network, tokenizer: Tokenizer, name: &str) -> LoadedModel {
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
            generation_config: None,
        }
    }

    /// The same model once more, without adapters: the base weights are shared, not copied, so that many students
    /// in turn can be trained on weights that were loaded once.
    #[must_use]
    pub fn share(&self) -> LoadedModel {
        LoadedModel {
            network: self.network.share(),
            tokenizer: self.tokenizer.clone(),
            fingerprint: self.fingerprint.clone(),
            digest: self.digest.clone(),
            name: self.name.clone(),
            bos: self.bos,
            eos: self.eos,
            tokenizer_config: self.tokenizer_config.clone(),
            generation_config: self.generation_config.clone(),
        }
    }
}

/// Loads a Hugging Face folder, a GGUF file or a model of the Hugging Face hub (`org/name`).
///
/// # Errors
/// Those of [`ModelFiles::open`] and [`ModelFiles::load`].
pub fn load(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    load_across(path, options.kind, &[options.device])
}

/// [`load`] with the projections in 8 bits: [`ModelFiles::load_in_8_bits`].
///
/// # Errors
/// Those of [`load`]; a masked model.
pub fn load_in_8_bits(path: &Path, options: &LoadOptions) -> Result<LoadedModel> {
    ModelFiles::open(path)?.load_in_8_bits(options.kind, &[options.device])
}

/// Loads a model with its layers placed across devices, as many on each: block i of L goes to
/// device i·P/L of P, the embedding to the first, final norm and head to the last.
///
/// # Errors
/// Those of [`ModelFiles::open`] and [`ModelFiles::load`].
pub fn load_across(path: &Path, kind: Kind, devices: &[Device]) -> Result<LoadedModel> {
    ModelFiles::open(path)?.load(kind, devices)
}

/// True for a file with GGUF's magic or name, false for a folder.
fn is_gguf(path: &Path) -> Result<bool> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if metadata.is_dir() {
        return Ok(false);
    }
    let mut magic = [0u8; 4];
    let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let starts_right =
        std::io::Read::read_exact(&mut file, &mut magic).is_ok() && &magic == b"GGUF";
    if starts_right
        || path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    {
        return Ok(true);
    }
    Err(Error::NotAModel {
        path: path.to_owned(),
    })
}
