//! What DKD, NKD and ATKD share: one token taken apart from all the others.

use tch::{Kind, Tensor};

use super::over_last;

/// The logarithms of a softmax split at one token per row.
pub(super) struct LogSplit {
    /// Of that token's probability \[N\].
    pub(super) target: Tensor,
    /// Of all the others' together \[N\].
    pub(super) others: Tensor,
    /// Of the others' probabilities among themselves [N, V]; −∞ at the token.
    pub(super) among_others: Tensor,
}

/// Splits softmax(logits) [N, V] at the tokens `mask` [N, V] marks, one a row.
pub(super) fn split(logits: &Tensor, mask: &Tensor) -> LogSplit {
    let others = logits.masked_fill(mask, f64::NEG_INFINITY);
    let log_all = logits.logsumexp([-1].as_slice(), false);
    let target = logits
        .masked_fill(&mask.logical_not(), 0.0)
        .sum_dim_intlist([-1].as_slice(), false, None::<Kind>);
    LogSplit {
        target: target - &log_all,
        others: others.logsumexp([-1].as_slice(), false) - log_all,
        among_others: others.log_softmax(-1, None::<Kind>),
    }
}

/// True at one token per row: \[N\] → [N, V].
pub(super) fn one_hot(tokens: &Tensor, like: &Tensor) -> Tensor {
    like.detach()
        .zeros_like()
        .to_kind(Kind::Bool)
        .scatter_value(-1, &tokens.unsqueeze(-1), 1)
}

/// KL of the two-way choice between the token and the rest: → \[N\].
pub(super) fn target_kl(teacher: &LogSplit, student: &LogSplit) -> Tensor {
    teacher.target.exp() * (&teacher.target - &student.target)
        + teacher.others.exp() * (&teacher.others - &student.others)
}

/// KL among the others: → \[N\].
pub(super) fn others_kl(teacher: &LogSplit, student: &LogSplit, mask: &Tensor) -> Tensor {
    let difference = &teacher.among_others - &student.among_others;
    // −∞ − (−∞) at the token itself, which has no part here.
    over_last(&(teacher.among_others.exp() * difference.masked_fill(mask, 0.0)))
}
