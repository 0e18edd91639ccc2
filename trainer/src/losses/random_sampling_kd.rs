//! Random-sampling KD: an unbiased few of the teacher's tokens.

use caskd_models::SeededRng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// KL(w ‖ softmax(s)) with w the empirical distribution of n draws from p^a/Σp^a, each weighted by
/// p/p^a and the weights normalised (Anshumann et al. 2025, arXiv 2503.16870, section 4). At a = 1
/// all weights are 1/n and the gradient is unbiased for that of KL(p ‖ q). Asks for the logits of the
/// whole vocabulary: the draws are made here, not in the cache.
///
/// The draws are a pure function of `seed` and the row (its sequence's tokens and its position), so
/// they are the same in every epoch, batch order and run, as if they had been cached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomSamplingKd {
    /// n; tokens drawn more than once count as often.
    pub draws: usize,
    /// a.
    pub proposal_exponent: f64,
    /// Of the draws.
    pub seed: u64,
}

impl Default for RandomSamplingKd {
    fn default() -> Self {
        RandomSamplingKd {
            draws: 50,
            proposal_exponent: 1.0,
            seed: 0,
        }
    }
}

impl LogitLoss for RandomSamplingKd {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(1.0))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::at_least("draws", self.draws, 1)?;
        check::positive("proposal_exponent", self.proposal_exponent)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let (ids, weights) = tch::no_grad(|| self.draw(rows));
        // A token drawn several times has the sum of its weights.
        let of_token = weights
            .new_zeros(rows.student.size(), (weights.kind(), weights.device()))
            .scatter_add(-1, &ids, &weights)
            .gather(-1, &ids, false);
        let log_q = rows
            .student
            .log_softmax(-1, None::<Kind>)
            .gather(-1, &ids, false);
        over_last(&(weights * (of_token.log() - log_q)))
    }
}

impl RandomSamplingKd {
    /// Tokens and normalised weights, [N, n] each, by inversion of the cumulative distribution.
    fn draw(&self, rows: &LogitRows<'_>) -> (Tensor, Tensor) {
        let teacher = rows.full_teacher();
        let uniform: Vec<f64> = (0..rows.keys.numel() as i64)
            .flat_map(|row| {
                let mut rng = SeededRng::new(self.seed ^ rows.keys.int64_value(&[row]) as u64);
                (0..self.draws).map(move |_| rng.uniform())
            })
            .collect();
        let uniform = Tensor::from_slice(&uniform)
            .view([-1, self.draws as i64])
            .to_device(teacher.device());
        let log_p = teacher.to_kind(Kind::Double).log_softmax(-1, None::<Kind>);
        let proposal = (&log_p * self.proposal_exponent).softmax(-1, None::<Kind>);
        let cumulative = proposal.cumsum(-1, None::<Kind>);
        let last = teacher.size()[1] - 1;
        // Rounding can leave the last sum below 1, hence a draw beyond it.
        let total = cumulative.narrow(-1, last, 1);
        let ids = (uniform * total)
            .searchsorted::<Tensor>(&cumulative, false, true, "right", None)
            .clamp_max(last);
        let log_weights = log_p.gather(-1, &ids, false) * (1.0 - self.proposal_exponent);
        (
            ids,
            log_weights
                .softmax(-1, None::<Kind>)
                .to_kind(teacher.kind()),
        )
    }
}
