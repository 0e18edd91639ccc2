//! How much weights matter: by their size, by what flows through them, or by what the loss would lose.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::activation::ActivationNorms;
use crate::block::Block;
use crate::linear::Linear;
use crate::saliency::Saliencies;
use crate::{Error, Result};

/// A criterion by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// [`Criterion::Magnitude`].
    Magnitude,
    /// [`Criterion::Wanda`].
    Wanda,
    /// [`Criterion::Taylor`].
    Taylor,
}

/// What the importance of a weight w is measured by.
#[derive(Debug, Default)]
pub enum Criterion {
    /// |w|; a group's importance is Σ w² over its coupled weights.
    #[default]
    Magnitude,
    /// |w| · ‖x‖ with the norm of the input that w multiplies on calibration text (Wanda, Sun et al. 2023, arXiv
    /// 2306.11695, Eq. 1). A group's importance is Σ w²‖x‖² over its columns of the projection that reads it: the
    /// energy that it adds to the residual stream.
    Wanda(ActivationNorms),
    /// |w · ∂L/∂w| with the cross-entropy L of calibration text (LLM-Pruner, Ma et al. 2023, Eq. 5, first order); a
    /// group's importance is the sum over its coupled weights.
    Taylor(Saliencies),
}

impl Criterion {
    /// Its name.
    pub fn method(&self) -> Method {
        match self {
            Criterion::Magnitude => Method::Magnitude,
            Criterion::Wanda(_) => Method::Wanda,
            Criterion::Taylor(_) => Method::Taylor,
        }
    }
}

/// A criterion's measures of one layer.
pub(crate) struct LayerEnergies<'a> {
    criterion: &'a Criterion,
    layer: usize,
}

impl Criterion {
    /// Its measures of one layer.
    pub(crate) fn of(&self, layer: usize) -> LayerEnergies<'_> {
        LayerEnergies {
            criterion: self,
            layer,
        }
    }
}

impl LayerEnergies<'_> {
    /// Whether a group's rows count beside its columns.
    pub(crate) fn counts_rows(&self) -> bool {
        !matches!(self.criterion, Criterion::Wanda(_))
    }

    /// Σ over the inputs, of every row of a projection: \[out\].
    pub(crate) fn rows(&self, block: &Block, path: &str) -> Result<Tensor> {
        Ok(sum(&self.elements(block, path)?, 1))
    }

    /// Σ over the outputs, of every column: \[in\].
    pub(crate) fn columns(&self, block: &Block, path: &str) -> Result<Tensor> {
        Ok(sum(&self.elements(block, path)?, 0))
    }

    /// What every weight adds to a group's importance: [out, in] f32 on the CPU.
    fn elements(&self, block: &Block, path: &str) -> Result<Tensor> {
        let scores = self.scores(find(block, path)?, path)?;
        Ok(match self.criterion {
            Criterion::Taylor(_) => scores,
            Criterion::Magnitude | Criterion::Wanda(_) => scores.square(),
        })
    }

    /// The importance of every single weight: [out, in] f32 on the CPU.
    ///
    /// # Errors
    /// A criterion that was measured on a network of other sizes, or not on this layer; a value that is not finite.
    pub(crate) fn scores(&self, linear: &Linear, path: &str) -> Result<Tensor> {
        let weight = linear.weight.to_device(Device::Cpu).to_kind(Kind::Float);
        let elsewhere = || Error::Prune {
            message: format!(
                "the calibration of layer {} is that of another network or of other layers",
                self.layer
            ),
        };
        let scores = match self.criterion {
            Criterion::Magnitude => weight.abs(),
            Criterion::Wanda(norms) => {
                let norms = norms
                    .of(self.layer, path)
                    .filter(|norms| norms.len() as i64 == weight.size()[1]);
                weight.abs() * Tensor::from_slice(norms.ok_or_else(elsewhere)?)
            }
            Criterion::Taylor(saliencies) => {
                let saliency = saliencies
                    .of(self.layer, path)
                    .filter(|saliency| saliency.size() == weight.size());
                saliency.ok_or_else(elsewhere)?.shallow_clone()
            }
        };
        if scores.isfinite().all().int64_value(&[]) == 0 {
            return Err(Error::Prune {
                message: format!(
                    "the importance of weights of layer {}, `{path}`, is not finite: the model is damaged",
                    self.layer
                ),
            });
        }
        Ok(scores)
    }
}

fn find<'a>(block: &'a Block, path: &str) -> Result<&'a Linear> {
    let found = block.linears().into_iter().find(|(of, _)| *of == path);
    found.map(|(_, linear)| linear).ok_or_else(|| Error::Prune {
        message: format!("the block has no `{path}`"),
    })
}

fn sum(values: &Tensor, over: i64) -> Tensor {
    values.sum_dim_intlist([over].as_slice(), false, Kind::Float)
}
