//! Knowledge Alignment of hidden states.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::hidden::{HiddenLoss, match_width};
use super::{BadKey, HiddenReduction, Normalization, check, over_last};

/// Σ_l β · mean over positions of ‖n(h_s\[l\]) − n(h_t\[l\])‖²: BayesKD Eq. 7 with one β for all layers,
/// and Eq. 9 (or none, or standardisation) as n, over the width of one position. Asks for the hidden
/// states of its layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnowledgeAlignment {
    /// β of Eq. 7.
    pub beta: f64,
    /// n.
    pub hidden_norm: Normalization,
    /// Over the width: mean, or Eq. 7's sum.
    pub reduction: HiddenReduction,
}

impl Default for KnowledgeAlignment {
    fn default() -> Self {
        KnowledgeAlignment {
            beta: 1.0,
            hidden_norm: Normalization::None,
            reduction: HiddenReduction::Mean,
        }
    }
}

impl HiddenLoss for KnowledgeAlignment {
    fn validate(&self) -> Result<(), BadKey> {
        check::positive("beta", self.beta)
    }

    fn value(&self, student: &Tensor, teacher: &Tensor) -> Tensor {
        let (student, teacher) = match_width(student, teacher);
        let difference = self.hidden_norm.apply(&student) - self.hidden_norm.apply(&teacher);
        let width = difference.size()[1] as f64;
        let squares = over_last(&difference.square());
        match self.reduction {
            HiddenReduction::Mean => squares * (self.beta / width),
            HiddenReduction::Paper => squares * self.beta,
        }
    }
}
