//! What a trial is: training a student on a share of the cache, or any program.

mod command;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_formats::{Cache, RowInfo, in_validation};
use caskd_models::{LoadOptions, LoadedModel, load};
use caskd_search::{BoxError, Discrepancy, Objective, Outcome, Params, Space, Trial, Value};
use caskd_trainer::{
    Control, Probe, TrainConfig, check_fit, check_terms, evaluate_cache, load_run_onto, paused_at,
    probe, train,
};

use crate::commands::eval::EVAL_TOKENS;
use crate::commands::{open_cache, parse_device, write_file};
use crate::exit::Failure;
use crate::terminal::{say, stopped};

pub(crate) use command::{CommandObjective, repeated, with_file};

/// Sequences on which S(x) is measured.
const PROBE_SEQUENCES: usize = 8;

/// What trains in a trial, on what, and what judges it.
#[derive(Debug, Clone)]
pub(crate) struct Distillation {
    pub(crate) cache: PathBuf,
    pub(crate) student: PathBuf,
    /// Settings that all trials share.
    pub(crate) base: TrainConfig,
    /// Share of the cache that judges a trial.
    pub(crate) validation: f64,
}

impl Distillation {
    /// With the trainer's default settings.
    pub(crate) fn new(cache: &Path, student: &Path) -> Self {
        Self {
            cache: cache.to_owned(),
            student: student.to_owned(),
            base: TrainConfig::default(),
            validation: 0.1,
        }
    }

    /// The configuration of a trial: the shared settings with the trial's own on top.
    pub(crate) fn config_of(&self, params: &Params) -> Result<TrainConfig, caskd_trainer::Error> {
        let mut config = self.base.clone();
        for (name, value) in params.iter() {
            config.set(name, &setting_text(value))?;
        }
        Ok(config)
    }
}

/// Trains a student for each configuration. Student and cache are opened at the first use, once for all trials.
pub(crate) struct DistillationObjective {
    pub(crate) plan: Distillation,
    opened: Option<Opened>,
    probe: Option<Probe>,
}

/// What all trials of a process share.
pub(crate) struct Opened {
    pub(crate) cache: Arc<Cache>,
    /// The untouched student. Trials train adapters on its weights, which nothing changes.
    pub(crate) student: LoadedModel,
    /// The sequences that judge a trial.
    validation: Vec<RowInfo>,
}

impl DistillationObjective {
    pub(crate) fn new(plan: Distillation) -> Self {
        Self {
            plan,
            opened: None,
            probe: None,
        }
    }

    /// Opens what is not open yet, and checks that it fits together.
    pub(crate) fn open(&mut self) -> Result<&Opened, Failure> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => Opened::new(&self.plan)?,
        };
        Ok(self.opened.insert(opened))
    }

    /// The space without what the cache can't answer, which is said; refused where nothing is left.
    pub(crate) fn narrowed(&mut self, space: &Space) -> Result<Space, Failure> {
        let plan = self.plan.clone();
        let opened = self.open()?;
        let mut refused = None;
        let narrowed = space.narrowed(|params| {
            let fits = plan
                .config_of(params)
                .and_then(|config| check_terms(&config, &opened.student, &opened.cache));
            fits.map_err(|error| {
                let hint = error
                    .hint()
                    .map_or_else(String::new, |hint| format!("; {hint}"));
                let said = format!("{error}{hint}");
                refused.get_or_insert(error);
                said
            })
        });
        match (narrowed, refused) {
            (Err(caskd_search::Error::SpaceEmpty { .. }), Some(error)) => Err(error.into()),
            (narrowed, _) => {
                let (space, impossible) = narrowed?;
                for level in impossible {
                    say(format!(
                        "note: `{}` = {} is not searched: {}",
                        level.parameter,
                        setting_text(&level.value),
                        level.reason
                    ));
                }
                Ok(space)
            }
        }
    }
}

impl Opened {
    fn new(plan: &Distillation) -> Result<Self, Failure> {
        let cache = Arc::new(open_cache(&plan.cache, &plan.base.shards, plan.base.io())?);
        let validation = validation_rows(&cache.rows()?, plan.validation);
        if validation.is_empty() {
            return Err(Failure::user(
                "no sequence of the cache falls into the validation share",
                "give a larger --validation, or a larger cache",
            ));
        }
        let options = LoadOptions {
            device: parse_device(&plan.base.device)?,
            kind: plan.base.kind(),
        };
        let student = load(&plan.student, &options)?;
        check_fit(&student, &cache).map_err(|error| {
            if plan.base.teacher_tokenizer.is_none() {
                return error.into();
            }
            Failure::user(
                format!("{error}: what it says of the cache's tokens can't judge a trial"),
                "search with --command, by a program that trains with `teacher_tokenizer` and scores the run on a text",
            )
        })?;
        Ok(Self {
            cache,
            student,
            validation,
        })
    }
}

/// A parameter's value as `--set` takes it.
pub(crate) fn setting_text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_string(),
        None => value.to_string(),
    }
}

/// The last share of the hash range judges; trials train on the first share.
fn validation_rows(rows: &[RowInfo], share: f64) -> Vec<RowInfo> {
    rows.iter()
        .filter(|row| in_validation(row.split_hash, share))
        .cloned()
        .collect()
}

impl Objective for DistillationObjective {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        let mut config = self.plan.config_of(trial.params)?;
        config.fraction = trial.fraction;
        config.seed = trial.seed;
        if let (Some(folder), Some(name)) = (&mut config.tensorboard, trial.dir.file_name()) {
            folder.push(name); // One board for the study, a run for each trial.
        }
        let student_path = self.plan.student.clone();
        let opened = self.open()?;
        let run = trial.dir.join("run");
        // The trainer writes a checkpoint and returns once this is true: when the rung's share of the steps is made.
        // The step is noted before the checkpoint is written, so that a rung whose worker died is not trained past.
        let noted = paused_at(&run).filter(|step| noted_step(trial) == Some(*step));
        let reached = Cell::new(noted.is_some());
        let pause = AtomicBool::new(noted.is_some() || stopped());
        let mut trouble = None;
        let trained = train(
            &config,
            opened.student.share(),
            &student_path,
            Arc::clone(&opened.cache),
            &run,
            &mut Control {
                resume: run.exists(),
                stop: &pause,
                progress: &mut |report| {
                    let target = rung_steps(trial.budget, report.total_steps);
                    if report.step == target && target < report.total_steps {
                        reached.set(true);
                        trouble = note_step(trial, target).err();
                    }
                    pause.store(reached.get() || stopped(), Ordering::Relaxed);
                },
            },
        );
        let summary = match trained {
            Ok(summary) => summary,
            Err(error @ caskd_trainer::Error::LowFidelity { .. }) => {
                return Ok(Outcome::Failed(error.to_string()));
            }
            Err(error) if error.is_divergence() => return Ok(Outcome::Failed(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if let Some(trouble) = trouble {
            return Err(trouble.into());
        }
        if !summary.completed && !reached.get() {
            return Ok(Outcome::Stopped);
        }
        let model = load_run_onto(&opened.student, &run)?;
        let scored = evaluate_cache(
            &model,
            &opened.cache,
            Some(&opened.validation),
            EVAL_TOKENS,
            &mut |_, _| {},
        );
        let score = match scored {
            Ok(score) => score,
            Err(error) if error.is_divergence() => return Ok(Outcome::Failed(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        Ok(if stopped() && !score.perplexity.is_finite() {
            Outcome::Stopped
        } else {
            Outcome::Value(score.perplexity)
        })
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        let config = self.plan.config_of(params)?;
        let measured = if let Some(measured) = self.probe.take() {
            measured
        } else {
            let opened = self.open()?;
            probe(&opened.student, &opened.cache, PROBE_SEQUENCES)?
        };
        let (logits, hidden) = self.probe.insert(measured).discrepancy(&config)?;
        Ok(Discrepancy { logits, hidden })
    }
}

/// Steps after which a rung judges, at least one.
fn rung_steps(budget: f64, total: u64) -> u64 {
    ((budget * total as f64).round() as u64).clamp(1, total.max(1))
}

/// At which step this rung of the training was paused, where it was.
fn noted_step(trial: &Trial<'_>) -> Option<u64> {
    let text = std::fs::read_to_string(step_file(trial)).ok()?;
    text.trim().parse().ok()
}

fn note_step(trial: &Trial<'_>, step: u64) -> Result<(), Failure> {
    write_file(&step_file(trial), |sink| {
        sink.write_all(step.to_string().as_bytes())
    })
}

fn step_file(trial: &Trial<'_>) -> PathBuf {
    trial.dir.join(format!("rung-{}.step", trial.rung))
}

impl From<BoxError> for Failure {
    fn from(error: BoxError) -> Self {
        Self::ours(error)
    }
}
