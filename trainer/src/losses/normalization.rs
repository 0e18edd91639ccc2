//! Normalisations of Table 2, ahead of a loss: of logits over the vocabulary, of hidden states over
//! the width, always one position at a time.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// ε of Eq. 9 and of the standardisation.
pub(crate) const EPSILON: f64 = 1e-6;

/// "Logits Normalization" and "Hidden States Normalization" of Table 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// As they are.
    #[default]
    None,
    /// (x − min) / (max − min + ε), BayesKD Eq. 9; `min-max` is the same.
    #[serde(alias = "min-max")]
    MaxMin,
    /// (x − mean) / (σ + ε) with the population's σ (Sun et al. 2024, "Logit standardization in
    /// knowledge distillation").
    Standardize,
}

impl Normalization {
    /// All three, in Table 2's order.
    pub const ALL: [Normalization; 3] = [
        Normalization::None,
        Normalization::MaxMin,
        Normalization::Standardize,
    ];

    /// Normalises each vector along the last dimension: [.., D] → [.., D], gradients included.
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Normalization::None => x.shallow_clone(),
            Normalization::MaxMin => {
                let min = x.amin([-1], true);
                let range = x.amax([-1], true) - &min;
                (x - min) / (range + EPSILON)
            }
            Normalization::Standardize => {
                let centred = x - x.mean_dim([-1].as_slice(), true, None::<Kind>);
                let sigma = root_mean_square(&centred);
                centred / (sigma + EPSILON)
            }
        }
    }
}

/// What is known of the spread of a teacher's logits where those at hand are rebuilt with errors, which make any spread too
/// wide.
#[derive(Debug)]
pub(crate) struct KnownSpread {
    /// Population σ over the vocabulary [N, 1].
    pub(crate) sigma: Tensor,
    /// The smallest logit [N, 1].
    pub(crate) min: Tensor,
}

impl KnownSpread {
    /// The same values in the same memory.
    pub(crate) fn shallow_clone(&self) -> KnownSpread {
        KnownSpread {
            sigma: self.sigma.shallow_clone(),
            min: self.min.shallow_clone(),
        }
    }

    /// Rows `first` to `first + count`.
    pub(crate) fn narrow(&self, first: i64, count: i64) -> KnownSpread {
        KnownSpread {
            sigma: self.sigma.narrow(0, first, count),
            min: self.min.narrow(0, first, count),
        }
    }

    /// [`Normalization::apply`] to logits [N, V] of this spread, and the σ that they have afterwards [N, 1]. The largest
    /// logit is taken as it is.
    pub(crate) fn normalize(&self, norm: Normalization, x: &Tensor) -> (Tensor, Tensor) {
        match norm {
            Normalization::None => (x.shallow_clone(), self.sigma.shallow_clone()),
            Normalization::MaxMin => {
                let range = x.amax([-1], true) - &self.min + EPSILON;
                ((x - &self.min) / &range, &self.sigma / range)
            }
            Normalization::Standardize => {
                let sigma = &self.sigma + EPSILON;
                let centred = x - x.mean_dim([-1].as_slice(), true, None::<Kind>);
                (centred / &sigma, &self.sigma / sigma)
            }
        }
    }
}

/// Population standard deviation over the last dimension, at least ε: [.., D] → [.., 1]. Constant
/// vectors, whose σ has no derivative, get the gradient 0.
pub(crate) fn population_sigma(x: &Tensor) -> Tensor {
    root_mean_square(&(x - x.mean_dim([-1].as_slice(), true, None::<Kind>)))
}

fn root_mean_square(centred: &Tensor) -> Tensor {
    centred
        .square()
        .mean_dim([-1].as_slice(), true, None::<Kind>)
        .clamp_min(EPSILON * EPSILON)
        .sqrt()
}

/// Standard deviation over the last dimension with V − 1 in the denominator: [.., V] → [.., 1].
/// Constant vectors as in [`population_sigma`].
pub(crate) fn unbiased_sigma(x: &Tensor) -> Tensor {
    population_sigma(x) * unbiased(*x.size().last().unwrap_or(&1))
}

/// σ with V − 1 in the denominator over σ with V.
pub(crate) fn unbiased(width: i64) -> f64 {
    (width as f64 / (width as f64 - 1.0).max(1.0)).sqrt()
}
