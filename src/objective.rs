//! A search trial: train the student on a share of the cache, judge it on sequences that no trial sees.

use std::path::PathBuf;
use std::sync::Arc;

use caskd_formats::{Cache, RowInfo};
use caskd_models::{LoadOptions, load};
use caskd_search::{BoxError, Discrepancy, Objective, Outcome, Params, Trial, Value};
use caskd_trainer::{Control, Probe, TrainConfig, evaluate_cache, train};

use crate::commands::eval::EVAL_TOKENS;
use crate::exit::Failure;
use crate::terminal::{self, stopped};

/// Trains a student for each configuration.
pub(crate) struct DistillationObjective {
    /// Settings that all trials share.
    pub(crate) base: TrainConfig,
    pub(crate) student: PathBuf,
    pub(crate) cache: Arc<Cache>,
    pub(crate) options: LoadOptions,
    /// The sequences that judge a trial.
    pub(crate) validation: Vec<RowInfo>,
    /// What the untouched student and the teacher differ in, measured once.
    pub(crate) probe: Probe,
}

impl DistillationObjective {
    /// The configuration of a trial: the shared settings with the trial's own on top.
    pub(crate) fn config_of(&self, params: &Params) -> Result<TrainConfig, caskd_trainer::Error> {
        let mut config = self.base.clone();
        for (name, value) in params.iter() {
            config.set(name, &setting_text(value))?;
        }
        Ok(config)
    }
}

/// A parameter's value as `--set` takes it.
pub(crate) fn setting_text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_string(),
        None => value.to_string(),
    }
}

/// The last share of the hash range judges; trials train on the first share, so the two never meet
/// unless together they are more than the whole.
pub(crate) fn validation_rows(rows: &[RowInfo], share: f64) -> Vec<RowInfo> {
    let first = (1.0 - share) * 2f64.powi(64);
    rows.iter()
        .filter(|row| row.split_hash as f64 >= first)
        .cloned()
        .collect()
}

impl Objective for DistillationObjective {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        let mut config = self.config_of(trial.params)?;
        config.fraction = trial.fraction;
        config.seed = trial.seed;
        let student = load(&self.student, &self.options)?;
        let run = trial.dir.join("run");
        let mut control = Control {
            resume: run.exists(),
            stop: &terminal::STOP,
            progress: &mut |_| {},
        };
        let summary = match train(
            &config,
            student,
            &self.student,
            Arc::clone(&self.cache),
            &run,
            &mut control,
        ) {
            Ok(summary) => summary,
            Err(error @ caskd_trainer::Error::LowFidelity { .. }) => {
                return Ok(Outcome::Failed(error.to_string()));
            }
            Err(error) if error.is_divergence() => return Ok(Outcome::Failed(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if !summary.completed {
            return Ok(Outcome::Stopped);
        }
        let trained = caskd_trainer::load_run(&run, &self.options)?;
        let score = evaluate_cache(
            &trained,
            &self.cache,
            Some(&self.validation),
            EVAL_TOKENS,
            &mut |_, _| {},
        )?;
        Ok(if stopped() && !score.perplexity.is_finite() {
            Outcome::Stopped
        } else {
            Outcome::Value(score.perplexity)
        })
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        let config = self.config_of(params)?;
        let (logits, hidden) = self.probe.discrepancy(&config)?;
        Ok(Discrepancy { logits, hidden })
    }
}

impl From<BoxError> for Failure {
    fn from(error: BoxError) -> Self {
        Self::ours(error)
    }
}
