//! NormKD and logit standardization: each model's logits brought to a spread of their own.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::divergence;
use super::normalization::unbiased_sigma;
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check};

/// (σ_t·c)² · KL(softmax(t/(σ_t·c)) ‖ softmax(s/(σ_s·c))) with c = `t_norm` (NormKD, Chi et al. 2023,
/// arXiv 2308.00520). Asks for the logits of the whole vocabulary.
///
/// As the BiLD authors' package has it: σ over the vocabulary of one position with V − 1 in the
/// denominator, gradients through the student's σ. [`DualScaling`](super::DualScaling) is the same
/// without the factor, with a constant σ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NormKd {
    /// c.
    pub t_norm: f64,
}

/// τ² · KL(softmax(z(t)/τ) ‖ softmax(z(s)/τ)) with z(x) = (x − mean)/(σ + 1e-7) (Sun et al. 2024,
/// arXiv 2403.01427, Eq. 14 and the authors' code). Asks for the logits of the whole vocabulary.
///
/// σ has V − 1 in the denominator, as in the authors' code; `kl` after `logits_norm = "standardize"`
/// is the same with the population's σ, and without τ².
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogitStandardization {
    /// τ.
    pub temperature: f64,
    /// Multiply by τ², as the authors do.
    pub temperature_squared: bool,
}

impl Default for NormKd {
    fn default() -> Self {
        NormKd { t_norm: 1.5 }
    }
}

impl Default for LogitStandardization {
    fn default() -> Self {
        LogitStandardization {
            temperature: 2.0,
            temperature_squared: true,
        }
    }
}

impl LogitLoss for NormKd {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Sigma(self.t_norm))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("t_norm", self.t_norm)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (teacher, student) = (rows.full_teacher(), rows.student);
        let of_teacher = rows.unbiased_sigma_of_teacher() * self.t_norm;
        let of_student = unbiased_sigma(student) * self.t_norm;
        divergence(&(teacher / &of_teacher), &(student / of_student))
            * of_teacher.squeeze_dim(-1).square()
    }
}

impl LogitLoss for LogitStandardization {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Sigma(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        const EPSILON: f64 = 1e-7;
        let standardized = |x: &Tensor, sigma: Tensor| {
            let centred = x - x.mean_dim([-1].as_slice(), true, None::<Kind>);
            centred / ((sigma + EPSILON) * self.temperature)
        };
        let value = divergence(
            &standardized(rows.full_teacher(), rows.unbiased_sigma_of_teacher()),
            &standardized(rows.student, unbiased_sigma(rows.student)),
        );
        super::kl::scaled_back(value, self.temperature, self.temperature_squared)
    }
}
