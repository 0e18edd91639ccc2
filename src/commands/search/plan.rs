//! How the trials of a study are evaluated. It is kept with the study, so that a worker needs to know nothing else.

use std::f64::consts::PI;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caskd_formats::Io;
use caskd_search::{
    Domain, Objective, Space, Study, StudyConfig, StudyView, Trial, TrialView, Value,
};
use caskd_trainer::TrainConfig;
use serde::{Deserialize, Serialize};

use crate::cli::SearchArgs;
use crate::commands::open_cache;
use crate::commands::train::{add_shards, read_config};
use crate::exit::Failure;
use crate::objective::{
    CommandObjective, Distillation, DistillationObjective, repeated, setting_text, with_file,
};
use crate::terminal::shell_word;

/// Share of the cache that judges the trials where neither the study nor the cache says.
const DEFAULT_VALIDATION: f64 = 0.1;

/// The trial with the best value.
pub(crate) const BEST: &str = "best";
/// The trial that is worth most by all trials together.
pub(crate) const RECOMMENDED: &str = "recommended";

/// The note of a study that holds its plan.
const NOTE: &str = "plan";

/// Settings that the study decides, or that belong to what all trials share.
const FIXED: [&str; 7] = [
    "seed",
    "fraction",
    "device",
    "dtype",
    "io",
    "shards",
    "allow_low_fidelity",
];

/// How a trial is evaluated.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one plan in a process")]
pub(crate) enum Plan {
    /// By training a student from a cache.
    Distillation(Distillation),
    /// By running a program.
    Command {
        command: String,
        timeout: Option<f64>,
    },
}

/// A plan as it is kept. Paths may differ from machine to machine, what they hold may not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Kept {
    Distillation {
        cache: PathBuf,
        student: PathBuf,
        /// Further folders of the cache's shards.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        shards: Vec<PathBuf>,
        /// Settings of every trial, as TOML.
        config: String,
        validation: f64,
        cache_digest: String,
        student_digest: String,
    },
    Command {
        command: String,
        timeout: Option<f64>,
    },
}

impl Plan {
    /// What the study was begun with.
    pub(crate) fn stored(study: &Study) -> Result<Option<Self>, Failure> {
        Self::from_kept(kept(study)?)
    }

    /// The same, of a study that is only looked at.
    pub(crate) fn noted(view: &StudyView) -> Result<Option<Self>, Failure> {
        // A report of a study whose plan a later version wrote does without.
        Self::from_kept(
            view.notes
                .get(NOTE)
                .and_then(|text| serde_json::from_str(text).ok()),
        )
    }

    fn from_kept(kept: Option<Kept>) -> Result<Option<Self>, Failure> {
        Ok(match kept {
            None => None,
            Some(Kept::Command { command, timeout }) => Some(Self::Command { command, timeout }),
            Some(Kept::Distillation {
                cache,
                student,
                shards,
                config,
                validation,
                ..
            }) => Some(Self::Distillation(Distillation {
                cache,
                student,
                base: TrainConfig {
                    shards,
                    ..TrainConfig::from_toml(&config)?
                },
                validation,
            })),
        })
    }

    /// What the arguments ask for, else what is stored.
    pub(crate) fn of(args: &SearchArgs, stored: Option<Self>) -> Result<Self, Failure> {
        if let Some(command) = &args.command {
            return Ok(Self::Command {
                command: command.clone(),
                timeout: args.timeout,
            });
        }
        let stored = match stored {
            Some(Self::Command { command, timeout }) if args.cache.is_none() => {
                return Ok(Self::Command { command, timeout });
            }
            Some(Self::Distillation(plan)) => Some(plan),
            _ => None,
        };
        let configured = args.config.is_some() || !args.settings.is_empty();
        let (cache, student) = match (&args.cache, &args.student, &stored) {
            (Some(cache), Some(student), _) => (cache.clone(), student.clone()),
            (_, _, Some(plan)) => (plan.cache.clone(), plan.student.clone()),
            _ => {
                return Err(Failure::user(
                    "there is nothing to evaluate a trial with",
                    "give --cache and --student, or --command",
                ));
            }
        };
        let mut base = match &stored {
            Some(plan) if !configured => plan.base.clone(),
            _ => read_config(args.config.as_deref(), &args.settings)?,
        };
        base.allow_low_fidelity |= args.allow_low_fidelity;
        add_shards(&mut base, &args.elsewhere)?;
        let validation = match args.validation.or(stored.map(|plan| plan.validation)) {
            Some(share) => share,
            None => match open_cache(&cache, &base.shards, Io::Read)?
                .manifest()
                .data
                .preparation
                .validation()
            {
                share if share > 0.0 => share,
                _ => DEFAULT_VALIDATION,
            },
        };
        Ok(Self::Distillation(Distillation {
            cache,
            student,
            base,
            validation,
        }))
    }

    /// Opens what the trials need, as far as that shows what is wrong with it.
    pub(crate) fn open(&self) -> Result<Evaluator, Failure> {
        Ok(match self {
            Self::Command { command, timeout } => Evaluator::Command(CommandObjective {
                command: command.clone(),
                timeout: timeout.map(Duration::from_secs_f64),
            }),
            Self::Distillation(plan) => {
                let mut objective = DistillationObjective::new(plan.clone());
                objective.open()?;
                Evaluator::Distillation(Box::new(objective))
            }
        })
    }

    /// Refuses parameters that the trainer does not have, values that they take together with nothing else of the
    /// space, and settings that a trial does not decide: a study that has begun can't be mended.
    pub(crate) fn check_space(&self, space: &Space) -> Result<(), Failure> {
        let Self::Distillation(plan) = self else {
            return Ok(());
        };
        for (j, parameter) in space.parameters().iter().enumerate() {
            let name = parameter.name();
            if FIXED.contains(&name) {
                return Err(Failure::user(
                    format!(
                        "`{name}` can't be searched: it is the same for all trials, or each has its own"
                    ),
                    "take it out of the space; every other key of `caskd train --print-config` can be searched",
                ));
            }
            let values: Vec<Value> = match parameter.domain() {
                // The ends may be whole numbers, what lies between them is not.
                Domain::Float { low, high, .. } => [*low, low + (high - low) / PI, *high]
                    .map(Value::Number)
                    .to_vec(),
                Domain::Int { low, high, .. } => vec![Value::Integer(*low), Value::Integer(*high)],
                Domain::Ordinal { values, .. } | Domain::Categorical { values } => values.clone(),
            };
            for value in values {
                plan.base.clone().set(name, &setting_text(&value))?;
                let mut tried = space.surroundings(j, &value).into_iter().map(|params| {
                    let config = plan.config_of(&params)?;
                    config.validate()
                });
                // One that fits is enough; where none does, the first says why.
                if let Some(Err(error)) = tried.next()
                    && tried.all(|one| one.is_err())
                {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// What a value is.
    pub(crate) fn metric(&self) -> &'static str {
        match self {
            Self::Distillation(_) => "validation perplexity",
            Self::Command { .. } => "value",
        }
    }

    /// The largest share of the cache that leaves the judging sequences alone.
    pub(crate) fn largest_fraction(&self) -> Option<f64> {
        match self {
            Self::Distillation(plan) => Some(1.0 - plan.validation),
            Self::Command { .. } => None,
        }
    }

    /// Name of the file for the configuration of the trial that is `which`: [`BEST`] or [`RECOMMENDED`].
    pub(crate) fn file_name(&self, which: &str) -> String {
        match self {
            Self::Distillation(_) => format!("{which}.toml"),
            Self::Command { .. } => format!("{which}.json"),
        }
    }

    /// A trial's configuration, in the form that the evaluation takes.
    pub(crate) fn config_text(&self, trial: &TrialView) -> Result<String, Failure> {
        match self {
            Self::Distillation(plan) => {
                let mut config = plan.config_of(&trial.params)?;
                config.seed = plan.base.seed;
                Ok(config.to_toml()?)
            }
            Self::Command { .. } => Ok(trial.params.to_json()),
        }
    }

    /// The command that does trial `trial`, whose files are in `folder`, once more.
    pub(crate) fn repetition(
        &self,
        config: &StudyConfig,
        folder: &Path,
        trial: &TrialView,
    ) -> Option<String> {
        match self {
            Self::Distillation(plan) => {
                let config = folder.join("run").join("config.toml");
                config.is_file().then(|| {
                    format!(
                        "caskd train --cache {} --student {} --config {} --out again",
                        shell_word(plan.cache.display()),
                        shell_word(plan.student.display()),
                        shell_word(config.display())
                    )
                })
            }
            Self::Command { command, .. } => {
                Some(repeated(command, &evaluated(config, folder, trial)))
            }
        }
    }

    /// The command that uses the configuration of `trial`, which is in `file`; `None` where the program gets its
    /// parameters in another way than as a file.
    pub(crate) fn reproduction(
        &self,
        config: &StudyConfig,
        file: &Path,
        trial: &TrialView,
    ) -> Option<String> {
        match self {
            Self::Distillation(plan) => Some(format!(
                "caskd train --cache {} --student {} --config {} --out RUN",
                shell_word(plan.cache.display()),
                shell_word(plan.student.display()),
                shell_word(file.display())
            )),
            Self::Command { command, .. } => {
                with_file(command, &evaluated(config, Path::new("."), trial), file)
            }
        }
    }
}

/// The trial as its objective saw it.
fn evaluated<'a>(config: &StudyConfig, dir: &'a Path, trial: &'a TrialView) -> Trial<'a> {
    let (fraction, budget) = config.shares(trial.rung);
    Trial {
        number: trial.number,
        params: &trial.params,
        rung: trial.rung,
        fraction,
        budget,
        seed: trial.seed,
        dir,
    }
}

/// An opened [`Plan`].
pub(crate) enum Evaluator {
    Distillation(Box<DistillationObjective>),
    Command(CommandObjective),
}

impl Evaluator {
    pub(crate) fn objective(&mut self) -> &mut dyn Objective {
        match self {
            Self::Distillation(objective) => objective.as_mut(),
            Self::Command(objective) => objective,
        }
    }

    /// The space without what no trial can be evaluated with.
    pub(crate) fn narrowed(&mut self, space: &Space) -> Result<Space, Failure> {
        match self {
            Self::Distillation(objective) => objective.narrowed(space),
            Self::Command(_) => Ok(space.clone()),
        }
    }

    /// Keeps the plan with the study, or checks that it is the study's.
    pub(crate) fn keep(&mut self, study: &Study) -> Result<(), Failure> {
        let now = self.kept()?;
        match kept(study)? {
            None => {
                let text = serde_json::to_string(&now)
                    .map_err(|error| Failure::ours(format!("can't write the plan: {error}")))?;
                Ok(study.set_note(NOTE, &text)?)
            }
            Some(then) => match then.difference(&now) {
                None => Ok(()),
                Some((what, then, now)) => Err(Failure::user(
                    format!(
                        "study `{}` was begun with another {what}: it has {then}, now it is {now}",
                        study.location()
                    ),
                    "go on with what it was begun with, or begin another study",
                )),
            },
        }
    }

    fn kept(&mut self) -> Result<Kept, Failure> {
        match self {
            Self::Command(objective) => Ok(Kept::Command {
                command: objective.command.clone(),
                timeout: objective.timeout.map(|timeout| timeout.as_secs_f64()),
            }),
            Self::Distillation(objective) => {
                let absolute =
                    |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
                let opened = objective.open()?;
                let (cache_digest, student_digest) = (
                    opened.cache.manifest().checksum.clone(),
                    opened.student.digest.clone(),
                );
                let without_shards = TrainConfig {
                    shards: Vec::new(),
                    ..objective.plan.base.clone()
                };
                Ok(Kept::Distillation {
                    cache: absolute(&objective.plan.cache),
                    student: absolute(&objective.plan.student),
                    shards: objective.plan.base.shards.clone(),
                    config: without_shards.to_toml()?,
                    validation: objective.plan.validation,
                    cache_digest,
                    student_digest,
                })
            }
        }
    }
}

impl Kept {
    /// What decides a trial's value and is not the same: its name, here, there.
    fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let short = |digest: &str| digest.chars().take(12).collect::<String>();
        let pairs: Vec<(&'static str, String, String)> = match (self, other) {
            (
                Self::Distillation {
                    config,
                    validation,
                    cache_digest,
                    student_digest,
                    ..
                },
                Self::Distillation {
                    config: config_now,
                    validation: validation_now,
                    cache_digest: cache_now,
                    student_digest: student_now,
                    ..
                },
            ) => {
                // The first line that differs says it best.
                let (line, line_now) = config
                    .lines()
                    .zip(config_now.lines())
                    .find(|(then, now)| then != now)
                    .unwrap_or((config, config_now));
                vec![
                    ("cache", short(cache_digest), short(cache_now)),
                    ("student", short(student_digest), short(student_now)),
                    (
                        "validation share",
                        validation.to_string(),
                        validation_now.to_string(),
                    ),
                    ("configuration", line.to_owned(), line_now.to_owned()),
                ]
            }
            (
                Self::Command { command, timeout },
                Self::Command {
                    command: command_now,
                    timeout: timeout_now,
                },
            ) => vec![
                ("command", command.clone(), command_now.clone()),
                (
                    "timeout",
                    format!("{timeout:?}"),
                    format!("{timeout_now:?}"),
                ),
            ],
            _ => vec![(
                "kind of trials",
                self.name().to_owned(),
                other.name().to_owned(),
            )],
        };
        pairs.into_iter().find(|(_, then, now)| then != now)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Distillation { .. } => "training from a cache",
            Self::Command { .. } => "a command",
        }
    }
}

fn kept(study: &Study) -> Result<Option<Kept>, Failure> {
    study
        .note(NOTE)?
        .map(|text| {
            serde_json::from_str(&text).map_err(|error| {
                Failure::user(
                    format!(
                        "study `{}`: how its trials are evaluated is unreadable: {error}",
                        study.location()
                    ),
                    "read it with the version of caskd that wrote it",
                )
            })
        })
        .transpose()
}
