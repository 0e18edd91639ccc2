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
mod mapped;
mod prune;
mod rng;
mod save;
mod tokenizer;
mod weights;

use std::path::Path;

use tch::{Device, Kind};
use tokenizers::Tokenizer;

use crate::gguf::GgufFile;
use crate::tokenizer::read_json;
use crate::weights::SafetensorsFolder;

pub use activation::{ActivationNorms, activation_norms};
pub use error::{Error, Result};
pub use linear::{linear, through_onednn};
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
    if !matches!(options.kind, Kind::Float | Kind::BFloat16) {
        return Err(Error::unsupported(
            path,
            "compute type",
            format!("{:?}", options.kind),
        ));
    }
    let gguf = is_gguf(path)?;
    let (network, tokenizer, digest) = if gguf {
        load_gguf(path, options)?
    } else {
        load_folder(path, options)?
    };
    if let Some(id) = tokenizer.tokenizer.get_vocab(true).into_values().max()
        && id as usize >= network.config().vocab_size
    {
        return Err(Error::Tokenizer {
            path: path.to_owned(),
            message: format!(
                "token {id} is outside the network's vocabulary of {}",
                network.config().vocab_size
            ),
        });
    }
    let bos = tokenizer.bos.or(network.config().bos_token_id);
    let eos = tokenizer
        .eos
        .or(network.config().eos_token_ids.first().copied());
    Ok(LoadedModel {
        network,
        tokenizer: tokenizer.tokenizer,
        fingerprint: tokenizer.fingerprint,
        digest,
        name: path_name(path),
        bos,
        eos,
        tokenizer_config: tokenizer.tokenizer_config,
    })
}

fn load_gguf(path: &Path, options: &LoadOptions) -> Result<(Llama, LoadedTokenizer, String)> {
    let file = GgufFile::open(path)?;
    let network = Llama::load(file.config()?, &file, options)?;
    Ok((network, file.tokenizer()?, file.digest()))
}

fn load_folder(path: &Path, options: &LoadOptions) -> Result<(Llama, LoadedTokenizer, String)> {
    let config_path = path.join("config.json");
    let config = read_json(&config_path)?.ok_or_else(|| Error::NotAModel {
        path: path.to_owned(),
    })?;
    let config = LlamaConfig::from_json(&config_path, &config)?;
    let files = SafetensorsFolder::open(path)?;
    let network = Llama::load(config, &files, options)?;
    Ok((network, load_tokenizer(path)?, files.digest()))
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

/// The last part of a path, also of one like `.` or `models/..`.
fn path_name(path: &Path) -> String {
    let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    canonical
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
