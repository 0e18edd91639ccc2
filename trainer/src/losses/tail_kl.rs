//! KL at temperature 1 from the teacher's K largest logits, with the exact mass of the rest.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    BadKey, ByHand, LogitLoss, LogitRows, Requirement, Scaling, SoftTarget, TopKRows, check,
    over_last,
};

/// Σ_k p_k log(p_k/q_k) + r log(r / (1 − Σ_k q_k)): the K tokens and one "ghost" token for all the
/// others, with the teacher's exact p_k = exp(t_k − log Σ exp t) and r = 1 − Σ_k p_k.
///
/// Right at τ = 1 only, where the cached log-sum-exp holds: at other temperatures the mass of the
/// tail is unknown, and a truncated target harms the student. Runs on every cache with K ≥ `k`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GhostKl {
    /// K.
    pub k: usize,
}

/// As [`GhostKl`] with the mass r spread evenly over the other tokens:
/// Σ_k p_k log(p_k/q_k) + r log(r/(V−K)) − r/(V−K) · Σ_{v∉K} log q_v.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UniformTailKl {
    /// K.
    pub k: usize,
}

impl Default for GhostKl {
    fn default() -> Self {
        GhostKl { k: 64 }
    }
}

impl Default for UniformTailKl {
    fn default() -> Self {
        UniformTailKl { k: 64 }
    }
}

impl LogitLoss for GhostKl {
    fn requirement(&self) -> Requirement {
        Requirement::TopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(1.0))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::at_least("k", self.k, 1)
    }

    fn by_hand(&self) -> Option<ByHand> {
        Some(ByHand {
            target: SoftTarget::Ghost(Some(self.k)),
            scaling: Scaling::Temperature(1.0),
            factor: 1.0,
        })
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        ghost(&rows.teacher_top(self.k), rows.student)
    }
}

impl LogitLoss for UniformTailKl {
    fn requirement(&self) -> Requirement {
        Requirement::TopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(1.0))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::at_least("k", self.k, 1)
    }

    fn by_hand(&self) -> Option<ByHand> {
        Some(ByHand {
            target: SoftTarget::EvenTail(Some(self.k)),
            scaling: Scaling::Temperature(1.0),
            factor: 1.0,
        })
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        uniform(&rows.teacher_top(self.k), rows.student)
    }
}

/// Keeps the logarithm of a vanishing tail finite; r log r is 0 there.
pub(crate) const SMALLEST_MASS: f64 = 1e-12;

/// The K tokens and a ghost: → \[N\].
pub(super) fn ghost(top: &TopKRows, student: &Tensor) -> Tensor {
    let (log_p, rest) = exact_masses(top);
    let log_q = student
        .log_softmax(-1, None::<Kind>)
        .gather(-1, &top.ids, false);
    let student_rest = (1.0f64 - over_last(&log_q.exp())).clamp_min(SMALLEST_MASS);
    over_last(&(log_p.exp() * (log_p - log_q))) + &rest * (rest.log() - student_rest.log())
}

/// The K tokens and an even tail: → \[N\].
pub(super) fn uniform(top: &TopKRows, student: &Tensor) -> Tensor {
    let (log_p, rest) = exact_masses(top);
    let log_q_all = student.log_softmax(-1, None::<Kind>);
    let log_q = log_q_all.gather(-1, &top.ids, false);
    let others = (student.size()[1] - top.ids.size()[1]).max(1) as f64;
    let log_q_others = over_last(&log_q_all) - over_last(&log_q);
    over_last(&(log_p.exp() * (log_p - log_q))) + &rest * (rest.log() - others.ln())
        - &rest / others * log_q_others
}

/// log p of the K tokens [N, K] and the mass of all others \[N\].
fn exact_masses(top: &TopKRows) -> (Tensor, Tensor) {
    let log_p = &top.logits - top.log_sum_exp.unsqueeze(-1);
    let rest = (1.0f64 - over_last(&log_p.exp())).clamp_min(SMALLEST_MASS);
    (log_p, rest)
}
