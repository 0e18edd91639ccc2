//! GGUF files (llama.cpp's format): metadata, dequantised weights under Hugging Face names.
//!
//! Reading and dequantising is candle's; here is what the format means: names, the configuration,
//! and the rows of q and k, which llama.cpp's converter permutes for its own rotary layout.

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Storage, cpu_backend::CpuStorage};
use tch::Tensor;

use crate::llama::{LayerShape, LlamaConfig};
use crate::mapped::MappedFile;
use crate::weights::WeightSource;
use crate::{Error, LoadOptions, Result};

/// An opened GGUF file.
pub(crate) struct GgufFile {
    file: MappedFile,
    content: Content,
}

impl GgufFile {
    /// Maps the file and checks its header: no length or offset in it leads beyond its end.
    pub(crate) fn open(path: &Path) -> Result<GgufFile> {
        let file = MappedFile::open(path)?;
        let content = Content::read(&mut Cursor::new(file.bytes()))
            .map_err(|e| damaged(path, first_line(&e.to_string())))?;
        for (name, tensor) in &content.tensor_infos {
            let elements = tensor
                .shape
                .dims()
                .iter()
                .try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
            let end = elements
                .filter(|n| n.is_multiple_of(tensor.ggml_dtype.block_size() as u64))
                .map(|n| n / tensor.ggml_dtype.block_size() as u64)
                .and_then(|blocks| blocks.checked_mul(tensor.ggml_dtype.type_size() as u64))
                .and_then(|bytes| {
                    bytes
                        .checked_add(tensor.offset)?
                        .checked_add(content.tensor_data_offset)
                });
            if end.is_none_or(|end| end > file.bytes().len() as u64) {
                return Err(damaged(
                    path,
                    format!("tensor `{name}` reaches beyond the end of the file"),
                ));
            }
        }
        Ok(GgufFile { file, content })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// blake3 (hex) of the file.
    pub(crate) fn digest(&self) -> String {
        blake3::hash(self.file.bytes()).to_hex().to_string()
    }

    /// The network's configuration.
    pub(crate) fn config(&self) -> Result<LlamaConfig> {
        let architecture = self.text("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::UnknownArchitecture {
                path: self.path().to_owned(),
                name: architecture.to_owned(),
            });
        }
        let number = |key: &str| self.number(&format!("llama.{key}"));
        let optional = |key: &str| self.optional_number(&format!("llama.{key}"));

        let layers = number("block_count")?;
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
        self.refuse_what_is_not_implemented(head_dim)?;
        let embedding = self
            .content
            .tensor_infos
            .get("token_embd.weight")
            .ok_or_else(|| Error::MissingTensor {
                path: self.path().to_owned(),
                name: "token_embd.weight".to_owned(),
            })?;
        let config = LlamaConfig {
            vocab_size: embedding.shape.dims().first().copied().unwrap_or(0),
            hidden_size,
            head_dim,
            max_position_embeddings: number("context_length")?,
            rms_norm_eps: self.float("llama.attention.layer_norm_rms_epsilon")?,
            rope_theta: if self.value("llama.rope.freq_base").is_some() {
                self.float("llama.rope.freq_base")?
            } else {
                10_000.0
            },
            rope_scaling: None,
            tie_word_embeddings: !self.content.tensor_infos.contains_key("output.weight"),
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: self
                .optional_number("tokenizer.ggml.bos_token_id")?
                .map(|id| id as u32),
            eos_token_ids: self
                .optional_number("tokenizer.ggml.eos_token_id")?
                .map(|id| id as u32)
                .into_iter()
                .collect(),
            dense,
            layers: vec![dense; layers.min(LlamaConfig::MAX_LAYERS + 1)],
        };
        config.check(self.path())?;
        Ok(config)
    }

    /// Refuses keys and tensors that change the numbers and that the Llama forward pass here
    /// does not know.
    fn refuse_what_is_not_implemented(&self, head_dim: usize) -> Result<()> {
        let refuse = |field: &str, value: &str| Err(Error::unsupported(self.path(), field, value));
        if let Some(value) = self.content.metadata.get("llama.rope.scaling.type")
            && value.to_string().is_ok_and(|name| name != "none")
        {
            return refuse(
                "llama.rope.scaling.type",
                value.to_string().map_or("?", String::as_str),
            );
        }
        if let Some(rotary) = self.optional_number("llama.rope.dimension_count")?
            && rotary != head_dim
        {
            return refuse("llama.rope.dimension_count", &rotary.to_string());
        }
        if self
            .optional_number("llama.expert_count")?
            .is_some_and(|experts| experts > 0)
        {
            return refuse("llama.expert_count", "a mixture of experts");
        }
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return refuse("rope_freqs.weight", "a table of scaled rotary frequencies");
        }
        let biases = self
            .content
            .tensor_infos
            .keys()
            .filter(|name| name.rsplit('.').next() == Some("bias"));
        if let Some(name) = biases.min() {
            return refuse(name, "a bias");
        }
        Ok(())
    }

    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        value
            .to_string()
            .map(String::as_str)
            .map_err(|_| self.wrong_type(key))
    }

    pub(crate) fn number(&self, key: &str) -> Result<usize> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            other => other.to_u64().ok(),
        };
        number
            .map(|n| Some(n as usize))
            .ok_or_else(|| self.wrong_type(key))
    }

    pub(crate) fn float(&self, key: &str) -> Result<f64> {
        match self.value(key).ok_or_else(|| self.missing(key))? {
            // The shortest decimal of the f32, so that 1e-5 comes back as 1e-5.
            Value::F32(x) => Ok(x.to_string().parse().unwrap_or(f64::from(*x))),
            Value::F64(x) => Ok(*x),
            _ => Err(self.wrong_type(key)),
        }
    }

    pub(crate) fn array(&self, key: &str) -> Result<&[Value]> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        value
            .to_vec()
            .map(Vec::as_slice)
            .map_err(|_| self.wrong_type(key))
    }

    pub(crate) fn wrong_type(&self, key: &str) -> Error {
        damaged(
            self.path(),
            format!("`{key}` has an unexpected type or value"),
        )
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingField {
            path: self.path().to_owned(),
            field: key.to_owned(),
        }
    }
}

impl WeightSource for GgufFile {
    fn tensor(&self, name: &str, shape: &[i64], options: &LoadOptions) -> Result<Tensor> {
        let path = self.path();
        let missing = || Error::MissingTensor {
            path: path.to_owned(),
            name: name.to_owned(),
        };
        let stored = gguf_name(name).ok_or_else(missing)?;
        let info = self
            .content
            .tensor_infos
            .get(&stored)
            .ok_or_else(|| Error::MissingTensor {
                path: path.to_owned(),
                name: stored.clone(),
            })?;
        let found: Vec<i64> = info.shape.dims().iter().map(|&n| n as i64).collect();
        if found != shape {
            return Err(Error::Shape {
                path: path.to_owned(),
                name: stored,
                expected: shape.to_vec(),
                found,
            });
        }
        let unreadable = |e: candle_core::Error| {
            damaged(path, format!("`{stored}`: {}", first_line(&e.to_string())))
        };
        let quantized = self
            .content
            .tensor(&mut Cursor::new(self.file.bytes()), &stored, &Device::Cpu)
            .map_err(unreadable)?;
        let plain = quantized.dequantize(&Device::Cpu).map_err(unreadable)?;
        let (storage, layout) = plain.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
            return Err(damaged(
                path,
                format!("`{stored}` does not dequantise to f32"),
            ));
        };
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        let tensor = Tensor::f_from_slice(&values[range])
            .map_err(Error::torch("copy a weight"))?
            .view(shape);
        let tensor = match self.heads_of(name)? {
            Some(heads) => undo_rotary_permutation(&tensor, heads as i64),
            None => tensor,
        };
        Ok(tensor.to_kind(options.kind).to_device(options.device))
    }
}

impl GgufFile {
    /// Heads of a projection whose rows the converter permuted.
    fn heads_of(&self, name: &str) -> Result<Option<usize>> {
        if name.ends_with("q_proj.weight") {
            self.number("llama.attention.head_count").map(Some)
        } else if name.ends_with("k_proj.weight") {
            let groups = self.optional_number("llama.attention.head_count_kv")?;
            groups
                .map_or_else(|| self.number("llama.attention.head_count"), Ok)
                .map(Some)
        } else {
            Ok(None)
        }
    }
}

/// llama.cpp rotates neighbours (2i, 2i+1), Hugging Face rotates halves (i, i + d/2): its converter
/// writes row i of the first half and row i of the second half side by side. Put them back.
fn undo_rotary_permutation(weight: &Tensor, heads: i64) -> Tensor {
    let size = weight.size();
    let (rows, columns) = (size[0], size[1]);
    weight
        .view([heads, rows / heads / 2, 2, columns])
        .transpose(1, 2)
        .reshape([rows, columns])
}

/// Hugging Face's name → llama.cpp's.
fn gguf_name(name: &str) -> Option<String> {
    let fixed = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => {
            let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let part = match part.strip_suffix(".weight")? {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            return Some(format!("blk.{layer}.{part}.weight"));
        }
    };
    Some(fixed.to_owned())
}

fn damaged(path: &Path, message: impl Into<String>) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        format: "GGUF",
        message: message.into(),
    }
}

/// candle's errors carry a backtrace after their first line.
fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}
