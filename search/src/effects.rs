//! What a study has learned of its parameters, read off the posterior mean of the Gaussian process.
//!
//! With the parameters drawn uniformly, the part of the mean's variance that one parameter explains alone is its
//! importance (Sobol's first-order index), and what two explain together beyond that is their interaction (Sobol
//! 2001, "Global sensitivity indices for nonlinear mathematical models"). The mean over all other parameters at a
//! fixed level is the partial dependence (Friedman 2001, Section 8.2).

use serde::Serialize;

use crate::acquisition::moments;
use crate::error::Result;
use crate::gp::fit::{Priors, Problem, map_estimate};
use crate::gp::kernel::{Columns, orders};
use crate::gp::posterior::Posterior;
use crate::params::Value;
use crate::rng::{Rng, Stream};
use crate::space::{Point, Space};
use crate::targets::Warped;
use crate::view::{StudyView, TrialView};

/// Configurations over which means are taken, for one parameter and for two.
const SAMPLE: usize = 512;
const PAIR_SAMPLE: usize = 96;
/// Levels of a parameter that has more, or a range.
const GRID: usize = 12;
/// Hyper-parameters are fitted to at most this many trials, the last ones.
const TRIALS: usize = 200;
/// Evaluations of the likelihood.
const EVALUATIONS: usize = 60;
/// Trials with a value below which nothing is said.
const LEAST: usize = 6;

/// Effects of the parameters on the metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effects {
    /// One per parameter, in the space's order.
    pub parameters: Vec<ParameterEffect>,
    /// Pairs of parameters, the strongest first.
    pub interactions: Vec<Interaction>,
}

/// What one parameter does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParameterEffect {
    /// Its name.
    pub name: String,
    /// Share of the mean's variance that it explains alone, in [0, 1].
    pub importance: f64,
    /// Partial dependence: the metric expected at each level, over all other parameters.
    pub levels: Vec<(Value, f64)>,
}

/// What two parameters do together beyond what each does alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interaction {
    /// The first parameter's name.
    pub first: String,
    /// The second parameter's name.
    pub second: String,
    /// Share of the mean's variance, in [0, 1].
    pub importance: f64,
}

/// What the configuration that was best so far is worth, by a surrogate that knows all trials.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Incumbent {
    /// The trial after which it was the best one.
    pub trial: u64,
    /// Its expected metric, without the noise of a single trial.
    pub mean: f64,
    /// Standard deviation of that expectation.
    pub deviation: f64,
}

impl StudyView {
    /// The parameters' effects; `None` where too few trials have a value or none differs.
    pub fn effects(&self) -> Result<Option<Effects>> {
        self.fitted(|space, posterior, warped, sign| {
            let mean = |points: &[Point]| posterior.predict_points(space, points).mean;
            let metric = |target: f64| sign * warped.metric(target);
            decompose(space, &mean, &metric)
        })
    }

    /// For each trial of the first rung from the first value on, what the best configuration so far is worth: the
    /// line of the best values themselves is too good, because luck helps to be the best.
    pub fn incumbents(&self) -> Result<Option<Vec<Incumbent>>> {
        let sign = self.config.direction.sign();
        let mut best: Option<&TrialView> = None;
        let mut holders: Vec<(u64, &TrialView)> = Vec::new();
        for trial in self.trials.iter().filter(|t| t.rung == 0) {
            if let Some(value) = trial.value
                && best
                    .and_then(|best| best.value)
                    .is_none_or(|least| sign * value < sign * least)
            {
                best = Some(trial);
            }
            holders.extend(best.map(|best| (trial.number, best)));
        }
        let curve = self.fitted(|space, posterior, warped, sign| -> Result<Vec<Incumbent>> {
            let points: Result<Vec<Point>> = holders
                .iter()
                .map(|(_, best)| space.point(&best.params))
                .collect();
            let prediction = posterior.predict_points(space, &points?);
            Ok(holders
                .iter()
                .zip(prediction.mean.iter().zip(&prediction.variance))
                .map(|((trial, _), (mean, variance))| Incumbent {
                    trial: *trial,
                    mean: sign * warped.metric(*mean),
                    deviation: variance.sqrt() * warped.scale,
                })
                .collect())
        })?;
        curve.transpose()
    }

    /// The trial whose configuration is worth most by a surrogate that knows all trials: where trials are noisy a
    /// safer choice than [`StudyView::best`], which luck helps to its place. On a ladder the highest rung decides
    /// instead, and as long as too little is known the best value does.
    pub fn recommended(&self) -> Result<Option<&TrialView>> {
        let best = self.best();
        if best.is_none_or(|best| best.rung > 0) {
            return Ok(best);
        }
        let complete: Vec<&TrialView> = self.trials.iter().filter(|t| t.value.is_some()).collect();
        let least = self.fitted(|space, posterior, _, _| -> Result<Option<usize>> {
            let points: Result<Vec<Point>> =
                complete.iter().map(|t| space.point(&t.params)).collect();
            let mean = posterior.predict_points(space, &points?).mean;
            Ok((0..mean.len()).min_by(|&a, &b| mean[a].total_cmp(&mean[b])))
        })?;
        Ok(match least.transpose()?.flatten() {
            Some(index) => Some(complete[index]),
            None => best,
        })
    }

    /// Reads something off the Gaussian process of the first rung's trials: its space, the process, the warping of
    /// its targets, and what a target is multiplied by after that.
    fn fitted<T>(
        &self,
        read: impl FnOnce(&Space, &Posterior<'_>, &Warped, f64) -> T,
    ) -> Result<Option<T>> {
        let space = Space::from_json(&self.space.to_string())?;
        let sign = self.config.direction.sign();
        let finished: Vec<&TrialView> = self
            .trials
            .iter()
            .filter(|t| t.rung == 0 && t.state.is_finished())
            .collect();
        let latest = &finished[finished.len().saturating_sub(TRIALS)..];
        let points: Vec<Point> = latest
            .iter()
            .map(|t| space.point(&t.params))
            .collect::<Result<_>>()?;
        let values: Vec<Option<f64>> = latest.iter().map(|t| t.value.map(|v| sign * v)).collect();
        let known = values.iter().flatten();
        if known.clone().count() < LEAST || known.clone().all(|v| Some(v) == known.clone().next()) {
            return Ok(None);
        }
        // Everything a fitted process borrows lives here.
        let Some(warped) = Warped::new(&values) else {
            return Ok(None);
        };
        let orders = orders(&space);
        let columns = Columns::new(&space, &points);
        let hyper = map_estimate(
            &Problem::new(&orders, &columns, &warped.targets, &Priors::default()),
            EVALUATIONS,
        );
        let posterior = Posterior::new(&orders, &columns, &hyper, &warped.targets);
        Ok(posterior.map(|posterior| read(&space, &posterior, &warped, sign)))
    }
}

/// Effects of a function of the space's points, whose values `metric` turns into what is shown.
fn decompose(
    space: &Space,
    function: &dyn Fn(&[Point]) -> Vec<f64>,
    metric: &dyn Fn(f64) -> f64,
) -> Effects {
    let sample = sample(space, SAMPLE);
    let (_, deviation) = moments(function(&sample).iter().copied());
    let variance = deviation * deviation;
    let share = |part: f64| {
        if variance > 1e-12 {
            (part / variance).clamp(0.0, 1.0)
        } else {
            0.0
        }
    };
    let parameters = space.parameters();
    let grids: Vec<Vec<f64>> = (0..parameters.len()).map(|j| grid(space, j)).collect();
    let mut effects = Vec::new();
    for (j, parameter) in parameters.iter().enumerate() {
        let levels: Vec<(f64, f64)> = grids[j]
            .iter()
            .filter_map(|code| Some((*code, mean_at(space, function, &sample, &[(j, *code)])?)))
            .collect();
        let (_, spread) = moments(levels.iter().map(|level| level.1));
        effects.push(ParameterEffect {
            name: parameter.name().to_owned(),
            importance: share(spread * spread),
            levels: levels
                .into_iter()
                .map(|(code, mean)| (parameter.domain().value(code), metric(mean)))
                .collect(),
        });
    }
    let few = &sample[..PAIR_SAMPLE.min(sample.len())];
    let mut interactions = Vec::new();
    for j in 0..parameters.len() {
        for l in 0..j {
            let table: Vec<Vec<f64>> = grids[l]
                .iter()
                .filter_map(|a| {
                    // Where one switches the other off there is nothing that they do together.
                    let row = grids[j].iter();
                    row.map(|b| mean_at(space, function, few, &[(l, *a), (j, *b)]))
                        .collect()
                })
                .collect();
            interactions.push(Interaction {
                first: parameters[l].name().to_owned(),
                second: parameters[j].name().to_owned(),
                importance: share(beyond_sums(&table)),
            });
        }
    }
    interactions.sort_by(|a, b| b.importance.total_cmp(&a.importance));
    Effects {
        parameters: effects,
        interactions,
    }
}

/// Mean of the function with some parameters fixed, over the points where these matter and are allowed; `None`
/// where there is no such point.
fn mean_at(
    space: &Space,
    function: &dyn Fn(&[Point]) -> Vec<f64>,
    sample: &[Point],
    fixed: &[(usize, f64)],
) -> Option<f64> {
    let points: Vec<Point> = sample
        .iter()
        .filter_map(|point| {
            let mut point = point.clone();
            for (j, code) in fixed {
                point[*j] = *code;
            }
            space.canonicalise(&mut point);
            let matter = fixed.iter().all(|(j, _)| space.is_active(*j, &point));
            (matter && !space.is_forbidden(&point)).then_some(point)
        })
        .collect();
    (!points.is_empty()).then(|| moments(function(&points).iter().copied()).0)
}

/// Variance of what is left of a table when its rows' and columns' means are taken out.
fn beyond_sums(table: &[Vec<f64>]) -> f64 {
    let (rows, columns) = (table.len() as f64, table.first().map_or(0, Vec::len) as f64);
    if rows * columns == 0.0 {
        return 0.0;
    }
    let all: f64 = table.iter().flatten().sum::<f64>() / (rows * columns);
    let row_means: Vec<f64> = table
        .iter()
        .map(|row| row.iter().sum::<f64>() / columns)
        .collect();
    let mut sum = 0.0;
    for (row, row_mean) in table.iter().zip(&row_means) {
        for (column, value) in row.iter().enumerate() {
            let column_mean: f64 = table.iter().map(|row| row[column]).sum::<f64>() / rows;
            sum += (value - row_mean - column_mean + all).powi(2);
        }
    }
    sum / (rows * columns)
}

/// Random allowed points, the same for every call.
fn sample(space: &Space, count: usize) -> Vec<Point> {
    let mut points = Vec::with_capacity(count);
    for number in 0..20 * count as u64 {
        let mut rng = Rng::new(0, Stream::Candidates, number);
        let unit: Vec<f64> = space.parameters().iter().map(|_| rng.uniform()).collect();
        let point = space.point_at(&unit);
        if !space.is_forbidden(&point) {
            points.push(point);
        }
        if points.len() == count {
            break;
        }
    }
    points
}

/// The codes at which a parameter is looked at: all levels, or some evenly spread ones.
fn grid(space: &Space, j: usize) -> Vec<f64> {
    let domain = space.parameters()[j].domain();
    match domain.levels() {
        Some(levels) if levels <= 2 * GRID => (0..levels).map(|level| level as f64).collect(),
        _ => {
            let mut codes: Vec<f64> = (0..GRID)
                .map(|i| domain.code_at(i as f64 / (GRID - 1) as f64))
                .collect();
            codes.dedup();
            codes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        Space::from_toml(
            "[[param]]\nname = 'a'\nkind = 'int'\nlow = 0\nhigh = 1\n\
             [[param]]\nname = 'b'\nkind = 'int'\nlow = 0\nhigh = 1\n\
             [[param]]\nname = 'c'\nkind = 'float'\nlow = 0.0\nhigh = 1.0\n",
        )
        .unwrap()
    }

    /// f = 2a + 4(a − ½)(b − ½): Var = 1 + 1, of which a explains 1 alone, a and b together the other, c nothing.
    #[test]
    fn a_known_function_is_taken_apart() {
        let space = space();
        let f = |points: &[Point]| -> Vec<f64> {
            points
                .iter()
                .map(|p| 2.0 * p[0] + 4.0 * (p[0] - 0.5) * (p[1] - 0.5))
                .collect()
        };
        let effects = decompose(&space, &f, &|y| -y);
        let importance: Vec<f64> = effects.parameters.iter().map(|p| p.importance).collect();
        assert!((importance[0] - 0.5).abs() < 0.06, "{importance:?}");
        assert!(
            importance[1] < 0.02 && importance[2] < 1e-12,
            "{importance:?}"
        );
        let strongest = &effects.interactions[0];
        assert_eq!(
            (strongest.first.as_str(), strongest.second.as_str()),
            ("a", "b")
        );
        assert!((strongest.importance - 0.5).abs() < 0.06, "{strongest:?}");
        assert!(effects.interactions[1].importance < 0.02);
        let levels = &effects.parameters[0].levels;
        assert_eq!(levels[1].0, Value::Integer(1));
        assert!((levels[0].1 - levels[1].1 - 2.0).abs() < 0.2, "{levels:?}");
    }
}
