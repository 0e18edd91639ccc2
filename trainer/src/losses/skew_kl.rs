//! Skew KL and skew reverse KL of DistiLLM.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::jensen_shannon::mixture;
use super::kl::{divided, scaled_back};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// KL(p ‖ α·p + (1 − α)·q) with p = softmax(t/τ), q = softmax(s/τ) (DistiLLM, Ko et al. 2024,
/// arXiv 2402.03898, section 3.1). Asks for the logits of the whole vocabulary.
///
/// The authors' code leaves Σ p log p out, which has no gradient; here the value is the divergence.
/// τ is not in the paper.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SkewKl {
    /// α, the teacher's share of the mixture, in (0, 1).
    pub alpha: f64,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
}

/// KL(q ‖ (1 − α)·p + α·q), the other way round; α is the student's share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SkewReverseKl {
    /// α, the student's share of the mixture, in (0, 1).
    pub alpha: f64,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
}

impl Default for SkewKl {
    fn default() -> Self {
        SkewKl {
            alpha: 0.1,
            temperature: 1.0,
            temperature_squared: false,
        }
    }
}

impl Default for SkewReverseKl {
    fn default() -> Self {
        SkewReverseKl {
            alpha: 0.1,
            temperature: 1.0,
            temperature_squared: false,
        }
    }
}

impl LogitLoss for SkewKl {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::inside_unit("alpha", self.alpha)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (log_p, log_q) = distributions(rows, self.temperature);
        let value = to_mixture(&log_p, &log_q, self.alpha);
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}

impl LogitLoss for SkewReverseKl {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::inside_unit("alpha", self.alpha)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (log_p, log_q) = distributions(rows, self.temperature);
        let value = to_mixture(&log_q, &log_p, self.alpha);
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}

/// Log-probabilities of teacher and student [N, V] each.
pub(super) fn distributions(rows: &LogitRows<'_>, temperature: f64) -> (Tensor, Tensor) {
    let log_softmax = |logits| divided(logits, temperature).log_softmax(-1, None::<Kind>);
    (log_softmax(rows.full_teacher()), log_softmax(rows.student))
}

/// KL(a ‖ share·a + (1 − share)·b) of log-probabilities: [N, V], [N, V] → \[N\].
pub(super) fn to_mixture(log_a: &Tensor, log_b: &Tensor, share: f64) -> Tensor {
    over_last(&(log_a.exp() * (log_a - mixture(log_a, log_b, share))))
}
