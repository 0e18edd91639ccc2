//! How far a model's confidence is from its accuracy.

use tch::{Kind, Tensor};

const BINS: i64 = 15;

/// The expected calibration error Σ_b n_b/N · |accuracy_b − confidence_b| over 15 equal bins of the probability that
/// a model gives its first choice (Guo et al. 2017, arXiv 1706.04599, Eq. 3).
#[derive(Debug)]
pub struct Calibration {
    /// Positions, Σ confidence and Σ right of each bin [3, 15] f64.
    sums: Tensor,
}

impl Default for Calibration {
    fn default() -> Self {
        Calibration {
            sums: Tensor::zeros([3, BINS], (Kind::Double, tch::Device::Cpu)),
        }
    }
}

impl Calibration {
    /// Adds positions: confidences in [0, 1] \[N\], and whether the first choice was right \[N\] bool.
    pub fn add(&mut self, confidence: &Tensor, right: &Tensor) {
        let confidence = confidence
            .to_device(tch::Device::Cpu)
            .to_kind(Kind::Double)
            .clamp(0.0, 1.0);
        let right = right.to_device(tch::Device::Cpu).to_kind(Kind::Double);
        // Bins are open on the left: (b/15, (b+1)/15].
        let bin = ((&confidence * BINS as f64).ceil() - 1.0)
            .clamp(0.0, BINS as f64 - 1.0)
            .to_kind(Kind::Int64);
        let parts = Tensor::stack(&[confidence.ones_like(), confidence, right], 0);
        self.sums = self.sums.index_add(1, &bin, &parts);
    }

    /// In [0, 1]; 0 without positions.
    pub fn error(&self) -> f64 {
        let count = self.sums.get(0).sum(Kind::Double).double_value(&[]);
        if count == 0.0 {
            return 0.0;
        }
        let gaps = (self.sums.get(1) - self.sums.get(2)).abs();
        gaps.sum(Kind::Double).double_value(&[]) / count
    }
}

/// The probability of the first choice: logits [N, V] → \[N\].
pub(crate) fn confidence(logits: &Tensor) -> Tensor {
    (logits.amax([-1], false) - logits.logsumexp([-1].as_slice(), false)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_weighted_gap_of_the_bins() {
        let mut calibration = Calibration::default();
        assert_eq!(calibration.error(), 0.0);
        let add = |calibration: &mut Calibration, confidence: &[f64], right: &[bool]| {
            calibration.add(&Tensor::from_slice(confidence), &Tensor::from_slice(right));
        };
        // One bin: (.90 + .92 + .91 − 2) / 3; another: |.50 − 1|; 1/15 belongs to the first bin with .01.
        add(&mut calibration, &[0.90, 0.50], &[true, true]);
        add(
            &mut calibration,
            &[0.87, 0.0, 1.0 / 15.0],
            &[false, false, false],
        );
        let expected = ((0.90f64 + 0.87 - 1.0).abs() + 0.5 + 1.0 / 15.0) / 5.0;
        assert!((calibration.error() - expected).abs() < 1e-12);
    }
}
