//! Logits Dual-Scaling.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::kl::{divergence, divided};
use super::normalization::population_sigma;
use super::{LogitLoss, LogitRows, Normalization, Requirement};

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

/// γ · KL(softmax(n(t)/(σ_t·b)) ‖ softmax(n(s)/(σ_s·b))): BayesKD Eqs. 1, 2 and 15, with the base
/// scaling value b (the appendix's t) and Table 2's normalisation n ahead. σ are population standard
/// deviations of the normalised logits.
#[derive(Debug, Clone, Copy)]
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
    pub scaling_squared: bool,
    /// n.
    pub logits_norm: Normalization,
}

impl LogitLoss for DualScaling {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let teacher = self.logits_norm.apply(rows.full_teacher());
        let student = self.logits_norm.apply(rows.student);
        let (sigma_teacher, sigma_student) = match self.sigma {
            Sigma::Position => {
                let of = if self.detach_sigma {
                    student.detach()
                } else {
                    student.shallow_clone()
                };
                (population_sigma(&teacher), population_sigma(&of))
            }
            Sigma::Sample => {
                let sigma = rows.sigma_of(self.logits_norm);
                (sigma.teacher.shallow_clone(), sigma.student.shallow_clone())
            }
        };
        let value = divergence(
            &(teacher / (sigma_teacher * self.scaling_value)),
            &(student / (sigma_student * self.scaling_value)),
        );
        let factor = if self.scaling_squared {
            self.gamma * self.scaling_value.powi(2)
        } else {
            self.gamma
        };
        divided(value, 1.0 / factor)
    }

    fn sample_sigma(&self) -> Option<Normalization> {
        (self.sigma == Sigma::Sample).then_some(self.logits_norm)
    }
}
