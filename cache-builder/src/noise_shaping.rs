//! Rounding whose errors cancel in a batch.
//!
//! A gradient adds up δ_t x_tᵀ over positions t: the errors δ of the rebuilt logits times features x. Rounded one by one,
//! the errors ε_t of a coefficient are independent and the sum grows with their number. Here each rounding makes up for
//! the ones before it: ε minimises Σ ε_t² + λ·‖Σ ε_t x_t‖² / mean ‖x‖², with the last hidden state for x. This is noise
//! shaping (Gerzon and Craven 1989) along the principal axes of the features, and what GPTQ (Frantar et al. 2023, arXiv
//! 2210.17323) does to the columns of a weight. Readers need not know of it.
//!
//! With H = I + λXXᵀ/s = LᵀDL, L unit lower triangular, εᵀHε = ‖D^½Lε‖²: each level is rounded from
//! y_t − Σ_{s<t} L_ts ε_s. Positions that are targets of the loss and others are shaped apart, for a batch adds up the
//! targets only.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// λ: four times more takes a tenth off the error of the gradient and adds 5% to the KL of single positions.
const STRENGTH: f64 = 2.0;

/// Positions shaped together: the filter grows with the square.
const WINDOW: usize = 256;

/// The filters of one sequence.
#[derive(Debug)]
pub(crate) struct Shaping {
    windows: Vec<Window>,
    positions: usize,
}

#[derive(Debug)]
struct Window {
    /// Ascending.
    positions: Vec<usize>,
    /// L without its diagonal, row by row: row t has t entries.
    filter: Vec<f32>,
}

impl Shaping {
    /// For hidden states \[T, D\] and the loss mask \[T\] of one sequence.
    pub(crate) fn of(hidden: &Tensor, loss_mask: &[bool]) -> Result<Shaping> {
        let positions = loss_mask.len();
        let is_target = |t: &usize| loss_mask.get(t + 1).copied().unwrap_or(false);
        let (targets, others): (Vec<usize>, Vec<usize>) = (0..positions).partition(is_target);
        let windows = targets
            .chunks(WINDOW)
            .chain(others.chunks(WINDOW))
            .map(|positions| Window::of(hidden, positions));
        Ok(Shaping {
            windows: windows.collect::<Result<_>>()?,
            positions,
        })
    }

    /// T.
    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// Levels \[T·r\] of scaled coefficients \[T·r\].
    pub(crate) fn round(&self, scaled: &[f32]) -> Vec<i16> {
        let rank = scaled.len() / self.positions.max(1);
        let mut levels = vec![0; scaled.len()];
        let mut errors: Vec<f32> = Vec::new();
        let mut wanted = vec![0.0; rank];
        for window in &self.windows {
            errors.clear();
            let mut filter = window.filter.as_slice();
            for (before, position) in window.positions.iter().enumerate() {
                let here = position * rank..(position + 1) * rank;
                let (own, rest) = filter.split_at(before);
                filter = rest;
                wanted.copy_from_slice(&scaled[here.clone()]);
                for (weight, errors) in own.iter().zip(errors.chunks_exact(rank)) {
                    for (wanted, error) in wanted.iter_mut().zip(errors) {
                        *wanted -= weight * error;
                    }
                }
                for ((level, wanted), scaled) in levels[here.clone()]
                    .iter_mut()
                    .zip(&wanted)
                    .zip(&scaled[here])
                {
                    // The cast keeps to the range of i16.
                    *level = wanted.round_ties_even() as i16;
                    errors.push(f32::from(*level) - scaled);
                }
            }
        }
        levels
    }
}

impl Window {
    fn of(hidden: &Tensor, positions: &[usize]) -> Result<Window> {
        let count = positions.len();
        // Backwards, since a Cholesky factor is lower triangular and Lᵀ is not.
        let order: Vec<i64> = positions.iter().rev().map(|t| *t as i64).collect();
        let features = hidden.index_select(0, &Tensor::from_slice(&order));
        let gram = features.matmul(&features.tr()).to_kind(Kind::Double);
        let size = gram.trace().double_value(&[]) / count.max(1) as f64;
        let weights = gram * (STRENGTH / size.max(f64::MIN_POSITIVE))
            + Tensor::eye(count as i64, (Kind::Double, tch::Device::Cpu));
        let factor = weights
            .f_linalg_cholesky(false)
            .map_err(|source| Error::Torch {
                doing: "factoring the covariance of hidden states".to_owned(),
                source,
            })?;
        let mut values = vec![0.0_f64; count * count];
        factor.contiguous().copy_data(&mut values, count * count);
        let at = |row: usize, column: usize| values[(count - 1 - row) * count + count - 1 - column];
        let mut filter = Vec::with_capacity(count * count.saturating_sub(1) / 2);
        for t in 0..count {
            filter.extend((0..t).map(|s| (at(s, t) / at(t, t)) as f32));
        }
        Ok(Window {
            positions: positions.to_vec(),
            filter,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// \[T, D\] around a mean, and coefficients \[T·r\].
    fn sample(positions: i64, width: i64, rank: i64) -> (Tensor, Vec<f32>) {
        tch::manual_seed(3);
        let options = (Kind::Float, tch::Device::Cpu);
        let hidden = Tensor::randn([positions, width], options) + 1.0;
        let scaled = Tensor::randn([positions, rank], options) * 3.0;
        (hidden, Vec::try_from(scaled.contiguous().view(-1)).unwrap())
    }

    /// (mean ε², ‖Σ ε_t x_tᵀ‖² over the given positions).
    fn errors(levels: &[i16], scaled: &[f32], hidden: &Tensor, among: &[i64]) -> (f64, f64) {
        let rank = (levels.len() as i64) / hidden.size()[0];
        let differences: Vec<f32> = levels
            .iter()
            .zip(scaled)
            .map(|(level, scaled)| f32::from(*level) - scaled)
            .collect();
        let among = Tensor::from_slice(among);
        let differences = Tensor::from_slice(&differences)
            .view([-1, rank])
            .index_select(0, &among);
        let sum = differences.tr().matmul(&hidden.index_select(0, &among));
        let square = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
        (
            square(&differences) / differences.numel() as f64,
            square(&sum),
        )
    }

    #[test]
    fn errors_cancel_among_targets_and_among_others() {
        let (hidden, scaled) = sample(300, 8, 5);
        let mask: Vec<bool> = (0..300).map(|t| t > 90).collect();
        let shaped = Shaping::of(&hidden, &mask).unwrap().round(&scaled);
        let plain: Vec<i16> = scaled
            .iter()
            .map(|value| value.round_ties_even() as i16)
            .collect();
        for among in [
            (0..90).collect::<Vec<i64>>(),
            (90..299).collect(),
            (0..300).collect(),
        ] {
            let (single, sum) = errors(&shaped, &scaled, &hidden, &among);
            let (plain_single, plain_sum) = errors(&plain, &scaled, &hidden, &among);
            assert!(sum < 0.2 * plain_sum, "{sum} of {plain_sum}");
            assert!(single < 1.2 * plain_single, "{single} of {plain_single}");
        }
    }

    #[test]
    fn one_position_is_rounded_to_the_nearest() {
        let (hidden, scaled) = sample(1, 4, 7);
        let levels = Shaping::of(&hidden, &[true]).unwrap().round(&scaled);
        let nearest: Vec<i16> = scaled
            .iter()
            .map(|value| value.round_ties_even() as i16)
            .collect();
        assert_eq!(levels, nearest);
        let zeros = Tensor::zeros([3, 4], (Kind::Float, tch::Device::Cpu));
        Shaping::of(&zeros, &[true; 3]).unwrap().round(&[0.4; 6]);
    }
}
