//! Gaussian-process search: expected improvement (`gp`) and logits-aware expected improvement (`sabo`), both weighed
//! by a density of good configurations. LAEI's exact mode goes without that weight.

use super::sobol::scrambled;
use super::tpe::log_ratio;
use super::{Discrepancies, History, Sampler, Suggestion, Tried};
use crate::acquisition::{
    alpha, discrepancy, expected_improvement, moments, standardised_discrepancies,
};
use crate::config::{Direction, SaboOptions, StudyConfig};
use crate::error::{Error, Result};
use crate::gp::fit::{Priors, Problem, map_estimate};
use crate::gp::kernel::{Columns, Hyper, Order, orders};
use crate::gp::posterior::{Posterior, Prediction};
use crate::rng::{Rng, Stream};
use crate::space::{Point, Space, key, snap};
use crate::targets::Warped;
use crate::view::Why;

/// Hyper-parameters are fitted to at most this many observations; predictions use all.
const FIT_OBSERVATIONS: usize = 160;
/// Evaluations of the likelihood per fit.
const FIT_EVALUATIONS: usize = 40;
/// Quasi-random candidates in a space that is not enumerated.
const CANDIDATES: u64 = 2048;
/// Rounds of local refinement around the best candidates, and new candidates per round.
const REFINEMENTS: usize = 4;
const NEIGHBOURS: usize = 256;
/// Candidates that seed the refinement.
const SEEDS: usize = 8;

/// A fitted surrogate with everything needed to score points.
struct Surrogate<'a> {
    space: &'a Space,
    orders: Vec<Order>,
    columns: Columns,
    hyper: Hyper,
    /// Targets of observations, then the believed ones of pending points.
    targets: Vec<f64>,
    warped: Warped,
    /// Noise-robust incumbent: the least posterior mean at an observed point.
    incumbent: f64,
    /// The least observed target.
    best_observed: f64,
}

/// Scores of some candidates.
struct Scores {
    prediction: Prediction,
    improvement: Vec<f64>,
    /// S(x) as it is weighed.
    weighed: Option<Vec<f64>>,
    alpha: f64,
    total: Vec<f64>,
}

impl Sampler {
    /// Maximises weighed EI, or weighed EI + α·S where `discrepancies` are given.
    pub(super) fn surrogate(
        &mut self,
        config: &StudyConfig,
        number: u64,
        history: &History,
        tried: &Tried,
        mut discrepancies: Option<&mut Discrepancies<'_, '_>>,
    ) -> Result<Suggestion> {
        let surrogate = Surrogate::new(&self.space, history)?;
        let finished = history.observations.len();
        let drawn;
        let drawn_columns;
        let (candidates, columns, parts, tried_flags) = if let Some(finite) = &self.finite {
            if let (Some(source), None) = (&mut discrepancies, &self.finite_discrepancies) {
                self.finite_discrepancies = Some(source.of_all(&self.space, &finite.points)?);
            }
            let parts = discrepancies.and(self.finite_discrepancies.clone());
            (&finite.points, &finite.columns, parts, finite.tried(tried))
        } else {
            drawn = surrogate.candidates(config, number, history, tried)?;
            drawn_columns = Columns::new(&self.space, &drawn);
            let parts = match discrepancies {
                Some(source) => Some(source.of_all(&self.space, &drawn)?),
                None => None,
            };
            (&drawn, &drawn_columns, parts, vec![false; drawn.len()])
        };
        let weights = density_weights(&self.space, history, columns);
        let scores =
            surrogate.score(&config.sabo, columns, &weights, parts.as_deref(), finished)?;
        let chosen = (0..candidates.len())
            .filter(|&i| !tried_flags[i])
            .max_by(|&a, &b| scores.total[a].total_cmp(&scores.total[b]).then(b.cmp(&a)));
        let Some(i) = chosen else {
            return self.random(config, number, tried);
        };
        let sign = match config.direction {
            Direction::Minimize => 1.0,
            Direction::Maximize => -1.0,
        };
        let deviation = scores.prediction.variance[i].sqrt();
        Ok(Suggestion {
            point: candidates[i].clone(),
            why: Why {
                by: config.sampler.name().to_owned(),
                expected_improvement: Some(scores.improvement[i]),
                discrepancy: scores.weighed.as_ref().map(|s| s[i]),
                alpha: scores.weighed.as_ref().map(|_| scores.alpha),
                score: Some(scores.total[i]),
                mean: Some(sign * surrogate.warped.metric(scores.prediction.mean[i])),
                deviation: Some(deviation * surrogate.warped.scale),
            },
        })
    }
}

impl<'a> Surrogate<'a> {
    fn new(space: &'a Space, history: &History) -> Result<Self> {
        let failed = || Error::Surrogate {
            observations: history.observations.len(),
        };
        let values: Vec<Option<f64>> = history.observations.iter().map(|o| o.value).collect();
        let warped = Warped::new(&values).ok_or_else(failed)?;
        let orders = orders(space);
        let observed: Vec<Point> = history
            .observations
            .iter()
            .map(|o| o.point.clone())
            .collect();
        let columns = Columns::new(space, &observed);
        let hyper = fitted(space, &orders, &observed, &warped.targets);
        let posterior =
            Posterior::new(&orders, &columns, &hyper, &warped.targets).ok_or_else(failed)?;
        let at_observed = posterior.predict(&columns);
        let incumbent = at_observed
            .mean
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min);
        let best_observed = warped.targets.iter().copied().fold(f64::INFINITY, f64::min);
        let mut targets = warped.targets.clone();
        let mut columns = columns;
        if !history.pending.is_empty() {
            // A pending point is believed to come out at its posterior mean: that leaves every other mean as it
            // is and takes away the uncertainty that its result will take away.
            let believed = Posterior::new(&orders, &columns, &hyper, &warped.targets)
                .ok_or_else(failed)?
                .predict_points(space, &history.pending);
            targets.extend(believed.mean);
            let all: Vec<Point> = observed.iter().chain(&history.pending).cloned().collect();
            columns = Columns::new(space, &all);
        }
        Ok(Self {
            space,
            orders,
            columns,
            hyper,
            targets,
            warped,
            incumbent,
            best_observed,
        })
    }

    fn score(
        &self,
        options: &SaboOptions,
        candidates: &Columns,
        weights: &[f64],
        parts: Option<&[crate::objective::Discrepancy]>,
        finished: usize,
    ) -> Result<Scores> {
        let posterior = Posterior::new(&self.orders, &self.columns, &self.hyper, &self.targets)
            .ok_or(Error::Surrogate {
                observations: self.targets.len(),
            })?;
        let prediction = posterior.predict(candidates);
        let exact = parts.is_some() && options.is_laei();
        let (best, unit) = if exact {
            (self.best_observed, self.warped.scale)
        } else {
            (self.incumbent, 1.0)
        };
        let xi = if parts.is_some() {
            options.xi / self.warped.scale * unit
        } else {
            0.0
        };
        let improvement: Vec<f64> = prediction
            .mean
            .iter()
            .zip(&prediction.variance)
            .zip(weights)
            .map(|((mean, variance), weight)| {
                let improvement = unit * expected_improvement(*mean, variance.sqrt(), best, xi);
                improvement * if exact { 1.0 } else { *weight }
            })
            .collect();
        let alpha = alpha(options, finished);
        let weighed = parts.map(|parts| {
            if options.standardize {
                let (_, spread) = moments(improvement.iter().copied());
                let mut weighed = standardised_discrepancies(options, parts);
                for s in &mut weighed {
                    *s *= spread;
                }
                weighed
            } else {
                parts.iter().map(|p| discrepancy(options, p)).collect()
            }
        });
        let total = match &weighed {
            Some(weighed) => improvement
                .iter()
                .zip(weighed)
                .map(|(e, s)| e + alpha * s)
                .collect(),
            None => improvement.clone(),
        };
        Ok(Scores {
            prediction,
            improvement,
            weighed,
            alpha,
            total,
        })
    }

    /// Candidates of a space that cannot be enumerated: a scrambled Sobol set, then rounds of neighbours of the
    /// best observed points and of the candidates with the highest expected improvement.
    fn candidates(
        &self,
        config: &StudyConfig,
        number: u64,
        history: &History,
        tried: &Tried,
    ) -> Result<Vec<Point>> {
        let dimensions = self.space.parameters().len();
        let mut rng = Rng::new(config.seed, Stream::Candidates, number);
        let mut seen = std::collections::BTreeSet::new();
        let mut candidates = Vec::new();
        let mut admit = |point: Point, candidates: &mut Vec<Point>| {
            let new = !self.space.is_forbidden(&point) && !tried.contains(&point);
            if new && seen.insert(key(&point)) {
                candidates.push(point);
            }
        };
        for index in 0..CANDIDATES {
            let unit = scrambled(
                index,
                dimensions,
                config.seed,
                Stream::Candidates,
                number + 1,
            );
            admit(self.space.point_at(&unit), &mut candidates);
        }
        let mut observed: Vec<(f64, &Point)> = history
            .observations
            .iter()
            .filter_map(|o| Some((o.value?, &o.point)))
            .collect();
        observed.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut seeds: Vec<Point> = observed
            .iter()
            .take(SEEDS)
            .map(|(_, p)| (*p).clone())
            .collect();
        for round in 0..REFINEMENTS {
            let radius = 0.2 * 0.4f64.powi(round as i32);
            for i in 0..NEIGHBOURS {
                if let Some(seed) = seeds.get(i % seeds.len().max(1)) {
                    admit(self.neighbour(seed, radius, &mut rng), &mut candidates);
                }
            }
            let columns = Columns::new(self.space, &candidates);
            let weights = density_weights(self.space, history, &columns);
            let scores = self.score(&config.sabo, &columns, &weights, None, 0)?;
            let mut order: Vec<usize> = (0..candidates.len()).collect();
            order.sort_by(|&a, &b| scores.total[b].total_cmp(&scores.total[a]).then(a.cmp(&b)));
            seeds = order
                .iter()
                .take(SEEDS)
                .map(|&i| candidates[i].clone())
                .collect();
        }
        Ok(candidates)
    }

    /// Moves one or more parameters of a point: a Gaussian step where there is an order, any other level where not.
    fn neighbour(&self, point: &[f64], radius: f64, rng: &mut Rng) -> Point {
        let parameters = self.space.parameters();
        let mut next = point.to_vec();
        let always = rng.below(parameters.len());
        for (j, parameter) in parameters.iter().enumerate() {
            if j != always && rng.uniform() > 2.0 / parameters.len() as f64 {
                continue;
            }
            next[j] = match parameter.domain().levels() {
                None => snap(point[j] + radius * rng.normal()),
                Some(1) => point[j],
                Some(levels) if parameter.domain().is_nominal() => {
                    ((point[j] as usize + 1 + rng.below(levels - 1)) % levels) as f64
                }
                Some(levels) => {
                    let last = (levels - 1) as f64;
                    let step = (radius * last * rng.normal()).round();
                    let step = if step == 0.0 {
                        (rng.below(2) * 2) as f64 - 1.0
                    } else {
                        step
                    };
                    (point[j] + step).clamp(0.0, last)
                }
            };
        }
        self.space.canonicalise(&mut next);
        next
    }
}

/// l/g of the Parzen estimator, by which expected improvement is multiplied.
///
/// The densities look at ranks only: they see which levels the good configurations share, whatever steps or cliffs the
/// metric has elsewhere. Its root, its square and no weight at all were tried and are worse (docs/lab-log-search.md).
fn density_weights(space: &Space, history: &History, candidates: &Columns) -> Vec<f64> {
    log_ratio(space, history, candidates)
        .into_iter()
        .map(f64::exp)
        .collect()
}

/// Fits hyper-parameters. Of many observations a subset decides them: the best half, and of the rest an even sample
/// in the order of the trials.
fn fitted(space: &Space, orders: &[Order], observed: &[Point], targets: &[f64]) -> Hyper {
    let chosen = fitting_subset(targets);
    let points: Vec<Point> = chosen.iter().map(|&i| observed[i].clone()).collect();
    let values: Vec<f64> = chosen.iter().map(|&i| targets[i]).collect();
    let columns = Columns::new(space, &points);
    map_estimate(
        &Problem::new(orders, &columns, &values, &Priors::default()),
        FIT_EVALUATIONS,
    )
}

fn fitting_subset(targets: &[f64]) -> Vec<usize> {
    let n = targets.len();
    if n <= FIT_OBSERVATIONS {
        return (0..n).collect();
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| targets[a].total_cmp(&targets[b]).then(a.cmp(&b)));
    let (best, rest) = order.split_at(FIT_OBSERVATIONS / 2);
    let mut rest = rest.to_vec();
    rest.sort_unstable();
    let wanted = FIT_OBSERVATIONS - best.len();
    let mut chosen = best.to_vec();
    chosen.extend((0..wanted).map(|i| rest[i * rest.len() / wanted]));
    chosen.sort_unstable();
    chosen
}
