//! Uniform random search without repetition.

use super::{Sampler, Suggestion, Tried};
use crate::config::StudyConfig;
use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};
use crate::view::Why;

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
        self.space
            .draws(&mut rng)
            .find(|point| !tried.contains(point))
            .map(|point| Suggestion { point, why })
            .ok_or_else(|| Error::SpaceEmpty {
                message: "no allowed configuration was found that was not tried".to_owned(),
            })
    }
}
