//! Kullback–Leibler divergence with a temperature.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::tail_kl::{ghost, uniform};
use super::{
    BadKey, ByHand, LogitLoss, LogitRows, Requirement, Scaling, SoftTarget, check, over_last,
};

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

/// KL(softmax(t/τ) ‖ softmax(s/τ)), times τ² on demand (Hinton, Vinyals, Dean 2015,
/// arXiv 1503.02531, section 2).
///
/// Asks for the logits of the whole vocabulary; with a `tail`, and at τ = 1, for the top K of a
/// cache and their log-sum-exp (see [`GhostKl`](super::GhostKl)).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kl {
    /// τ.
    pub temperature: f64,
    /// Multiply by τ², so that the gradient keeps its size when τ changes.
    pub temperature_squared: bool,
    /// On a sparse cache.
    pub tail: Tail,
}

impl Default for Kl {
    fn default() -> Self {
        Kl {
            temperature: 1.0,
            temperature_squared: false,
            tail: Tail::Refuse,
        }
    }
}

impl LogitLoss for Kl {
    fn requirement(&self) -> Requirement {
        match self.tail {
            Tail::Refuse => Requirement::FullLogits,
            Tail::Uniform | Tail::Ghost => Requirement::TopK(1),
        }
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::positive("temperature", self.temperature)?;
        check::that(
            "tail",
            self.tail == Tail::Refuse || self.temperature == 1.0,
            serde_json::json!(self.tail),
            "the mass of the tail is known at temperature 1 only",
        )
    }

    fn by_hand(&self) -> Option<ByHand> {
        let squared = self.temperature_squared;
        Some(ByHand {
            target: match self.tail {
                Tail::Refuse => SoftTarget::Teacher,
                Tail::Ghost => SoftTarget::Ghost(None),
                Tail::Uniform => SoftTarget::EvenTail(None),
            },
            scaling: Scaling::Temperature(self.temperature),
            factor: if squared {
                self.temperature.powi(2)
            } else {
                1.0
            },
        })
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        // Where the whole vocabulary is at hand there is no tail to make up.
        if let (Tail::Uniform | Tail::Ghost, Some(top)) = (self.tail, rows.top_k) {
            return match self.tail {
                Tail::Ghost => ghost(top, rows.student),
                Tail::Uniform | Tail::Refuse => uniform(top, rows.student),
            };
        }
        let teacher = divided(rows.full_teacher(), self.temperature);
        let student = divided(rows.student, self.temperature);
        let value = divergence(&teacher, &student);
        scaled_back(value, self.temperature, self.temperature_squared)
    }
}

/// KL(softmax(t) ‖ softmax(s)) over the last dimension: [N, V], [N, V] → \[N\].
pub(crate) fn divergence(teacher: &Tensor, student: &Tensor) -> Tensor {
    let log_p = teacher.log_softmax(-1, None::<Kind>);
    let log_q = student.log_softmax(-1, None::<Kind>);
    over_last(&(log_p.exp() * (log_p - log_q)))
}

/// x / scale, without a copy of [N, V] where the scale is 1.
pub(super) fn divided(x: &Tensor, scale: f64) -> Tensor {
    if scale == 1.0 {
        x.shallow_clone()
    } else {
        x / scale
    }
}

/// value · τ² where that is asked for.
pub(super) fn scaled_back(value: Tensor, temperature: f64, squared: bool) -> Tensor {
    if squared && temperature != 1.0 {
        value * temperature.powi(2)
    } else {
        value
    }
}
