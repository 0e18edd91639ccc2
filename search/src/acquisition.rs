//! Acquisition functions, for metrics of which small values are good.

use statrs::distribution::{Continuous, ContinuousCDF, Normal};

use crate::config::SaboOptions;
use crate::objective::Discrepancy;

/// Expected improvement below `best` of a normal variable, less ξ:
///
/// EI = (f(x⁺) − μ − ξ)·Φ(Z) + σ·φ(Z), Z = (f(x⁺) − μ − ξ)/σ.
///
/// This is the first part of BayesKD's Eq. 10 with Eq. 11. The paper writes μ − f(x⁺), which is the improvement of
/// a metric that grows; a perplexity or a loss falls, so the sign is turned. Σ is the standard deviation (the paper
/// calls it a variance, but divides by it where the deviation belongs).
pub(crate) fn expected_improvement(mean: f64, deviation: f64, best: f64, xi: f64) -> f64 {
    let improvement = best - mean - xi;
    if deviation <= 0.0 {
        return improvement.max(0.0);
    }
    let z = improvement / deviation;
    let normal = Normal::standard();
    (improvement * normal.cdf(z) + deviation * normal.pdf(z)).max(0.0)
}

/// S(x) of BayesKD's Eq. 12: λ1·D(σt, σs) + λ2·A(ht, hs), raw.
pub(crate) fn discrepancy(options: &SaboOptions, parts: &Discrepancy) -> f64 {
    options.lambda1 * parts.logits + options.lambda2 * parts.hidden
}

/// S(x) with D and A each brought to mean 0 and deviation 1 over the candidates.
pub(crate) fn standardised_discrepancies(options: &SaboOptions, parts: &[Discrepancy]) -> Vec<f64> {
    let logits = standardise(parts.iter().map(|p| p.logits));
    let hidden = standardise(parts.iter().map(|p| p.hidden));
    logits
        .iter()
        .zip(&hidden)
        .map(|(d, a)| options.lambda1 * d + options.lambda2 * a)
        .collect()
}

/// The weight of S(x) after `finished` trials, with its sign.
pub(crate) fn alpha(options: &SaboOptions, finished: usize) -> f64 {
    let sign = if options.inverted { -1.0 } else { 1.0 };
    let decay = options
        .decay
        .map_or(1.0, |decay| 1.0 + (finished as f64 / decay).powi(2));
    sign * options.alpha / decay
}

/// Mean and population standard deviation.
pub(crate) fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

fn standardise(values: impl Iterator<Item = f64> + Clone) -> Vec<f64> {
    let (mean, deviation) = moments(values.clone());
    let scale = if deviation > 1e-12 * mean.abs().max(1e-300) {
        1.0 / deviation
    } else {
        0.0
    };
    values.map(|v| (v - mean) * scale).collect()
}
