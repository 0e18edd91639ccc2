//! Generalised Jensen–Shannon divergence.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::{divided, scaled_back};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// β · KL(p ‖ m) + (1 − β) · KL(q ‖ m) with m = β·p + (1 − β)·q, p = softmax(t/τ), q = softmax(s/τ)
/// (GKD, Agarwal et al. 2024, arXiv 2306.13649, section 2). Divided by β it tends to KL for β → 0;
/// divided by 1 − β, to reverse KL for β → 1. Asks for the logits of the whole vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JensenShannon {
    /// β, in (0, 1).
    pub beta: f64,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
}

impl Default for JensenShannon {
    fn default() -> Self {
        JensenShannon {
            beta: 0.5,
            temperature: 1.0,
            temperature_squared: false,
        }
    }
}

impl LogitLoss for JensenShannon {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::inside_unit("beta", self.beta)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let log_p = divided(rows.full_teacher(), self.temperature).log_softmax(-1, None::<Kind>);
        let log_q = divided(rows.student, self.temperature).log_softmax(-1, None::<Kind>);
        let log_m = mixture(&log_p, &log_q, self.beta);
        let of_teacher = log_p.exp() * (&log_p - &log_m);
        let of_student = log_q.exp() * (&log_q - &log_m);
        let value = over_last(&(of_teacher * self.beta + of_student * (1.0 - self.beta)));
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}

/// log(share · exp(a) + (1 − share) · exp(b)).
pub(super) fn mixture(a: &Tensor, b: &Tensor, share: f64) -> Tensor {
    (a + share.ln()).logaddexp(&(b + (1.0 - share).ln()))
}
