//! A model's files, opened and not loaded; and its parts, loaded one at a time.
//!
//! This is the way to run a network that is larger than memory: open the files, load the embedding,
//! run it, and drop it; load block after block, run each over many positions, and drop it; then the
//! final norm, and the head in chunks of vocabulary rows. [`ModelFiles`] can be shared between
//! threads, so that one of them loads block i + 1 while another computes with block i. Where the
//! shapes of the products are the same, the values are those of [`Network::forward`], byte for
//! byte: that is made of the same pieces.
//!
//! ```no_run
//! # fn main() -> caskd_models::Result<()> {
//! # use std::path::Path;
//! use caskd_models::{LoadOptions, ModelFiles};
//! let files = ModelFiles::open(Path::new("teacher"))?;
//! let options = LoadOptions::default();
//! let ids = tch::Tensor::from_slice(&[1i64, 2, 3, 4]).view([1, 4]); // [B, T]
//! let context = files.context((1, 4), &options);
//! let mut x = files.load_embedding(&options)?.forward(&ids); // [B·T, D]; hidden layer 0
//! for index in 0..files.config().num_layers() {
//!     x = files.load_block(index, &options)?.forward(&x, &context); // hidden layer index + 1
//! }
//! let last_hidden = files.load_norm(&options)?.forward(&x); // hidden layer L
//! let rows = files.load_head(0..100, &options)?; // [100, D]
//! let logits = caskd_models::linear(&last_hidden, &rows, None); // [B·T, 100]
//! # Ok(())
//! # }
//! ```

use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::block::{Block, Context};
use crate::config::Config;
use crate::gguf::GgufFile;
use crate::hub;
use crate::linear::Pass;
use crate::norm::Norm;
use crate::sparsity::Sparsity;
use crate::tokenizer::{GENERATION_CONFIG, read_json};
use crate::training::masked_in_8_bits;
use crate::weights::{Checked, SafetensorsFolder, WeightSource};
use crate::{
    Error, LoadOptions, LoadedModel, LoadedTokenizer, Network, Result, is_gguf, load_tokenizer,
};

/// An opened Hugging Face folder or GGUF file: configuration and tokenizer are read, the weights
/// mapped and not loaded.
pub struct ModelFiles {
    path: PathBuf,
    config: Config,
    /// Of a masked network.
    sparsity: Option<Sparsity>,
    source: Box<dyn WeightSource>,
    /// The tokenizer, with its fingerprint, special tokens and configuration; `bos` and `eos` fall
    /// back to those of the network's configuration.
    pub tokenizer: LoadedTokenizer,
    /// The folder's or file's name without its path, or the hub's name.
    pub name: String,
}

impl std::fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFiles")
            .field("path", &self.path)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Bytes that the parts of a network take in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartBytes {
    /// The embedding, with its norm where it has one.
    pub embedding: u64,
    /// Every block.
    pub blocks: Vec<u64>,
    /// The final norm.
    pub norm: u64,
    /// The LM head, also where it is the embedding.
    pub head: u64,
}

impl ModelFiles {
    /// Opens a folder, a file or a model of the Hugging Face hub (`org/name`, which may have to be
    /// fetched first) and reads everything but the weights.
    ///
    /// # Errors
    /// A name that neither the local cache nor the hub serves, a path that is neither, an architecture or `model_type` this crate does not know (named in
    /// the error), a configuration it does not implement, damaged files, a tokenizer with tokens
    /// outside the network's vocabulary.
    pub fn open(path: &Path) -> Result<ModelFiles> {
        let name = hub::model_name(path);
        let path = &*hub::locate(path)?;
        let mut sparsity = None;
        let (config, source): (Config, Box<dyn WeightSource>) = if is_gguf(path)? {
            let file = GgufFile::open(path)?;
            (file.config()?, Box::new(file))
        } else {
            let config_path = path.join("config.json");
            let config = read_json(&config_path)?.ok_or_else(|| Error::NotAModel {
                path: path.to_owned(),
            })?;
            sparsity = Sparsity::from_config(&config_path, &config)?;
            let config = Config::from_json(&config_path, &config)?;
            (config, Box::new(SafetensorsFolder::open(path)?))
        };
        check_parts(&config, source.as_ref())?;
        let mut tokenizer = load_tokenizer(path)?;
        if let Some(id) = tokenizer.tokenizer.get_vocab(true).into_values().max()
            && id as usize >= config.vocab_size()
        {
            return Err(Error::Tokenizer {
                path: path.to_owned(),
                message: format!(
                    "token {id} is outside the network's vocabulary of {}",
                    config.vocab_size()
                ),
            });
        }
        let known = |name: &str, id: Option<u32>| match id {
            Some(id) if id as usize >= config.vocab_size() => {
                Err(Error::unsupported(path, name, id))
            }
            id => Ok(id),
        };
        let bos = known("bos_token_id", config.bos_token_id());
        tokenizer.bos = tokenizer.bos.map_or_else(|| bos, |id| Ok(Some(id)))?;
        let eos = known("eos_token_id", config.eos_token_ids().first().copied());
        tokenizer.eos = tokenizer.eos.map_or_else(|| eos, |id| Ok(Some(id)))?;
        Ok(ModelFiles {
            path: path.to_owned(),
            config,
            sparsity,
            source,
            tokenizer,
            name: name.unwrap_or_else(|| path_name(path)),
        })
    }

    /// The network's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// blake3 (hex) of the weight files' bytes, see [`LoadedModel::digest`]. Reads all of them.
    pub fn digest(&self) -> String {
        self.source.digest()
    }

    /// Parameters of the network; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        self.config.num_parameters()
    }

    /// Bytes that the parts take once loaded in compute type `kind`.
    pub fn part_bytes(&self, kind: Kind) -> PartBytes {
        let bytes = |elements: u64| elements * kind.elt_size_in_bytes() as u64;
        let table = (self.config.vocab_size() * self.config.hidden_size()) as u64;
        let (embedding_norm, norm) = self.config.norm_elements();
        PartBytes {
            embedding: bytes(table + embedding_norm),
            blocks: (0..self.config.num_layers())
                .map(|index| bytes(self.config.block_elements(index)))
                .collect(),
            norm: bytes(norm),
            head: bytes(table),
        }
    }

    /// What the blocks share in a pass over [B, T] tokens, on the device and in the type of the
    /// options. One context serves all blocks and all batches of that shape.
    pub fn context(&self, shape: (i64, i64), options: &LoadOptions) -> Context {
        Context::new(&self.config, shape, options, Pass::Inference)
    }

    /// Loads the embedding.
    ///
    /// # Errors
    /// A missing or misshapen tensor.
    pub fn load_embedding(&self, options: &LoadOptions) -> Result<Embedding> {
        Embedding::load(&self.config, self.source.as_ref(), options)
    }

    /// Loads block `index` of 0..L: reads it from the files and converts it, in one copy that is
    /// free again when the block is dropped; no page of the files stays with the process.
    ///
    /// # Errors
    /// A missing or misshapen tensor.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn load_block(&self, index: usize, options: &LoadOptions) -> Result<Block> {
        Block::load(&self.config, index, self.source.as_ref(), options)
    }

    /// Loads the final norm.
    ///
    /// # Errors
    /// A missing or misshapen tensor.
    pub fn load_norm(&self, options: &LoadOptions) -> Result<Norm> {
        self.config.final_norm(self.source.as_ref(), options)
    }

    /// Loads rows of the LM head: [rows, D].
    ///
    /// # Errors
    /// A missing or misshapen tensor.
    ///
    /// # Panics
    /// When `rows` lead beyond the vocabulary.
    pub fn load_head(&self, rows: Range<usize>, options: &LoadOptions) -> Result<Tensor> {
        self.config.head_rows(rows, self.source.as_ref(), options)
    }

    /// Loads everything; the blocks are placed in turn on the devices, as many on each. Weights
    /// that stay on the CPU in the type of their file are not copied: they are the mapped file.
    ///
    /// # Errors
    /// A compute type that is neither f32 nor bf16, no device, missing or misshapen tensors.
    pub fn load(mut self, kind: Kind, devices: &[Device]) -> Result<LoadedModel> {
        self.source.keep_mapped();
        self.load_finished(kind, devices, &|_| {})
    }

    /// The same with the projections in 8 bits, as [`Network::quantize`] makes them: each block as soon as it is read,
    /// so that no more than one is in memory as it was.
    ///
    /// # Errors
    /// Those of [`ModelFiles::load`]; a masked model.
    pub fn load_in_8_bits(self, kind: Kind, devices: &[Device]) -> Result<LoadedModel> {
        if self.sparsity.is_some() {
            return Err(masked_in_8_bits());
        }
        self.load_finished(kind, devices, &|block| block.quantize())
    }

    /// Loads everything, and does to each block what is to be done to it.
    fn load_finished(
        self,
        kind: Kind,
        devices: &[Device],
        finish: &dyn Fn(&mut Block),
    ) -> Result<LoadedModel> {
        if !matches!(kind, Kind::Float | Kind::BFloat16) {
            return Err(Error::unsupported(
                &self.path,
                "compute type",
                format!("{kind:?}"),
            ));
        }
        if devices.is_empty() || devices.len() > self.config.num_layers() {
            return Err(Error::unsupported(
                &self.path,
                "number of devices",
                devices.len(),
            ));
        }
        let source = self.source.as_ref();
        let mut network = Network::load(&self.config, source, kind, devices, finish)?;
        if let Some(sparsity) = self.sparsity.clone() {
            network.set_sparsity(sparsity);
        }
        let digest = self.digest();
        let generation_config = read_json(&self.path.join(GENERATION_CONFIG))?;
        let tokenizer = self.tokenizer;
        Ok(LoadedModel {
            network,
            tokenizer: tokenizer.tokenizer,
            fingerprint: tokenizer.fingerprint,
            digest,
            name: self.name,
            bos: tokenizer.bos,
            eos: tokenizer.eos,
            tokenizer_config: tokenizer.tokenizer_config,
            generation_config,
        })
    }
}

/// Refuses files that lack a part, before anything is read of them.
fn check_parts(config: &Config, source: &dyn WeightSource) -> Result<()> {
    let (source, options) = (Checked(source), LoadOptions::default());
    Embedding::load(config, &source, &options)?;
    for index in 0..config.num_layers() {
        Block::load(config, index, &source, &options)?;
    }
    config.final_norm(&source, &options)?;
    let _ = config.head_rows(0..config.vocab_size(), &source, &options)?;
    Ok(())
}

/// The token embedding.
#[derive(Debug)]
pub struct Embedding {
    /// [V, D].
    pub(crate) table: Tensor,
    /// BLOOM's.
    norm: Option<Norm>,
}

const EMBEDDING_NORM: &str = "transformer.word_embeddings_layernorm";

impl Embedding {
    pub(crate) fn load(
        config: &Config,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Embedding> {
        let name = format!("{}.weight", config.embedding_path());
        let shape = [config.vocab_size() as i64, config.hidden_size() as i64];
        let table = source.tensor(&name, &shape, options)?;
        let norm = match config {
            Config::Llama(_) => None,
            Config::Bloom(bloom) => Some(Norm::layer(
                EMBEDDING_NORM,
                bloom.hidden_size,
                bloom.layer_norm_epsilon,
                source,
                options,
            )?),
        };
        Ok(Embedding { table, norm })
    }

    /// Token ids of any shape with N elements, on any device → [N, D].
    ///
    /// # Panics
    /// When an id is outside the vocabulary.
    pub fn forward(&self, input_ids: &Tensor) -> Tensor {
        let ids = input_ids.view([-1]).to_device(self.table.device());
        let x = Tensor::embedding(&self.table, &ids, -1, false, false);
        match &self.norm {
            Some(norm) => norm.forward(&x),
            None => x,
        }
    }

    pub(crate) fn for_each_tensor(&mut self, change: &mut dyn FnMut(&mut Tensor)) {
        change(&mut self.table);
        if let Some(norm) = &mut self.norm {
            norm.for_each_tensor(change);
        }
    }

    pub(crate) fn parameters(&self, config: &Config) -> Vec<(String, &Tensor)> {
        let table = (format!("{}.weight", config.embedding_path()), &self.table);
        let norm = self
            .norm
            .as_ref()
            .map(|norm| norm.parameters(EMBEDDING_NORM));
        std::iter::once(table)
            .chain(norm.into_iter().flatten())
            .collect()
    }

    pub(crate) fn share(&self) -> Embedding {
        Embedding {
            table: self.table.shallow_clone(),
            norm: self.norm.as_ref().map(Norm::share),
        }
    }
}

impl Config {
    pub(crate) fn final_norm(
        &self,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Norm> {
        let (name, width) = (self.norm_path(), self.hidden_size());
        match self {
            Config::Llama(config) => Norm::rms(name, width, config.rms_norm_eps, source, options),
            Config::Bloom(config) => {
                Norm::layer(name, width, config.layer_norm_epsilon, source, options)
            }
        }
    }

    pub(crate) fn head_rows(
        &self,
        rows: Range<usize>,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let name = if self.tie_word_embeddings() {
            self.embedding_path()
        } else {
            "lm_head"
        };
        let shape = [self.vocab_size() as i64, self.hidden_size() as i64];
        source.rows(&format!("{name}.weight"), &shape, rows, options)
    }
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
