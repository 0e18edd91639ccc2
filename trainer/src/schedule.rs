//! How the weight of a loss term changes over a run.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::losses::BadKey;

/// The course of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// `weight` at every step.
    #[default]
    Constant,
    /// From `weight` at the first step to `final_weight` at the last, in equal steps.
    Linear,
    /// The same along half a cosine.
    Cosine,
    /// From 0 to `weight` over the first `warmup_share` of the steps, in equal steps; constant from there.
    WarmUp,
}

/// The keys of a `[[loss]]` entry that change its weight: a pure function of the step, so that a resumed run has the
/// weights of an uninterrupted one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Which course.
    pub schedule: Course,
    /// Where `linear` and `cosine` end.
    pub final_weight: f64,
    /// Share of the steps that `warm-up` takes, in (0, 1].
    pub warmup_share: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule {
            schedule: Course::Constant,
            final_weight: 0.0,
            warmup_share: 0.1,
        }
    }
}

impl Schedule {
    /// The weight at a step, counted from 0, of a run of `total_steps`.
    pub fn weight(&self, weight: f64, step: u64, total_steps: u64) -> f64 {
        let progress = step as f64 / total_steps.saturating_sub(1).max(1) as f64;
        match self.schedule {
            Course::Constant => weight,
            Course::Linear => weight + (self.final_weight - weight) * progress,
            Course::Cosine => {
                self.final_weight
                    + (weight - self.final_weight) * 0.5 * (1.0 + (PI * progress).cos())
            }
            Course::WarmUp => {
                let steps = (self.warmup_share * total_steps as f64).round().max(1.0);
                weight * ((step + 1) as f64 / steps).min(1.0)
            }
        }
    }

    /// Whether a term of this weight adds nothing at any step.
    pub(crate) fn is_nothing(&self, weight: f64) -> bool {
        let ends_elsewhere = matches!(self.schedule, Course::Linear | Course::Cosine);
        weight == 0.0 && !(ends_elsewhere && self.final_weight != 0.0)
    }

    pub(crate) fn validate(&self) -> Result<(), BadKey> {
        let defaults = Schedule::default();
        let refused = |key, value: f64, message| {
            Err(BadKey {
                key,
                value: value.to_string(),
                message,
            })
        };
        let ends = matches!(self.schedule, Course::Linear | Course::Cosine);
        if !(self.final_weight >= 0.0 && self.final_weight.is_finite()) {
            return refused("final_weight", self.final_weight, "it must not be below 0");
        }
        if !ends && self.final_weight != defaults.final_weight {
            return refused(
                "final_weight",
                self.final_weight,
                "only the schedules linear and cosine end elsewhere",
            );
        }
        if !(self.warmup_share > 0.0 && self.warmup_share <= 1.0) {
            return refused(
                "warmup_share",
                self.warmup_share,
                "it must be above 0 and at most 1",
            );
        }
        if self.schedule != Course::WarmUp && self.warmup_share != defaults.warmup_share {
            return refused(
                "warmup_share",
                self.warmup_share,
                "only the schedule warm-up has one",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(schedule: Schedule, expected: &[f64]) {
        let total = expected.len() as u64;
        for (step, expected) in expected.iter().enumerate() {
            let weight = schedule.weight(2.0, step as u64, total);
            assert!(
                (weight - expected).abs() < 1e-12,
                "{schedule:?} at {step}: {weight}, not {expected}"
            );
        }
    }

    #[test]
    fn courses_begin_and_end_where_they_say() {
        let of = |schedule| Schedule {
            schedule,
            ..Schedule::default()
        };
        check(of(Course::Constant), &[2.0, 2.0, 2.0]);
        check(
            Schedule {
                final_weight: 1.0,
                ..of(Course::Linear)
            },
            &[2.0, 1.75, 1.5, 1.25, 1.0],
        );
        check(
            of(Course::Cosine),
            &[2.0, 1.0 + 0.5f64.sqrt(), 1.0, 1.0 - 0.5f64.sqrt(), 0.0],
        );
        check(
            Schedule {
                warmup_share: 0.5,
                ..of(Course::WarmUp)
            },
            &[0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0],
        );
        check(of(Course::Linear), &[2.0]);
    }

    #[test]
    fn keys_without_effect_are_refused() {
        let linear = Schedule {
            schedule: Course::Linear,
            ..Schedule::default()
        };
        assert!(linear.validate().is_ok());
        for bad in [
            Schedule {
                final_weight: 1.0,
                ..Schedule::default()
            },
            Schedule {
                final_weight: -1.0,
                ..linear
            },
            Schedule {
                warmup_share: 0.3,
                ..linear
            },
            Schedule {
                schedule: Course::WarmUp,
                warmup_share: 0.0,
                ..Schedule::default()
            },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
