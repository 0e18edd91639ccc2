//! Hard-label cross-entropy.

use tch::{Kind, Tensor};

use super::{LogitLoss, LogitRows, Requirement};

/// −log softmax(s)\[y\], y the token that follows.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy;

impl LogitLoss for CrossEntropy {
    fn requirement(&self) -> Requirement {
        Requirement::Nothing
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let log_q = rows.student.log_softmax(-1, None::<Kind>);
        -log_q
            .gather(-1, &rows.labels.unsqueeze(-1), false)
            .squeeze_dim(-1)
    }
}
