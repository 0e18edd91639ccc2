//! Structured pruning: whole KV groups and FFN channels go, so that the student is really smaller.
//!
//! Groups of coupled weights as in LLM-Pruner (Ma et al. 2023, arXiv 2305.11627, Section 3.1),
//! with magnitude as importance, or magnitude weighted by activation in the manner of Wanda (Sun
//! et al. 2023, arXiv 2306.11695).

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::block::{self, BloomBlock, LlamaBlock};
use crate::config::Config;
use crate::linear::Linear;
use crate::llama::{Block, LayerShape};
use crate::{ActivationNorms, Error, LoadedModel, Result};

/// How much goes, and from where.
#[derive(Debug, Clone, Default)]
pub struct PruneOptions {
    /// Share of groups and channels removed in every layer of the scope, in [0, 1).
    pub ratio: f64,
    /// Layers pruned; by default all but the first four and the last two (all but the first and
    /// the last below eight layers).
    pub scope: Option<Range<usize>>,
    /// Norms of the inputs of `o_proj` and `down_proj` on calibration text
    /// ([`activation_norms`](crate::activation_norms)); with them importance is weighted by
    /// activation.
    pub activation: Option<ActivationNorms>,
}

/// What pruning did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PruneReport {
    /// Parameters before.
    pub parameters_before: u64,
    /// Parameters after.
    pub parameters_after: u64,
    /// Every layer of the network.
    pub layers: Vec<LayerPruning>,
    /// What the user should know, for instance that no KV group was removed.
    pub notes: Vec<String>,
}

/// One layer's sizes before and after.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerPruning {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Query heads before.
    pub heads_before: usize,
    /// Query heads after.
    pub heads_after: usize,
    /// Key/value heads before.
    pub kv_heads_before: usize,
    /// Key/value heads after.
    pub kv_heads_after: usize,
    /// FFN channels before.
    pub channels_before: usize,
    /// FFN channels after.
    pub channels_after: usize,
}

/// Removes the KV groups (floor(ratio · groups)) and FFN channels (round(ratio · channels)) of
/// least importance from every layer in scope; of equal ones the earlier goes first. The model's
/// digest becomes one derived from the old digest and what was kept.
///
/// # Errors
/// A ratio outside [0, 1), a scope beyond the network, adapters still attached, activation norms of
/// another network.
pub fn prune(model: &mut LoadedModel, options: &PruneOptions) -> Result<PruneReport> {
    let network = &mut model.network;
    let scope = check(network.num_layers(), options)?;
    if network.lora().is_some() {
        return Err(refuse("the network has adapters; merge or drop them first"));
    }
    let parameters_before = network.num_parameters();
    let head_dim = network.config().head_dim();
    let before = network.config().layers().to_vec();
    let mut after = before.clone();
    let mut digest = blake3::Hasher::new();
    digest.update(b"pruned");
    digest.update(model.digest.as_bytes());

    for index in scope.clone() {
        let shape = before[index];
        let block::Block::Llama(LlamaBlock(block)) = &mut network.blocks[index] else {
            return Err(refuse("pruning is not implemented for this architecture"));
        };
        let (kept_groups, kept_channels) = kept(block, index, shape, head_dim, options)?;
        after[index] = cut(block, shape, head_dim, &kept_groups, &kept_channels);
        for &kept in kept_groups.iter().chain(&kept_channels) {
            digest.update(&kept.to_le_bytes());
        }
    }
    network.set_layers(after.clone());
    model.digest = digest.finalize().to_hex().to_string();

    let mut notes = Vec::new();
    if options.ratio > 0.0
        && scope
            .clone()
            .all(|index| after[index].kv_heads == before[index].kv_heads)
    {
        let groups = before[scope.start].kv_heads;
        notes.push(format!(
            "no KV group was removed: {} of {groups} groups rounds down to none; only FFN channels went",
            options.ratio
        ));
    }
    Ok(PruneReport {
        parameters_before,
        parameters_after: network.num_parameters(),
        layers: before
            .iter()
            .zip(&after)
            .enumerate()
            .map(|(layer, (b, a))| LayerPruning::new(layer, *b, *a))
            .collect(),
        notes,
    })
}

/// Does to a block that was loaded alone what [`prune`] does to it in its network. Of BLOOM, which [`prune`] refuses,
/// only FFN channels go: enough for a student that exists to be compared with.
///
/// # Errors
/// Those of [`prune`].
pub fn prune_block(
    config: &Config,
    index: usize,
    block: &mut block::Block,
    options: &PruneOptions,
) -> Result<()> {
    if !check(config.num_layers(), options)?.contains(&index) {
        return Ok(());
    }
    let shape = config.layers()[index];
    match block {
        block::Block::Llama(LlamaBlock(block)) => {
            let (groups, channels) = kept(block, index, shape, config.head_dim(), options)?;
            cut(block, shape, config.head_dim(), &groups, &channels);
        }
        block::Block::Bloom(BloomBlock(block)) => {
            let (rise, fall) = (&mut block.mlp.dense_h_to_4h, &mut block.mlp.dense_4h_to_h);
            let importance = to_vec(&(squares(rise, 1) + squares(fall, 0)))?;
            let channels = strongest(&importance, removed_channels(shape, options));
            let channels = Tensor::from_slice(&channels).to_device(rise.weight.device());
            rise.keep_rows(&channels);
            fall.keep_columns(&channels);
        }
    }
    Ok(())
}

/// The KV groups and FFN channels of a block that stay.
fn kept(
    block: &Block,
    index: usize,
    shape: LayerShape,
    head_dim: usize,
    options: &PruneOptions,
) -> Result<(Vec<i64>, Vec<i64>)> {
    let norms = options
        .activation
        .as_ref()
        .map(|norms| LayerNorms::of(norms, index, shape, head_dim));
    let norms = norms.transpose()?;
    let groups = strongest(
        &group_importance(block, shape, norms.as_ref())?,
        (options.ratio * shape.kv_heads as f64 + 1e-9).floor() as usize,
    );
    let channels = strongest(
        &channel_importance(block, norms.as_ref())?,
        removed_channels(shape, options),
    );
    Ok((groups, channels))
}

fn removed_channels(shape: LayerShape, options: &PruneOptions) -> usize {
    (options.ratio * shape.intermediate_size as f64).round() as usize
}

impl LayerPruning {
    fn new(layer: usize, before: LayerShape, after: LayerShape) -> LayerPruning {
        LayerPruning {
            layer,
            heads_before: before.heads,
            heads_after: after.heads,
            kv_heads_before: before.kv_heads,
            kv_heads_after: after.kv_heads,
            channels_before: before.intermediate_size,
            channels_after: after.intermediate_size,
        }
    }
}

/// One layer's activation norms as tensors.
struct LayerNorms {
    /// [H·d].
    attention: Tensor,
    /// [F].
    ffn: Tensor,
}

impl LayerNorms {
    fn of(
        norms: &ActivationNorms,
        layer: usize,
        shape: LayerShape,
        head_dim: usize,
    ) -> Result<LayerNorms> {
        let pick = |all: &[Vec<f32>], width: usize| match all.get(layer) {
            Some(values) if values.len() == width => Ok(Tensor::from_slice(values)),
            _ => Err(refuse(&format!(
                "the activation norms of layer {layer} are those of another network"
            ))),
        };
        Ok(LayerNorms {
            attention: pick(&norms.attention, shape.heads * head_dim)?,
            ffn: pick(&norms.ffn, shape.intermediate_size)?,
        })
    }
}

/// Resolves the scope and checks the ratio.
fn check(layers: usize, options: &PruneOptions) -> Result<Range<usize>> {
    if !(0.0..1.0).contains(&options.ratio) {
        return Err(refuse(&format!(
            "the ratio {} is not in [0, 1)",
            options.ratio
        )));
    }
    let scope = options
        .scope
        .clone()
        .unwrap_or_else(|| default_scope(layers));
    if scope.is_empty() || scope.end > layers {
        return Err(refuse(&format!(
            "layers {}..{} of a network with {layers}",
            scope.start, scope.end
        )));
    }
    Ok(scope)
}

/// The first and the last layers matter most (LLM-Pruner, Section 4.1, keeps four and two of 32).
fn default_scope(layers: usize) -> Range<usize> {
    if layers < 8 {
        1..layers.saturating_sub(1)
    } else {
        4..layers - 2
    }
}

/// Importance of every KV group. By magnitude: the squared norms of its rows of q, k, v and its
/// columns of o. With activations: Σ ‖x_c‖² · ‖o column c‖² over the group's channels c, the energy
/// the group adds to the residual stream.
fn group_importance(
    block: &Block,
    shape: LayerShape,
    norms: Option<&LayerNorms>,
) -> Result<Vec<f32>> {
    let attention = &block.attention;
    let groups = shape.kv_heads as i64;
    let per_group = |values: Tensor| {
        values
            .view([groups, -1])
            .sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
    };
    let columns = squares(&attention.o_proj, 0);
    let importance = match norms {
        Some(norms) => per_group(columns * norms.attention.square()),
        None => {
            per_group(columns)
                + per_group(squares(&attention.q_proj, 1))
                + per_group(squares(&attention.k_proj, 1))
                + per_group(squares(&attention.v_proj, 1))
        }
    };
    to_vec(&importance)
}

/// Importance of every FFN channel. By magnitude: the squared norms of its rows of gate and up and
/// its column of down. With activations: ‖x_c‖² · ‖down column c‖².
fn channel_importance(block: &Block, norms: Option<&LayerNorms>) -> Result<Vec<f32>> {
    let mlp = &block.mlp;
    let columns = squares(&mlp.down_proj, 0);
    let importance = match norms {
        Some(norms) => columns * norms.ffn.square(),
        None => columns + squares(&mlp.gate_proj, 1) + squares(&mlp.up_proj, 1),
    };
    to_vec(&importance)
}

/// Σ w² over dimension `over`, in f32 on the CPU.
fn squares(linear: &Linear, over: i64) -> Tensor {
    let wide = linear
        .weight
        .to_kind(Kind::Float)
        .to_device(tch::Device::Cpu);
    wide.square()
        .sum_dim_intlist([over].as_slice(), false, Kind::Float)
}

fn to_vec(values: &Tensor) -> Result<Vec<f32>> {
    Vec::<f32>::try_from(values).map_err(Error::torch("read importances"))
}

/// Indices that stay, ascending, when the `remove` least important go; one always stays.
fn strongest(importance: &[f32], remove: usize) -> Vec<i64> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[a].total_cmp(&importance[b]).then(a.cmp(&b)));
    let mut kept: Vec<i64> = order[remove.min(importance.len() - 1)..]
        .iter()
        .map(|&index| index as i64)
        .collect();
    kept.sort_unstable();
    kept
}

/// Cuts the block down to the kept groups and channels.
fn cut(
    block: &mut Block,
    shape: LayerShape,
    head_dim: usize,
    groups: &[i64],
    channels: &[i64],
) -> LayerShape {
    let queries_per_group = (shape.heads / shape.kv_heads) as i64;
    let d = head_dim as i64;
    let device = block.attention.q_proj.weight.device();
    // Rows of the kept groups when every group owns `width` consecutive rows.
    let rows = |width: i64| {
        let rows: Vec<i64> = groups
            .iter()
            .flat_map(|&group| group * width..(group + 1) * width)
            .collect();
        Tensor::from_slice(&rows).to_device(device)
    };
    if groups.len() < shape.kv_heads {
        let (q, kv) = (rows(queries_per_group * d), rows(d));
        block.attention.q_proj.keep_rows(&q);
        block.attention.k_proj.keep_rows(&kv);
        block.attention.v_proj.keep_rows(&kv);
        block.attention.o_proj.keep_columns(&q);
    }
    if channels.len() < shape.intermediate_size {
        let kept = Tensor::from_slice(channels).to_device(device);
        block.mlp.gate_proj.keep_rows(&kept);
        block.mlp.up_proj.keep_rows(&kept);
        block.mlp.down_proj.keep_columns(&kept);
    }
    LayerShape {
        heads: groups.len() * queries_per_group as usize,
        kv_heads: groups.len(),
        intermediate_size: channels.len(),
    }
}

fn refuse(message: &str) -> Error {
    Error::Prune {
        message: message.to_owned(),
    }
}
