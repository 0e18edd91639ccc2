//! Kullback–Leibler divergence with a temperature.

use tch::{Kind, Tensor};

use super::{LogitLoss, LogitRows, Normalization, Requirement};

/// KL(softmax(n(t)/τ) ‖ softmax(n(s)/τ)), times τ² on demand (Hinton, Vinyals, Dean 2015,
/// arXiv 1503.02531, section 2); n is Table 2's "logits normalization".
#[derive(Debug, Clone, Copy)]
pub struct Kl {
    /// τ.
    pub temperature: f64,
    /// Multiply by τ², so that the gradient keeps its size when τ changes.
    pub temperature_squared: bool,
    /// n.
    pub logits_norm: Normalization,
}

impl LogitLoss for Kl {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn is_at_temperature_one(&self) -> bool {
        self.temperature == 1.0 && self.logits_norm == Normalization::None
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let teacher = divided(
            self.logits_norm.apply(rows.full_teacher()),
            self.temperature,
        );
        let student = divided(self.logits_norm.apply(rows.student), self.temperature);
        let value = divergence(&teacher, &student);
        if self.temperature_squared {
            divided(value, self.temperature.powi(-2))
        } else {
            value
        }
    }
}

/// KL(softmax(t) ‖ softmax(s)) over the last dimension: [N, V], [N, V] → \[N\].
pub(super) fn divergence(teacher: &Tensor, student: &Tensor) -> Tensor {
    let log_p = teacher.log_softmax(-1, None::<Kind>);
    let log_q = student.log_softmax(-1, None::<Kind>);
    (log_p.exp() * (log_p - log_q)).sum_dim_intlist([-1].as_slice(), false, None::<Kind>)
}

/// x / scale, without a copy of [N, V] where the scale is 1.
pub(super) fn divided(x: Tensor, scale: f64) -> Tensor {
    if scale == 1.0 { x } else { x / scale }
}
