//! One block of any architecture, and what the blocks of one pass share.

use tch::{Device, Tensor};

use crate::attention::Packed;
use crate::config::Config;
use crate::linear::{Adapter, Linear, Pass};
use crate::llama::LayerShape;
use crate::prune::Coupling;
use crate::weights::WeightSource;
use crate::{LoadOptions, Result, bloom, llama};

/// Places inside a block that an observer sees, with what enters there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// Input of the attention's first projections: [N, D].
    AttentionInput,
    /// Input of the attention's output projection: [N, H·d].
    AttentionOutput,
    /// Input of the FFN's first projections: [N, D].
    FfnInput,
    /// Input of the FFN's output projection: [N, F].
    FfnOutput,
}

/// Where the input of a projection is seen, by its path inside the block.
pub(crate) fn site_of(path: &str) -> Site {
    match path {
        "self_attn.o_proj" | "self_attention.dense" => Site::AttentionOutput,
        "mlp.down_proj" | "mlp.dense_4h_to_h" => Site::FfnOutput,
        path if path.starts_with("mlp.") => Site::FfnInput,
        _ => Site::AttentionInput,
    }
}

/// One block, loaded. Its memory is free again when it is dropped.
#[expect(
    clippy::large_enum_variant,
    reason = "the blocks of a network are all of one kind"
)]
#[derive(Debug)]
pub enum Block {
    /// Of Llama, Qwen2 and Mistral.
    Llama(LlamaBlock),
    /// Of BLOOM.
    Bloom(BloomBlock),
}

/// A block of [`llama`].
#[derive(Debug)]
pub struct LlamaBlock(pub(crate) llama::Block);

/// A block of [`bloom`].
#[derive(Debug)]
pub struct BloomBlock(pub(crate) bloom::Block);

/// What every block of one pass over [B, T] tokens shares on one device: the positions' rotations
/// or biases, the mask.
#[derive(Debug)]
pub struct Context(Kinds);

#[derive(Debug)]
enum Kinds {
    Llama(llama::Context),
    Bloom(bloom::Context),
}

impl Context {
    pub(crate) fn new(
        config: &Config,
        shape: (i64, i64),
        options: &LoadOptions,
        pass: Pass,
    ) -> Context {
        let (kind, device) = (options.kind, options.device);
        Context(match config {
            Config::Llama(config) => Kinds::Llama(config.context(shape, kind, device, pass)),
            Config::Bloom(config) => Kinds::Bloom(config.context(shape, kind, device, pass)),
        })
    }

    pub(crate) fn packed(config: &Config, packed: &Packed<'_>, options: &LoadOptions) -> Context {
        let (kind, device) = (options.kind, options.device);
        Context(match config {
            Config::Llama(config) => Kinds::Llama(config.packed_context(packed, kind, device)),
            Config::Bloom(config) => Kinds::Bloom(config.packed_context(packed, kind, device)),
        })
    }
}

impl Block {
    pub(crate) fn load(
        config: &Config,
        index: usize,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Block> {
        Ok(match config {
            Config::Llama(config) => Block::Llama(LlamaBlock(llama::Block::load(
                config, index, source, options,
            )?)),
            Config::Bloom(config) => Block::Bloom(BloomBlock(bloom::Block::load(
                config, index, source, options,
            )?)),
        })
    }

    /// [N, D] → [N, D], N = B·T, both of the context's architecture, shape and device.
    ///
    /// # Panics
    /// When the context is that of another architecture, shape or device.
    pub fn forward(&self, x: &Tensor, context: &Context) -> Tensor {
        self.forward_observed(x, context, &mut |_, _| {})
    }

    pub(crate) fn forward_observed(
        &self,
        x: &Tensor,
        context: &Context,
        observe: &mut dyn FnMut(Site, &Tensor),
    ) -> Tensor {
        match (self, &context.0) {
            (Block::Llama(block), Kinds::Llama(context)) => block.0.forward(x, context, observe),
            (Block::Bloom(block), Kinds::Bloom(context)) => block.0.forward(x, context, observe),
            _ => panic!("the context of another architecture"),
        }
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.linears()
            .first()
            .map_or(Device::Cpu, |(_, linear)| linear.weight.device())
    }

    /// The projections with their paths inside the block, in the order of the forward pass.
    pub(crate) fn linears(&self) -> Vec<(&'static str, &Linear)> {
        match self {
            Block::Llama(block) => block.0.linears(),
            Block::Bloom(block) => block.0.linears(),
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        match self {
            Block::Llama(block) => block.0.linears_mut(),
            Block::Bloom(block) => block.0.linears_mut(),
        }
    }

    /// What a head's weights, or those of a key/value head with its query heads, are.
    pub(crate) fn attention_coupling(&self, shape: LayerShape, head_dim: usize) -> Coupling {
        match self {
            Block::Llama(_) => {
                let queries = shape.heads / shape.kv_heads * head_dim;
                Coupling {
                    rows: vec![
                        ("self_attn.q_proj", queries),
                        ("self_attn.k_proj", head_dim),
                        ("self_attn.v_proj", head_dim),
                    ],
                    columns: ("self_attn.o_proj", queries),
                }
            }
            Block::Bloom(_) => Coupling {
                rows: vec![("self_attention.query_key_value", 3 * head_dim)],
                columns: ("self_attention.dense", head_dim),
            },
        }
    }

    /// Of its heads, or its key/value heads with their query heads, these stay, and their weights are cut already.
    pub(crate) fn keep_heads(&mut self, kept: &[i64]) {
        match self {
            // Positions are in queries and keys: a head's place is nothing to it.
            Block::Llama(_) => {}
            Block::Bloom(block) => block.0.keep_heads(kept),
        }
    }

    /// All of the architecture's heads are here again, those that were gone as zeros.
    pub(crate) fn fill_heads(&mut self, heads: usize) {
        match self {
            Block::Llama(_) => {}
            Block::Bloom(block) => block.0.fill_heads(heads as i64),
        }
    }

    /// What an FFN channel's weights are.
    pub(crate) fn ffn_coupling(&self) -> Coupling {
        match self {
            Block::Llama(_) => Coupling {
                rows: vec![("mlp.gate_proj", 1), ("mlp.up_proj", 1)],
                columns: ("mlp.down_proj", 1),
            },
            Block::Bloom(_) => Coupling {
                rows: vec![("mlp.dense_h_to_4h", 1)],
                columns: ("mlp.dense_4h_to_h", 1),
            },
        }
    }

    /// The block's tensors, to be replaced.
    pub(crate) fn for_each_tensor(&mut self, change: &mut dyn FnMut(&mut Tensor)) {
        let norms = match self {
            Block::Llama(block) => block.0.norms_mut(),
            Block::Bloom(block) => block.0.norms_mut(),
        };
        for norm in norms {
            norm.for_each_tensor(change);
        }
        for (_, linear) in self.linears_mut() {
            change(&mut linear.weight);
            if let Some(bias) = &mut linear.bias {
                change(bias);
            }
        }
    }

    /// The block's tensors with their names below `path`.
    pub(crate) fn parameters(&self, path: &str) -> Vec<(String, &Tensor)> {
        let norms = match self {
            Block::Llama(block) => block.0.norms(),
            Block::Bloom(block) => block.0.norms(),
        };
        let mut tensors = Vec::new();
        for (name, norm) in norms {
            tensors.extend(norm.parameters(&format!("{path}.{name}")));
        }
        for (name, linear) in self.linears() {
            tensors.push((format!("{path}.{name}.weight"), &linear.weight));
            if let Some(bias) = &linear.bias {
                tensors.push((format!("{path}.{name}.bias"), bias));
            }
        }
        tensors
    }

    /// The same block for another thread, adapters included: weights are shared, not copied.
    pub(crate) fn replica(&self) -> Block {
        let mut replica = self.share();
        for ((_, of), (_, to)) in self.linears().into_iter().zip(replica.linears_mut()) {
            to.adapter = of.adapter.as_ref().map(Adapter::share);
        }
        replica
    }

    pub(crate) fn share(&self) -> Block {
        match self {
            Block::Llama(block) => Block::Llama(LlamaBlock(block.0.share())),
            Block::Bloom(block) => Block::Bloom(BloomBlock(block.0.share())),
        }
    }
}
