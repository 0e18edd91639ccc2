//! The BLOOM architecture (BigScience 2022, arXiv 2211.05100), from its parts up: configuration,
//! linear biases, attention, MLP, block.

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, Packed, causal_mask};
use crate::block::Site;
use crate::hf::{OneOrMany, check_sizes, refuse_quantized};
use crate::linear::{Linear, Pass};
use crate::llama::LayerShape;
use crate::norm::Norm;
use crate::weights::WeightSource;
use crate::{Error, LoadOptions, Result};

use std::path::Path;

use serde_json::{Value, json};

/// Configuration, with Hugging Face's field names where there is one value for the whole network.
#[derive(Debug, Clone, PartialEq)]
pub struct BloomConfig {
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// A block's sums start from the normed states.
    pub apply_residual_connection_post_layernorm: bool,
    /// Context length the model was trained for; linear biases set no limit.
    pub seq_length: usize,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Sizes of a block before any pruning: every head has its own keys and values, and there are
    /// 4·D channels.
    pub dense: LayerShape,
    /// Sizes of every block; L is its length.
    pub layers: Vec<LayerShape>,
    /// Places that the heads of every block have among the dense ones, ascending: what their position biases go by.
    pub head_places: Vec<Vec<usize>>,
}

/// The keys that matter here.
#[derive(Debug, Deserialize)]
struct RawConfig {
    vocab_size: usize,
    #[serde(alias = "n_embed")]
    hidden_size: usize,
    #[serde(alias = "num_hidden_layers")]
    n_layer: usize,
    #[serde(alias = "num_attention_heads")]
    n_head: usize,
    #[serde(default = "default_eps")]
    layer_norm_epsilon: f64,
    #[serde(default)]
    apply_residual_connection_post_layernorm: bool,
    seq_length: Option<usize>,
    #[serde(default = "default_tie")]
    tie_word_embeddings: bool,
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: OneOrMany,
    quantization_config: Option<Value>,
    /// Ours: the sizes of every block of a pruned network.
    caskd_layers: Option<Vec<LayerShape>>,
    /// Ours: the places of every block's heads where some are gone.
    caskd_heads: Option<Vec<Vec<usize>>>,
}

fn default_eps() -> f64 {
    1e-5
}

fn default_tie() -> bool {
    true
}

impl BloomConfig {
    /// d.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.dense.heads.max(1)
    }

    /// True when some block is smaller than the architecture's own sizes.
    pub fn is_pruned(&self) -> bool {
        self.layers.iter().any(|layer| *layer != self.dense)
    }

    /// Reads `config.json`.
    pub(crate) fn from_json(path: &Path, value: &Value) -> Result<BloomConfig> {
        let raw: RawConfig = serde_json::from_value(value.clone()).map_err(Error::json(path))?;
        refuse_quantized(path, raw.quantization_config.as_ref())?;
        let dense = LayerShape {
            heads: raw.n_head,
            kv_heads: raw.n_head,
            intermediate_size: raw.hidden_size.saturating_mul(4),
        };
        let layers = crate::hf::layers(path, dense, raw.n_layer, raw.caskd_layers)?;
        let head_places = raw
            .caskd_heads
            .unwrap_or_else(|| all_heads(dense, layers.len()));
        let config = BloomConfig {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            layer_norm_epsilon: raw.layer_norm_epsilon,
            apply_residual_connection_post_layernorm: raw.apply_residual_connection_post_layernorm,
            seq_length: raw.seq_length.unwrap_or(2048),
            tie_word_embeddings: raw.tie_word_embeddings,
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.into_vec(),
            dense,
            layers,
            head_places,
        };
        config.check(path)?;
        Ok(config)
    }

    /// Writes `config.json`; the sizes of a pruned network's blocks go to `caskd_layers`.
    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        let mut config = json!({
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "n_layer": self.layers.len(),
            "n_head": self.dense.heads,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "apply_residual_connection_post_layernorm": self.apply_residual_connection_post_layernorm,
            "seq_length": self.seq_length,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": OneOrMany::of(&self.eos_token_ids),
            "torch_dtype": dtype,
        });
        if self.is_pruned() {
            config["caskd_layers"] = json!(self.layers);
        }
        if self
            .layers
            .iter()
            .any(|layer| layer.heads < self.dense.heads)
        {
            config["caskd_heads"] = json!(self.head_places);
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
                ("seq_length", self.seq_length),
            ],
        )?;
        if !(self.layer_norm_epsilon.is_finite() && self.layer_norm_epsilon >= 0.0) {
            return Err(Error::unsupported(
                path,
                "layer_norm_epsilon",
                self.layer_norm_epsilon,
            ));
        }
        let heads = self.dense.heads;
        if heads == 0 || heads > 1 << 16 || !self.hidden_size.is_multiple_of(heads) {
            return Err(Error::unsupported(path, "n_head", heads));
        }
        if self.head_places.len() != self.layers.len() {
            let blocks = format!("those of {} blocks", self.head_places.len());
            return Err(Error::unsupported(path, "caskd_heads", blocks));
        }
        for (layer, places) in self.layers.iter().zip(&self.head_places) {
            check_sizes(
                path,
                &[
                    ("heads", layer.heads),
                    ("intermediate_size", layer.intermediate_size),
                ],
            )?;
            if layer.kv_heads != layer.heads {
                return Err(Error::unsupported(
                    path,
                    "caskd_layers: kv_heads",
                    layer.kv_heads,
                ));
            }
            let in_order = places.is_sorted_by(|a, b| a < b);
            if places.len() != layer.heads || !in_order || places.last() >= Some(&heads) {
                let places = format!("{places:?} for {} of {heads} heads", layer.heads);
                return Err(Error::unsupported(path, "caskd_heads", places));
            }
        }
        Ok(())
    }

    /// Takes new sizes of the blocks; those that have all heads have them in their places.
    pub(crate) fn set_layers(&mut self, layers: Vec<LayerShape>) {
        for (shape, places) in layers.iter().zip(&mut self.head_places) {
            if shape.heads == self.dense.heads {
                *places = (0..shape.heads).collect();
            }
        }
        self.layers = layers;
    }

    /// Of the heads that block `index` has these stay.
    pub(crate) fn keep_heads(&mut self, index: usize, kept: &[i64]) {
        let places = &mut self.head_places[index];
        *places = kept.iter().map(|&head| places[head as usize]).collect();
    }

    /// Elements of a block.
    pub(crate) fn block_elements(&self, shape: LayerShape) -> u64 {
        let (width, channels) = (self.hidden_size as u64, shape.intermediate_size as u64);
        let heads = (shape.heads * self.head_dim()) as u64;
        let attention = 4 * width * heads + 3 * heads + width;
        let mlp = 2 * width * channels + channels + width;
        attention + mlp + 4 * width
    }

    /// What the blocks share in a pass over [B, T] tokens.
    pub(crate) fn context(
        &self,
        (batch, positions): (i64, i64),
        kind: Kind,
        device: Device,
        pass: Pass,
    ) -> Context {
        let places = Tensor::arange(positions, (Kind::Float, Device::Cpu));
        let bias = linear_biases(self.dense.heads, &places, &places)
            .to_kind(kind)
            .to_device(device)
            + causal_mask(positions, kind, device);
        Context {
            batch,
            positions,
            queries: None,
            attention: Attention::added(bias, positions, kind, device),
            pass,
        }
    }

    /// What the blocks share where tokens are packed.
    pub(crate) fn packed_context(
        &self,
        packed: &Packed<'_>,
        kind: Kind,
        device: Device,
    ) -> Context {
        let (places, visible) = (packed.places, packed.of_queries(packed.visible));
        let bias = linear_biases(self.dense.heads, &packed.of_queries(places), places);
        Context {
            batch: 1,
            positions: places.numel() as i64,
            queries: packed.queries.map(|rows| rows.to_device(device)),
            attention: packed.attention(&bias, &visible, kind, device),
            pass: Pass::Inference,
        }
    }
}

/// Every head in its place, in every block.
pub(crate) fn all_heads(dense: LayerShape, layers: usize) -> Vec<Vec<usize>> {
    vec![(0..dense.heads).collect(); layers]
}

/// Attention with linear biases (Press et al. 2021, arXiv 2108.12409): −m_h · (i − j) for head h,
/// query i and key j. Places of queries [M] and keys [T] (f32) → [H, M, T].
fn linear_biases(heads: usize, queries: &Tensor, keys: &Tensor) -> Tensor {
    let distance = keys.unsqueeze(0) - queries.unsqueeze(1);
    let slopes = Tensor::from_slice(&slopes(heads)).view([-1, 1, 1]);
    slopes * distance.unsqueeze(0)
}

/// The slopes m of the heads: 2^(−8k/n), k = 1.. n, for n heads when n is a power of two; else
/// those of the next lower power, and then every other slope of twice that power.
fn slopes(heads: usize) -> Vec<f32> {
    let lower = 1 << heads.max(1).ilog2();
    let slope = |power: usize, of: usize| (-8.0 * power as f64 / of as f64).exp2() as f32;
    let first = (1..=lower).map(|power| slope(power, lower));
    let rest = (0..heads - lower).map(|index| slope(2 * index + 1, 2 * lower));
    first.chain(rest).collect()
}

/// What every block of one pass shares.
#[derive(Debug)]
pub(crate) struct Context {
    batch: i64,
    positions: i64,
    /// [M] i64, ascending: the positions that attend and go on to the next layer, where not all do.
    queries: Option<Tensor>,
    attention: Attention,
    pass: Pass,
}

impl Context {
    /// The rows of the positions that attend, of x, whose positions are its dimension `dim`.
    fn of_queries(&self, x: &Tensor, dim: i64) -> Tensor {
        match &self.queries {
            Some(queries) => x.index_select(dim, queries),
            None => x.shallow_clone(),
        }
    }
}

/// Attention over one fused projection: its rows are [H, 3, d], a head's query, key and value side
/// by side.
#[derive(Debug)]
struct SelfAttention {
    query_key_value: Linear,
    dense: Linear,
    heads: i64,
    /// [heads] i64: whose position biases they have, where some of the heads are gone.
    places: Option<Tensor>,
}

impl SelfAttention {
    /// [N, D] → [M, D], what enters `dense`.
    fn mix(&self, x: &Tensor, context: &Context) -> Tensor {
        let fused = self.query_key_value.forward(x, context.pass);
        let fused = fused.view([context.batch, context.positions, self.heads, 3, -1]);
        let [q, k, v] = [0, 1, 2].map(|part| fused.select(3, part));
        let q = context.of_queries(&q, 1);
        match &self.places {
            Some(places) => context.attention.of_heads(places).attend(&q, &k, &v),
            None => context.attention.attend(&q, &k, &v),
        }
    }

    fn keep_heads(&mut self, kept: &[i64]) {
        let device = self.dense.weight.device();
        let kept = Tensor::from_slice(kept).to_device(device);
        let places = match &self.places {
            Some(places) => places.index_select(0, &kept),
            None => kept,
        };
        self.heads = places.numel() as i64;
        self.places = Some(places);
    }

    /// Takes all `heads` heads, in their places, of weights that have them already.
    fn fill_heads(&mut self, heads: i64) {
        self.heads = heads;
        self.places = None;
    }

    fn share(&self) -> SelfAttention {
        SelfAttention {
            query_key_value: self.query_key_value.share(),
            dense: self.dense.share(),
            heads: self.heads,
            places: self.places.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// down(gelu(up(x))).
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) dense_h_to_4h: Linear,
    pub(crate) dense_4h_to_h: Linear,
}

/// One layer: x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Debug)]
pub(crate) struct Block {
    input_norm: Norm,
    attention: SelfAttention,
    post_attention_norm: Norm,
    pub(crate) mlp: Mlp,
    residual_after_norm: bool,
}

impl Block {
    pub(crate) fn load(
        config: &BloomConfig,
        index: usize,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Block> {
        let path = format!("transformer.h.{index}");
        let shape = config.layers[index];
        let (width, channels) = (config.hidden_size as i64, shape.intermediate_size as i64);
        let mixed = (shape.heads * config.head_dim()) as i64;
        let places = (shape.heads < config.dense.heads).then(|| {
            let places: Vec<i64> = config.head_places[index]
                .iter()
                .map(|&p| p as i64)
                .collect();
            Tensor::from_slice(&places).to_device(options.device)
        });
        let norm = |name: &str| {
            let name = format!("{path}.{name}");
            Norm::layer(
                &name,
                config.hidden_size,
                config.layer_norm_epsilon,
                source,
                options,
            )
        };
        let linear = |name: &str, rows: i64, columns: i64| -> Result<Linear> {
            let weight = format!("{path}.{name}.weight");
            let bias = format!("{path}.{name}.bias");
            Ok(Linear::new(
                source.tensor(&weight, &[rows, columns], options)?,
                Some(source.tensor(&bias, &[rows], options)?),
            ))
        };
        Ok(Block {
            input_norm: norm("input_layernorm")?,
            attention: SelfAttention {
                query_key_value: linear("self_attention.query_key_value", 3 * mixed, width)?,
                dense: linear("self_attention.dense", width, mixed)?,
                heads: shape.heads as i64,
                places,
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                dense_h_to_4h: linear("mlp.dense_h_to_4h", channels, width)?,
                dense_4h_to_h: linear("mlp.dense_4h_to_h", width, channels)?,
            },
            residual_after_norm: config.apply_residual_connection_post_layernorm,
        })
    }

    /// [N, D] → [M, D], of the positions that attend.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        observe: &mut dyn FnMut(Site, &Tensor),
    ) -> Tensor {
        let pass = context.pass;
        let normed = self.input_norm.forward(x);
        observe(Site::AttentionInput, &normed);
        let mixed = self.attention.mix(&normed, context);
        observe(Site::AttentionOutput, &mixed);
        let residual = if self.residual_after_norm { &normed } else { x };
        let residual = context.of_queries(residual, 0);
        let x = self.attention.dense.forward(&mixed, pass).g_add_(&residual);
        let normed = self.post_attention_norm.forward(&x);
        observe(Site::FfnInput, &normed);
        let active = self.mlp.dense_h_to_4h.forward(&normed, pass).gelu("tanh");
        observe(Site::FfnOutput, &active);
        let residual = if self.residual_after_norm {
            &normed
        } else {
            &x
        };
        self.mlp
            .dense_4h_to_h
            .forward(&active, pass)
            .g_add_(residual)
    }

    /// The projections with their paths inside the block, in the order of the forward pass.
    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        vec![
            (
                "self_attention.query_key_value",
                &self.attention.query_key_value,
            ),
            ("self_attention.dense", &self.attention.dense),
            ("mlp.dense_h_to_4h", &self.mlp.dense_h_to_4h),
            ("mlp.dense_4h_to_h", &self.mlp.dense_4h_to_h),
        ]
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        vec![
            (
                "self_attention.query_key_value",
                &mut self.attention.query_key_value,
            ),
            ("self_attention.dense", &mut self.attention.dense),
            ("mlp.dense_h_to_4h", &mut self.mlp.dense_h_to_4h),
            ("mlp.dense_4h_to_h", &mut self.mlp.dense_4h_to_h),
        ]
    }

    /// Of its heads these stay, whose weights are all that is left.
    pub(crate) fn keep_heads(&mut self, kept: &[i64]) {
        self.attention.keep_heads(kept);
    }

    /// All heads of the architecture are here again, in their places.
    pub(crate) fn fill_heads(&mut self, heads: i64) {
        self.attention.fill_heads(heads);
    }

    pub(crate) fn norms_mut(&mut self) -> [&mut Norm; 2] {
        [&mut self.input_norm, &mut self.post_attention_norm]
    }

    pub(crate) fn norms(&self) -> Vec<(&'static str, &Norm)> {
        vec![
            ("input_layernorm", &self.input_norm),
            ("post_attention_layernorm", &self.post_attention_norm),
        ]
    }

    pub(crate) fn share(&self) -> Block {
        Block {
            input_norm: self.input_norm.share(),
            attention: self.attention.share(),
            post_attention_norm: self.post_attention_norm.share(),
            mlp: Mlp {
                dense_h_to_4h: self.mlp.dense_h_to_4h.share(),
                dense_4h_to_h: self.mlp.dense_4h_to_h.share(),
            },
            residual_after_norm: self.residual_after_norm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::slopes;

    /// Section 3 of the paper: 8 heads have 1/2, 1/4, …, 1/256; the authors' rule for other counts.
    #[test]
    fn slopes_of_the_paper() {
        let eight: Vec<f32> = (1..=8).map(|power| 0.5f32.powi(power)).collect();
        assert_eq!(slopes(8), eight);
        assert_eq!(slopes(1), [1.0 / 256.0]);
        let twelve = slopes(12);
        assert_eq!(twelve[..8], eight);
        let root = 0.5f32.sqrt();
        for (slope, power) in twelve[8..].iter().zip([1, 3, 5, 7]) {
            assert!((slope - root.powi(power)).abs() < 1e-7);
        }
    }
}
