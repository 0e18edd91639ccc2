//! Universal Logit Distillation, between vocabularies.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::divided;
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// Σ_i |p_(i) − q_(i)| over the probabilities in descending order, the shorter vector padded with
/// zeros: the optimal transport between two vocabularies when every move costs the same (Boizard
/// et al. 2024, arXiv 2402.12030, Eq. 5). Asks for the logits of the whole vocabulary.
///
/// The cross-entropy that the paper adds is a term of its own. Which token is which plays no part:
/// use it where vocabularies differ.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Uld {
    /// τ of both models.
    pub temperature: f64,
}

impl Default for Uld {
    fn default() -> Self {
        Uld { temperature: 1.0 }
    }
}

impl LogitLoss for Uld {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn across_vocabularies(&self) -> bool {
        true
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let width = rows.student.size()[1].max(rows.full_teacher().size()[1]);
        let sorted = |logits: &Tensor| {
            let probabilities = divided(logits, self.temperature).softmax(-1, None::<Kind>);
            let padding = width - probabilities.size()[1];
            let (descending, _) = probabilities.sort(-1, true);
            if padding == 0 {
                descending
            } else {
                descending.constant_pad_nd([0, padding])
            }
        };
        over_last(&(sorted(rows.full_teacher()) - sorted(rows.student)).abs())
    }
}
