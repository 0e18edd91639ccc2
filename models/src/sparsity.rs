//! Masks: single weights go to zero, and stay zero through training and merging.
//!
//! A masked network keeps its shapes. Its configuration says which layers are masked (`caskd_sparsity`), and the mask
//! of a projection is where its stored weight is not zero. Adapters of a masked projection add `mask ⊙ scale·BA` to the
//! weight, in training as after merging, so that merging changes neither the numbers nor the mask (as SPP does, Lu et
//! al. 2024, arXiv 2405.16057).

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::importance::{Criterion, Method};
use crate::prune::check;
use crate::{Error, LoadedModel, Result};

/// Which weights may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Any: the share that is asked for, of every projection.
    Unstructured,
    /// `keep` of every `of` consecutive inputs stay (2:4 is what tensor cores are fast at).
    Blocks {
        /// N.
        keep: usize,
        /// M.
        of: usize,
    },
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Unstructured => formatter.write_str("unstructured"),
            Pattern::Blocks { keep, of } => write!(formatter, "{keep}:{of}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Pattern, String> {
        if text == "unstructured" {
            return Ok(Pattern::Unstructured);
        }
        let parts = text
            .split_once(':')
            .and_then(|(keep, of)| Some((keep.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((keep, of)) if 0 < keep && keep < of && of <= 64 => {
                Ok(Pattern::Blocks { keep, of })
            }
            _ => Err(format!(
                "`{text}` is neither unstructured nor N:M, like 2:4"
            )),
        }
    }
}

/// What a masked network's configuration says: `caskd_sparsity`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsity {
    /// "unstructured" or "N:M".
    pub pattern: String,
    /// Share of the masked projections' weights that are zero.
    pub ratio: f64,
    /// First masked layer.
    pub first_layer: usize,
    /// The layer after the last masked one.
    pub end_layer: usize,
}

impl Sparsity {
    /// What a `config.json` says of it.
    pub(crate) fn from_config(path: &Path, config: &Value) -> Result<Option<Sparsity>> {
        let sparsity = config.get(SPARSITY_KEY).cloned();
        sparsity
            .map(serde_json::from_value)
            .transpose()
            .map_err(Error::json(path))
    }
}

/// The key of `config.json`.
pub(crate) const SPARSITY_KEY: &str = "caskd_sparsity";

/// How much is masked, and where.
#[derive(Debug)]
pub struct MaskOptions {
    /// Which weights may go.
    pub pattern: Pattern,
    /// Share of weights that go, in [0, 1); the pattern N:M has its own and takes none.
    pub ratio: f64,
    /// Layers masked; by default those of [`default_scope`](crate::default_scope).
    pub scope: Option<Range<usize>>,
    /// What the masked matter least by.
    pub criterion: Criterion,
}

/// What masking did.
#[derive(Debug, Clone, Serialize)]
pub struct MaskReport {
    /// Weights of the masked projections.
    pub weights: u64,
    /// Of them, zeros.
    pub zeros: u64,
    /// Parameters of the whole network.
    pub parameters: u64,
    /// What its configuration says.
    pub sparsity: Sparsity,
}

/// Sets the least important weights of every projection in scope to zero. Under Wanda they compete within each output
/// (Sun et al. 2023, section 3), under the other criteria within the projection; under N:M within every M consecutive
/// inputs of an output. Of equal ones the earlier goes first.
///
/// # Errors
/// A ratio outside [0, 1), a scope beyond the network, adapters attached, a network that is masked already, a width that
/// is no multiple of M, a criterion that was measured on another network.
pub fn mask(model: &mut LoadedModel, options: &MaskOptions) -> Result<MaskReport> {
    let network = &mut model.network;
    let scope = check(network.num_layers(), options.ratio, options.scope.as_ref())?;
    if network.lora().is_some() {
        return Err(refuse(
            "the network has adapters; merge or drop them first".to_owned(),
        ));
    }
    if network.sparsity().is_some() {
        return Err(refuse("the network is masked already".to_owned()));
    }
    let mut digest = blake3::Hasher::new();
    digest.update(b"masked");
    digest.update(model.digest.as_bytes());
    let (mut weights, mut zeros) = (0, 0);
    for index in scope.clone() {
        let block = &mut network.blocks[index];
        let energies = options.criterion.of(index);
        for (path, linear) in block.linears_mut() {
            let scores = energies.scores(linear, path)?;
            let kept = match options.pattern {
                Pattern::Unstructured => {
                    let per_output = options.criterion.method() == Method::Wanda;
                    keep_strongest(&scores, options.ratio, per_output)
                }
                Pattern::Blocks { keep, of } => keep_of_blocks(&scores, path, keep, of)?,
            };
            weights += kept.numel() as u64;
            zeros += kept.logical_not().sum(Kind::Int64).int64_value(&[]) as u64;
            let bytes =
                Vec::<bool>::try_from(kept.view(-1)).map_err(Error::torch("read a mask"))?;
            digest.update(
                &bytes
                    .iter()
                    .map(|kept| u8::from(*kept))
                    .collect::<Vec<u8>>(),
            );
            linear.weight = &linear.weight * kept.to_device(linear.weight.device());
        }
    }
    let sparsity = Sparsity {
        pattern: options.pattern.to_string(),
        ratio: zeros as f64 / weights as f64,
        first_layer: scope.start,
        end_layer: scope.end,
    };
    network.set_sparsity(sparsity.clone());
    model.digest = digest.finalize().to_hex().to_string();
    Ok(MaskReport {
        weights,
        zeros,
        parameters: model.network.num_parameters(),
        sparsity,
    })
}

/// True where a weight stays: all but the lowest `ratio` of each row, or of the whole matrix.
fn keep_strongest(scores: &Tensor, ratio: f64, per_output: bool) -> Tensor {
    let rows = if per_output {
        scores.shallow_clone()
    } else {
        scores.view([1, -1])
    };
    let remove = (ratio * rows.size()[1] as f64).round() as i64;
    let (_, order) = rows.sort_stable(true, 1, false);
    let kept = Tensor::ones(rows.size(), (Kind::Bool, scores.device()));
    kept.scatter_value(1, &order.narrow(1, 0, remove), 0)
        .view_as(scores)
}

/// True for the `keep` highest of every `of` consecutive scores of a row.
fn keep_of_blocks(scores: &Tensor, path: &str, keep: usize, of: usize) -> Result<Tensor> {
    let inputs = scores.size()[1];
    if inputs % of as i64 != 0 {
        return Err(refuse(format!(
            "`{path}` has {inputs} inputs, which are no multiple of {of}"
        )));
    }
    let blocks = scores.view([-1, of as i64]);
    let (_, order) = blocks.sort_stable(true, 1, false);
    let kept = Tensor::ones(blocks.size(), (Kind::Bool, scores.device()));
    Ok(kept
        .scatter_value(1, &order.narrow(1, 0, (of - keep) as i64), 0)
        .view_as(scores))
}

fn refuse(message: String) -> Error {
    Error::Prune { message }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn flags(mask: &Tensor) -> Vec<bool> {
        Vec::try_from(mask.view(-1)).unwrap()
    }

    #[test]
    fn the_lowest_go_and_of_equal_ones_the_earlier() {
        let scores = Tensor::from_slice(&[4f32, 1.0, 2.0, 2.0, 9.0, 9.0, 9.0, 0.0]).view([2, 4]);
        let (yes, no) = (true, false);
        assert_eq!(
            flags(&keep_strongest(&scores, 0.5, true)),
            [yes, no, no, yes, no, yes, yes, no]
        );
        assert_eq!(
            flags(&keep_strongest(&scores, 0.5, false)),
            [yes, no, no, no, yes, yes, yes, no]
        );
        assert_eq!(
            flags(&keep_of_blocks(&scores, "x", 1, 2).unwrap()),
            [yes, no, no, yes, no, yes, yes, no]
        );
        assert!(keep_of_blocks(&scores, "x", 2, 3).is_err());
    }

    #[test]
    fn patterns_are_read_and_written() {
        for text in ["unstructured", "2:4", "4:8"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        for text in ["", "4:2", "0:4", "2:2", "two", "2:400"] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
