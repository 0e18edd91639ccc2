//! From raw metrics to targets that a Gaussian process can model.
//!
//! A diverged trial may be a hundred times worse than a good one, and a failed one has no value at all. Neither
//! must bend the surrogate: values far above the median are drawn in, and a failure counts as the worst of what was
//! seen after that.

use crate::acquisition::moments;

/// Values further above the median than this many times the distance from the best to the median are drawn in.
const REACH: f64 = 1.5;

/// Targets of mean 0 and deviation 1, and the way back.
#[derive(Debug, Clone)]
pub(crate) struct Warped {
    /// One per observation, failures included.
    pub(crate) targets: Vec<f64>,
    pub(crate) mean: f64,
    pub(crate) scale: f64,
}

impl Warped {
    /// From metrics of which small ones are good; `None` where fewer than two trials have a value.
    pub(crate) fn new(values: &[Option<f64>]) -> Option<Self> {
        let mut sorted: Vec<f64> = values.iter().flatten().copied().collect();
        if sorted.len() < 2 {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let best = sorted[0];
        let median = 0.5 * (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]);
        let cap = median + REACH * (median - best);
        let worst = sorted[sorted.len() - 1].min(cap);
        let drawn_in: Vec<f64> = values
            .iter()
            .map(|value| value.unwrap_or(worst).min(cap))
            .collect();
        let (mean, deviation) = moments(drawn_in.iter().copied());
        let scale = if deviation > 0.0 { deviation } else { 1.0 };
        Some(Self {
            targets: drawn_in.iter().map(|v| (v - mean) / scale).collect(),
            mean,
            scale,
        })
    }

    /// A target in units of the metric.
    pub(crate) fn metric(&self, target: f64) -> f64 {
        self.mean + self.scale * target
    }
}
