//! Reverse Kullback–Leibler divergence.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::{divided, scaled_back};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// KL(softmax(s/τ) ‖ softmax(t/τ)): mode-seeking, as in MiniLLM (arXiv 2306.08543) position by
/// position. Asks for the logits of the whole vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReverseKl {
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
    /// Both softmaxes in f32 whatever the input, as the BiLD authors' package has it; it only
    /// matters for f64 input, and only where their values are to be met beyond f32.
    pub single_precision: bool,
}

impl Default for ReverseKl {
    fn default() -> Self {
        ReverseKl {
            temperature: 1.0,
            temperature_squared: false,
            single_precision: false,
        }
    }
}

impl LogitLoss for ReverseKl {
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
        let teacher = divided(rows.full_teacher(), self.temperature);
        let student = divided(rows.student, self.temperature);
        let value = if self.single_precision {
            let log_p = teacher.log_softmax(-1, Kind::Float);
            let q = student.softmax(-1, Kind::Float);
            over_last(&log_p.kl_div(&q, tch::Reduction::None, false)).to_kind(student.kind())
        } else {
            let log_p = teacher.log_softmax(-1, None::<Kind>);
            let log_q = student.log_softmax(-1, None::<Kind>);
            over_last(&(log_q.exp() * (log_q - log_p)))
        };
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}
