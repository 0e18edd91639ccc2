//! Total variation distance.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::divided;
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// ½ Σ_v |p_v − q_v| with p = softmax(t/τ), q = softmax(s/τ) (as in f-DISTILL, Wen et al. 2023,
/// arXiv 2307.15190). Asks for the logits of the whole vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TotalVariation {
    /// τ.
    pub temperature: f64,
}

impl Default for TotalVariation {
    fn default() -> Self {
        TotalVariation { temperature: 1.0 }
    }
}

impl LogitLoss for TotalVariation {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let p = divided(rows.full_teacher(), self.temperature).softmax(-1, None::<Kind>);
        let q = divided(rows.student, self.temperature).softmax(-1, None::<Kind>);
        over_last(&(p - q).abs()) * 0.5
    }
}
