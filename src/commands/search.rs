//! `caskd search`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use caskd_formats::Cache;
use caskd_models::{LoadOptions, load};
use caskd_search::{
    Control, Progress as StudyProgress, SamplerKind, Space, StudyConfig, StudySummary, TrialState,
    run_study,
};
use caskd_trainer::{TrainConfig, check_fit, probe};
use serde::Serialize;

use super::train::read_config;
use super::{parse_device, print_json, write_file};
use crate::cli::{SamplerArg, SearchArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::objective::{DistillationObjective, setting_text, validation_rows};
use crate::terminal::{self, duration, say};

/// Sequences on which S(x) is measured.
const PROBE_SEQUENCES: usize = 8;

/// Everything a study of the distillation objective needs.
pub(crate) struct SearchPlan {
    pub(crate) cache: PathBuf,
    pub(crate) student: PathBuf,
    pub(crate) out: PathBuf,
    pub(crate) space: Space,
    pub(crate) study: StudyConfig,
    pub(crate) validation: f64,
    pub(crate) base: TrainConfig,
    pub(crate) resume: bool,
}

#[derive(Serialize)]
struct Searched<'a> {
    out: &'a Path,
    best_config: Option<PathBuf>,
    #[serde(flatten)]
    summary: &'a StudySummary,
}

pub(crate) fn run(args: &SearchArgs) -> Outcome {
    let space = match &args.space {
        None => Space::table2(),
        Some(path) => Space::from_toml(
            &std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?,
        )?,
    };
    let sampler = match args.sampler {
        SamplerArg::Sabo => SamplerKind::Sabo,
        SamplerArg::Gp => SamplerKind::Gp,
        SamplerArg::Random => SamplerKind::Random,
    };
    let mut base = read_config(args.config.as_deref(), &args.settings)?;
    base.allow_low_fidelity |= args.allow_low_fidelity;
    let plan = SearchPlan {
        cache: args.cache.clone(),
        student: args.student.clone(),
        out: args.out.clone(),
        space,
        study: StudyConfig {
            sampler,
            seed: args.seed,
            trials: args.trials,
            fraction: args.fraction,
            ..StudyConfig::default()
        },
        validation: args.validation,
        base,
        resume: args.resume,
    };
    let summary = search_with_progress(&plan)?;
    if args.json {
        let best_config = summary.best.as_ref().map(|_| plan.out.join("best.toml"));
        print_json(&Searched {
            out: &plan.out,
            best_config,
            summary: &summary,
        })?;
    }
    Ok(if summary.completed {
        Exit::Done
    } else {
        Exit::Stopped
    })
}

/// Runs the study trial by trial, saying how each went, and writes the best configuration.
pub(crate) fn search_with_progress(plan: &SearchPlan) -> Result<StudySummary, Failure> {
    if !(plan.validation > 0.0 && plan.fraction_and_validation() <= 1.0) {
        return Err(Failure::user(
            format!(
                "--fraction {} and --validation {} don't fit: a trial would be judged on what it trains on",
                plan.study.fraction, plan.validation
            ),
            "both must be positive, and at most 1 together",
        ));
    }
    let study_there = plan.out.join("study.sqlite").exists();
    if !study_there
        && plan
            .out
            .read_dir()
            .is_ok_and(|mut entries| entries.next().is_some())
    {
        return Err(Failure::user(
            format!(
                "`{}` holds something that is not a study",
                plan.out.display()
            ),
            "choose another --out",
        ));
    }
    let cache = Arc::new(Cache::open(&plan.cache, plan.base.io())?);
    let options = LoadOptions {
        device: parse_device(&plan.base.device)?,
        kind: plan.base.kind(),
    };
    let validation = validation_rows(&cache.rows()?, plan.validation);
    if validation.is_empty() {
        return Err(Failure::user(
            "no sequence of the cache falls into the validation share",
            "give a larger --validation, or a larger cache",
        ));
    }
    let student = load(&plan.student, &options)?;
    check_fit(&student, &cache)?;
    let probe = probe(&student, &cache, PROBE_SEQUENCES)?;
    drop(student);
    let mut objective = DistillationObjective {
        base: plan.base.clone(),
        student: plan.student.clone(),
        cache,
        options,
        validation,
        probe,
    };

    let mut control = Control {
        resume: plan.resume,
        stop: &terminal::STOP,
        progress: &mut |event| say(as_line(event)),
    };
    let summary = run_study(
        &plan.out,
        &plan.space,
        &plan.study,
        &mut objective,
        &mut control,
    )?;
    if let Some(best) = &summary.best {
        let mut config = objective.config_of(&best.params)?;
        config.seed = plan.base.seed;
        let text = config.to_toml()?;
        let path = plan.out.join("best.toml");
        write_file(&path, |sink| {
            std::io::Write::write_all(sink, text.as_bytes())
        })?;
        say(format!(
            "best: trial {} with validation perplexity {:.3} (`{}`)",
            best.number + 1,
            best.value.unwrap_or(f64::NAN),
            path.display()
        ));
        say(format!(
            "train it on the whole cache: caskd train --cache {} --student {} --config {} --out RUN",
            plan.cache.display(),
            plan.student.display(),
            path.display()
        ));
    }
    if !summary.completed {
        say(format!(
            "stopped; go on with: caskd search … --out {} --resume",
            plan.out.display()
        ));
    }
    Ok(summary)
}

impl SearchPlan {
    fn fraction_and_validation(&self) -> f64 {
        self.study.fraction + self.validation
    }
}

fn as_line(event: &StudyProgress) -> String {
    match event {
        StudyProgress::Started {
            trial,
            params,
            trials,
            resumed,
            ..
        } => {
            let settings: Vec<String> = params
                .iter()
                .map(|(name, value)| format!("{name}={}", setting_text(value)))
                .collect();
            let again = if *resumed { " (taken up again)" } else { "" };
            format!(
                "trial {}/{trials}{again}: {}",
                trial + 1,
                settings.join(" ")
            )
        }
        StudyProgress::Finished {
            trial,
            state,
            value,
            error,
            seconds,
            best_value,
            trials,
            eta_seconds,
            ..
        } => {
            let result = match (state, value, error) {
                (TrialState::Complete, Some(value), _) => format!("{value:.3}"),
                (_, _, Some(error)) => format!("{}: {error}", state.name()),
                _ => state.name().to_string(),
            };
            let best = best_value.map_or(String::new(), |best| format!(", best {best:.3}"));
            let eta = eta_seconds.map_or(String::new(), |eta| format!(", ETA {}", duration(eta)));
            format!(
                "trial {}/{trials}: {result} in {}{best}{eta}",
                trial + 1,
                duration(*seconds)
            )
        }
    }
}
