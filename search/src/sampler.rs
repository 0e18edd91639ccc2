//! Samplers: from what was observed to the next configuration.
//!
//! A suggestion is a function of (space, settings, trial number, history) and nothing else; what a [`Sampler`]
//! remembers between calls only saves time. No sampler returns a point that was observed or is pending, unless the
//! space is exhausted: then the point with the fewest evaluations is replicated.

mod random;
mod sobol;
mod surrogate;
mod tpe;

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{SamplerKind, StudyConfig};
use crate::error::{BoxError, Error, Result};
use crate::gp::kernel::Columns;
use crate::objective::{DependsOn, Discrepancy};
use crate::params::Params;
use crate::rng::{Rng, Stream};
use crate::space::{Point, Space, key};
use crate::view::Why;

/// What a suggestion is based on, in the order of the trials' numbers.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// Finished trials.
    pub(crate) observations: Vec<Observation>,
    /// Trials suggested earlier that have no result yet.
    pub(crate) pending: Vec<Point>,
}

/// One finished trial.
#[derive(Debug, Clone)]
pub(crate) struct Observation {
    pub(crate) point: Point,
    /// The metric, turned so that smaller is better; `None` for a failure.
    pub(crate) value: Option<f64>,
}

/// The next point and why.
#[derive(Debug, Clone)]
pub(crate) struct Suggestion {
    pub(crate) point: Point,
    pub(crate) why: Why,
}

/// Measures S(x)'s parts for one configuration.
pub(crate) type Measure<'a> = dyn FnMut(&Params) -> std::result::Result<Discrepancy, BoxError> + 'a;

/// A space made ready for many suggestions.
pub(crate) struct Sampler {
    pub(crate) space: Space,
    /// Every distinct point, where the space is finite.
    finite: Option<Finite>,
    /// S(x)'s parts of every point of a finite space, once measured.
    finite_discrepancies: Option<Vec<Discrepancy>>,
}

/// The points of a space that is listed whole.
struct Finite {
    points: Vec<Point>,
    columns: Columns,
    index: BTreeMap<Vec<u64>, usize>,
}

impl Finite {
    fn new(space: &Space, points: Vec<Point>) -> Self {
        Self {
            columns: Columns::new(space, &points),
            index: points
                .iter()
                .enumerate()
                .map(|(i, p)| (key(p), i))
                .collect(),
            points,
        }
    }

    /// For each point, whether it was tried.
    fn tried(&self, tried: &Tried) -> Vec<bool> {
        let mut flags = vec![false; self.points.len()];
        for i in tried.0.iter().filter_map(|key| self.index.get(key)) {
            flags[*i] = true;
        }
        flags
    }
}

impl Sampler {
    pub(crate) fn new(space: &Space) -> Self {
        Self {
            space: space.clone(),
            finite: space.enumerate().map(|points| Finite::new(space, points)),
            finite_discrepancies: None,
        }
    }

    /// The suggestion for trial `number`. `discrepancies` is asked only by [`SamplerKind::Sabo`].
    pub(crate) fn suggest(
        &mut self,
        config: &StudyConfig,
        number: u64,
        history: &History,
        discrepancies: &mut Discrepancies<'_, '_>,
    ) -> Result<Suggestion> {
        let tried = history.tried();
        if let Some(replicate) = self.replicate(config, number, history, &tried) {
            return Ok(replicate);
        }
        let enough = history.successes() >= 3 && number >= config.startup;
        match config.sampler {
            SamplerKind::Random => self.random(config, number, &tried),
            SamplerKind::Sobol => self.sobol(config, number, &tried, "sobol"),
            SamplerKind::Tpe | SamplerKind::Gp | SamplerKind::Sabo if !enough => {
                self.sobol(config, number, &tried, "startup")
            }
            SamplerKind::Tpe => self.tpe(config, number, history, &tried),
            SamplerKind::Gp => self.surrogate(config, number, history, &tried, None),
            SamplerKind::Sabo => {
                self.surrogate(config, number, history, &tried, Some(discrepancies))
            }
        }
    }

    /// When nothing is left to try: the least evaluated point, the better one first.
    fn replicate(
        &self,
        config: &StudyConfig,
        number: u64,
        history: &History,
        tried: &Tried,
    ) -> Option<Suggestion> {
        let points = &self.finite.as_ref()?.points;
        if points.iter().any(|point| !tried.contains(point)) {
            return None;
        }
        let mut evaluations: BTreeMap<Vec<u64>, (usize, f64, usize)> = BTreeMap::new();
        for observation in &history.observations {
            let entry = evaluations.entry(key(&observation.point)).or_default();
            entry.0 += 1;
            if let Some(value) = observation.value {
                entry.1 += value;
                entry.2 += 1;
            }
        }
        for point in &history.pending {
            evaluations.entry(key(point)).or_default().0 += 1;
        }
        let rank = |point: &Point| {
            let (count, sum, values) = evaluations.get(&key(point)).copied().unwrap_or_default();
            let mean = if values == 0 {
                f64::INFINITY
            } else {
                sum / values as f64
            };
            (count, mean)
        };
        let mut tie = Rng::new(config.seed, Stream::Ties, number);
        let start = tie.below(points.len());
        (0..points.len())
            .map(|i| &points[(start + i) % points.len()])
            .min_by(|a, b| {
                let ((count_a, mean_a), (count_b, mean_b)) = (rank(a), rank(b));
                count_a.cmp(&count_b).then(mean_a.total_cmp(&mean_b))
            })
            .map(|point| Suggestion {
                point: point.clone(),
                why: Why {
                    by: "replicate".to_owned(),
                    ..Why::default()
                },
            })
    }
}

/// The points that are not to be proposed again.
pub(crate) struct Tried(BTreeSet<Vec<u64>>);

impl Tried {
    pub(crate) fn contains(&self, point: &[f64]) -> bool {
        self.0.contains(&key(point))
    }
}

impl History {
    pub(crate) fn tried(&self) -> Tried {
        Tried(
            self.observations
                .iter()
                .map(|o| &o.point)
                .chain(&self.pending)
                .map(|point| key(point))
                .collect(),
        )
    }

    pub(crate) fn successes(&self) -> usize {
        self.observations
            .iter()
            .filter(|o| o.value.is_some())
            .count()
    }
}

/// S(x)'s parts, measured once per distinct setting of the parameters they depend on.
pub(crate) struct Discrepancies<'a, 'm> {
    depends_on: DependsOn,
    known: &'a mut BTreeMap<(Part, String), f64>,
    measure: Option<&'a mut Measure<'m>>,
    /// What was measured by this object, for the study.
    pub(crate) fresh: Vec<(Part, String, f64)>,
}

/// The two parts of S(x).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Logits,
    Hidden,
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Logits => "logits",
            Self::Hidden => "hidden",
        }
    }
}

impl<'a, 'm> Discrepancies<'a, 'm> {
    /// Without `measure`, what is not known counts as 0.
    pub(crate) fn new(
        depends_on: DependsOn,
        known: &'a mut BTreeMap<(Part, String), f64>,
        measure: Option<&'a mut Measure<'m>>,
    ) -> Self {
        Self {
            depends_on,
            known,
            measure,
            fresh: Vec::new(),
        }
    }

    pub(crate) fn of(&mut self, params: &Params) -> Result<Discrepancy> {
        let keys = [
            (Part::Logits, params.only(&self.depends_on.logits).to_json()),
            (Part::Hidden, params.only(&self.depends_on.hidden).to_json()),
        ];
        if keys.iter().any(|k| !self.known.contains_key(k))
            && let Some(measure) = self.measure.as_mut()
        {
            let failed = |source| Error::Discrepancy {
                params: params.to_json(),
                source,
            };
            let found = measure(params).map_err(failed)?;
            if !found.logits.is_finite() || !found.hidden.is_finite() {
                return Err(failed("the measured discrepancy is not finite".into()));
            }
            for (k, value) in keys.iter().zip([found.logits, found.hidden]) {
                if !self.known.contains_key(k) {
                    self.known.insert(k.clone(), value);
                    self.fresh.push((k.0, k.1.clone(), value));
                }
            }
        }
        let [logits, hidden] = keys.map(|k| self.known.get(&k).copied().unwrap_or(0.0));
        Ok(Discrepancy { logits, hidden })
    }

    /// The parts for many points, asking once per distinct setting.
    pub(crate) fn of_all(&mut self, space: &Space, points: &[Point]) -> Result<Vec<Discrepancy>> {
        let names: Vec<&str> = space.names().collect();
        let relevant: Vec<usize> = (0..names.len())
            .filter(|&j| {
                let lists = [&self.depends_on.logits, &self.depends_on.hidden];
                lists
                    .iter()
                    .any(|list| list.iter().any(|name| name == names[j]))
            })
            .collect();
        let mut seen: BTreeMap<Vec<u64>, Discrepancy> = BTreeMap::new();
        points
            .iter()
            .map(|point| {
                let codes: Vec<u64> = relevant.iter().map(|&j| point[j].to_bits()).collect();
                if let Some(found) = seen.get(&codes) {
                    return Ok(*found);
                }
                let found = self.of(&space.params(point))?;
                seen.insert(codes, found);
                Ok(found)
            })
            .collect()
    }
}
