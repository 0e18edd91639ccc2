//! The drawings of a study.

use caskd_search::{
    Direction, Effects, Incumbent, ParameterEffect, RungTrust, StudyView, TrialState, TrialView,
};

use super::svg::{Plot, Svg, number};
use crate::commands::search::{Comparison, best_so_far};
use crate::objective::setting_text;

const WIDE: f64 = 760.0;
/// Of a normal variable, 95% lie within so many standard deviations.
const NORMAL: f64 = 1.96;

/// Value of each trial, the best so far, and the band in which the surrogate believes what the best is worth. Values
/// far worse than the median are left to the edge.
pub(super) fn progress(view: &StudyView, incumbents: &[Incumbent], metric: &str) -> String {
    let sign = view.config.direction.sign();
    let trials: Vec<&TrialView> = view.trials.iter().filter(|t| t.rung == 0).collect();
    let values: Vec<(f64, f64)> = trials
        .iter()
        .enumerate()
        .filter_map(|(i, t)| Some((i as f64 + 1.0, t.value?)))
        .collect();
    if values.is_empty() {
        return String::new();
    }
    let cap = drawn_in(values.iter().map(|v| sign * v.1));
    let shown: Vec<(f64, f64)> = values
        .iter()
        .map(|(i, v)| (*i, sign * (sign * v).min(cap)))
        .collect();
    let clip = |value: f64| sign * (sign * value).min(cap);
    let edges: Vec<[(f64, f64); 2]> = incumbents
        .iter()
        .filter_map(|incumbent| {
            let i = trials.iter().position(|t| t.number == incumbent.trial)? as f64 + 1.0;
            let half = NORMAL * incumbent.deviation;
            Some([
                (i, clip(incumbent.mean + half)),
                (i, clip(incumbent.mean - half)),
            ])
        })
        .collect();
    let mut svg = Svg::new(
        WIDE,
        320.0,
        &format!("{metric} by trial, the best so far, and the 95% band of what it is worth"),
    );
    let all: Vec<(f64, f64)> = shown
        .iter()
        .chain(edges.iter().flatten())
        .copied()
        .collect();
    let plot = Plot::around(&svg, &all);
    plot.axes(&mut svg, "trial", metric);
    let [upper, lower] =
        [0, 1].map(|edge| steps(&plot, &edges.iter().map(|e| e[edge]).collect::<Vec<_>>()));
    svg.area(
        "band f0",
        &upper
            .into_iter()
            .chain(lower.into_iter().rev())
            .collect::<Vec<_>>(),
    );
    let best: Vec<(f64, f64)> = best_so_far(&view.trials, sign)
        .into_iter()
        .enumerate()
        .filter_map(|(i, v)| Some((i as f64 + 1.0, sign * (sign * v?).min(cap))))
        .collect();
    svg.path("curve c0", &steps(&plot, &best), "best so far");
    for ((i, y), (_, value)) in shown.iter().zip(&values) {
        let trial = trials[*i as usize - 1];
        let title = format!("trial {}: {}", trial.number, number(*value));
        svg.dot("trial", plot.at((*i, *y)), 3.5, &title);
    }
    svg.finish()
}

/// Mean of the best so far over a sampler's studies, with the 95% band of the mean.
pub(super) fn regret(comparison: &Comparison) -> String {
    // Student's t at 97.5% for 1, 2, … degrees of freedom (tables; 1.96 beyond).
    const T: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];
    let mut curves = Vec::new();
    for sampled in &comparison.samplers {
        let length = sampled
            .studies
            .iter()
            .map(|s| s.best_so_far.len())
            .min()
            .unwrap_or(0);
        let mut curve = Vec::new();
        for i in 0..length {
            let values: Option<Vec<f64>> =
                sampled.studies.iter().map(|s| s.best_so_far[i]).collect();
            // Before every study has a value there is no mean.
            let Some(values) = values.filter(|values| !values.is_empty()) else {
                continue;
            };
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
            let half = if values.len() > 1 {
                let t = T.get(values.len() - 2).copied().unwrap_or(1.96);
                t * (squares / (n - 1.0) / n).sqrt()
            } else {
                0.0
            };
            curve.push((i as f64 + 1.0, mean, half));
        }
        curves.push((sampled.sampler.as_str(), curve));
    }
    let sign = if comparison.maximize { -1.0 } else { 1.0 };
    let means = || curves.iter().flat_map(|(_, curve)| curve);
    if means().next().is_none() {
        return String::new();
    }
    // Scaled to the means after the first few trials: what comes before is luck.
    let cap = drawn_in(means().map(|point| sign * point.1));
    let clip = |value: f64| sign * (sign * value).min(cap);
    let all: Vec<(f64, f64)> = means()
        .flat_map(|(i, mean, half)| [(*i, clip(mean - half)), (*i, clip(mean + half))])
        .collect();
    let mut svg = Svg::new(
        WIDE,
        340.0,
        "mean of the best value so far with its 95% confidence band, by sampler",
    );
    let plot = Plot::around(&svg, &all);
    plot.axes(&mut svg, "trials", &format!("best {}", comparison.metric));
    for (c, (_, curve)) in curves.iter().enumerate() {
        let upper = curve.iter().map(|(i, m, h)| plot.at((*i, clip(m + h))));
        let lower = curve
            .iter()
            .rev()
            .map(|(i, m, h)| plot.at((*i, clip(m - h))));
        svg.area(
            &format!("band f{}", c % 5),
            &upper.chain(lower).collect::<Vec<_>>(),
        );
    }
    for (c, (name, curve)) in curves.iter().enumerate() {
        let points: Vec<(f64, f64)> = curve
            .iter()
            .map(|(i, m, _)| plot.at((*i, clip(*m))))
            .collect();
        svg.path(&format!("curve c{}", c % 5), &points, name);
        let y = 24.0 + 18.0 * c as f64;
        svg.line(
            &format!("curve c{}", c % 5),
            (WIDE - 120.0, y - 4.0),
            (WIDE - 96.0, y - 4.0),
        );
        svg.text("start", (WIDE - 90.0, y), name);
    }
    svg.finish()
}

/// One axis per parameter and one for the value, one line per trial (BayesKD's Figure 2).
pub(super) fn parallel(view: &StudyView, metric: &str) -> String {
    let sign = view.config.direction.sign();
    let mut trials: Vec<(&TrialView, f64)> = view
        .trials
        .iter()
        .filter(|t| t.rung == 0)
        .filter_map(|t| Some((t, t.value?)))
        .collect();
    let Some(&(first, _)) = trials.first() else {
        return String::new();
    };
    // The best are drawn last, on top.
    trials.sort_by(|a, b| (sign * b.1).total_cmp(&(sign * a.1)));
    let cap = drawn_in(trials.iter().map(|t| sign * t.1));
    let names: Vec<&str> = first.params.iter().map(|(name, _)| name).collect();
    // The names of neighbouring axes must not touch.
    let gap = longest(names.iter().copied()).max(108.0) + 10.0;
    let (top, height) = (40.0, 300.0);
    let mut svg = Svg::new(
        gap * (names.len() as f64 + 0.5) + 71.0,
        top + height + 34.0,
        "parallel coordinates of all trials",
    );
    let x = |axis: usize| 1.0 + gap * (axis as f64 + 0.5);
    let y = |place: f64| top + (1.0 - place) * height;
    let axes: Vec<AxisPlaces> = names.iter().map(|name| axis_of(&trials, name)).collect();
    let last = names.len();
    let low = trials
        .iter()
        .map(|t| sign * t.1)
        .fold(f64::INFINITY, f64::min);
    let place = |value: f64| (cap - (sign * value).min(cap)) / (cap - low).max(1e-12);
    let count = trials.len();
    for (rank, (trial, value)) in trials.iter().enumerate() {
        let mut line: Vec<(f64, f64)> = axes
            .iter()
            .enumerate()
            .map(|(axis, places)| (x(axis), y(places.trials[rank])))
            .collect();
        line.push((x(last), y(place(*value))));
        let class = if rank + 1 == count {
            "lead".to_owned()
        } else {
            format!("trace q{}", 5 * rank / count)
        };
        let title = format!(
            "trial {}: {} ({})",
            trial.number,
            number(*value),
            trial.params
        );
        svg.path(&class, &line, &title);
    }
    let value_axis = AxisPlaces {
        labels: vec![(number(sign * low), 1.0), (number(sign * cap), 0.0)],
        trials: Vec::new(),
    };
    let labelled = names.iter().copied().zip(&axes);
    for (axis, (name, places)) in labelled.chain([(metric, &value_axis)]).enumerate() {
        svg.line("axis", (x(axis), top), (x(axis), top + height));
        svg.text("middle", (x(axis), top - 18.0), name);
        for (label, place) in &places.labels {
            svg.line(
                "axis",
                (x(axis) - 3.0, y(*place)),
                (x(axis) + 3.0, y(*place)),
            );
            svg.text("start", (x(axis) + 6.0, y(*place) + 4.0), label);
        }
    }
    svg.finish()
}

/// Width that the longest of some labels takes, roughly.
fn longest<'a>(labels: impl Iterator<Item = &'a str>) -> f64 {
    7.0 * labels.map(|label| label.chars().count()).max().unwrap_or(0) as f64
}

struct AxisPlaces {
    labels: Vec<(String, f64)>,
    /// In [0, 1], one per trial.
    trials: Vec<f64>,
}

/// Levels evenly apart where they are few, otherwise a scale from the least to the largest value.
fn axis_of(trials: &[(&TrialView, f64)], name: &str) -> AxisPlaces {
    let values: Vec<_> = trials
        .iter()
        .filter_map(|(t, _)| t.params.get(name))
        .collect();
    let mut levels: Vec<(String, Option<f64>)> = Vec::new();
    for value in &values {
        let text = setting_text(value);
        if !levels.iter().any(|(known, _)| *known == text) {
            levels.push((text, value.as_f64()));
        }
    }
    levels.sort_by(|a, b| match (a.1, b.1) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => a.0.cmp(&b.0),
    });
    let numbers: Option<Vec<f64>> = levels.iter().map(|level| level.1).collect();
    if let Some(numbers) = numbers.filter(|numbers| numbers.len() > 8) {
        let (low, high) = (numbers[0], numbers[numbers.len() - 1]);
        let log = low > 0.0 && high / low >= 50.0;
        let scale = |value: f64| if log { value.ln() } else { value };
        let place = |value: f64| (scale(value) - scale(low)) / (scale(high) - scale(low));
        let middle = if log {
            (low * high).sqrt()
        } else {
            f64::midpoint(low, high)
        };
        return AxisPlaces {
            labels: [low, middle, high].map(|v| (number(v), place(v))).to_vec(),
            trials: values
                .iter()
                .map(|v| v.as_f64().map_or(0.0, place))
                .collect(),
        };
    }
    let place = |index: usize| {
        if levels.len() < 2 {
            0.5
        } else {
            index as f64 / (levels.len() - 1) as f64
        }
    };
    AxisPlaces {
        labels: levels
            .iter()
            .enumerate()
            .map(|(i, (text, value))| match value {
                Some(value) if text.len() > 8 => (number(*value), place(i)),
                _ => (text.clone(), place(i)),
            })
            .collect(),
        trials: values
            .iter()
            .map(|value| {
                let text = setting_text(value);
                place(
                    levels
                        .iter()
                        .position(|(known, _)| *known == text)
                        .unwrap_or(0),
                )
            })
            .collect(),
    }
}

/// How much of the surrogate's variance each parameter, and each pair beyond its parts, explains.
pub(super) fn importance(effects: &Effects) -> String {
    let mut rows: Vec<(String, f64, &str)> = effects
        .parameters
        .iter()
        .map(|p| (p.name.clone(), p.importance, "b0"))
        .collect();
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    rows.extend(effects.interactions.iter().take(5).map(|pair| {
        (
            format!("{} × {}", pair.first, pair.second),
            pair.importance,
            "b1",
        )
    }));
    let left = longest(rows.iter().map(|row| row.0.as_str())).max(250.0);
    let mut svg = Svg::new(
        left + 510.0,
        24.0 * rows.len() as f64 + 12.0,
        "importance of the parameters and of pairs of them",
    );
    for (i, (name, share, class)) in rows.iter().enumerate() {
        let y = 24.0 * i as f64 + 8.0;
        svg.text("end", (left, y + 13.0), name);
        svg.bar(class, (left + 10.0, y), (440.0 * share, 16.0), "");
        svg.text(
            "start",
            (left + 16.0 + 440.0 * share, y + 13.0),
            &format!("{:.0}%", 100.0 * share),
        );
    }
    svg.finish()
}

/// Partial dependence of one parameter, all on the same scale.
pub(super) fn effect(parameter: &ParameterEffect, all: &Effects, direction: Direction) -> String {
    let heights = all
        .parameters
        .iter()
        .flat_map(|p| &p.levels)
        .map(|level| level.1);
    let (low, high) = heights.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let scale = 150.0 / (high - low).max(1e-12);
    let step = 320.0 / parameter.levels.len() as f64;
    let mut svg = Svg::new(
        330.0,
        240.0,
        &format!("expected value by {}", parameter.name),
    );
    let better = |a: f64, b: f64| direction.sign() * a < direction.sign() * b;
    let mut best = 0;
    for (i, level) in parameter.levels.iter().enumerate() {
        if better(level.1, parameter.levels[best].1) {
            best = i;
        }
    }
    for (i, (value, mean)) in parameter.levels.iter().enumerate() {
        let x = 6.0 + step * i as f64;
        let height = 12.0 + scale * (mean - low);
        let class = if i == best { "b1" } else { "b0" };
        let text = match value.as_f64() {
            Some(value) => number(value),
            None => setting_text(value),
        };
        svg.bar(
            class,
            (x + 2.0, 196.0 - height),
            ((step - 4.0).min(60.0), height),
            &format!("{text}: {}", number(*mean)),
        );
        // Every label where they fit, otherwise some.
        let every = (parameter.levels.len() as f64 / 6.0).ceil() as usize;
        if i % every == 0 {
            svg.text("start", (x + 2.0, 212.0), &text);
            svg.text("start", (x + 2.0, 190.0 - height), &number(*mean));
        }
    }
    svg.finish()
}

/// Values of the promoted trials below and above.
pub(super) fn fidelity(view: &StudyView, rung: &RungTrust) -> String {
    let pairs: Vec<(f64, f64, u64)> = view
        .trials
        .iter()
        .filter(|t| t.rung == rung.rung + 1)
        .filter_map(|t| {
            let below = view.trials.iter().find(|b| Some(b.number) == t.parent)?;
            Some((below.value?, t.value?, t.number))
        })
        .collect();
    if pairs.is_empty() {
        return String::new();
    }
    let points: Vec<(f64, f64)> = pairs.iter().map(|(a, b, _)| (*a, *b)).collect();
    let mut svg = Svg::new(
        420.0,
        300.0,
        "values at two shares of the data or the steps",
    );
    let plot = Plot::around(&svg, &points);
    plot.axes(
        &mut svg,
        &format!("at {}", number(rung.shares.0)),
        &format!("at {}", number(rung.shares.1)),
    );
    for (a, b, trial) in pairs {
        svg.dot("trial", plot.at((a, b)), 4.0, &format!("trial {trial}"));
    }
    svg.finish()
}

/// Who worked on which trial when.
pub(super) fn timeline(view: &StudyView) -> String {
    let mut workers: Vec<&str> = view
        .trials
        .iter()
        .filter_map(|t| t.owner.as_deref())
        .collect();
    workers.sort_unstable();
    workers.dedup();
    let start = view
        .trials
        .iter()
        .map(|t| t.started_at)
        .fold(f64::INFINITY, f64::min);
    let end = view
        .trials
        .iter()
        .filter_map(|t| t.finished_at)
        .fold(start, f64::max);
    if workers.is_empty() || end <= start {
        return String::new();
    }
    let mut svg = Svg::new(
        WIDE,
        26.0 * workers.len() as f64 + 40.0,
        "what each worker did when",
    );
    let x = |time: f64| 120.0 + 620.0 * (time - start) / (end - start);
    for (lane, worker) in workers.iter().enumerate() {
        let y = 26.0 * lane as f64 + 8.0;
        let name = worker.split(" started").next().unwrap_or(worker);
        svg.text("end", (112.0, y + 13.0), name);
        for trial in view
            .trials
            .iter()
            .filter(|t| t.owner.as_deref() == Some(worker))
        {
            let until = trial.finished_at.unwrap_or(end);
            // A trial that waited between two workers was worked on for its seconds only.
            let begun = trial
                .seconds
                .map_or(trial.started_at, |s| (until - s).max(trial.started_at));
            let class = match trial.state {
                TrialState::Complete => "b0",
                TrialState::Failed => "bad",
                TrialState::Running | TrialState::Stopped => "open",
            };
            let width = (x(until) - x(begun)).max(1.5);
            let title = format!("trial {}, {}", trial.number, trial.state.name());
            svg.bar(class, (x(begun), y), (width, 16.0), &title);
        }
    }
    let bottom = 26.0 * workers.len() as f64 + 28.0;
    svg.text("start", (120.0, bottom), "0 s");
    svg.text(
        "end",
        (740.0, bottom),
        &format!("{} s", number(end - start)),
    );
    svg.finish()
}

/// The staircase of a curve that only changes at its points.
fn steps(plot: &Plot, curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut points = Vec::new();
    for (i, point) in curve.iter().enumerate() {
        if i > 0 {
            points.push(plot.at((point.0, curve[i - 1].1)));
        }
        points.push(plot.at(*point));
    }
    points
}

/// The largest value to be drawn, of values of which small ones are good: a diverged trial must not flatten the rest.
fn drawn_in(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (Some(best), Some(worst)) = (values.first(), values.last()) else {
        return 0.0;
    };
    let median = values[values.len() / 2];
    worst.min(median + 3.0 * (median - best)).max(median)
}
