//! What GGUF's metadata and tensor names mean, architecture by architecture: the configuration,
//! Hugging Face's names, and the order of rows, which llama.cpp's converter changes.

use tch::Tensor;

use crate::bloom::{BloomConfig, all_heads};
use crate::config::Config;
use crate::gguf::GgufFile;
use crate::hf::layers;
use crate::llama::{AttentionBias, Family, LayerShape, Llama3Scaling, LlamaConfig, RopeScaling};
use crate::{Error, Result};

/// How far a stored rotary factor may be from Llama 3's rule.
const FACTOR_TOLERANCE: f64 = 1e-4;

impl GgufFile {
    /// The network's configuration; an unknown architecture is refused by name.
    pub(crate) fn config(&self) -> Result<Config> {
        let config = match self.text("general.architecture")? {
            // Mistral's files say "llama"; they know no sliding window.
            "llama" => Config::Llama(self.llama_config(Family::Llama)?),
            "qwen2" => Config::Llama(self.llama_config(Family::Qwen2)?),
            "bloom" => Config::Bloom(self.bloom_config()?),
            other => {
                return Err(Error::UnknownArchitecture {
                    path: self.path().to_owned(),
                    name: other.to_owned(),
                });
            }
        };
        self.refuse_unknown_tensors(&config)?;
        Ok(config)
    }

    fn llama_config(&self, family: Family) -> Result<LlamaConfig> {
        let architecture = self.text("general.architecture")?;
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| self.number(&key(name));
        let optional = |name: &str| self.optional_number(&key(name));

        let hidden_size = number("embedding_length")?;
        let heads = number("attention.head_count")?;
        let dense = LayerShape {
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            intermediate_size: number("feed_forward_length")?,
        };
        let head_dim = match optional("attention.key_length")? {
            Some(length) => length,
            None if heads > 0 => hidden_size / heads,
            None => 0,
        };
        if let Some(rotary) = optional("rope.dimension_count")?
            && rotary != head_dim
        {
            return Err(self.unsupported(&key("rope.dimension_count"), rotary));
        }
        if let Some(window) = optional("attention.sliding_window")? {
            return Err(self.unsupported(&key("attention.sliding_window"), window));
        }
        if let Some(experts) = optional("expert_count")?.filter(|&experts| experts > 0) {
            return Err(self.unsupported(&key("expert_count"), experts));
        }
        let theta = key("rope.freq_base");
        let mut config = LlamaConfig {
            family,
            vocab_size: self.embedding_rows()?,
            hidden_size,
            head_dim,
            max_position_embeddings: number("context_length")?,
            rms_norm_eps: self.float(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: match self.value(&theta) {
                Some(_) => self.float(&theta)?,
                None => 10_000.0,
            },
            rope_scaling: self.linear_scaling(architecture)?,
            sliding_window: None,
            tie_word_embeddings: !self.has("output.weight"),
            attention_bias: match (
                self.has("blk.0.attn_q.bias"),
                self.has("blk.0.attn_output.bias"),
            ) {
                (false, _) => AttentionBias::None,
                (true, false) => AttentionBias::Qkv,
                (true, true) => AttentionBias::All,
            },
            mlp_bias: self.has("blk.0.ffn_up.bias"),
            bos_token_id: self.token_id("bos")?,
            eos_token_ids: self.token_id("eos")?.into_iter().collect(),
            dense,
            layers: layers(self.path(), dense, number("block_count")?, None)?,
        };
        config.check(self.path())?;
        if self.has(ROTARY_FACTORS) {
            config.rope_scaling = Some(self.llama3_scaling(&config)?);
        }
        Ok(config)
    }

    fn bloom_config(&self) -> Result<BloomConfig> {
        let hidden_size = self.number("bloom.embedding_length")?;
        let heads = self.number("bloom.attention.head_count")?;
        let dense = LayerShape {
            heads,
            kv_heads: heads,
            intermediate_size: self.number("bloom.feed_forward_length")?,
        };
        let layers = layers(self.path(), dense, self.number("bloom.block_count")?, None)?;
        let config = BloomConfig {
            vocab_size: self.embedding_rows()?,
            hidden_size,
            layer_norm_epsilon: self.float("bloom.attention.layer_norm_epsilon")?,
            apply_residual_connection_post_layernorm: false,
            seq_length: self.number("bloom.context_length")?,
            tie_word_embeddings: !self.has("output.weight"),
            bos_token_id: self.token_id("bos")?,
            eos_token_ids: self.token_id("eos")?.into_iter().collect(),
            dense,
            head_places: all_heads(dense, layers.len()),
            layers,
        };
        config.check(self.path())?;
        Ok(config)
    }

    /// V, from the embedding: the metadata need not say it.
    fn embedding_rows(&self) -> Result<usize> {
        let shape = self.tensor_shape("token_embd.weight");
        let rows = shape.and_then(<[usize]>::first).copied();
        rows.ok_or_else(|| Error::MissingTensor {
            path: self.path().to_owned(),
            name: "token_embd.weight".to_owned(),
        })
    }

    fn token_id(&self, name: &str) -> Result<Option<u32>> {
        let id = self.optional_number(&format!("tokenizer.ggml.{name}_token_id"))?;
        Ok(id.map(|id| id as u32))
    }

    /// `rope.scaling`: none or linear; others are refused by name.
    fn linear_scaling(&self, architecture: &str) -> Result<Option<RopeScaling>> {
        let key = format!("{architecture}.rope.scaling.type");
        if self.value(&key).is_none() {
            return Ok(None);
        }
        match self.text(&key)? {
            "none" => Ok(None),
            "linear" => {
                let factor = self.float(&format!("{architecture}.rope.scaling.factor"))?;
                Ok(Some(RopeScaling::Linear { factor }))
            }
            other => Err(self.unsupported(&key, other)),
        }
    }

    /// The scaling behind a file's table of factors [d/2], by which the rotary frequencies are
    /// divided: llama.cpp's converter works them out of Llama 3's rule and keeps only them.
    fn llama3_scaling(&self, config: &LlamaConfig) -> Result<RopeScaling> {
        let table = self.plain(ROTARY_FACTORS, &[config.head_dim as i64 / 2])?;
        let factors = Vec::<f32>::try_from(&table).map_err(Error::torch("read rotary factors"))?;
        // The longest wavelength is scaled by the whole factor; the other settings have always been these.
        let scaling = Llama3Scaling {
            factor: factors.iter().copied().map(f64::from).fold(1.0, f64::max),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let follows = factors.iter().enumerate().all(|(pair, &stored)| {
            let frequency = config.rotary_frequency(pair);
            let expected = frequency / scaling.apply(frequency);
            (expected / f64::from(stored) - 1.0).abs() < FACTOR_TOLERANCE
        });
        if !follows {
            let what = "a table of rotary factors that is not Llama 3's";
            return Err(self.unsupported(ROTARY_FACTORS, what));
        }
        Ok(RopeScaling::Llama3(scaling))
    }

    /// A tensor that the forward pass here would not use changes the numbers.
    fn refuse_unknown_tensors(&self, config: &Config) -> Result<()> {
        let known = |name: &str| {
            let (path, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
            let part = match path.strip_prefix("blk.") {
                Some(rest) => rest.split_once('.').map_or("", |(_, part)| part),
                None => path,
            };
            match config {
                Config::Llama(config) => match (part, suffix) {
                    ("rope_freqs", "weight") => true,
                    ("attn_q" | "attn_k" | "attn_v", "bias") => {
                        config.attention_bias != AttentionBias::None
                    }
                    ("attn_output", "bias") => config.attention_bias == AttentionBias::All,
                    ("ffn_gate" | "ffn_up" | "ffn_down", "bias") => config.mlp_bias,
                    (part, "weight") => LLAMA_PARTS.iter().any(|(_, known)| *known == part),
                    _ => false,
                },
                Config::Bloom(_) => {
                    matches!(suffix, "weight" | "bias")
                        && BLOOM_PARTS.iter().any(|(_, known)| *known == part)
                }
            }
        };
        match self.tensor_names().filter(|name| !known(name)).min() {
            Some(name) => Err(self.unsupported(name, "a tensor")),
            None => Ok(()),
        }
    }

    fn unsupported(&self, field: &str, value: impl ToString) -> Error {
        Error::unsupported(self.path(), field, value)
    }

    /// Rows of a tensor as Hugging Face orders them.
    pub(crate) fn reorder(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let heads =
            |key: &str| self.number(&format!("{}.{key}", self.text("general.architecture")?));
        let is = |part: &str| {
            name.strip_suffix(".weight")
                .or_else(|| name.strip_suffix(".bias"))
                .is_some_and(|path| path.ends_with(part))
        };
        Ok(match self.text("general.architecture")? {
            "llama" if is("q_proj") => {
                undo_rotary_permutation(&tensor, heads("attention.head_count")? as i64)
            }
            "llama" if is("k_proj") => {
                let groups = self.optional_number("llama.attention.head_count_kv")?;
                let groups = groups.map_or_else(|| heads("attention.head_count"), Ok)?;
                undo_rotary_permutation(&tensor, groups as i64)
            }
            "bloom" if is("query_key_value") => {
                fuse_heads(&tensor, heads("attention.head_count")? as i64)
            }
            _ => tensor,
        })
    }
}

const ROTARY_FACTORS: &str = "rope_freqs.weight";

/// llama.cpp rotates neighbours (2i, 2i+1), Hugging Face rotates halves (i, i + d/2): its converter
/// writes row i of the first half and row i of the second half side by side. Put them back.
fn undo_rotary_permutation(tensor: &Tensor, heads: i64) -> Tensor {
    let size = tensor.size();
    tensor
        .view([heads, size[0] / heads / 2, 2, -1])
        .transpose(1, 2)
        .reshape(size)
}

/// llama.cpp keeps all queries, then all keys, then all values; BLOOM has those of a head side by
/// side.
fn fuse_heads(tensor: &Tensor, heads: i64) -> Tensor {
    let size = tensor.size();
    tensor
        .view([3, heads, size[0] / heads / 3, -1])
        .transpose(0, 1)
        .reshape(size)
}

/// Hugging Face's parts of a network and llama.cpp's.
const LLAMA_PARTS: [(&str, &str); 12] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const BLOOM_PARTS: [(&str, &str); 10] = [
    ("transformer.word_embeddings", "token_embd"),
    ("transformer.word_embeddings_layernorm", "token_embd_norm"),
    ("transformer.ln_f", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attention.query_key_value", "attn_qkv"),
    ("self_attention.dense", "attn_output"),
    ("mlp.dense_h_to_4h", "ffn_up"),
    ("mlp.dense_4h_to_h", "ffn_down"),
];

/// Hugging Face's name → llama.cpp's.
pub(crate) fn gguf_name(name: &str) -> Option<String> {
    let (path, suffix) = name.rsplit_once('.')?;
    let find = |parts: &[(&str, &'static str)], part: &str| {
        let found = parts.iter().find(|(theirs, _)| *theirs == part);
        found.map(|(_, ours)| *ours)
    };
    for (prefix, parts) in [
        ("model.layers.", LLAMA_PARTS.as_slice()),
        ("transformer.h.", BLOOM_PARTS.as_slice()),
    ] {
        if let Some((layer, part)) = path
            .strip_prefix(prefix)
            .and_then(|rest| rest.split_once('.'))
        {
            return Some(format!("blk.{layer}.{}.{suffix}", find(parts, part)?));
        }
    }
    let part = find(&LLAMA_PARTS, path).or_else(|| find(&BLOOM_PARTS, path))?;
    Some(format!("{part}.{suffix}"))
}
