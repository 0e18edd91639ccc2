//! Normalised knowledge distillation.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::decoupled::{one_hot, split};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// −p_y log q_y − γ Σ_{v≠y} p̂_v log q̂_v, p and q at temperature 1, p̂ and q̂ the softmaxes at τ over
/// all tokens but y (NKD, Yang et al. 2023, arXiv 2303.13005, Eq. 8). Asks for the logits of the
/// whole vocabulary.
///
/// The BiLD authors' reading: y is the teacher's first token, not the label, and the second part
/// has no factor τ². It is a cross-entropy, so its least value is not 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nkd {
    /// γ.
    pub gamma: f64,
    /// τ.
    pub temperature: f64,
}

impl Default for Nkd {
    fn default() -> Self {
        Nkd {
            gamma: 0.25,
            temperature: 1.0,
        }
    }
}

impl LogitLoss for Nkd {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::not_negative("gamma", self.gamma)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (teacher, student) = (rows.full_teacher(), rows.student);
        let mask = one_hot(&teacher.argmax(-1, false), student);
        let (p, q) = (split(teacher, &mask), split(student, &mask));
        let target = p.target.exp() * q.target;
        let (p, q) = if self.temperature == 1.0 {
            (p.among_others, q.among_others)
        } else {
            let at = |logits: &Tensor| split(&(logits / self.temperature), &mask).among_others;
            (at(teacher), at(student))
        };
        // −∞ at y, whose p̂ is 0.
        let others = over_last(&(p.exp() * q.masked_fill(&mask, 0.0)));
        -(target + others * self.gamma)
    }
}
