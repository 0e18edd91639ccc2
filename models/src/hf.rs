//! Hugging Face's `config.json` of a network made of Llama's blocks, read and written, and what the
//! other architectures' files have in common with it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::llama::{AttentionBias, Family, LayerShape, Llama3Scaling, LlamaConfig, RopeScaling};
use crate::{Error, Result, mistral, qwen2};

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
    max_position_embeddings: Option<usize>,
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

/// `eos_token_id`: nothing, a number or a list.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    pub(crate) fn of(ids: &[u32]) -> OneOrMany {
        match ids {
            [] => OneOrMany::None,
            [id] => OneOrMany::One(*id),
            ids => OneOrMany::Many(ids.to_vec()),
        }
    }

    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            OneOrMany::None => Vec::new(),
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

/// What transformers takes where a family's `config.json` says nothing.
struct Defaults {
    /// G; `None` for one per query head.
    kv_heads: Option<usize>,
    max_position_embeddings: usize,
}

impl Family {
    fn defaults(self) -> Defaults {
        let (kv_heads, max_position_embeddings) = match self {
            Family::Llama => (None, 2048),
            Family::Qwen2 => (Some(32), 32_768),
            Family::Mistral => (Some(8), 131_072),
        };
        Defaults {
            kv_heads,
            max_position_embeddings,
        }
    }
}

/// More layers than this are taken for damage.
pub(crate) const MAX_LAYERS: usize = 4096;

/// Weights in a form of their own are refused by its name.
pub(crate) fn refuse_quantized(path: &Path, settings: Option<&Value>) -> Result<()> {
    let Some(settings) = settings else {
        return Ok(());
    };
    let method = settings.get("quant_method").unwrap_or(settings);
    Err(Error::unsupported(path, "quantization_config", method))
}

/// The sizes of every block: all dense, or those of a pruned network.
pub(crate) fn layers(
    path: &Path,
    dense: LayerShape,
    depth: usize,
    pruned: Option<Vec<LayerShape>>,
) -> Result<Vec<LayerShape>> {
    if depth == 0 || depth > MAX_LAYERS {
        return Err(Error::unsupported(path, "num_hidden_layers", depth));
    }
    match pruned {
        Some(layers) if layers.len() == depth => Ok(layers),
        Some(layers) => Err(Error::unsupported(
            path,
            "caskd_layers",
            format!("a list of {}", layers.len()),
        )),
        None => Ok(vec![dense; depth]),
    }
}

/// Refuses sizes of nothing and of more than any network has.
pub(crate) fn check_sizes(path: &Path, sizes: &[(&str, usize)]) -> Result<()> {
    match sizes
        .iter()
        .find(|(_, value)| !(1..=0x4000_0000).contains(value))
    {
        Some((field, value)) => Err(Error::unsupported(path, field, value)),
        None => Ok(()),
    }
}

fn default_eps() -> f64 {
    1e-6
}

impl LlamaConfig {
    /// Reads `config.json`.
    pub(crate) fn from_json(path: &Path, value: &Value, family: Family) -> Result<LlamaConfig> {
        let raw: RawConfig = serde_json::from_value(value.clone()).map_err(Error::json(path))?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(Error::unsupported(path, "hidden_act", act));
        }
        refuse_quantized(path, raw.quantization_config.as_ref())?;
        let (rope_theta, rope_scaling) = rotary_settings(path, &raw)?;
        let dense = LayerShape {
            heads: raw.num_attention_heads,
            // `null` means one for each query head, a missing key the family's default.
            kv_heads: match value.get("num_key_value_heads") {
                Some(_) => raw.num_key_value_heads,
                None => family.defaults().kv_heads,
            }
            .unwrap_or(raw.num_attention_heads),
            intermediate_size: raw.intermediate_size,
        };
        let layers = layers(path, dense, raw.num_hidden_layers, raw.caskd_layers)?;
        let depth = layers.len();
        let config = LlamaConfig {
            family,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            head_dim: raw
                .head_dim
                .unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            max_position_embeddings: raw
                .max_position_embeddings
                .unwrap_or(family.defaults().max_position_embeddings),
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            rope_scaling,
            sliding_window: match family {
                Family::Llama => None,
                Family::Qwen2 => qwen2::sliding_window(path, value, depth)?,
                Family::Mistral => mistral::sliding_window(path, value, depth)?,
            },
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: match family {
                Family::Llama if raw.attention_bias => AttentionBias::All,
                Family::Qwen2 => AttentionBias::Qkv,
                Family::Llama | Family::Mistral => AttentionBias::None,
            },
            mlp_bias: family == Family::Llama && raw.mlp_bias,
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.into_vec(),
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
        match self.rope_scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => {
                rope = json!({ "rope_type": "linear", "factor": factor });
            }
            Some(RopeScaling::Llama3(scaling)) => {
                rope = json!(scaling);
                rope["rope_type"] = json!("llama3");
            }
        }
        let (class, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Mistral => ("MistralForCausalLM", "mistral"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
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
            "bos_token_id": self.bos_token_id,
            "eos_token_id": OneOrMany::of(&self.eos_token_ids),
            "torch_dtype": dtype,
        });
        match self.family {
            Family::Llama => {
                config["attention_bias"] = json!(self.attention_bias == AttentionBias::All);
                config["mlp_bias"] = json!(self.mlp_bias);
            }
            Family::Qwen2 => qwen2::write_sliding_window(self, &mut config),
            Family::Mistral => mistral::write_sliding_window(self, &mut config),
        }
        if self.is_pruned() {
            config["caskd_layers"] = json!(self.layers);
        }
        config
    }

    /// Refuses sizes that make no network, before anything is allocated by them.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        check_sizes(
            path,
            &[
                ("vocab_size", self.vocab_size),
                ("hidden_size", self.hidden_size),
                ("max_position_embeddings", self.max_position_embeddings),
            ],
        )?;
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
            check_sizes(path, &[("intermediate_size", layer.intermediate_size)])?;
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

/// θ and scaling from the old keys or the new one; linear scaling and Llama 3's are known,
/// others refused by name.
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
        Some("linear") => match settings.get("factor").and_then(Value::as_f64) {
            Some(factor) if factor >= 1.0 && factor.is_finite() => {
                Ok((theta, Some(RopeScaling::Linear { factor })))
            }
            _ => Err(Error::unsupported(path, "rope_scaling", settings)),
        },
        Some("llama3") => {
            let scaling: Llama3Scaling =
                serde_json::from_value(settings.clone()).map_err(Error::json(path))?;
            if !(scaling.factor >= 1.0
                && scaling.low_freq_factor > 0.0
                && scaling.high_freq_factor > scaling.low_freq_factor
                && scaling.factor.is_finite())
            {
                return Err(Error::unsupported(path, "rope_scaling", settings));
            }
            Ok((theta, Some(RopeScaling::Llama3(scaling))))
        }
        Some(other) => Err(Error::unsupported(path, "rope_type", other)),
        None => Err(Error::unsupported(path, "rope_scaling", settings)),
    }
}
