//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): configuration, and files in PEFT's form.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use tch::Kind;

use crate::save::{sync_folder, write_json, write_safetensors};
use crate::tokenizer::read_json;
use crate::weights::{SafetensorsFolder, WeightSource};
use crate::{Error, LoadOptions, Network, Result};

/// Stands for every linear projection of a block, as in PEFT.
pub const ALL_LINEAR: &str = "all-linear";

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// Which projections get adapters, and how large they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// r: rows of A.
    pub rank: i64,
    /// The update is scaled by alpha / rank.
    pub alpha: f64,
    /// Probability that an input element of the adapter is dropped while training.
    pub dropout: f64,
    /// Projections that get an adapter (`q_proj`, …), or [`ALL_LINEAR`]; read from a list, or from one text with commas.
    #[serde(deserialize_with = "names")]
    pub targets: Vec<String>,
}

/// A list of names, or a text that holds them with commas between.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    Ok(match Targets::deserialize(deserializer)? {
        Targets::Names(names) => names,
        Targets::Word(text) => text.split(',').map(|name| name.trim().to_owned()).collect(),
    })
}

/// Target projections as TOML and JSON may have them.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected projections (\"q_proj,v_proj\", or a list), or \"all-linear\""
)]
enum Targets {
    Names(Vec<String>),
    Word(String),
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: vec![ALL_LINEAR.to_owned()],
        }
    }
}

impl LoraConfig {
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=1 << 16).contains(&self.rank) {
            return Err(refuse(format!("the rank is {}", self.rank)));
        }
        if !self.alpha.is_finite() {
            return Err(refuse(format!("alpha is {}", self.alpha)));
        }
        // The mask's probability is a multiple of 2⁻¹⁶ and must leave something over.
        if !(0.0..=0.99).contains(&self.dropout) {
            return Err(refuse(format!(
                "the dropout {} is not in [0, 0.99]",
                self.dropout
            )));
        }
        if self.targets.is_empty() {
            return Err(refuse("there are no target projections".to_owned()));
        }
        Ok(())
    }

    /// The same with the targets that it names among the projections of a block.
    pub(crate) fn resolve(&self, projections: &[&str]) -> Result<LoraConfig> {
        let unknown = |name: &&String| *name != ALL_LINEAR && !projections.contains(&name.as_str());
        if let Some(name) = self.targets.iter().find(unknown) {
            return Err(refuse(format!(
                "`{name}` is no projection of a block (there are {}, and `{ALL_LINEAR}` for all)",
                projections.join(", ")
            )));
        }
        let all = self.targets.iter().any(|name| name == ALL_LINEAR);
        let chosen = |name: &&&str| all || self.targets.iter().any(|target| target == **name);
        Ok(LoraConfig {
            targets: projections
                .iter()
                .filter(chosen)
                .map(|&name| name.to_owned())
                .collect(),
            ..self.clone()
        })
    }
}

/// Writes the adapters in PEFT's form into the folder `out` (made if needed):
/// `adapter_config.json`, then `adapter_model.safetensors`, each complete before it gets its name.
///
/// # Errors
/// The network has no adapters; the disk is full or not writable.
pub fn save_adapters(network: &Network, out: &Path) -> Result<()> {
    save_adapters_for(network, None, out)
}

/// The same, naming the base model that they go onto.
pub(crate) fn save_adapters_for(network: &Network, base: Option<&Path>, out: &Path) -> Result<()> {
    let lora = network
        .lora()
        .ok_or_else(|| refuse("the network has none".to_owned()))?;
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
    });
    publish(out, CONFIG, |path| write_json(path, &config))?;
    publish(out, WEIGHTS, |path| {
        write_safetensors(path, network.trainable())
    })?;
    sync_folder(out)
}

/// Writes a file under a temporary name beside its final one, and renames it.
fn publish(folder: &Path, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = folder.join(format!(".{name}.{}.partial", std::process::id()));
    let done = folder.join(name);
    let written = write(&partial)
        .and_then(|()| std::fs::rename(&partial, &done).map_err(Error::io("rename to", &done)));
    if written.is_err() {
        // The error that led here is the one to report.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

/// Reads adapters that [`save_adapters`] or PEFT wrote into the folder `from`; attaches them first
/// where the network has none yet.
///
/// # Errors
/// A PEFT option that is not implemented (named), adapters of another network or of another
/// configuration than the attached ones, damaged files.
pub fn load_adapters(network: &mut Network, from: &Path) -> Result<()> {
    let path = from.join(CONFIG);
    let config = read_json(&path)?.ok_or_else(|| Error::Io {
        action: "read",
        path: path.clone(),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let lora = from_peft(&path, &config)?.resolve(&network.projections())?;
    let files = SafetensorsFolder::open_files(from, &[WEIGHTS.to_owned()])?;
    let attached = network.lora().is_some();
    if network
        .lora()
        .is_some_and(|present| present.rank != lora.rank || present.targets != lora.targets)
    {
        return Err(refuse(
            "the network has adapters of another rank or other targets".to_owned(),
        ));
    }
    if !attached {
        network.attach_lora(&lora, 0)?;
    }
    let options = LoadOptions {
        device: network.device(),
        kind: Kind::Float,
    };
    let trainable = network.trainable();
    if let Some(name) = files
        .names()
        .find(|name| !trainable.iter().any(|(known, _)| known == name))
    {
        return Err(refuse(format!(
            "`{}` holds `{name}`, which the network has not",
            from.display()
        )));
    }
    // All are read before the first is changed: a bad file leaves the network as it was.
    let loaded = trainable
        .iter()
        .map(|(name, tensor)| files.tensor(name, &tensor.size(), &options))
        .collect::<Result<Vec<_>>>()?;
    tch::no_grad(|| {
        for ((_, mut tensor), values) in trainable.into_iter().zip(&loaded) {
            tensor.copy_(values);
        }
    });
    Ok(())
}

/// PEFT's `adapter_config.json` → ours; what changes the numbers and is not implemented is refused.
fn from_peft(path: &Path, config: &Value) -> Result<LoraConfig> {
    #[derive(Deserialize)]
    #[expect(clippy::struct_field_names, reason = "the file's names")]
    struct Peft {
        peft_type: String,
        r: i64,
        lora_alpha: f64,
        #[serde(default)]
        lora_dropout: f64,
        target_modules: Targets,
    }

    let peft: Peft = serde_json::from_value(config.clone()).map_err(Error::json(path))?;
    if peft.peft_type != "LORA" {
        return Err(Error::unsupported(path, "peft_type", &peft.peft_type));
    }
    let harmless = |value: &Value| {
        value.is_null()
            || *value == json!(false)
            || *value == json!("none")
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty)
    };
    for key in [
        "bias",
        "fan_in_fan_out",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layer_replication",
        "exclude_modules",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "use_qalora",
    ] {
        if let Some(value) = config.get(key).filter(|value| !harmless(value)) {
            return Err(Error::unsupported(path, key, value));
        }
    }
    let targets = match peft.target_modules {
        Targets::Names(names) => names,
        Targets::Word(word) if word == ALL_LINEAR => vec![word],
        Targets::Word(pattern) => return Err(Error::unsupported(path, "target_modules", pattern)),
    };
    let lora = LoraConfig {
        rank: peft.r,
        alpha: peft.lora_alpha,
        dropout: peft.lora_dropout,
        targets,
    };
    lora.check()?;
    Ok(lora)
}

fn refuse(message: String) -> Error {
    Error::Lora { message }
}
