//! The Llama architecture (Touvron et al. 2023, arXiv 2302.13971; grouped-query attention by
//! Ainslie et al. 2023), from its parts up: configuration, norm, rotary embedding, attention, MLP,
//! block, model.

mod share;

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::linear::{Adapter, Linear, Pass};
use crate::lora::{LORA_TARGETS, LoraConfig};
use crate::weights::{RandomWeights, WeightSource};
use crate::{Error, LoadOptions, Result};

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

/// Rotary scaling of Llama 3 (`rope_type` "llama3").
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// Frequencies of long wavelength are divided by this.
    pub factor: f64,
    /// Wavelengths above `original / low_freq_factor` are scaled wholly.
    pub low_freq_factor: f64,
    /// Wavelengths below `original / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length the model was trained at first.
    pub original_max_position_embeddings: usize,
}

/// Configuration, with Hugging Face's field names where there is one value for the whole network.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
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
    /// Llama 3's scaled rotary embedding.
    pub rope_scaling: Option<RopeScaling>,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// The projections of the attention have biases.
    pub attention_bias: bool,
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

impl LlamaConfig {
    /// True when some block is smaller than the architecture's own sizes.
    pub fn is_pruned(&self) -> bool {
        self.layers.iter().any(|layer| *layer != self.dense)
    }
}

/// x / √(mean(x²) + ε) · w (Zhang and Sennrich 2019), reduced in f32.
#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        // Type promotion makes the products f32 without a wide copy of x.
        let norm = x.linalg_norm(2.0, [-1i64].as_slice(), true, Kind::Float);
        let inverse = (norm.square() / self.weight.numel() as f64 + self.eps).rsqrt();
        (x * inverse).to_kind(x.kind()).g_mul_(&self.weight)
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
        let d = config.head_dim;
        let frequencies = (0..d / 2)
            .map(|pair| {
                let frequency = config.rope_theta.powf(-((2 * pair) as f64) / d as f64);
                config
                    .rope_scaling
                    .as_ref()
                    .map_or(frequency, |scaling| scaling.apply(frequency)) as f32
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

impl RopeScaling {
    /// Llama 3's rule: long wavelengths are stretched by `factor`, short ones kept, those between
    /// interpolated.
    fn apply(&self, frequency: f64) -> f64 {
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
    /// [B, T, H, d] → the same, rotated.
    fn rotate(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let swapped = Tensor::cat(&[&halves[1], &halves[0]], -1);
        (x * &self.cos).addcmul_(&swapped, &self.sin)
    }
}

/// Causal grouped-query attention.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    head_dim: i64,
}

/// Places inside a block that an observer sees, with what enters there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// Input of `o_proj`: [N, H·d].
    AttentionOutput,
    /// Input of `down_proj`: [N, F].
    FfnOutput,
}

/// Called with (layer, place, tensor) during a pass.
pub(crate) type Observer<'a> = &'a mut dyn FnMut(usize, Site, &Tensor);

/// What every block of one pass shares.
struct Context {
    batch: i64,
    positions: i64,
    angles: Angles,
    /// Given where attention goes by products, not by the fused kernel.
    mask: Option<Tensor>,
    pass: Pass,
}

impl Attention {
    /// [N, D] → [N, H·d], what enters `o_proj`.
    fn mix(&self, x: &Tensor, context: &Context) -> Tensor {
        let split = |projection: &Linear| {
            projection.forward(x, context.pass).view([
                context.batch,
                context.positions,
                -1,
                self.head_dim,
            ])
        };
        let q = context.angles.rotate(&split(&self.q_proj));
        let k = context.angles.rotate(&split(&self.k_proj));
        let v = split(&self.v_proj);
        let mixed = if let Some(mask) = &context.mask {
            attend_by_products(&q, &k, &v, mask)
        } else {
            let [q, k, v] = [q, k, v].map(|heads| heads.transpose(1, 2));
            let grouped = q.size()[1] != k.size()[1];
            Tensor::scaled_dot_product_attention(
                &q,
                &k,
                &v,
                None::<&Tensor>,
                0.0,
                true,
                None,
                grouped,
            )
        };
        mixed
            .transpose(1, 2)
            .reshape([context.batch * context.positions, -1])
    }
}

/// Positions up to which bf16 on the CPU attends by whole products: their memory grows with T².
const PRODUCT_POSITIONS: i64 = 1024;

/// The causal mask [T, T] for [`attend_by_products`], where that is the faster way: libtorch's
/// fused kernel takes twice the time forward in bf16 on the CPU, and two to four times with its
/// backward (measured at [8, 128] and [4, 512]); in f32 it wins.
fn product_mask(positions: i64, kind: Kind, device: Device) -> Option<Tensor> {
    let pays = kind == Kind::BFloat16 && device == Device::Cpu && positions <= PRODUCT_POSITIONS;
    pays.then(|| Tensor::full([positions, positions], f64::NEG_INFINITY, (kind, device)).triu(1))
}

/// softmax(q kᵀ / √d + mask) v with two batched products, the H/G query heads of a group side by
/// side as rows: q [B, T, H, d], k and v [B, T, G, d] → [B, H, T, d]. Softmax reduces in f32.
fn attend_by_products(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    let &[b, t, h, d] = q.size().as_slice() else {
        unreachable!("heads are split before")
    };
    let g = k.size()[2];
    let rows = (q * (d as f64).powf(-0.5))
        .view([b, t, g, h / g, d])
        .permute([0, 2, 3, 1, 4])
        .reshape([b * g, h / g * t, d]);
    let by_group = |heads: &Tensor| heads.transpose(1, 2).reshape([b * g, t, d]);
    let scores = rows
        .bmm(&by_group(k).transpose(1, 2))
        .view([b * g, h / g, t, t])
        .g_add_(mask);
    let weights = scores.softmax(-1, None::<Kind>).view([b * g, h / g * t, t]);
    weights.bmm(&by_group(v)).view([b, h, t, d])
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
        let gate = self.gate_proj.forward(x, pass).silu();
        gate * self.up_proj.forward(x, pass)
    }
}

/// One layer: x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Debug)]
pub(crate) struct Block {
    input_norm: RmsNorm,
    pub(crate) attention: Attention,
    post_attention_norm: RmsNorm,
    pub(crate) mlp: Mlp,
}

impl Block {
    fn load(
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
        let norm =
            |name: &str| RmsNorm::load(&format!("{path}.{name}.weight"), config, source, options);
        let linear = |name: &str, rows: i64, columns: i64, bias: bool| -> Result<Linear> {
            let weight =
                source.tensor(&format!("{path}.{name}.weight"), &[rows, columns], options)?;
            let bias =
                bias.then(|| source.tensor(&format!("{path}.{name}.bias"), &[rows], options));
            Ok(Linear::new(weight, bias.transpose()?))
        };
        Ok(Block {
            input_norm: norm("input_layernorm")?,
            attention: Attention {
                q_proj: linear("self_attn.q_proj", q, width, config.attention_bias)?,
                k_proj: linear("self_attn.k_proj", kv, width, config.attention_bias)?,
                v_proj: linear("self_attn.v_proj", kv, width, config.attention_bias)?,
                o_proj: linear("self_attn.o_proj", width, q, config.attention_bias)?,
                head_dim: d,
            },
            post_attention_norm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                gate_proj: linear("mlp.gate_proj", f, width, config.mlp_bias)?,
                up_proj: linear("mlp.up_proj", f, width, config.mlp_bias)?,
                down_proj: linear("mlp.down_proj", width, f, config.mlp_bias)?,
            },
        })
    }

    /// [N, D] → [N, D]. The sums go into the projections' fresh outputs; `x` stays as it is.
    fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        observe: &mut dyn FnMut(Site, &Tensor),
    ) -> Tensor {
        let mixed = self.attention.mix(&self.input_norm.forward(x), context);
        observe(Site::AttentionOutput, &mixed);
        let x = self
            .attention
            .o_proj
            .forward(&mixed, context.pass)
            .g_add_(x);
        let active = self
            .mlp
            .activate(&self.post_attention_norm.forward(&x), context.pass);
        observe(Site::FfnOutput, &active);
        self.mlp.down_proj.forward(&active, context.pass).g_add_(&x)
    }

    /// The projections with their paths inside the block, in the order of [`LORA_TARGETS`].
    pub(crate) fn linears(&self) -> [(&'static str, &Linear); 7] {
        [
            ("self_attn.q_proj", &self.attention.q_proj),
            ("self_attn.k_proj", &self.attention.k_proj),
            ("self_attn.v_proj", &self.attention.v_proj),
            ("self_attn.o_proj", &self.attention.o_proj),
            ("mlp.gate_proj", &self.mlp.gate_proj),
            ("mlp.up_proj", &self.mlp.up_proj),
            ("mlp.down_proj", &self.mlp.down_proj),
        ]
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.attention.q_proj),
            ("self_attn.k_proj", &mut self.attention.k_proj),
            ("self_attn.v_proj", &mut self.attention.v_proj),
            ("self_attn.o_proj", &mut self.attention.o_proj),
            ("mlp.gate_proj", &mut self.mlp.gate_proj),
            ("mlp.up_proj", &mut self.mlp.up_proj),
            ("mlp.down_proj", &mut self.mlp.down_proj),
        ]
    }
}

impl RmsNorm {
    fn load(
        name: &str,
        config: &LlamaConfig,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<RmsNorm> {
        let weight = source.tensor(name, &[config.hidden_size as i64], options)?;
        Ok(RmsNorm {
            weight,
            eps: config.rms_norm_eps,
        })
    }
}

/// What a forward pass returns.
#[derive(Debug)]
pub struct Forward {
    /// [B, T, D] after the final norm.
    pub last_hidden: Tensor,
    /// The layers asked for, ascending, each [B, T, D].
    pub hidden: Vec<(u32, Tensor)>,
}

/// A Llama network. The base weights are frozen; only attached adapters train.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embedding: Tensor,
    pub(crate) blocks: Vec<Block>,
    norm: RmsNorm,
    head: Tensor,
    rotary: Rotary,
    lora: Option<LoraConfig>,
    dropout_seed: u64,
}

impl Llama {
    pub(crate) fn load(
        config: LlamaConfig,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Llama> {
        let rows = [config.vocab_size as i64, config.hidden_size as i64];
        let embedding = source.tensor("model.embed_tokens.weight", &rows, options)?;
        let blocks = (0..config.layers.len())
            .map(|index| Block::load(&config, index, source, options))
            .collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load("model.norm.weight", &config, source, options)?;
        let head = if config.tie_word_embeddings {
            embedding.shallow_clone()
        } else {
            source.tensor("lm_head.weight", &rows, options)?
        };
        let rotary = Rotary::new(&config);
        Ok(Llama {
            config,
            embedding,
            blocks,
            norm,
            head,
            rotary,
            lora: None,
            dropout_seed: 0,
        })
    }

    /// Random weights (normal, standard deviation 0.02; norms near one) from a seed, for tests and
    /// for measuring.
    pub fn random(config: &LlamaConfig, seed: u64, options: &LoadOptions) -> Result<Llama> {
        Llama::load(config.clone(), &RandomWeights { seed }, options)
    }

    /// Runs the network on `input_ids` [B, T] i64, padded on the right: attention is causal, so
    /// padding never reaches a real position. `keep` names the layers to return (0..=L). An
    /// autograd graph is built only for attached adapters, and not inside `tch::no_grad`.
    ///
    /// # Panics
    /// When `input_ids` is not two-dimensional or holds an id outside the vocabulary, or `keep`
    /// names a layer beyond L: callers check both before.
    pub fn forward(&self, input_ids: &Tensor, keep: &[u32], train: bool) -> Forward {
        let pass = if train {
            Pass::Training {
                dropout_seed: self.dropout_seed,
            }
        } else {
            Pass::Inference
        };
        self.forward_observed(input_ids, keep, pass, &mut |_, _, _| {})
    }

    pub(crate) fn forward_observed(
        &self,
        input_ids: &Tensor,
        keep: &[u32],
        pass: Pass,
        observe: Observer<'_>,
    ) -> Forward {
        let &[batch, positions] = input_ids.size().as_slice() else {
            panic!("input_ids must be [B, T], not {:?}", input_ids.size());
        };
        let last = self.blocks.len() as u32;
        assert!(
            keep.iter().all(|&layer| layer <= last),
            "layers {keep:?} of a network with {last}"
        );

        let shape = [batch, positions, self.config.hidden_size as i64];
        let angles = self.rotary.angles(
            &Tensor::arange(positions, (Kind::Float, Device::Cpu)),
            self.kind(),
            self.device(),
        );
        let mask = product_mask(positions, self.kind(), self.device());
        let context = Context {
            batch,
            positions,
            angles,
            mask,
            pass,
        };
        let mut hidden = Vec::new();
        let mut x = Tensor::embedding(&self.embedding, &input_ids.view([-1]), -1, false, false);
        for (index, block) in self.blocks.iter().enumerate() {
            if keep.contains(&(index as u32)) {
                hidden.push((index as u32, x.view(shape)));
            }
            x = block.forward(&x, &context, &mut |site, tensor| {
                observe(index, site, tensor);
            });
        }
        let last_hidden = self.norm.forward(&x).view(shape);
        if keep.contains(&last) {
            hidden.push((last, last_hidden.shallow_clone()));
        }
        Forward {
            last_hidden,
            hidden,
        }
    }

    /// Hidden states after the final norm of N tokens that are not one sequence but many, packed side
    /// by side: [N] ids → [N, D]. `positions` are those within each token's own sequence, and a token
    /// attends to those for which its row of `visible` \[N·N\] holds, so that continuations of one
    /// context can share it. Without a graph and without dropout.
    ///
    /// # Panics
    /// When the three disagree on N, or an id is outside the vocabulary.
    pub fn forward_packed(&self, input_ids: &[i64], positions: &[f32], visible: &[bool]) -> Tensor {
        let n = input_ids.len() as i64;
        assert!(
            positions.len() as i64 == n && visible.len() as i64 == n * n,
            "{n} tokens, {} positions, {} pairs",
            positions.len(),
            visible.len()
        );
        let (kind, device) = (self.kind(), self.device());
        tch::no_grad(|| {
            let hidden = Tensor::from_slice(visible).view([n, n]).logical_not();
            let mask = Tensor::zeros([n, n], (kind, device))
                .masked_fill_(&hidden.to_device(device), f64::NEG_INFINITY);
            let context = Context {
                batch: 1,
                positions: n,
                angles: self
                    .rotary
                    .angles(&Tensor::from_slice(positions), kind, device),
                mask: Some(mask),
                pass: Pass::Inference,
            };
            let ids = Tensor::from_slice(input_ids).to_device(device);
            let mut x = Tensor::embedding(&self.embedding, &ids, -1, false, false);
            for block in &self.blocks {
                x = block.forward(&x, &context, &mut |_, _| {});
            }
            self.norm.forward(&x)
        })
    }

    /// Logits of hidden states after the final norm: [.., D] → [.., V], in the compute type.
    pub fn logits(&self, last_hidden: &Tensor) -> Tensor {
        last_hidden.linear(&self.head, None::<&Tensor>)
    }

    /// The configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// L.
    pub fn num_layers(&self) -> usize {
        self.blocks.len()
    }

    /// LM head [V, D] (the embedding when tied).
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Attaches fresh adapters: A kaiming-uniform from the seed, B zero, both f32 whatever the
    /// compute type.
    ///
    /// # Errors
    /// A rank below one, a dropout outside [0, 1), a target that is no projection of a block,
    /// adapters attached already.
    pub fn attach_lora(&mut self, lora: &LoraConfig, seed: u64) -> Result<()> {
        lora.check()?;
        if self.lora.is_some() {
            return Err(Error::Lora {
                message: "the network has adapters already".to_owned(),
            });
        }
        let device = self.device();
        let scale = lora.alpha / lora.rank as f64;
        for (index, block) in self.blocks.iter_mut().enumerate() {
            for ((path, linear), target) in block.linears_mut().into_iter().zip(LORA_TARGETS) {
                if lora.targets.iter().any(|name| name == target) {
                    let name = format!("model.layers.{index}.{path}");
                    let size = linear.weight.size();
                    let shape = (size[0], size[1]);
                    linear.adapter = Some(Adapter::new(
                        &name,
                        shape,
                        lora.rank,
                        scale,
                        lora.dropout,
                        seed,
                        device,
                    ));
                }
            }
        }
        self.lora = Some(lora.clone());
        Ok(())
    }

    /// The attached adapters' configuration.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Dropout masks of the next `forward(train = true)` are a pure function of this seed: set it
    /// before every training pass (for instance from seed, step and micro-batch).
    pub fn set_dropout_seed(&mut self, seed: u64) {
        self.dropout_seed = seed;
    }

    /// Adapter tensors by PEFT name (`base_model.model.….lora_A.weight`), ordered by name: shallow
    /// clones that require gradients, so an optimizer changes the network through them.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for adapter in self
            .blocks
            .iter()
            .flat_map(Block::linears)
            .filter_map(|(_, l)| l.adapter.as_ref())
        {
            for (part, tensor) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
                let name = format!("base_model.model.{}.{part}.weight", adapter.name);
                tensors.push((name, tensor.shallow_clone()));
            }
        }
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        tensors
    }

    /// Adds the adapters to the base weights (in f32, then rounded to the compute type) and
    /// removes them.
    pub fn merge_lora(&mut self) {
        for block in &mut self.blocks {
            for (_, linear) in block.linears_mut() {
                linear.merge();
            }
        }
        self.lora = None;
    }

    /// Parameters of the base network, adapters not counted; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        self.parameters()
            .iter()
            .map(|(_, tensor)| tensor.numel() as u64)
            .sum()
    }

    /// Base parameters under Hugging Face's names; a tied head is left out, as there.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![(
            "model.embed_tokens.weight".to_owned(),
            self.embedding.shallow_clone(),
        )];
        for (index, block) in self.blocks.iter().enumerate() {
            let path = format!("model.layers.{index}");
            let mut push =
                |name: String, tensor: &Tensor| tensors.push((name, tensor.shallow_clone()));
            push(
                format!("{path}.input_layernorm.weight"),
                &block.input_norm.weight,
            );
            push(
                format!("{path}.post_attention_layernorm.weight"),
                &block.post_attention_norm.weight,
            );
            for (name, linear) in block.linears() {
                push(format!("{path}.{name}.weight"), &linear.weight);
                if let Some(bias) = &linear.bias {
                    push(format!("{path}.{name}.bias"), bias);
                }
            }
        }
        tensors.push((
            "model.norm.weight".to_owned(),
            self.norm.weight.shallow_clone(),
        ));
        if !self.config.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), self.head.shallow_clone()));
        }
        tensors
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.head.device()
    }

    /// Compute type of the weights.
    pub fn kind(&self) -> Kind {
        self.head.kind()
    }

    /// Records new block sizes after the weights were cut.
    pub(crate) fn set_layers(&mut self, layers: Vec<LayerShape>) {
        self.config.layers = layers;
    }
}
