//! Adaptive teaching: easy and hard tokens taught differently.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::decoupled::{one_hot, others_kl, split, target_kl};
use super::{BadKey, Labels, LogitLoss, LogitRows, Requirement, Scaling, check};

/// λ · mean over easy rows of KL among the rest + (1 − λ) · mean over hard rows of (KL of (label,
/// rest) + KL among the rest) (ATKD, Zhong et al. 2024, arXiv 2402.11890, section 3.3). Asks for the
/// logits of the whole vocabulary and for labels.
///
/// Hard are the rows where the teacher is least sure of the label: the `hard_share` of them with the
/// largest 1 − p_label, rounded up, ties to the earlier row. The paper ranks a mini-batch; here the
/// rows are those of one chunk of the fused head. The value of a row is its part of that sum times
/// the number of rows, so that the mean over the rows is the loss. (The authors' code cuts at the
/// median with "below", which makes the hard half the larger one for an even count.)
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Atkd {
    /// Share of the rows that are hard, in (0, 1).
    pub hard_share: f64,
    /// λ, the weight of the easy rows, in (0, 1).
    pub lambda: f64,
    /// Temperature of both models.
    pub temperature: f64,
}

impl Default for Atkd {
    fn default() -> Self {
        Atkd {
            hard_share: 0.5,
            lambda: 0.2,
            temperature: 1.0,
        }
    }
}

impl LogitLoss for Atkd {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn labels(&self) -> Labels {
        Labels::Needed
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::inside_unit("hard_share", self.hard_share)?;
        check::inside_unit("lambda", self.lambda)?;
        check::positive("temperature", self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let mask = one_hot(rows.labels, rows.student);
        let teacher = split(&(rows.full_teacher() / self.temperature), &mask);
        let student = split(&(rows.student / self.temperature), &mask);
        let count = rows.student.size()[0];
        let hard_count = ((self.hard_share * count as f64).ceil() as i64).min(count);
        let hardest = teacher
            .others
            .argsort_stable(true, -1, true)
            .narrow(0, 0, hard_count);
        let is_hard = teacher.others.zeros_like().index_fill(0, &hardest, 1.0);
        let share = |of: i64| count as f64 / of.max(1) as f64;
        let hard_weight = (1.0 - self.lambda) * share(hard_count);
        let easy_weight = self.lambda * share(count - hard_count);
        let weight = &is_hard * (hard_weight - easy_weight) + easy_weight;
        let target = target_kl(&teacher, &student) * (is_hard * hard_weight);
        target + others_kl(&teacher, &student, &mask) * weight
    }
}
