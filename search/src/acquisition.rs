//! Acquisition functions, for metrics of which small values are good.

use statrs::distribution::{Continuous, ContinuousCDF, Normal};

use crate::config::SaboOptions;
use crate::objective::Discrepancy;

/// Expected improvement below `best` of a normal variable, less ξ:
///
/// EI = (f(x⁺) − μ − ξ)·Φ(Z) + σ·φ(Z), Z = (f(x⁺) − μ − ξ)/σ.
///
/// This is the first part of BayesKD's Eq. 10 with Eq. 11. The paper writes μ − f(x⁺), which is the improvement of
/// a metric that grows; a perplexity or a loss falls, so the sign is turned. σ is the standard deviation (the paper
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// ∫ max(best − ξ − y, 0) N(y; μ, σ²) dy by Simpson's rule.
    fn integrated(mean: f64, deviation: f64, best: f64, xi: f64) -> f64 {
        let steps = 20_000;
        let (low, high) = (
            mean - 12.0 * deviation,
            (best - xi).min(mean + 12.0 * deviation),
        );
        if high <= low {
            return 0.0;
        }
        let h = (high - low) / f64::from(steps);
        let f = |y: f64| {
            let z = (y - mean) / deviation;
            let density = (-0.5 * z * z).exp() / (deviation * std::f64::consts::TAU.sqrt());
            (best - xi - y).max(0.0) * density
        };
        let inner: f64 = (1..steps)
            .map(|i| f(low + f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 })
            .sum();
        h / 3.0 * (f(low) + inner + f(high))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn expected_improvement_is_the_integral(
            mean in -3.0..3.0f64, deviation in 0.01..3.0f64, best in -3.0..3.0f64, xi in -0.5..0.5f64,
        ) {
            let analytic = expected_improvement(mean, deviation, best, xi);
            prop_assert!((analytic - integrated(mean, deviation, best, xi)).abs() < 1e-8);
        }
    }

    #[test]
    fn without_uncertainty_only_the_improvement_counts() {
        assert_eq!(expected_improvement(1.0, 0.0, 3.0, 0.5), 1.5);
        assert_eq!(expected_improvement(3.0, 0.0, 1.0, 0.0), 0.0);
    }

    /// Eqs. 10–12 by hand: Z = (2 − 1.5 − 0.1)/0.8 = 0.5, Φ(Z) = 0.691462461274, φ(Z) = 0.352065326764,
    /// EI = 0.4·Φ + 0.8·φ; S = 2·0.3 + 0.5·1.2 = 1.2; α = 0.7.
    #[test]
    fn laei_on_hand_values() {
        let options = SaboOptions {
            alpha: 0.7,
            lambda1: 2.0,
            lambda2: 0.5,
            xi: 0.1,
            ..SaboOptions::laei()
        };
        let ei = expected_improvement(1.5, 0.8, 2.0, options.xi);
        assert!((ei - 0.558_237_245_921).abs() < 1e-9, "{ei}");
        let s = discrepancy(
            &options,
            &Discrepancy {
                logits: 0.3,
                hidden: 1.2,
            },
        );
        assert!((s - 1.2).abs() < 1e-12);
        let laei = ei + alpha(&options, 100) * s;
        assert!((laei - (0.558_237_245_921 + 0.84)).abs() < 1e-9);
    }

    #[test]
    fn alpha_decays_and_turns() {
        let options = SaboOptions {
            alpha: 1.0,
            decay: Some(10.0),
            ..SaboOptions::default()
        };
        assert_eq!(alpha(&options, 0), 1.0);
        assert_eq!(alpha(&options, 10), 0.5);
        let inverted = SaboOptions {
            inverted: true,
            ..options
        };
        assert_eq!(alpha(&inverted, 30), -0.1);
    }

    #[test]
    fn a_part_that_never_varies_weighs_nothing() {
        let parts: Vec<Discrepancy> = (0..4)
            .map(|i| Discrepancy {
                logits: 5.0,
                hidden: f64::from(i),
            })
            .collect();
        let s = standardised_discrepancies(&SaboOptions::default(), &parts);
        assert!((s.iter().sum::<f64>()).abs() < 1e-12);
        assert!((s[3] + s[0]).abs() < 1e-12 && s[3] > 1.0);
    }
}
