//! What the page says of a study.

use caskd_search::{Climb, Location, Params, StudyView, TrialState, TrialView};
use serde::Serialize;

use super::charts;
use super::svg::number;
use crate::commands::search::{BEST, Plan, RECOMMENDED};
use crate::exit::Failure;
use crate::objective::setting_text;
use crate::terminal::duration;

#[derive(Serialize)]
pub(super) struct StudySection {
    study: String,
    sampler: String,
    seed: u64,
    goal: &'static str,
    metric: &'static str,
    counts: Vec<(&'static str, usize)>,
    best: Option<Choice>,
    /// Another trial than the best one that is worth more by all trials together.
    recommended: Option<Choice>,
    progress: String,
    parallel: String,
    importance: String,
    effects: Vec<(String, String)>,
    rungs: Vec<Rung>,
    timeline: String,
    failures: Vec<FailedTrial>,
    late: usize,
    names: Vec<String>,
    trials: Vec<TrialRow>,
}

#[derive(Serialize)]
struct Choice {
    trial: u64,
    value: String,
    settings: Vec<(String, String)>,
    /// What each is for, and the command.
    commands: Vec<(&'static str, String)>,
}

#[derive(Serialize)]
struct Rung {
    from: String,
    to: String,
    promoted: u64,
    pairs: usize,
    spearman: String,
    trusted: bool,
    drawing: String,
}

#[derive(Serialize)]
struct FailedTrial {
    trial: u64,
    reason: String,
    settings: String,
}

#[derive(Serialize)]
struct TrialRow {
    number: u64,
    rung: u64,
    state: &'static str,
    value: String,
    settings: Vec<String>,
    by: String,
    mean: String,
    expected_improvement: String,
    discrepancy: String,
    alpha: String,
    score: String,
    seconds: String,
}

impl StudySection {
    pub(super) fn of(location: &Location, view: &StudyView) -> Result<Self, Failure> {
        let plan = Plan::noted(view)?;
        let metric = plan.as_ref().map_or("value", Plan::metric);
        let effects = view.effects()?;
        let incumbents = view.incumbents()?.unwrap_or_default();
        let direction = view.config.direction;
        Ok(Self {
            study: location.to_string(),
            sampler: view.config.sampler.to_string(),
            seed: view.config.seed,
            goal: match direction {
                caskd_search::Direction::Minimize => "small is good",
                caskd_search::Direction::Maximize => "large is good",
            },
            metric,
            counts: [
                TrialState::Complete,
                TrialState::Failed,
                TrialState::Running,
                TrialState::Stopped,
            ]
            .map(|state| (state.name(), view.count(state)))
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect(),
            best: view
                .best()
                .map(|trial| Choice::of(BEST, location, plan.as_ref(), view, trial)),
            recommended: view
                .recommended()?
                .filter(|trial| view.best().is_some_and(|best| best.number != trial.number))
                .map(|trial| Choice::of(RECOMMENDED, location, plan.as_ref(), view, trial)),
            progress: charts::progress(view, &incumbents, metric),
            parallel: charts::parallel(view, metric),
            importance: effects.as_ref().map(charts::importance).unwrap_or_default(),
            effects: effects
                .iter()
                .flat_map(|all| {
                    all.parameters.iter().map(|parameter| {
                        let drawing = charts::effect(parameter, all, direction);
                        (parameter.name.clone(), drawing)
                    })
                })
                .collect(),
            rungs: view
                .rungs()
                .iter()
                .map(|rung| Rung {
                    from: number(rung.shares.0),
                    to: number(rung.shares.1),
                    promoted: rung.promoted,
                    pairs: rung.pairs,
                    spearman: rung
                        .spearman
                        .map_or_else(String::new, |rho| format!("{rho:.2}")),
                    trusted: rung.trusted,
                    drawing: charts::fidelity(view, rung),
                })
                .collect(),
            timeline: charts::timeline(view),
            failures: view
                .trials
                .iter()
                .filter(|t| t.state == TrialState::Failed)
                .map(|t| FailedTrial {
                    trial: t.number,
                    reason: t.error.clone().unwrap_or_default(),
                    settings: t.params.to_string(),
                })
                .collect(),
            late: view.late.len(),
            names: view.trials.first().map_or_else(Vec::new, |trial| {
                let names = trial.params.iter();
                names.map(|(name, _)| name.to_owned()).collect()
            }),
            trials: view.trials.iter().map(TrialRow::of).collect(),
        })
    }
}

impl TrialRow {
    fn of(trial: &TrialView) -> Self {
        let settings = |params: &Params| {
            let values = params.iter();
            values.map(|(_, value)| setting_text(value)).collect()
        };
        Self {
            number: trial.number,
            rung: trial.rung,
            state: trial.state.name(),
            value: optional(trial.value),
            settings: settings(&trial.params),
            by: trial.why.by.clone(),
            mean: match (trial.why.mean, trial.why.deviation) {
                (Some(mean), Some(deviation)) => {
                    format!("{} ± {}", number(mean), number(deviation))
                }
                _ => String::new(),
            },
            expected_improvement: optional(trial.why.expected_improvement),
            discrepancy: optional(trial.why.discrepancy),
            alpha: optional(trial.why.alpha),
            score: optional(trial.why.score),
            seconds: trial.seconds.map_or_else(String::new, duration),
        }
    }
}

fn optional(value: Option<f64>) -> String {
    value.map_or_else(String::new, number)
}

impl Choice {
    /// The trial that is `which` ([`BEST`] or [`RECOMMENDED`]).
    fn of(
        which: &str,
        location: &Location,
        plan: Option<&Plan>,
        view: &StudyView,
        trial: &TrialView,
    ) -> Self {
        Self {
            trial: trial.number,
            value: optional(trial.value),
            settings: trial
                .params
                .iter()
                .map(|(name, value)| (name.to_owned(), setting_text(value)))
                .collect(),
            commands: commands(which, location, plan, view, trial),
        }
    }
}

/// How to get a trial again, and how to use its configuration.
fn commands(
    which: &str,
    location: &Location,
    plan: Option<&Plan>,
    view: &StudyView,
    chosen: &TrialView,
) -> Vec<(&'static str, String)> {
    let Some((plan, folder)) = plan.zip(location.folder()) else {
        return vec![("Its parameters:", chosen.params.to_json())];
    };
    // Trials that go on with a paused training share its folder.
    let ladder = view.config.ladder.as_ref();
    let number = if ladder.is_some_and(|ladder| ladder.climb == Climb::Steps) {
        view.root(chosen.number)
    } else {
        chosen.number
    };
    let trial = folder.join("trials").join(format!("{number:05}"));
    let file = folder.join(plan.file_name(which));
    let again = plan.repetition(&view.config, &trial, chosen);
    let used = plan
        .reproduction(&view.config, &file, chosen)
        .filter(|_| file.is_file());
    let again = again.map(|command| ("This trial once more, on its share of the data:", command));
    let used = used.map(|command| ("A run with its settings:", command));
    again.into_iter().chain(used).collect()
}
