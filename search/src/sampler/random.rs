//! Uniform random search without repetition.

use super::{Sampler, Suggestion, Tried};
use crate::config::StudyConfig;
use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};
use crate::view::Why;

/// Draws before a space with forbidden combinations counts as empty.
const MAX_DRAWS: usize = 100_000;

impl Sampler {
    pub(super) fn random(
        &self,
        config: &StudyConfig,
        number: u64,
        tried: &Tried,
    ) -> Result<Suggestion> {
        let mut rng = Rng::new(config.seed, Stream::Random, number);
        let why = Why {
            by: "random".to_owned(),
            ..Why::default()
        };
        if let Some(finite) = &self.finite {
            let tried = finite.tried(tried);
            let left: Vec<usize> = (0..tried.len()).filter(|&i| !tried[i]).collect();
            if !left.is_empty() {
                let point = finite.points[left[rng.below(left.len())]].clone();
                return Ok(Suggestion { point, why });
            }
        }
        for _ in 0..MAX_DRAWS {
            let unit: Vec<f64> = self
                .space
                .parameters()
                .iter()
                .map(|_| rng.uniform())
                .collect();
            let point = self.space.point_at(&unit);
            if !self.space.is_forbidden(&point) && !tried.contains(&point) {
                return Ok(Suggestion { point, why });
            }
        }
        Err(Error::SpaceEmpty {
            message: "no allowed configuration was found that was not tried".to_owned(),
        })
    }
}
