//! Which trials climb the ladder of fidelities: a pure function of the study's rows.

use crate::config::{Climb, Ladder, StudyConfig};
use crate::view::{RungTrust, TrialState, TrialView};

/// What the ladder wants next, once the first rung has all its trials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A trial of `rung`, with the configuration of trial `parent` of the rung below.
    Promote { parent: u64, rung: u64 },
    /// Results of a rung are still to come.
    Wait,
    /// Every rung has its trials, and they are finished.
    Done,
}

/// Pairs below which a rank correlation says nothing.
const PAIRS: usize = 3;

/// The next step.
pub(crate) fn next(config: &StudyConfig, trials: &[&TrialView]) -> Step {
    let lower = on_rung(trials, 0);
    if !lower.iter().all(|t| t.state.is_finished()) {
        return Step::Wait;
    }
    let Some(ladder) = &config.ladder else {
        return Step::Done;
    };
    for rung in 1..ladder.shares.len() as u64 {
        let upper = on_rung(trials, rung);
        for wanted in [base(ladder, rung), 2 * base(ladder, rung)] {
            let promoted = |t: &TrialView| upper.iter().any(|u| u.parent == Some(t.number));
            let next = ranked(config, trials, rung - 1)
                .into_iter()
                .take(wanted as usize)
                .find(|t| !promoted(t));
            if let Some(parent) = next {
                return Step::Promote {
                    parent: parent.number,
                    rung,
                };
            }
            if !upper.iter().all(|t| t.state.is_finished()) {
                return Step::Wait;
            }
            if believed(ladder, correlation(config, trials, rung - 1).1) {
                break;
            }
        }
    }
    Step::Done
}

/// Trials wanted in all, as far as that is known: a distrusted rung adds to it.
pub(crate) fn wanted(config: &StudyConfig, trials: &[&TrialView]) -> u64 {
    let Some(ladder) = &config.ladder else {
        return config.trials;
    };
    (1..ladder.shares.len() as u64)
        .map(|rung| base(ladder, rung).max(on_rung(trials, rung).len() as u64))
        .sum::<u64>()
        + config.trials
}

/// How well each rung foretold the next one; empty without a ladder.
pub(crate) fn trust(config: &StudyConfig, trials: &[&TrialView]) -> Vec<RungTrust> {
    let Some(ladder) = &config.ladder else {
        return Vec::new();
    };
    (1..ladder.shares.len())
        .map(|rung| {
            let (pairs, spearman) = correlation(config, trials, rung as u64 - 1);
            RungTrust {
                rung: rung as u64 - 1,
                shares: (ladder.shares[rung - 1], ladder.shares[rung]),
                pairs,
                spearman,
                trusted: believed(ladder, spearman),
                promoted: on_rung(trials, rung as u64).len() as u64,
            }
        })
        .collect()
}

impl StudyConfig {
    /// Share of the data, and of the steps, that a trial of a rung gets.
    pub fn shares(&self, rung: u64) -> (f64, f64) {
        let share = |ladder: &Ladder| ladder.shares.get(rung as usize).copied().unwrap_or(1.0);
        match &self.ladder {
            None => (self.fraction, 1.0),
            Some(ladder) => match ladder.climb {
                Climb::Data => (share(ladder), 1.0),
                Climb::Steps => (self.fraction, share(ladder)),
            },
        }
    }
}

/// Trials that a rung gets while the one below is trusted.
fn base(ladder: &Ladder, rung: u64) -> u64 {
    (1..rung).fold(ladder.promote, |count, _| {
        ((count as f64 * ladder.keep).ceil() as u64).max(1)
    })
}

fn on_rung<'a>(trials: &[&'a TrialView], rung: u64) -> Vec<&'a TrialView> {
    trials.iter().copied().filter(|t| t.rung == rung).collect()
}

/// Complete trials of a rung, the best first; of one configuration only the best counts.
fn ranked<'a>(config: &StudyConfig, trials: &[&'a TrialView], rung: u64) -> Vec<&'a TrialView> {
    let sign = config.direction.sign();
    let mut complete: Vec<(f64, &TrialView)> = on_rung(trials, rung)
        .into_iter()
        .filter(|t| t.state == TrialState::Complete)
        .filter_map(|t| Some((sign * t.value?, t)))
        .collect();
    complete.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.number.cmp(&b.1.number)));
    let mut best: Vec<&TrialView> = Vec::new();
    for (_, trial) in complete {
        if !best.iter().any(|b| b.params == trial.params) {
            best.push(trial);
        }
    }
    best
}

fn believed(ladder: &Ladder, spearman: Option<f64>) -> bool {
    spearman.is_none_or(|rho| rho >= ladder.trust)
}

/// Spearman's correlation of the values of a rung and the one above.
fn correlation(config: &StudyConfig, trials: &[&TrialView], lower: u64) -> (usize, Option<f64>) {
    let below = ranked(config, trials, lower);
    let pairs: Vec<(f64, f64)> = on_rung(trials, lower + 1)
        .into_iter()
        .filter(|t| t.state == TrialState::Complete)
        .filter_map(|t| {
            let parent = below.iter().find(|b| Some(b.number) == t.parent)?;
            Some((parent.value?, t.value?))
        })
        .collect();
    let rho = (pairs.len() >= PAIRS).then(|| spearman(&pairs)).flatten();
    (pairs.len(), rho)
}

/// Spearman's rank correlation, ties at their mean rank; `None` where one side never varies.
pub(crate) fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let a = ranks(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>());
    let b = ranks(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>());
    let mean = f64::midpoint(pairs.len() as f64, 1.0);
    let product = |x: &[f64], y: &[f64]| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum()
    };
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    (scale > 0.0).then(|| product(&a, &b) / scale)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    values
        .iter()
        .map(|value| {
            let below = values.iter().filter(|other| *other < value).count();
            let same = values.iter().filter(|other| *other == value).count();
            below as f64 + f64::midpoint(same as f64, 1.0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Params, Value};

    /// scipy.stats.spearmanr([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) = 0.8207826816681233.
    #[test]
    fn spearman_agrees_with_scipy() {
        let pairs = [(1.0, 5.0), (2.0, 6.0), (3.0, 7.0), (4.0, 8.0), (5.0, 7.0)];
        assert!((spearman(&pairs).unwrap() - 0.820_782_681_668_123_3).abs() < 1e-12);
        assert_eq!(spearman(&[(1.0, 1.0), (2.0, 1.0)]), None);
    }

    /// Climbs the whole ladder with `value(root, rung)` as the metric; returns the parents by rung.
    fn climb(trust: f64, value: impl Fn(u64, u64) -> f64) -> (Vec<Vec<u64>>, u64) {
        let config = StudyConfig {
            trials: 9,
            ladder: Some(Ladder {
                climb: Climb::Data,
                shares: vec![0.1, 0.3, 1.0],
                promote: 3,
                keep: 1.0 / 3.0,
                trust,
            }),
            ..StudyConfig::default()
        };
        let trial = |number: u64, rung: u64, parent: Option<u64>, root: u64| TrialView {
            number,
            state: TrialState::Complete,
            params: Params::new(vec![("a".to_owned(), Value::Integer(root as i64))]),
            value: Some(value(root, rung)),
            rung,
            parent,
            seed: root,
            ..TrialView::default()
        };
        let mut trials: Vec<TrialView> = (0..9).map(|n| trial(n, 0, None, n)).collect();
        let mut promoted = vec![Vec::new(); 2];
        loop {
            let rows: Vec<&TrialView> = trials.iter().collect();
            match next(&config, &rows) {
                Step::Done => return (promoted, wanted(&config, &rows)),
                Step::Wait => panic!("everything is finished"),
                Step::Promote { parent, rung } => {
                    let root = trials[parent as usize].seed;
                    promoted[rung as usize - 1].push(root);
                    trials.push(trial(trials.len() as u64, rung, Some(parent), root));
                }
            }
        }
    }

    #[test]
    fn the_best_climb() {
        let (promoted, wanted) = climb(0.5, |root, _| (root as f64 - 4.2).abs());
        assert_eq!(promoted, [vec![4, 5, 3], vec![4]]);
        assert_eq!(wanted, 13);
    }

    #[test]
    fn a_rung_that_foretells_nothing_promotes_twice_as_many() {
        let (promoted, wanted) = climb(0.5, |root, rung| {
            let sign = if rung == 1 { -1.0 } else { 1.0 };
            sign * root as f64
        });
        assert_eq!(promoted[0], [0, 1, 2, 3, 4, 5]);
        // The winner is chosen by the next rung: its best, the worst of the rung below.
        assert_eq!(promoted[1], [5]);
        assert_eq!(wanted, 9 + 6 + 1);
    }

    #[test]
    fn unfinished_rungs_are_waited_for() {
        let running = TrialView::default();
        assert_eq!(next(&StudyConfig::default(), &[&running]), Step::Wait);
        assert_eq!(next(&StudyConfig::default(), &[]), Step::Done);
    }
}
