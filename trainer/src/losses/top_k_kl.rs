//! KL on the teacher's K largest logits, renormalised: the baseline that exact tails are judged by.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::kl::{divergence, divided, scaled_back};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check};

/// KL(softmax(t_K/τ) ‖ softmax(s_K/τ)) on the teacher's K largest logits t_K and the student's
/// logits s_K of the same tokens; τ and K as in the package of the BiLD paper (arXiv 2406.13555).
///
/// What lies outside the K tokens has no part in it, neither as target nor as penalty: the student
/// may put any mass there. Runs on every cache with K ≥ `k`, and from rebuilt logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopKKl {
    /// K.
    pub k: usize,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
}

impl Default for TopKKl {
    fn default() -> Self {
        TopKKl {
            k: 1024,
            temperature: 3.0,
            temperature_squared: false,
        }
    }
}

impl LogitLoss for TopKKl {
    fn requirement(&self) -> Requirement {
        Requirement::TopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::at_least("k", self.k, 1)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let top = rows.teacher_top(self.k);
        let student = rows.student.gather(-1, &top.ids, false);
        let value = divergence(
            &divided(&top.logits, self.temperature),
            &divided(&student, self.temperature),
        );
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}
