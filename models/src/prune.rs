//! Structured pruning: whole attention groups and FFN channels go, so that the student is really smaller.
//!
//! Groups of coupled weights, and layers that are kept, as in LLM-Pruner (Ma et al. 2023, arXiv 2305.11627, Section
//! 3.1 and 4.1). How much a group matters is asked of a [`Criterion`].

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::block::Block;
use crate::config::Config;
use crate::importance::{Criterion, LayerEnergies};
use crate::llama::LayerShape;
use crate::{Error, LoadedModel, Result};

/// How much goes, and from where.
#[derive(Debug, Default)]
pub struct PruneOptions {
    /// Share of groups and channels removed in every layer of the scope, in [0, 1).
    pub ratio: f64,
    /// Layers pruned; by default those of [`default_scope`].
    pub scope: Option<Range<usize>>,
    /// What is removed.
    pub parts: Parts,
    /// What the removed matter least by.
    pub criterion: Criterion,
}

/// What structured pruning removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Parts {
    /// FFN channels, and attention heads where none shares its keys and values, but for BLOOM's: what gives the sizes of
    /// BayesKD's Table 5.
    #[default]
    Auto,
    /// Attention groups and FFN channels.
    All,
    /// Attention groups: a key/value head with its query heads, or a single head where none is shared.
    Heads,
    /// FFN channels.
    Ffn,
}

impl Parts {
    /// What it means for layers of this shape.
    fn of(self, config: &Config, shape: LayerShape) -> Parts {
        let whole = shape.heads > shape.kv_heads || matches!(config, Config::Bloom(_));
        match self {
            Parts::Auto if whole => Parts::Ffn,
            Parts::Auto => Parts::All,
            chosen => chosen,
        }
    }
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

/// Weights that go together: a unit owns `width` consecutive rows of each of `rows`, and as many consecutive columns
/// of `columns`.
pub(crate) struct Coupling {
    /// Projections by path inside the block, with the rows of one unit.
    pub(crate) rows: Vec<(&'static str, usize)>,
    /// The projection that reads the unit's output, with the columns of one unit.
    pub(crate) columns: (&'static str, usize),
}

/// Removes the attention groups (floor(ratio · groups)) and FFN channels (round(ratio · channels)) of least importance
/// from every layer in scope; of equal ones the earlier goes first. The model's digest becomes one derived from the old
/// digest and what was kept.
///
/// # Errors
/// A ratio outside [0, 1), a scope beyond the network, adapters still attached, a criterion that was measured on another
/// network.
pub fn prune(model: &mut LoadedModel, options: &PruneOptions) -> Result<PruneReport> {
    let network = &mut model.network;
    let scope = check(network.num_layers(), options.ratio, options.scope.as_ref())?;
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
    let mut notes = Vec::new();

    for index in scope.clone() {
        let shape = before[index];
        let parts = options.parts.of(network.config(), shape);
        let block = &mut network.blocks[index];
        let (kept_groups, kept_channels) =
            prune_one(block, index, shape, head_dim, (parts, options))?;
        network.keep_heads(index, &kept_groups);
        after[index] = LayerShape {
            heads: kept_groups.len() * (shape.heads / shape.kv_heads),
            kv_heads: kept_groups.len(),
            intermediate_size: kept_channels.len(),
        };
        for &kept in kept_groups.iter().chain(&kept_channels) {
            digest.update(&kept.to_le_bytes());
        }
        if index == scope.start && options.parts == Parts::Auto && parts == Parts::Ffn {
            notes.push(match shape.heads / shape.kv_heads {
                1 => "only FFN channels went; --parts all takes a share of the heads too".to_owned(),
                heads => format!(
                    "only FFN channels went: every key/value head serves {heads} query heads, which would go together; \
                     --parts all takes a share of these groups too"
                ),
            });
        }
    }
    network.set_layers(after.clone());
    model.digest = digest.finalize().to_hex().to_string();

    let no_group_went = scope
        .clone()
        .all(|index| after[index].kv_heads == before[index].kv_heads);
    if options.ratio > 0.0 && no_group_went && options.parts != Parts::Ffn && notes.is_empty() {
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

/// Does to a block that was loaded alone what [`prune`] does to it in its network.
///
/// # Errors
/// Those of [`prune`].
pub fn prune_block(
    config: &Config,
    index: usize,
    block: &mut Block,
    options: &PruneOptions,
) -> Result<()> {
    if check(config.num_layers(), options.ratio, options.scope.as_ref())?.contains(&index) {
        let (shape, head_dim) = (config.layers()[index], config.head_dim());
        let parts = options.parts.of(config, shape);
        prune_one(block, index, shape, head_dim, (parts, options))?;
    }
    Ok(())
}

/// Prunes a block of the scope of what `parts`, none of them automatic, says; the groups and channels that stay.
fn prune_one(
    block: &mut Block,
    index: usize,
    shape: LayerShape,
    head_dim: usize,
    (parts, options): (Parts, &PruneOptions),
) -> Result<(Vec<i64>, Vec<i64>)> {
    let energies = options.criterion.of(index);
    let mut kept_groups: Vec<i64> = (0..shape.kv_heads as i64).collect();
    if parts != Parts::Ffn {
        let coupling = block.attention_coupling(shape, head_dim);
        let importance = importance(&energies, block, &coupling, shape.kv_heads)?;
        kept_groups = strongest(&importance, groups_removed(shape, options.ratio));
        if kept_groups.len() < shape.kv_heads {
            cut(block, &coupling, &kept_groups);
            block.keep_heads(&kept_groups);
        }
    }
    let mut kept_channels: Vec<i64> = (0..shape.intermediate_size as i64).collect();
    if parts != Parts::Heads {
        let coupling = block.ffn_coupling();
        let importance = importance(&energies, block, &coupling, shape.intermediate_size)?;
        kept_channels = strongest(&importance, channels_removed(shape, options.ratio));
        if kept_channels.len() < shape.intermediate_size {
            cut(block, &coupling, &kept_channels);
        }
    }
    Ok((kept_groups, kept_channels))
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

/// Whole groups only: a part of one rounds down.
fn groups_removed(shape: LayerShape, ratio: f64) -> usize {
    (ratio * shape.kv_heads as f64 + 1e-9).floor() as usize
}

fn channels_removed(shape: LayerShape, ratio: f64) -> usize {
    (ratio * shape.intermediate_size as f64).round() as usize
}

/// Resolves the scope and checks the ratio.
pub(crate) fn check(
    layers: usize,
    ratio: f64,
    scope: Option<&Range<usize>>,
) -> Result<Range<usize>> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(refuse(&format!("the ratio {ratio} is not in [0, 1)")));
    }
    let scope = scope.cloned().unwrap_or_else(|| default_scope(layers));
    if scope.is_empty() || scope.end > layers {
        return Err(refuse(&format!(
            "layers {}..{} of a network with {layers}",
            scope.start, scope.end
        )));
    }
    Ok(scope)
}

/// The first and the last layers matter most: LLM-Pruner (Section 4.1) keeps four and two of LLaMA's 32, layers 4 to
/// 30, the 30th not included. Below eight layers the first and the last are kept, of one or two none.
pub fn default_scope(layers: usize) -> Range<usize> {
    match layers {
        0..=2 => 0..layers,
        3..=7 => 1..layers - 1,
        _ => 4..layers - 2,
    }
}

/// Importance of each of `units`: the energies of its rows and columns, or of its columns alone where the criterion
/// speaks of what flows through them.
fn importance(
    energies: &LayerEnergies<'_>,
    block: &Block,
    coupling: &Coupling,
    units: usize,
) -> Result<Vec<f32>> {
    let per_unit = |values: Tensor| {
        values
            .view([units as i64, -1])
            .sum_dim_intlist([1i64].as_slice(), false, tch::Kind::Float)
    };
    let mut total = per_unit(energies.columns(block, coupling.columns.0)?);
    if energies.counts_rows() {
        for (name, _) in &coupling.rows {
            total += per_unit(energies.rows(block, name)?);
        }
    }
    Vec::<f32>::try_from(&total).map_err(Error::torch("read importances"))
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

/// Cuts the block down to the kept units.
fn cut(block: &mut Block, coupling: &Coupling, kept: &[i64]) {
    let device = block.device();
    let places = |width: usize| {
        let width = width as i64;
        let places: Vec<i64> = kept
            .iter()
            .flat_map(|&unit| unit * width..(unit + 1) * width)
            .collect();
        Tensor::from_slice(&places).to_device(device)
    };
    for (path, linear) in block.linears_mut() {
        if let Some((_, width)) = coupling.rows.iter().find(|(name, _)| *name == path) {
            linear.keep_rows(&places(*width));
        }
        if coupling.columns.0 == path {
            linear.keep_columns(&places(coupling.columns.1));
        }
    }
}

fn refuse(message: &str) -> Error {
    Error::Prune {
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{AttentionBias, Family, LlamaConfig};

    fn llama(layers: usize, width: usize, dense: LayerShape, vocab_size: usize) -> Config {
        Config::Llama(LlamaConfig {
            family: Family::Llama,
            vocab_size,
            hidden_size: width,
            head_dim: width / dense.heads,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            sliding_window: None,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![],
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            dense,
            layers: vec![dense; layers],
        })
    }

    /// Parameters before and after a quarter of the default scope went.
    fn counts(mut config: Config, parts: Parts) -> (u64, u64) {
        let before = config.num_parameters();
        let mut layers = config.layers().to_vec();
        for shape in &mut layers[default_scope(config.num_layers())] {
            if parts.of(&config, *shape) != Parts::Ffn {
                let per_group = shape.heads / shape.kv_heads;
                shape.kv_heads -= groups_removed(*shape, 0.25);
                shape.heads = per_group * shape.kv_heads;
            }
            shape.intermediate_size -= channels_removed(*shape, 0.25);
        }
        config.set_layers(layers);
        (before, config.num_parameters())
    }

    /// Table 5 of BayesKD: LLaMA-7B and Vicuna-7B have 6.738 B parameters before and 5.423 B after, 0.8048. TinyLlama's
    /// 0.8735 (0.961 B of 1.1 B) is that of its FFN channels alone, to 0.1%; with a key/value head and its eight query
    /// heads gone it would be 0.8399.
    #[test]
    fn a_quarter_leaves_the_papers_ratios() {
        let shape = |heads, kv_heads, intermediate_size| LayerShape {
            heads,
            kv_heads,
            intermediate_size,
        };
        let llama_7b = || llama(32, 4096, shape(32, 32, 11008), 32000);
        let (before, after) = counts(llama_7b(), Parts::Auto);
        assert_eq!((before, after), (6_738_415_616, 5_422_977_024));
        assert!((after as f64 / before as f64 - 0.8048).abs() < 5e-5);

        let tiny = || llama(22, 2048, shape(32, 4, 5632), 32000);
        let (before, after) = counts(tiny(), Parts::Auto);
        assert_eq!((before, after), (1_100_048_384, 961_636_352));
        assert!((after as f64 / before as f64 - 0.8735).abs() < 1e-3);
        let (before, after) = counts(tiny(), Parts::All);
        assert!((after as f64 / before as f64 - 0.8399).abs() < 5e-5);
    }

    #[test]
    fn the_scope_of_llm_pruner() {
        assert_eq!(default_scope(32), 4..30);
        assert_eq!(default_scope(7), 1..6);
        assert_eq!(default_scope(2), 0..2);
    }
}
