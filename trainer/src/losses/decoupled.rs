//! What DKD, NKD and ATKD share: one token taken apart from all the others.

use tch::{Kind, Tensor};

use super::over_last;

/// A softmax split at one token per row.
pub(super) struct Split {
    /// log of that token's probability \[N\].
    pub(super) log_target: Tensor,
    /// log of all the others' together \[N\].
    pub(super) log_others: Tensor,
    /// log of the others' probabilities among themselves [N, V]; −∞ at the token.
    pub(super) log_among_others: Tensor,
}

/// Splits softmax(logits) [N, V] at the tokens `mask` [N, V] marks, one a row.
pub(super) fn split(logits: &Tensor, mask: &Tensor) -> Split {
    let others = logits.masked_fill(mask, f64::NEG_INFINITY);
    let log_all = logits.logsumexp([-1].as_slice(), false);
    let target = logits
        .masked_fill(&mask.logical_not(), 0.0)
        .sum_dim_intlist([-1].as_slice(), false, None::<Kind>);
    Split {
        log_target: target - &log_all,
        log_others: others.logsumexp([-1].as_slice(), false) - log_all,
        log_among_others: others.log_softmax(-1, None::<Kind>),
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
pub(super) fn target_kl(teacher: &Split, student: &Split) -> Tensor {
    teacher.log_target.exp() * (&teacher.log_target - &student.log_target)
        + teacher.log_others.exp() * (&teacher.log_others - &student.log_others)
}

/// KL among the others: → \[N\].
pub(super) fn others_kl(teacher: &Split, student: &Split, mask: &Tensor) -> Tensor {
    let difference = &teacher.log_among_others - &student.log_among_others;
    // −∞ − (−∞) at the token itself, which has no part here.
    over_last(&(teacher.log_among_others.exp() * difference.masked_fill(mask, 0.0)))
}
