//! Decoupled knowledge distillation.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::decoupled::{one_hot, others_kl, split, target_kl};
use super::normalization::unbiased_sigma;
use super::{BadKey, Labels, LogitLoss, LogitRows, Requirement, Scaling, check};

/// τ_t² · [α · KL of (label, rest) + β · KL among the rest] (Zhao et al. 2022, arXiv 2203.08679,
/// Eq. 7). Asks for the logits of the whole vocabulary.
///
/// `normalized`, the reading of the BiLD authors' package: each model's temperature is
/// `t_norm` · σ of its logits at that position (V − 1 in the denominator, gradients through the
/// student's), and the factor is the teacher's. Otherwise the original, with one `temperature`.
/// Where a position has no label, that package takes the teacher's first token; so does this.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dkd {
    /// α, of the target class.
    pub alpha: f64,
    /// β, of the other classes (Zhao et al. use 8 with α = 1).
    pub beta: f64,
    /// Divide by σ.
    pub normalized: bool,
    /// Temperature in units of σ, when normalised.
    pub t_norm: f64,
    /// Temperature, when not.
    pub temperature: f64,
}

impl Default for Dkd {
    fn default() -> Self {
        Dkd {
            alpha: 0.5,
            beta: 0.5,
            normalized: true,
            t_norm: 2.0,
            temperature: 4.0,
        }
    }
}

impl LogitLoss for Dkd {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn labels(&self) -> Labels {
        Labels::OrTeachersFirst
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(if self.normalized {
            Scaling::Sigma(self.t_norm)
        } else {
            Scaling::Temperature(self.temperature)
        })
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::not_negative("alpha", self.alpha)?;
        check::not_negative("beta", self.beta)?;
        check::positive("t_norm", self.t_norm)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (teacher, student) = (rows.full_teacher(), rows.student);
        let first = teacher.argmax(-1, false);
        let labels = rows.labels.where_self(&rows.labels.ge(0), &first);
        let mask = one_hot(&labels, student);
        let (of_teacher, of_student, squared) = if self.normalized {
            let of_teacher = rows.unbiased_sigma_of_teacher() * self.t_norm;
            let squared = of_teacher.squeeze_dim(-1).square();
            let of_student = unbiased_sigma(student) * self.t_norm;
            (teacher / of_teacher, student / of_student, squared)
        } else {
            let squared = Tensor::from(self.temperature.powi(2)).to_kind(student.kind());
            (
                teacher / self.temperature,
                student / self.temperature,
                squared,
            )
        };
        let (of_teacher, of_student) = (split(&of_teacher, &mask), split(&of_student, &mask));
        let target = target_kl(&of_teacher, &of_student) * self.alpha;
        let others = others_kl(&of_teacher, &of_student, &mask) * self.beta;
        (target + others) * squared.to_device(student.device())
    }
}
