//! The Llama architecture (Touvron et al. 2023, arXiv 2302.13971; grouped-query attention by
//! Ainslie et al. 2023), from its parts up: configuration, rotary embedding, attention, MLP, block.
//!
//! Qwen2 and Mistral are the same blocks under other settings; `qwen2.rs` and `mistral.rs` say which.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, Packed};
use crate::block::Site;
use crate::linear::{Input, Linear, Pass};
use crate::norm::Norm;
use crate::weights::WeightSource;
use crate::{LoadOptions, Result, row_kernels};

/// Sizes of one block; pruned students have blocks of different sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// H: query heads.
    pub heads: usize,
    /// G: key/value heads.
    pub kv_heads: usize,
    /// F: FFN channels.
    pub intermediate_size: usize,
}

/// How the rotary frequencies of a longer context come from those of the first training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// All of them divided by a factor (`rope_type` "linear").
    Linear {
        /// The factor.
        factor: f64,
    },
    /// By wavelength (`rope_type` "llama3").
    Llama3(Llama3Scaling),
}

/// Rotary scaling of Llama 3.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Llama3Scaling {
    /// Frequencies of long wavelength are divided by this.
    pub factor: f64,
    /// Wavelengths above `original / low_freq_factor` are scaled wholly.
    pub low_freq_factor: f64,
    /// Wavelengths below `original / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length the model was trained at first.
    pub original_max_position_embeddings: usize,
}

/// The architectures that are made of Llama's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3, TinyLlama, Vicuna, SmolLM2.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Mistral 7B and its kin.
    Mistral,
}

/// Which projections of the attention have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    None,
    /// q, k and v (Qwen2).
    Qkv,
    /// q, k, v and o (`attention_bias` of Llama).
    All,
}

/// Layers that see no further back than a number of positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// How many positions such a layer sees, the position itself included.
    pub positions: usize,
    /// For every layer whether it has the window.
    pub layers: Vec<bool>,
}

/// Configuration, with Hugging Face's field names where there is one value for the whole network.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Which architecture the settings are those of.
    pub family: Family,
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// d: even.
    pub head_dim: usize,
    /// Context length the model was trained for.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaled rotary embedding.
    pub rope_scaling: Option<RopeScaling>,
    /// Layers with a sliding window.
    pub sliding_window: Option<SlidingWindow>,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Which projections of the attention have biases.
    pub attention_bias: AttentionBias,
    /// The projections of the MLP have biases.
    pub mlp_bias: bool,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Sizes of a block before any pruning (`num_attention_heads`, `num_key_value_heads`,
    /// `intermediate_size`).
    pub dense: LayerShape,
    /// Sizes of every block; L is its length. A pruned network differs from `dense` somewhere.
    pub layers: Vec<LayerShape>,
}

impl Default for LlamaConfig {
    /// Llama 7B, the first of its kind.
    fn default() -> Self {
        let dense = LayerShape {
            heads: 32,
            kv_heads: 32,
            intermediate_size: 11_008,
        };
        LlamaConfig {
            family: Family::Llama,
            vocab_size: 32_000,
            hidden_size: 4096,
            head_dim: 128,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            sliding_window: None,
            tie_word_embeddings: false,
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            dense,
            layers: vec![dense; 32],
        }
    }
}

impl LlamaConfig {
    /// True when some block is smaller than the architecture's own sizes.
    pub fn is_pruned(&self) -> bool {
        self.layers.iter().any(|layer| *layer != self.dense)
    }

    /// Angle per position of pair `pair`, before any scaling.
    pub(crate) fn rotary_frequency(&self, pair: usize) -> f64 {
        self.rope_theta
            .powf(-((2 * pair) as f64) / self.head_dim as f64)
    }

    /// What the blocks share in a pass over [B, T] tokens.
    pub(crate) fn context(
        &self,
        (batch, positions): (i64, i64),
        kind: Kind,
        device: Device,
        pass: Pass,
    ) -> Context {
        let window = self
            .sliding_window
            .as_ref()
            .map(|window| Attention::windowed(positions, window.positions as i64, kind, device));
        Context {
            batch,
            positions,
            angles: Rotary::new(self).angles(
                &Tensor::arange(positions, (Kind::Float, Device::Cpu)),
                kind,
                device,
            ),
            queries: None,
            attention: Attention::causal(positions, kind, device),
            window,
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
        let rotary = Rotary::new(self);
        let (places, visible) = (packed.places, packed.of_queries(packed.visible));
        let of_queries = packed.of_queries(places);
        let zeros = Tensor::zeros(visible.size(), (Kind::Float, Device::Cpu));
        let window = self.sliding_window.as_ref().map(|window| {
            let distance = of_queries.unsqueeze(1) - places.unsqueeze(0);
            let near = distance.lt(window.positions as f64);
            packed.attention(&zeros, &visible.logical_and(&near), kind, device)
        });
        Context {
            batch: 1,
            positions: places.numel() as i64,
            angles: rotary.angles(places, kind, device),
            queries: packed.queries.map(|rows| Queries {
                rows: rows.to_device(device),
                angles: rotary.angles(&of_queries, kind, device),
            }),
            attention: packed.attention(&zeros, &visible, kind, device),
            window,
            pass: Pass::Inference,
        }
    }
}

/// Rotary position embedding (Su et al. 2021) in the half-rotation layout: element i of a head is
/// rotated with element i + d/2.
#[derive(Debug)]
struct Rotary {
    /// Angle per position of each pair: d/2 values.
    frequencies: Vec<f32>,
}

/// Cosines and sines of one pass, [T, 1, d], to meet [B, T, H, d]; the sine of the first half is
/// negated, so that a rotation is x · cos + swap(x) · sin.
#[derive(Debug)]
struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(config: &LlamaConfig) -> Rotary {
        let frequencies = (0..config.head_dim / 2)
            .map(|pair| {
                let frequency = config.rotary_frequency(pair);
                (match config.rope_scaling {
                    None => frequency,
                    Some(RopeScaling::Linear { factor }) => frequency / factor,
                    Some(RopeScaling::Llama3(scaling)) => scaling.apply(frequency),
                }) as f32
            })
            .collect();
        Rotary { frequencies }
    }

    /// `positions` [T] f32 on the CPU.
    fn angles(&self, positions: &Tensor, kind: Kind, device: Device) -> Angles {
        let angle = positions.view([-1, 1, 1]) * Tensor::from_slice(&self.frequencies);
        let (cos, sin) = (angle.cos(), angle.sin());
        let join = |left: &Tensor, right: &Tensor| {
            Tensor::cat(&[left, right], -1)
                .to_device(device)
                .to_kind(kind)
        };
        Angles {
            cos: join(&cos, &cos),
            sin: join(&-&sin, &sin),
        }
    }
}

impl Llama3Scaling {
    /// Llama 3's rule: long wavelengths are stretched by `factor`, short ones kept, those between
    /// interpolated.
    pub(crate) fn apply(&self, frequency: f64) -> f64 {
        let wavelength = TAU / frequency;
        let original = self.original_max_position_embeddings as f64;
        if wavelength < original / self.high_freq_factor {
            frequency
        } else if wavelength > original / self.low_freq_factor {
            frequency / self.factor
        } else {
            let smooth = (original / wavelength - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

impl Angles {
    /// [B, T, H, d], in memory of its own → the same, rotated.
    fn rotate(&self, mut x: Tensor) -> Tensor {
        if row_kernels::rotate(&mut x, &self.cos, &self.sin) {
            return x;
        }
        let halves = x.chunk(2, -1);
        let swapped = Tensor::cat(&[&halves[1], &halves[0]], -1);
        (&x * &self.cos).addcmul_(&swapped, &self.sin)
    }
}

/// Causal grouped-query attention.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    head_dim: i64,
    /// This layer has the sliding window.
    windowed: bool,
}

/// What every block of one pass shares.
#[derive(Debug)]
pub(crate) struct Context {
    batch: i64,
    positions: i64,
    angles: Angles,
    /// The positions that attend and go on to the next layer, where not all do.
    queries: Option<Queries>,
    attention: Attention,
    /// Of the layers with a sliding window.
    window: Option<Attention>,
    pass: Pass,
}

/// Some of the positions.
#[derive(Debug)]
struct Queries {
    /// [M] i64, ascending.
    rows: Tensor,
    angles: Angles,
}

impl Context {
    /// The rows [M, D] of the positions that attend, of x [N, D].
    fn of_queries(&self, x: &Tensor) -> Tensor {
        match &self.queries {
            Some(queries) => x.index_select(0, &queries.rows),
            None => x.shallow_clone(),
        }
    }
}

impl SelfAttention {
    /// [N, D] → [M, H·d], what enters `o_proj`.
    fn mix(&self, x: &Tensor, context: &Context) -> Tensor {
        let input = Input::new(x);
        let split = |projection: &Linear, input: &Input<'_>, positions: i64| {
            let heads = projection.forward_of(input, context.pass);
            heads.view([context.batch, positions, -1, self.head_dim])
        };
        let q = match &context.queries {
            Some(Queries { rows, angles }) => {
                let x = x.index_select(0, rows);
                angles.rotate(split(&self.q_proj, &Input::new(&x), rows.numel() as i64))
            }
            None => context
                .angles
                .rotate(split(&self.q_proj, &input, context.positions)),
        };
        let k = split(&self.k_proj, &input, context.positions);
        let k = context.angles.rotate(k);
        let v = split(&self.v_proj, &input, context.positions);
        let attention = match &context.window {
            Some(window) if self.windowed => window,
            _ => &context.attention,
        };
        attention.attend(&q, &k, &v)
    }

    fn share(&self) -> SelfAttention {
        SelfAttention {
            q_proj: self.q_proj.share(),
            k_proj: self.k_proj.share(),
            v_proj: self.v_proj.share(),
            o_proj: self.o_proj.share(),
            head_dim: self.head_dim,
            windowed: self.windowed,
        }
    }
}

/// down(silu(gate(x)) · up(x)) (Shazeer 2020).
#[expect(clippy::struct_field_names, reason = "the checkpoint's names")]
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl Mlp {
    /// [N, D] → [N, F], what enters `down_proj`.
    fn activate(&self, x: &Tensor, pass: Pass) -> Tensor {
        let input = Input::new(x);
        let mut gate = self.gate_proj.forward_of(&input, pass);
        let up = self.up_proj.forward_of(&input, pass);
        if row_kernels::silu_times(&mut gate, &up) {
            return gate;
        }
        // Without a graph the gate's memory is free again before the product takes its own.
        gate = gate.silu();
        gate * up
    }

    fn share(&self) -> Mlp {
        Mlp {
            gate_proj: self.gate_proj.share(),
            up_proj: self.up_proj.share(),
            down_proj: self.down_proj.share(),
        }
    }
}

/// One layer: x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Debug)]
pub(crate) struct Block {
    input_norm: Norm,
    pub(crate) attention: SelfAttention,
    post_attention_norm: Norm,
    pub(crate) mlp: Mlp,
}

impl Block {
    pub(crate) fn load(
        config: &LlamaConfig,
        index: usize,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Block> {
        let shape = config.layers[index];
        let (d, width) = (config.head_dim as i64, config.hidden_size as i64);
        let (q, kv, f) = (
            shape.heads as i64 * d,
            shape.kv_heads as i64 * d,
            shape.intermediate_size as i64,
        );
        let path = format!("model.layers.{index}");
        let norm = |name: &str| {
            let name = format!("{path}.{name}");
            Norm::rms(
                &name,
                config.hidden_size,
                config.rms_norm_eps,
                source,
                options,
            )
        };
        let linear = |name: &str, rows: i64, columns: i64, bias: bool| -> Result<Linear> {
            let weight =
                source.tensor(&format!("{path}.{name}.weight"), &[rows, columns], options)?;
            let bias =
                bias.then(|| source.tensor(&format!("{path}.{name}.bias"), &[rows], options));
            Ok(Linear::new(weight, bias.transpose()?))
        };
        let qkv_bias = config.attention_bias != AttentionBias::None;
        let o_bias = config.attention_bias == AttentionBias::All;
        let window = config.sliding_window.as_ref();
        Ok(Block {
            input_norm: norm("input_layernorm")?,
            attention: SelfAttention {
                q_proj: linear("self_attn.q_proj", q, width, qkv_bias)?,
                k_proj: linear("self_attn.k_proj", kv, width, qkv_bias)?,
                v_proj: linear("self_attn.v_proj", kv, width, qkv_bias)?,
                o_proj: linear("self_attn.o_proj", width, q, o_bias)?,
                head_dim: d,
                windowed: window.is_some_and(|window| window.layers[index]),
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                gate_proj: linear("mlp.gate_proj", f, width, config.mlp_bias)?,
                up_proj: linear("mlp.up_proj", f, width, config.mlp_bias)?,
                down_proj: linear("mlp.down_proj", width, f, config.mlp_bias)?,
            },
        })
    }

    /// [N, D] → [M, D], of the positions that attend. The sums go into the projections' fresh outputs; `x` stays as it is.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        observe: &mut dyn FnMut(Site, &Tensor),
    ) -> Tensor {
        let normed = self.input_norm.forward(x);
        observe(Site::AttentionInput, &normed);
        let mixed = self.attention.mix(&normed, context);
        observe(Site::AttentionOutput, &mixed);
        let x = self
            .attention
            .o_proj
            .forward(&mixed, context.pass)
            .g_add_(&context.of_queries(x));
        let normed = self.post_attention_norm.forward(&x);
        observe(Site::FfnInput, &normed);
        let active = self.mlp.activate(&normed, context.pass);
        observe(Site::FfnOutput, &active);
        self.mlp.down_proj.forward(&active, context.pass).g_add_(&x)
    }

    /// The projections with their paths inside the block, in the order of the forward pass.
    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        vec![
            ("self_attn.q_proj", &self.attention.q_proj),
            ("self_attn.k_proj", &self.attention.k_proj),
            ("self_attn.v_proj", &self.attention.v_proj),
            ("self_attn.o_proj", &self.attention.o_proj),
            ("mlp.gate_proj", &self.mlp.gate_proj),
            ("mlp.up_proj", &self.mlp.up_proj),
            ("mlp.down_proj", &self.mlp.down_proj),
        ]
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        vec![
            ("self_attn.q_proj", &mut self.attention.q_proj),
            ("self_attn.k_proj", &mut self.attention.k_proj),
            ("self_attn.v_proj", &mut self.attention.v_proj),
            ("self_attn.o_proj", &mut self.attention.o_proj),
            ("mlp.gate_proj", &mut self.mlp.gate_proj),
            ("mlp.up_proj", &mut self.mlp.up_proj),
            ("mlp.down_proj", &mut self.mlp.down_proj),
        ]
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
            mlp: self.mlp.share(),
        }
    }
}
