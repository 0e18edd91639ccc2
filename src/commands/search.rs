//! `caskd search`

mod compare;
mod plan;

use std::path::{Path, PathBuf};

use caskd_search::{
    Climb, Control, Direction, Error, Ladder, Location, Progress as StudyProgress, SamplerKind,
    Space, Study, StudyConfig, StudySummary, TrialState, TrialView, Why, work_on,
};
use serde::Serialize;

use super::{print_json, write_file};
use crate::cli::{LadderArgs, SamplerArg, SearchArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::objective::setting_text;
use crate::terminal::{self, duration, say, shell_word, shown};

pub(crate) use compare::{COMPARISON_FILE, Comparison, Test, best_so_far};
use plan::Evaluator;
pub(crate) use plan::{BEST, Plan, RECOMMENDED};

/// A study and how its trials are evaluated.
pub(crate) struct SearchPlan {
    pub(crate) location: Location,
    pub(crate) space: Space,
    pub(crate) study: StudyConfig,
    pub(crate) plan: Plan,
    pub(crate) resume: bool,
}

#[derive(Serialize)]
struct Searched<'a> {
    study: String,
    out: Option<&'a Path>,
    best_config: Option<PathBuf>,
    recommended_config: Option<PathBuf>,
    #[serde(flatten)]
    summary: &'a StudySummary,
}

pub(crate) fn run(args: &SearchArgs) -> Outcome {
    if args.compare.is_empty() {
        let plan = resolve(args)?;
        let summary = search_with_progress(&plan)?;
        if summary.completed && summary.best.is_none() {
            return Err(without_value(&plan.location));
        }
        if args.json {
            let file = |which: &str, trial: &Option<TrialView>| {
                trial.as_ref().and_then(|_| plan.config_file(which))
            };
            print_json(&Searched {
                study: plan.location.to_string(),
                out: args.out.as_deref(),
                best_config: file(BEST, &summary.best),
                recommended_config: file(RECOMMENDED, &summary.recommended),
                summary: &summary,
            })?;
        }
        return Ok(if summary.completed {
            Exit::Done
        } else {
            Exit::Stopped
        });
    }
    compare::run(args, &resolve(args)?)
}

/// Every trial failed: whoever waits for a configuration must hear of it.
fn without_value(study: &Location) -> Failure {
    Failure::user(
        format!("no trial of study `{study}` has a value: all have failed"),
        format!(
            "see why: caskd report {} --out report.html",
            shell_word(study)
        ),
    )
}

/// Everything that the arguments leave open comes from the study, where there is one to go on with.
fn resolve(args: &SearchArgs) -> Result<SearchPlan, Failure> {
    let location = match (&args.study, &args.out) {
        (Some(study), Some(out)) => Location::parse(study)?.with_folder(out),
        (Some(study), None) => Location::parse(study)?,
        (None, Some(out)) => Location::parse(&format!("sqlite:{}/study.sqlite", out.display()))?,
        (None, None) => {
            return Err(Failure::user(
                "there is no place for the study",
                "give --out",
            ));
        }
    };
    location.trials_folder()?;
    let stored = if (args.resume || args.worker) && args.compare.is_empty() {
        match Study::open(&location) {
            Ok(study) => Some(study),
            Err(Error::StudyMissing { .. }) if args.resume => None,
            Err(error) => return Err(error.into()),
        }
    } else {
        None
    };
    let (config, space, plan) = match &stored {
        None => (StudyConfig::default(), None, None),
        Some(study) => (
            study.config().clone(),
            Some(study.space().clone()),
            Plan::stored(study)?,
        ),
    };
    let space = match &args.space {
        Some(space) => read_space(space)?,
        None => space.unwrap_or_else(Space::table2),
    };
    let plan = Plan::of(args, plan)?;
    let mut study = StudyConfig {
        sampler: args.sampler.map_or(config.sampler, sampler_kind),
        seed: args.seed.unwrap_or(config.seed),
        trials: args.trials.unwrap_or(config.trials),
        fraction: args.fraction.unwrap_or(config.fraction),
        direction: if args.maximize {
            Direction::Maximize
        } else {
            config.direction
        },
        sabo: args.sabo.options(&config.sabo),
        lease_seconds: args.lease.unwrap_or(config.lease_seconds),
        ..config
    };
    let sampler = args.compare.iter().copied().map(sampler_kind);
    if !sampler.clone().any(|kind| kind == SamplerKind::Sabo) {
        args.sabo
            .check(sampler.clone().next().unwrap_or(study.sampler))?;
    }
    if let Some(ladder) = ladder(&args.ladder, study.trials, &plan) {
        if ladder.climb == Climb::Data {
            study.fraction = ladder.shares[0];
        }
        study.ladder = Some(ladder);
    }
    Ok(SearchPlan {
        location,
        space,
        study,
        plan,
        resume: args.resume || args.worker,
    })
}

/// `table2`, or a file.
pub(crate) fn read_space(name: &str) -> Result<Space, Failure> {
    if name == "table2" {
        return Ok(Space::table2());
    }
    let path = Path::new(name);
    let text =
        std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?;
    Ok(Space::from_toml(&text)?)
}

pub(crate) fn sampler_kind(sampler: SamplerArg) -> SamplerKind {
    match sampler {
        SamplerArg::Sabo => SamplerKind::Sabo,
        SamplerArg::Gp => SamplerKind::Gp,
        SamplerArg::Tpe => SamplerKind::Tpe,
        SamplerArg::Sobol => SamplerKind::Sobol,
        SamplerArg::Random => SamplerKind::Random,
    }
}

fn ladder(args: &LadderArgs, trials: u64, plan: &Plan) -> Option<Ladder> {
    if args.halving {
        let rungs = args.rungs as i32;
        let eta = args.eta as f64;
        return Some(Ladder {
            climb: Climb::Steps,
            shares: (0..rungs).rev().map(|power| eta.powi(-power)).collect(),
            promote: args
                .promote
                .unwrap_or_else(|| trials.div_ceil(args.eta))
                .max(1),
            keep: 1.0 / eta,
            trust: args.trust,
        });
    }
    if args.fractions.is_empty() {
        return None;
    }
    let mut shares = args.fractions.clone();
    if let (Some(last), Some(most)) = (shares.last_mut(), plan.largest_fraction())
        && *last > most
    {
        say(format!(
            "note: the last fraction is {} instead of {last}: the rest judges the trials",
            share(most)
        ));
        *last = most;
    }
    Some(Ladder {
        climb: Climb::Data,
        shares,
        promote: args.promote.unwrap_or(3),
        keep: 1.0 / args.eta as f64,
        trust: args.trust,
    })
}

/// Runs the study trial by trial, saying how each went, and writes the best configuration.
pub(crate) fn search_with_progress(plan: &SearchPlan) -> Result<StudySummary, Failure> {
    if let Some(most) = plan.plan.largest_fraction()
        && (plan.study.fraction > most || most >= 1.0)
    {
        return Err(Failure::user(
            format!(
                "--fraction {} and --validation {} don't fit: a trial would be judged on what it trains on",
                plan.study.fraction,
                share(1.0 - most)
            ),
            "both must be positive, and at most 1 together",
        ));
    }
    refuse_other_things(&plan.location)?;
    plan.plan.check_space(&plan.space)?;
    let mut evaluator = plan.plan.open()?;
    let space = evaluator.narrowed(&plan.space)?;
    search_with(plan, &space, &mut evaluator)
}

/// The same with what the trials need opened before: many studies can share it.
fn search_with(
    plan: &SearchPlan,
    space: &Space,
    evaluator: &mut Evaluator,
) -> Result<StudySummary, Failure> {
    let study = if plan.resume {
        Study::open_or_create(&plan.location, space, &plan.study)?
    } else {
        Study::create(&plan.location, space, &plan.study)?
    };
    evaluator.keep(&study)?;
    if plan.study.sampler == SamplerKind::Sabo && matches!(plan.plan, Plan::Command { .. }) {
        say("note: of a command S(x) is not known: sabo goes by expected improvement alone");
    }
    let mut control = Control {
        resume: plan.resume,
        stop: &terminal::STOP,
        progress: &mut |event| say(as_line(event)),
    };
    let summary = work_on(study, evaluator.objective(), &mut control)?;
    let luck = "by all trials together it is worth more than the best value, which may be luck";
    let other = match (&summary.best, &summary.recommended) {
        (Some(best), Some(other)) if best.number != other.number => Some(luck),
        _ => None,
    };
    for (which, trial, note) in [
        (BEST, &summary.best, None),
        (RECOMMENDED, &summary.recommended, other),
    ] {
        let Some(trial) = trial else { continue };
        let file = plan.config_file(which);
        if let Some(path) = &file {
            let text = plan.plan.config_text(trial)?;
            write_file(path, |sink| {
                std::io::Write::write_all(sink, text.as_bytes())
            })?;
        }
        // Mostly both are the same trial, and one line says it.
        if which == RECOMMENDED && note.is_none() {
            continue;
        }
        let place = file.as_ref().map_or_else(
            || format!(": {}", trial.params),
            |path| format!(" (`{}`)", path.display()),
        );
        say(format!(
            "{which}: trial {} with {} {}{place}{}",
            trial.number,
            plan.plan.metric(),
            shown(trial.value.unwrap_or(f64::NAN)),
            note.map_or_else(String::new, |note| format!("; {note}"))
        ));
        let used = file.and_then(|path| plan.plan.reproduction(&plan.study, &path, trial));
        if let Some(command) = used {
            say(format!("use it: {command}"));
        }
    }
    if !summary.completed {
        say(format!(
            "stopped; go on with: caskd search --study {} --resume",
            shell_word(&plan.location)
        ));
    }
    Ok(summary)
}

/// A folder that holds something else than a study is left alone.
fn refuse_other_things(location: &Location) -> Result<(), Failure> {
    let Some(folder) = location.folder() else {
        return Ok(());
    };
    let study_there = location.may_exist();
    let something = folder
        .read_dir()
        .is_ok_and(|mut entries| entries.next().is_some());
    if something && !study_there {
        return Err(Failure::user(
            format!("`{}` holds something that is not a study", folder.display()),
            "choose another --out",
        ));
    }
    Ok(())
}

impl SearchPlan {
    /// Where the configuration of the best or of the recommended trial is written.
    fn config_file(&self, which: &str) -> Option<PathBuf> {
        Some(self.location.folder()?.join(self.plan.file_name(which)))
    }
}

/// Why a point is tried, in one line.
fn reason(why: &Why) -> String {
    match (
        why.expected_improvement,
        why.discrepancy,
        why.alpha,
        why.score,
    ) {
        (Some(improvement), Some(discrepancy), Some(alpha), Some(score)) => format!(
            "EI {} {} {} · S {} = {}",
            shown(improvement),
            if alpha < 0.0 { '-' } else { '+' },
            shown(alpha.abs()),
            shown(discrepancy),
            shown(score)
        ),
        (Some(improvement), ..) => format!("EI {}", shown(improvement)),
        _ => why.by.clone(),
    }
}

/// A share of the data or the steps in few digits.
pub(crate) fn share(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

fn as_line(event: &StudyProgress) -> String {
    match event {
        StudyProgress::Started {
            trial,
            params,
            trials,
            resumed,
            rung,
            why,
            ..
        } => {
            let settings: Vec<String> = params
                .iter()
                .map(|(name, value)| format!("{name}={}", setting_text(value)))
                .collect();
            let again = if *resumed { " (taken up again)" } else { "" };
            let promoted = match rung {
                0 => String::new(),
                rung => format!(" (promoted to rung {rung})"),
            };
            format!(
                "trial {trial} of {trials}{promoted}{again}: {} ({})",
                settings.join(" "),
                reason(why)
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
                (TrialState::Complete, Some(value), _) => shown(*value),
                (_, _, Some(error)) => format!("{}: {error}", state.name()),
                _ => state.name().to_string(),
            };
            let best = best_value.map_or(String::new(), |best| format!(", best {}", shown(best)));
            let eta = eta_seconds.map_or(String::new(), |eta| format!(", ETA {}", duration(eta)));
            format!(
                "trial {trial} of {trials}: {result} in {}{best}{eta}",
                duration(*seconds)
            )
        }
        StudyProgress::Distrusted { rung } => format!(
            "note: at share {} the trials rank otherwise than at {} (rank correlation {:.2} over {} pairs): twice as \
             many go on, and the higher share chooses the winner",
            share(rung.shares.0),
            share(rung.shares.1),
            rung.spearman.unwrap_or(f64::NAN),
            rung.pairs
        ),
    }
}
