//! How near the logits that a cache gives back are to the teacher's: the figures that stand in the manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Temperatures that a report measures.
pub const TEMPERATURES: [u32; 6] = [1, 2, 4, 8, 16, 20];

/// Key of the figures under Logits Dual-Scaling.
const DUAL_SCALING: &str = "dual-scaling";

/// A fidelity report. Figures are rounded to four significant digits, so that they say no more than they know.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Fidelity {
    /// Positions measured, none of which a basis was fitted on where there were others.
    pub positions: u64,
    /// Positions whose gradients are added up into one batch.
    pub batch_positions: u64,
    /// Whose gradient: the student's name.
    pub student: String,
    /// How logits outside the top K were made where the cache holds none: `uniform`.
    pub tail: Option<String>,
    /// KL(teacher ‖ rebuilt) in nats a position, by temperature ("1", "2", …) and under "dual-scaling".
    pub kl: BTreeMap<String, f64>,
    /// Relative error of the batch gradient at the LM head, by the same keys.
    pub gradient_error: BTreeMap<String, f64>,
}

impl Fidelity {
    /// Keys of the figures, in their order: temperatures, then dual-scaling.
    pub fn keys() -> impl Iterator<Item = String> {
        let temperatures = TEMPERATURES.iter().map(u32::to_string);
        temperatures.chain([DUAL_SCALING.to_owned()])
    }

    /// Gradient error of KL at a temperature, interpolated over its logarithm; beyond the measured ones that of the
    /// nearest.
    pub fn gradient_error_at(&self, temperature: f64) -> Option<f64> {
        let points: Vec<(f64, f64)> = TEMPERATURES
            .iter()
            .filter_map(|of| {
                let error = self.gradient_error.get(&of.to_string())?;
                Some((f64::from(*of).ln(), *error))
            })
            .collect();
        let (first, last) = (points.first()?, points.last()?);
        let at = temperature.ln().clamp(first.0, last.0);
        let after = points.partition_point(|point| point.0 < at);
        let (right, left) = (points.get(after)?, points[after.saturating_sub(1)]);
        let share = if right.0 > left.0 {
            (at - left.0) / (right.0 - left.0)
        } else {
            0.0
        };
        Some(left.1 + share * (right.1 - left.1))
    }

    /// Gradient error of Logits Dual-Scaling.
    pub fn gradient_error_of_dual_scaling(&self) -> Option<f64> {
        self.gradient_error.get(DUAL_SCALING).copied()
    }

    /// Four significant digits.
    pub fn rounded(value: f64) -> f64 {
        format!("{value:.3e}").parse().unwrap_or(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperatures_between_the_measured_ones_are_interpolated() {
        let errors = [(1, 0.3), (2, 0.1), (4, 0.2), (8, 0.2), (16, 0.2), (20, 0.4)];
        let gradient_error = errors
            .iter()
            .map(|(t, error)| (t.to_string(), *error))
            .collect();
        let report = Fidelity {
            positions: 1,
            batch_positions: 1,
            student: String::new(),
            tail: None,
            kl: BTreeMap::new(),
            gradient_error,
        };
        let check = |temperature: f64, expected: f64| {
            let found = report.gradient_error_at(temperature).unwrap();
            assert!((found - expected).abs() < 1e-12, "{temperature}: {found}");
        };
        for (temperature, error) in errors {
            check(f64::from(temperature), error);
        }
        check(8.0_f64.sqrt(), 0.15);
        check(0.1, 0.3);
        check(100.0, 0.4);
        assert_eq!(Fidelity::rounded(0.012_345_6), 0.012_35);
        assert_eq!(report.gradient_error_of_dual_scaling(), None);
    }
}
