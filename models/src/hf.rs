//! Hugging Face's `config.json` of a Llama network, read and written.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::llama::{LayerShape, LlamaConfig, RopeScaling};
use crate::{Error, Result};

/// The keys that matter here. Keys that only matter to generation or training elsewhere are left
/// alone; keys that change the numbers are understood or refused.
#[derive(Debug, Deserialize)]
struct RawConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    /// Where newer transformers keep both of the former.
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: OneOrMany,
    /// Ours: the sizes of every block of a pruned network.
    caskd_layers: Option<Vec<LayerShape>>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(untagged)]
enum OneOrMany {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

fn default_positions() -> usize {
    2048
}

fn default_eps() -> f64 {
    1e-6
}

impl LlamaConfig {
    /// More layers than this are taken for damage.
    pub(crate) const MAX_LAYERS: usize = 4096;

    /// Reads `config.json`.
    pub(crate) fn from_json(path: &Path, value: &Value) -> Result<LlamaConfig> {
        let model_type = value
            .get("model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| Error::MissingField {
                path: path.to_owned(),
                field: "model_type".to_owned(),
            })?;
        if model_type != "llama" {
            return Err(Error::UnknownArchitecture {
                path: path.to_owned(),
                name: model_type.to_owned(),
            });
        }
        let raw: RawConfig = serde_json::from_value(value.clone()).map_err(Error::json(path))?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(Error::unsupported(path, "hidden_act", act));
        }
        if let Some(quantization) = &raw.quantization_config {
            let method = quantization.get("quant_method").unwrap_or(quantization);
            return Err(Error::unsupported(path, "quantization_config", method));
        }
        let (rope_theta, rope_scaling) = rotary_settings(path, &raw)?;
        let dense = LayerShape {
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            intermediate_size: raw.intermediate_size,
        };
        let depth = raw.num_hidden_layers;
        let layers = match raw.caskd_layers {
            Some(layers) if layers.len() == depth => layers,
            Some(layers) => {
                return Err(Error::unsupported(
                    path,
                    "caskd_layers",
                    format!("a list of {}", layers.len()),
                ));
            }
            None => vec![dense; depth.min(LlamaConfig::MAX_LAYERS + 1)],
        };
        let config = LlamaConfig {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            head_dim: raw
                .head_dim
                .unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            bos_token_id: raw.bos_token_id,
            eos_token_ids: match raw.eos_token_id {
                OneOrMany::None => Vec::new(),
                OneOrMany::One(id) => vec![id],
                OneOrMany::Many(ids) => ids,
            },
            dense,
            layers,
        };
        config.check(path)?;
        Ok(config)
    }

    /// Writes `config.json`, in the words of both older and newer transformers; the sizes of a
    /// pruned network's blocks go to `caskd_layers`.
    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        let mut rope = json!({ "rope_type": "default", "rope_theta": self.rope_theta });
        if let Some(scaling) = self.rope_scaling {
            rope = json!(scaling);
            rope["rope_type"] = json!("llama3");
        }
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.dense.intermediate_size,
            "num_hidden_layers": self.layers.len(),
            "num_attention_heads": self.dense.heads,
            "num_key_value_heads": self.dense.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.map(|_| rope.clone()),
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids.as_slice() {
                [] => OneOrMany::None,
                [id] => OneOrMany::One(*id),
                ids => OneOrMany::Many(ids.to_vec()),
            },
            "torch_dtype": dtype,
        });
        if self.is_pruned() {
            config["caskd_layers"] = json!(self.layers);
        }
        config
    }

    /// Refuses sizes that make no network, before anything is allocated by them.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let size = |field: &str, value: usize| match value {
            1..=0x4000_0000 => Ok(()),
            _ => Err(Error::unsupported(path, field, value)),
        };
        size("vocab_size", self.vocab_size)?;
        size("hidden_size", self.hidden_size)?;
        size("max_position_embeddings", self.max_position_embeddings)?;
        if self.layers.is_empty() || self.layers.len() > LlamaConfig::MAX_LAYERS {
            return Err(Error::unsupported(
                path,
                "num_hidden_layers",
                self.layers.len(),
            ));
        }
        // The rotary embedding pairs the two halves of a head.
        if self.head_dim == 0 || self.head_dim % 2 == 1 || self.head_dim > 1 << 16 {
            return Err(Error::unsupported(path, "head_dim", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(Error::unsupported(path, "rope_theta", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(Error::unsupported(path, "rms_norm_eps", self.rms_norm_eps));
        }
        for layer in std::iter::once(&self.dense).chain(&self.layers) {
            size("intermediate_size", layer.intermediate_size)?;
            if layer.heads == 0 || layer.heads > 1 << 16 {
                return Err(Error::unsupported(path, "num_attention_heads", layer.heads));
            }
            if layer.kv_heads == 0 || !layer.heads.is_multiple_of(layer.kv_heads) {
                return Err(Error::unsupported(
                    path,
                    "num_key_value_heads",
                    layer.kv_heads,
                ));
            }
        }
        Ok(())
    }
}

/// θ and scaling from the old keys or the new one; other scalings than Llama 3's are refused by
/// name.
fn rotary_settings(path: &Path, raw: &RawConfig) -> Result<(f64, Option<RopeScaling>)> {
    let theta_of = |value: &Value| value.get("rope_theta").and_then(Value::as_f64);
    let theta = raw
        .rope_parameters
        .as_ref()
        .and_then(theta_of)
        .or(raw.rope_theta)
        .unwrap_or(10_000.0);
    let Some(settings) = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()) else {
        return Ok((theta, None));
    };
    if let Some(partial) = settings
        .get("partial_rotary_factor")
        .filter(|v| v.as_f64() != Some(1.0))
    {
        return Err(Error::unsupported(path, "partial_rotary_factor", partial));
    }
    let kind = settings.get("rope_type").or_else(|| settings.get("type"));
    match kind.and_then(Value::as_str) {
        Some("default") => Ok((theta, None)),
        Some("llama3") => {
            let scaling: RopeScaling =
                serde_json::from_value(settings.clone()).map_err(Error::json(path))?;
            Ok((theta, Some(scaling)))
        }
        Some(other) => Err(Error::unsupported(path, "rope_type", other)),
        None => Err(Error::unsupported(path, "rope_scaling", settings)),
    }
}
