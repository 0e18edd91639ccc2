//! Logits Dual-Scaling.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::kl::{divergence, scaled_back};
use super::normalization::population_sigma;
use super::{BadKey, ByHand, LogitLoss, LogitRows, Requirement, Scaling, SoftTarget, check};

/// Over which logits the σ of Eq. 2 are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sigma {
    /// Over the vocabulary of one position: σ_{i,j}.
    #[default]
    Position,
    /// Over the vocabulary and all target positions of one sample: σ_i, Eq. 2 to the letter.
    Sample,
}

/// γ · KL(softmax(t/(σ_t·b)) ‖ softmax(s/(σ_s·b))): BayesKD Eqs. 1, 2 and 15, with the base scaling
/// value b (the appendix's t). σ are population standard deviations of the logits as they come, after
/// a normalisation that is configured ahead. Asks for the logits of the whole vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DualScaling {
    /// b, the base scaling value of Eq. 15.
    pub scaling_value: f64,
    /// γ of Eq. 1.
    pub gamma: f64,
    /// Per position or per sample.
    pub sigma: Sigma,
    /// Treat the student's σ as a constant: no gradient flows through it.
    pub detach_sigma: bool,
    /// Multiply by b².
    pub temperature_squared: bool,
}

impl Default for DualScaling {
    fn default() -> Self {
        DualScaling {
            scaling_value: 1.0,
            gamma: 1.0,
            sigma: Sigma::Position,
            detach_sigma: true,
            temperature_squared: false,
        }
    }
}

impl LogitLoss for DualScaling {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn needs_sample_sigma(&self) -> bool {
        self.sigma == Sigma::Sample
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Sigma(self.scaling_value))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("scaling_value", self.scaling_value)?;
        check::positive("gamma", self.gamma)?;
        check::that(
            "detach_sigma",
            self.sigma == Sigma::Position || self.detach_sigma,
            self.detach_sigma,
            "gradients through σ need sigma = \"position\"",
        )
    }

    fn by_hand(&self) -> Option<ByHand> {
        let squared = self.temperature_squared;
        let constant = self.sigma == Sigma::Position && self.detach_sigma;
        constant.then(|| ByHand {
            target: SoftTarget::Teacher,
            scaling: Scaling::Sigma(self.scaling_value),
            factor: self.gamma
                * if squared {
                    self.scaling_value.powi(2)
                } else {
                    1.0
                },
        })
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (teacher, student) = (rows.full_teacher(), rows.student);
        let (sigma_teacher, sigma_student) = match self.sigma {
            Sigma::Position => {
                let of = if self.detach_sigma {
                    student.detach()
                } else {
                    student.shallow_clone()
                };
                (rows.sigma_of_teacher(), population_sigma(&of))
            }
            Sigma::Sample => {
                let sigma = rows.sigma_of_sample();
                (sigma.teacher.shallow_clone(), sigma.student.shallow_clone())
            }
        };
        let value = divergence(
            &(teacher / (sigma_teacher * self.scaling_value)),
            &(student / (sigma_student * self.scaling_value)),
        );
        let value = scaled_back(value, self.scaling_value, self.temperature_squared);
        if self.gamma == 1.0 {
            value
        } else {
            value * self.gamma
        }
    }
}
