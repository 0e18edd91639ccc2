//! Writing models as Hugging Face folders, and the small rules of writing files safely.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, View};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::lora::save_adapters_for;
use crate::sparsity::SPARSITY_KEY;
use crate::tokenizer::GENERATION_CONFIG;
use crate::{Error, LoadedModel, Result};

/// Writes a Hugging Face folder: `config.json`, `model.safetensors` (in the compute type),
/// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and `generation_config.json` where the model came
/// with one. Attached adapters are not written; merge them first. The folder gets its name when everything in it is on disk.
///
/// # Errors
/// `out` exists already; the disk is full or not writable.
pub fn save_model(model: &LoadedModel, out: &Path) -> Result<()> {
    if out.exists() {
        return Err(Error::Exists {
            path: out.to_owned(),
        });
    }
    let parent = parent_of(out);
    std::fs::create_dir_all(&parent).map_err(Error::io("create", &parent))?;
    let staging = StagingFolder::beside(out)?;
    write_model(model, &staging.path)?;
    sync_folder(&staging.path)?;
    staging.publish(out)?;
    sync_folder(&parent)
}

fn write_model(model: &LoadedModel, folder: &Path) -> Result<()> {
    let network = &model.network;
    let dtype = match network.kind() {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    };
    let mut config = network.config().to_json(dtype);
    if let Some(sparsity) = network.sparsity() {
        config[SPARSITY_KEY] = json!(sparsity);
    }
    if network.config().is_pruned() {
        // transformers knows one size for all layers; this is how it learns of each layer's own.
        let class = match network.architecture() {
            "bloom" => "CaskdBloomForCausalLM",
            "mistral" => "CaskdMistralForCausalLM",
            "qwen2" => "CaskdQwen2ForCausalLM",
            _ => "CaskdLlamaForCausalLM",
        };
        config["auto_map"] = json!({"AutoModelForCausalLM": format!("modeling_caskd.{class}")});
        write_file(&folder.join("modeling_caskd.py"), MODELING.as_bytes())?;
    }
    write_json(&folder.join("config.json"), &config)?;
    write_safetensors(&folder.join("model.safetensors"), network.parameters())?;
    let path = folder.join("tokenizer.json");
    let tokenizer = model
        .tokenizer
        .to_string(true)
        .map_err(|e| Error::Tokenizer {
            path: path.clone(),
            message: e.to_string(),
        })?;
    write_file(&path, tokenizer.as_bytes())?;
    write_json(
        &folder.join("tokenizer_config.json"),
        &model.tokenizer_config,
    )?;
    write_json(
        &folder.join("special_tokens_map.json"),
        &special_tokens(&model.tokenizer_config),
    )?;
    match &model.generation_config {
        Some(config) => write_json(&folder.join(GENERATION_CONFIG), config),
        None => Ok(()),
    }
}

/// Loads pruned folders with transformers.
const MODELING: &str = include_str!("../../python/modeling_caskd.py");

/// Writes a run's adapters in PEFT's form into the new folder `out`, with the base model that they go onto in
/// `out/base`. Returns the base's path.
///
/// # Errors
/// The network has no adapters; `out` exists already; the disk is full or not writable.
pub fn save_peft(model: &LoadedModel, out: &Path) -> Result<PathBuf> {
    if out.exists() {
        return Err(Error::Exists {
            path: out.to_owned(),
        });
    }
    let parent = parent_of(out);
    std::fs::create_dir_all(&parent).map_err(Error::io("create", &parent))?;
    let staging = StagingFolder::beside(out)?;
    let base = staging.path.join(BASE);
    std::fs::create_dir(&base).map_err(Error::io("create", &base))?;
    write_model(model, &base)?;
    sync_folder(&base)?;
    let published = parent.canonicalize().map_err(Error::io("read", &parent))?;
    let published = published
        .join(out.file_name().unwrap_or_default())
        .join(BASE);
    save_adapters_for(&model.network, Some(&published), &staging.path)?;
    staging.publish(out)?;
    sync_folder(&parent)?;
    Ok(published)
}

const BASE: &str = "base";

/// The `*_token` entries of `tokenizer_config.json`.
fn special_tokens(config: &Value) -> Value {
    let mut map = json!({});
    for key in [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "additional_special_tokens",
    ] {
        if let Some(value) = config.get(key).filter(|value| !value.is_null()) {
            map[key] = value.clone();
        }
    }
    map
}

/// Writes tensors as safetensors, one tensor's bytes in memory at a time, and syncs the file.
pub(crate) fn write_safetensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let tensors: Vec<(String, Stored)> = tensors
        .into_iter()
        .map(|(name, tensor)| (name, Stored::new(&tensor)))
        .collect();
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => Error::Io {
            action: "write",
            path: path.to_owned(),
            source,
        },
        other => Error::Damaged {
            path: path.to_owned(),
            format: "safetensors",
            message: other.to_string(),
        },
    })?;
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("sync", path))
}

/// A tensor as safetensors wants to see it.
struct Stored {
    tensor: Tensor,
    shape: Vec<usize>,
}

impl Stored {
    fn new(tensor: &Tensor) -> Stored {
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        Stored {
            tensor: tensor.detach(),
            shape,
        }
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        match self.tensor.kind() {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor = self.tensor.to_device(tch::Device::Cpu).contiguous();
        let mut bytes = vec![0u8; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Pretty JSON with a final newline, synced.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("sync", folder))
}

fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A hidden sibling folder that vanishes unless it is published.
struct StagingFolder {
    path: PathBuf,
}

impl StagingFolder {
    fn beside(out: &Path) -> Result<StagingFolder> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let path = parent_of(out).join(format!(".{name}.{}.partial", std::process::id()));
        if path.exists() {
            // Left by a killed process whose id we now have.
            std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
        std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(StagingFolder { path })
    }

    fn publish(self, out: &Path) -> Result<()> {
        std::fs::rename(&self.path, out).map_err(Error::io("rename to", out))
    }
}

impl Drop for StagingFolder {
    fn drop(&mut self) {
        // After a rename there is nothing to remove; after a failure this is the best that can be
        // done, and the error that led here is the one to report.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
