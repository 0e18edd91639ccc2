//! Multi-level logit distillation: instances and batches of positions at several temperatures.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::divided;
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check, over_last};

/// Σ_τ [τ² · KL(p ‖ q) + w · Σ_j (⟨p_i, p_j⟩ − ⟨q_i, q_j⟩)²] for row i, with p = softmax(t/τ),
/// q = softmax(s/τ) and j over the rows at hand (Jin, Wang, Lin 2023, "Multi-level logit
/// distillation", CVPR, Eqs. 3, 5, 9; τ and τ² as in the authors' code). Asks for the logits of the
/// whole vocabulary.
///
/// * Instance level: the temperatures are summed, as there.
/// * Batch level: the mean over the rows is ‖PPᵀ − QQᵀ‖²/N. The rows at hand are those of one chunk
///   of the fused head (128 at V = 49,152), not of the batch: logits of more never exist at once.
/// * Class level, PᵀP of [V, V]: left out, it is a product of V² entries.
/// * The masks of confident images and the pairs of weak and strong augmentations: left out, text has
///   no such views.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MultiLevel {
    /// The τ.
    pub temperatures: Vec<f64>,
    /// w; 0 leaves the instance level alone.
    pub batch_weight: f64,
}

impl Default for MultiLevel {
    fn default() -> Self {
        MultiLevel {
            temperatures: vec![2.0, 3.0, 4.0, 5.0, 6.0],
            batch_weight: 1.0,
        }
    }
}

impl LogitLoss for MultiLevel {
    fn requirement(&self) -> Requirement {
        Requirement::FullLogits
    }

    fn scaling(&self) -> Option<Scaling> {
        // One τ stands for all in a measure that takes one: the middle of the list.
        let middle = self.temperatures.get(self.temperatures.len() / 2);
        middle.copied().map(Scaling::Temperature)
    }

    fn validate(&self) -> Result<(), BadKey> {
        check::that(
            "temperatures",
            !self.temperatures.is_empty(),
            "[]",
            "there must be one at least",
        )?;
        for &temperature in &self.temperatures {
            check::positive("temperatures", temperature)?;
        }
        check::not_negative("batch_weight", self.batch_weight)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        let at = |temperature: f64| {
            let log_p = divided(rows.full_teacher(), temperature).log_softmax(-1, None::<Kind>);
            let log_q = divided(rows.student, temperature).log_softmax(-1, None::<Kind>);
            let p = log_p.exp();
            let instance = over_last(&(&p * (log_p - &log_q))) * temperature.powi(2);
            if self.batch_weight == 0.0 {
                return instance;
            }
            let q = log_q.exp();
            let difference = p.matmul(&p.tr()) - q.matmul(&q.tr());
            instance + over_last(&difference.square()) * self.batch_weight
        };
        self.temperatures
            .iter()
            .map(|&temperature| at(temperature))
            .reduce(|sum, value| sum + value)
            .unwrap_or_else(|| {
                rows.student
                    .zeros_like()
                    .sum_dim_intlist([-1].as_slice(), false, None::<Kind>)
            })
    }
}
