//! What a study looks like from outside: for reports, status lines and the command line's JSON.

use serde::{Deserialize, Serialize};

use crate::config::StudyConfig;
use crate::params::Params;
use crate::study::is_dead;

/// State of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrialState {
    /// A worker holds it.
    #[default]
    Running,
    /// It has a value.
    Complete,
    /// It has no value, but a reason.
    Failed,
    /// It was given back and will be taken up again.
    Stopped,
}

impl TrialState {
    /// The name in the study.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// True for a trial that has its result.
    pub fn is_finished(self) -> bool {
        matches!(self, Self::Complete | Self::Failed)
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Running, Self::Complete, Self::Failed, Self::Stopped]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

/// Why a point was suggested.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Why {
    /// What chose it: a sampler's name, `startup`, or `replicate`.
    pub by: String,
    /// Expected improvement times the weight of the density of good configurations, on the surrogate's unit scale;
    /// in LAEI's exact mode the bare expected improvement in units of the metric.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_improvement: Option<f64>,
    /// S(x) of Eq. 12 as it was weighed (standardised or raw).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discrepancy: Option<f64>,
    /// The weight α of S(x) at this trial, with its sign.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// What was maximised: EI + α·S (for `tpe`, the log density ratio).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// The surrogate's mean here, in units of the metric.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
    /// The surrogate's standard deviation here, in units of the metric (near the best values).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deviation: Option<f64>,
}

/// One trial of a study.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrialView {
    /// Its number, from 0.
    pub number: u64,
    /// Its state.
    pub state: TrialState,
    /// Its configuration.
    pub params: Params,
    /// Its value, when complete.
    pub value: Option<f64>,
    /// Seconds that its evaluation took.
    pub seconds: Option<f64>,
    /// Why it was suggested.
    pub why: Why,
    /// Why it failed.
    pub error: Option<String>,
    /// The seed given to the objective.
    pub seed: u64,
    /// How many finished trials the suggestion was based on.
    pub seen: u64,
    /// Step of the ladder of fidelities, from 0.
    pub rung: u64,
    /// The trial of the rung below that was promoted to this one.
    pub parent: Option<u64>,
    /// How often its worker died.
    pub attempts: u64,
    /// Who works or worked on it.
    pub owner: Option<String>,
    /// Until when it is held, in seconds since 1970, while it runs.
    pub lease_expires: Option<f64>,
    /// When it was suggested, in seconds since 1970.
    pub started_at: f64,
    /// When it was finished, in seconds since 1970.
    pub finished_at: Option<f64>,
}

impl TrialView {
    /// True where the trial is running no longer, for certain: its worker was a process of this machine that has ended.
    pub fn worker_died(&self) -> bool {
        self.state == TrialState::Running && self.owner.as_deref().is_some_and(is_dead)
    }
}

/// A value that came after its lease had gone to somebody else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LateResult {
    /// The trial.
    pub trial: u64,
    /// The value, unless it failed.
    pub value: Option<f64>,
    /// The reason, where it failed.
    pub error: Option<String>,
    /// When it came, in seconds since 1970.
    pub at: f64,
}

/// A whole study, read-only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudyView {
    /// Its settings.
    pub config: StudyConfig,
    /// Its space, as JSON.
    pub space: serde_json::Value,
    /// Its trials by number.
    pub trials: Vec<TrialView>,
    /// Results that came too late.
    pub late: Vec<LateResult>,
    /// What callers keep with the study, by name; see [`Study::note`](crate::Study::note).
    pub notes: std::collections::BTreeMap<String, String>,
}

impl StudyView {
    /// The best complete trial of the highest rung that has one (ties go to the earlier one).
    pub fn best(&self) -> Option<&TrialView> {
        best_of(&self.config, &self.trials)
    }

    /// How well each rung of the ladder foretold the next one.
    pub fn rungs(&self) -> Vec<RungTrust> {
        let trials: Vec<&TrialView> = self.trials.iter().collect();
        crate::ladder::trust(&self.config, &trials)
    }

    /// Number of trials that the study wants in all, promotions included.
    pub fn wanted(&self) -> u64 {
        let trials: Vec<&TrialView> = self.trials.iter().collect();
        crate::ladder::wanted(&self.config, &trials)
    }

    /// The configuration of the first trial before it was promoted, for a trial of any rung.
    pub fn root(&self, trial: u64) -> u64 {
        let mut number = trial;
        while let Some(parent) = self
            .trials
            .iter()
            .find(|t| t.number == number)
            .and_then(|t| t.parent)
            .filter(|parent| *parent < number)
        {
            number = parent;
        }
        number
    }

    /// Number of trials in `state`.
    pub fn count(&self, state: TrialState) -> usize {
        self.trials.iter().filter(|t| t.state == state).count()
    }
}

pub(crate) fn best_of<'a>(config: &StudyConfig, trials: &'a [TrialView]) -> Option<&'a TrialView> {
    let complete = trials.iter().filter(|t| t.state == TrialState::Complete);
    let highest = complete.clone().map(|t| t.rung).max()?;
    complete
        .filter(|t| t.rung == highest)
        .filter_map(|t| t.value.map(|value| (config.direction.sign() * value, t)))
        .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.number.cmp(&b.1.number)))
        .map(|(_, t)| t)
}

/// How well a rung of the ladder foretold the next one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RungTrust {
    /// The lower rung.
    pub rung: u64,
    /// Share of the data or the steps of the lower rung, and of the one above.
    pub shares: (f64, f64),
    /// Configurations with a value on both.
    pub pairs: usize,
    /// Spearman's rank correlation of the two values, where there are at least three pairs.
    pub spearman: Option<f64>,
    /// False where the correlation is below the ladder's threshold: twice as many were promoted then.
    pub trusted: bool,
    /// Trials promoted to the upper rung.
    pub promoted: u64,
}

/// What [`run_study`](crate::run_study) tells while it works.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// A trial begins.
    Started {
        /// Its number.
        trial: u64,
        /// True where an earlier worker had begun it.
        resumed: bool,
        /// Its configuration.
        params: Params,
        /// Why it was suggested.
        why: Why,
        /// Seconds that the suggestion took.
        suggest_seconds: f64,
        /// Step of the ladder of fidelities, from 0.
        rung: u64,
        /// Finished trials so far.
        finished: u64,
        /// Trials wanted.
        trials: u64,
    },
    /// A trial ended.
    Finished {
        /// Its number.
        trial: u64,
        /// Its state now.
        state: TrialState,
        /// Its value.
        value: Option<f64>,
        /// Why it failed.
        error: Option<String>,
        /// Seconds that it took.
        seconds: f64,
        /// Best value so far.
        best_value: Option<f64>,
        /// Trial of the best value.
        best_trial: Option<u64>,
        /// Finished trials so far.
        finished: u64,
        /// Trials wanted.
        trials: u64,
        /// Seconds to go, from the mean of the finished trials.
        eta_seconds: Option<f64>,
    },
    /// The ranks of two neighbouring rungs of the ladder disagree: more trials are promoted.
    Distrusted {
        /// The lower rung.
        #[serde(flatten)]
        rung: RungTrust,
    },
}

/// How a study ended, or stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudySummary {
    /// All trials are finished; false where it was stopped and can be resumed.
    pub completed: bool,
    /// Trials with a value.
    pub complete: u64,
    /// Trials that failed.
    pub failed: u64,
    /// Trials wanted.
    pub trials: u64,
    /// The best trial.
    pub best: Option<TrialView>,
    /// The trial that is worth most by all trials together; see [`StudyView::recommended`].
    #[serde(default)]
    pub recommended: Option<TrialView>,
    /// How well each rung of the ladder foretold the next one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rungs: Vec<RungTrust>,
    /// Seconds of this call.
    pub seconds: f64,
}
