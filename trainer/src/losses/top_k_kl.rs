//! KL at temperature 1 from the K largest logits of a sparse cache, with the exact mass of the rest.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{LogitLoss, LogitRows, Requirement, TopKRows};

/// What a KL term on a sparse cache takes the uncached logits to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tail {
    /// Nothing: a sparse cache cannot answer.
    #[default]
    Refuse,
    /// The mass outside the top K, spread evenly over the other V − K tokens.
    Uniform,
    /// One "ghost" token that holds the mass outside the top K, for teacher and student alike.
    Ghost,
}

/// Σ_k p_k log(p_k/q_k) + tail, with the teacher's exact p_k = exp(t_k − log Σ exp t), and
/// r = 1 − Σ_k p_k the teacher's mass outside of its top K:
/// * uniform: r log(r/(V−K)) − r/(V−K) · Σ_{v∉K} log q_v;
/// * ghost: r log(r / (1 − Σ_k q_k)).
///
/// Right at τ = 1 only, where the cached log-sum-exp holds; at τ > 1 the mass of the tail is unknown
/// and the truncated target harms the student.
#[derive(Debug, Clone, Copy)]
pub struct TopKKl {
    /// `Uniform` or `Ghost`; `Refuse` never gets here and counts as uniform.
    pub tail: Tail,
}

/// Keeps the logarithm of a vanishing tail finite; r log r is 0 there.
const SMALLEST_MASS: f64 = 1e-12;

impl LogitLoss for TopKKl {
    fn requirement(&self) -> Requirement {
        Requirement::TopK
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let TopKRows {
            ids,
            logits,
            log_sum_exp,
        } = rows
            .top_k
            .expect("a loss that requires the top K is only run where they are read");
        let log_p = logits - log_sum_exp.unsqueeze(-1);
        let p = log_p.exp();
        let rest = (1.0f64 - over_last(&p)).clamp_min(SMALLEST_MASS);
        let log_q_all = rows.student.log_softmax(-1, None::<Kind>);
        let log_q = log_q_all.gather(-1, ids, false);
        let kept = over_last(&(&p * (&log_p - &log_q)));
        kept + match self.tail {
            Tail::Ghost => {
                let student_rest = (1.0f64 - over_last(&log_q.exp())).clamp_min(SMALLEST_MASS);
                &rest * (rest.log() - student_rest.log())
            }
            Tail::Uniform | Tail::Refuse => {
                let others = (rows.student.size()[1] - ids.size()[1]).max(1) as f64;
                let log_q_others = over_last(&log_q_all) - over_last(&log_q);
                &rest * (rest.log() - others.ln()) - &rest / others * log_q_others
            }
        }
    }
}

fn over_last(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([-1].as_slice(), false, None::<Kind>)
}
