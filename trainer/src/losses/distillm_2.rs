//! The contrastive pair of DistiLLM-2.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::kl::scaled_back;
use super::skew_kl::{distributions, to_mixture};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check};

/// 2(1 − β) · KL(p ‖ αp + (1 − α)q) where the response is the teacher's, 2β · KL(q ‖ (1 − α)p + αq) where it is
/// the student's own (DistiLLM-2, Ko et al. 2025, arXiv 2503.07067, section 3.1: skew KL raises what the teacher
/// wrote, skew reverse KL lowers what the student wrote and the teacher would not). Asks for the logits of the whole
/// vocabulary, and for a cache with responses of both; which is whose stands in the records' `response_by`.
///
/// At β = ½ both halves weigh 1. The paper raises β over the run and adapts α to each sample; here both are numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillm2 {
    /// α, the share of the first distribution in the mixture, in (0, 1).
    pub alpha: f64,
    /// β, the weight of the student's responses, in [0, 1].
    pub beta: f64,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
}

impl Default for Distillm2 {
    fn default() -> Self {
        Distillm2 {
            alpha: 0.1,
            beta: 0.5,
            temperature: 1.0,
            temperature_squared: false,
        }
    }
}

impl LogitLoss for Distillm2 {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn needs_responses(&self) -> bool {
        true
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::inside_unit("alpha", self.alpha)?;
        let inside = (0.0..=1.0).contains(&self.beta);
        check::that("beta", inside, self.beta, "it must be in [0, 1]")?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (log_p, log_q) = distributions(rows, self.temperature);
        let of_student = rows.written_by_student();
        let raised = to_mixture(&log_p, &log_q, self.alpha) * (2.0 * (1.0 - self.beta));
        let lowered = to_mixture(&log_q, &log_p, self.alpha) * (2.0 * self.beta);
        let value = lowered.where_self(of_student, &raised);
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}
