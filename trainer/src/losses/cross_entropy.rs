//! Hard-label cross-entropy.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{ByHand, Labels, LogitLoss, LogitRows, Requirement, Scaling, SoftTarget};

/// −log softmax(s)\[y\], y the token that follows. Asks nothing of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CrossEntropy {}

impl LogitLoss for CrossEntropy {
    fn requirement(&self) -> Requirement {
        Requirement::Nothing
    }

    fn labels(&self) -> Labels {
        Labels::Needed
    }

    fn scaling(&self) -> Option<Scaling> {
        None
    }

    fn by_hand(&self) -> Option<ByHand> {
        Some(ByHand {
            target: SoftTarget::Label,
            scaling: Scaling::Temperature(1.0),
            factor: 1.0,
        })
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let log_q = rows.student.log_softmax(-1, None::<Kind>);
        -log_q
            .gather(-1, &rows.labels.unsqueeze(-1), false)
            .squeeze_dim(-1)
    }
}
