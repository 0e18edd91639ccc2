//! A space without what can't be evaluated at all.

use super::Space;
use super::spec::OneOrMany;
use crate::error::Result;
use crate::params::{Params, Value};

/// A level that no configuration with it can be evaluated with.
#[derive(Debug, Clone, PartialEq)]
pub struct Impossible {
    /// The parameter's name.
    pub parameter: String,
    /// The level.
    pub value: Value,
    /// What is against one of the configurations.
    pub reason: String,
}

impl Space {
    /// The space without the levels for which every allowed configuration is refused by `check`, with these levels. Such
    /// levels are forbidden, so that the parameters stay what they are. A space that is too large to be enumerated stays as
    /// it is. Configurations are checked until one with each level passes.
    ///
    /// # Errors
    /// [`crate::Error::SpaceEmpty`] where no configuration is left.
    pub fn narrowed(
        &self,
        mut check: impl FnMut(&Params) -> std::result::Result<(), String>,
    ) -> Result<(Space, Vec<Impossible>)> {
        let Some(points) = self.enumerate() else {
            return Ok((self.clone(), Vec::new()));
        };
        let mut checked = vec![None; points.len()];
        let mut left: Vec<usize> = (0..points.len()).collect();
        let mut spec = self.spec.clone();
        let mut impossible = Vec::new();
        // A conditional parameter's levels go with those of the parameter that it depends on.
        let mut order: Vec<usize> = (0..self.parameters.len()).collect();
        order.sort_by_key(|&j| self.parameters[j].is_conditional());
        for j in order {
            let parameter = &self.parameters[j];
            for level in 0..parameter.domain.levels().unwrap_or(0) {
                let has = |index: usize| points[index][j] == level as f64;
                let mut reason = None;
                let passes = left
                    .iter()
                    .copied()
                    .filter(|&index| has(index))
                    .any(|index| {
                        let found = checked[index]
                            .get_or_insert_with(|| check(&self.params(&points[index])))
                            .clone();
                        found.map_err(|error| reason = Some(error)).is_ok()
                    });
                let Some(reason) = reason.filter(|_| !passes) else {
                    continue;
                };
                let value = parameter.domain.value(level as f64);
                let name = parameter.name.clone();
                let forbidden = [(name.clone(), OneOrMany::One(value.clone()))];
                spec.forbid.push(forbidden.into());
                left.retain(|&index| !has(index));
                impossible.push(Impossible {
                    parameter: name,
                    value,
                    reason,
                });
            }
        }
        if impossible.is_empty() {
            return Ok((self.clone(), impossible));
        }
        Ok((Space::from_spec(spec)?, impossible))
    }
}
