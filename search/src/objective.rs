//! What is searched for: the one trait through which the search reaches a trainer.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::BoxError;
use crate::params::Params;

/// Something that gives a configuration a value. Smaller is better unless the study maximises.
pub trait Objective {
    /// Evaluates one trial. A trial that was given back or whose worker died is passed again with the same
    /// number, parameters, seed and folder, so that the objective can go on from a checkpoint in `trial.dir`.
    ///
    /// An `Err` means that the surroundings broke down (no disk space, a missing cache): the trial is given back
    /// and the study ends with the error. A configuration that does not work is [`Outcome::Failed`].
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError>;

    /// Measures the two parts of S(x) (BayesKD, Eq. 12) for the untouched student under these settings.
    /// Called once per distinct setting of [`Objective::depends_on`].
    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError>;

    /// Which parameters the two parts of S(x) depend on. The default is what they depend on in Table 2.
    fn depends_on(&self) -> DependsOn {
        DependsOn::default()
    }
}

/// One trial, as the objective sees it.
#[derive(Debug, Clone, Copy)]
pub struct Trial<'a> {
    /// Number of the trial, from 0.
    pub number: u64,
    /// Its configuration.
    pub params: &'a Params,
    /// Step of the ladder of fidelities, from 0; see [`Ladder`](crate::Ladder).
    pub rung: u64,
    /// Share of the data to train on, in (0, 1].
    pub fraction: f64,
    /// Share of the training steps after which to pause and to judge, in (0, 1]. A later rung of the same
    /// configuration comes with the same folder and seed, and goes on from there.
    pub budget: f64,
    /// Seed of this trial, a function of the study's seed and the number.
    pub seed: u64,
    /// Folder of this trial, which exists; for checkpoints and artefacts.
    pub dir: &'a Path,
}

/// How a trial ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The metric. One that [`Outcome::of`] takes for a failure is recorded as such.
    Value(f64),
    /// The configuration does not work (diverged, did not fit), with the reason.
    Failed(String),
    /// The trial was asked to stop: it is given back, and the study can be resumed.
    Stopped,
}

/// Squares of larger metrics overflow, and with them every mean and deviation of the study.
const LARGEST_METRIC: f64 = 1e150;

impl Outcome {
    /// What a metric means: its value, or a failure where it is not finite or beyond ±1e150.
    pub fn of(metric: f64) -> Self {
        if metric.abs() <= LARGEST_METRIC {
            Self::Value(metric)
        } else if metric.is_finite() {
            Self::Failed(format!(
                "the value is beyond ±{LARGEST_METRIC:e}: {metric:e}"
            ))
        } else {
            Self::Failed(format!("the value is not finite: {metric}"))
        }
    }
}

/// The two measured parts of S(x) (BayesKD, Eq. 12).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Discrepancy {
    /// D(σt, σs) = |1/σt − 1/σs|.
    pub logits: f64,
    /// A(ht, hs) = Σ over layers of the squared distance of the hidden states.
    pub hidden: f64,
}

/// Names of the parameters on which each part of a [`Discrepancy`] depends; names that the space does not have
/// are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DependsOn {
    /// For D.
    pub logits: Vec<String>,
    /// For A.
    pub hidden: Vec<String>,
}

impl Default for DependsOn {
    fn default() -> Self {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Self {
            logits: owned(&["logits_norm", "kd_type", "scaling_value"]),
            hidden: owned(&["layers", "hidden_norm"]),
        }
    }
}
