//! `caskd status`: how a study stands, without touching it.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caskd_search::{
    Location, RungTrust, StudyConfig, StudyView, TrialState, TrialView, read_study,
};
use serde::Serialize;

use super::search::share;
use super::{print_json, print_text};
use crate::cli::StatusArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{duration, shown, stopped};

/// Between two looks of `--watch`.
const LOOK: Duration = Duration::from_secs(2);

#[derive(Serialize)]
struct Status<'a> {
    study: String,
    config: &'a StudyConfig,
    /// Trials in all, promotions included; 0 for a study without an end.
    wanted: u64,
    complete: usize,
    failed: usize,
    running: Vec<Running<'a>>,
    stopped: usize,
    late: usize,
    best: Option<&'a TrialView>,
    /// Worth most by all trials together.
    recommended: Option<&'a TrialView>,
    rungs: Vec<RungTrust>,
    eta_seconds: Option<f64>,
    completed: bool,
}

#[derive(Serialize)]
struct Running<'a> {
    trial: u64,
    rung: u64,
    params: &'a caskd_search::Params,
    owner: Option<&'a str>,
    since_seconds: f64,
    /// Until the trial is handed out again; negative where that may happen any moment.
    lease_seconds: Option<f64>,
    /// The worker was a process of this machine and has certainly ended.
    worker_died: bool,
}

pub(crate) fn run(args: &StatusArgs) -> Outcome {
    let location = Location::parse(&args.study)?;
    loop {
        let view = read_study(&location)?;
        let status = Status::of(&location, &view)?;
        if args.json {
            print_json(&status)?;
        } else {
            let clear = if args.watch { "\x1b[2J\x1b[H" } else { "" };
            print_text(format!("{clear}{}", text(&status)));
        }
        if !args.watch || status.completed || stopped() {
            return Ok(Exit::Done);
        }
        let mut waited = Duration::ZERO;
        while waited < LOOK && !stopped() {
            std::thread::sleep(LOOK / 20);
            waited += LOOK / 20;
        }
    }
}

impl<'a> Status<'a> {
    fn of(location: &Location, view: &'a StudyView) -> Result<Self, Failure> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_err(|error| Failure::ours(format!("the clock is before 1970: {error}")))?
            .as_secs_f64();
        let running: Vec<Running<'_>> = view
            .trials
            .iter()
            .filter(|t| t.state == TrialState::Running)
            .map(|t| Running {
                trial: t.number,
                rung: t.rung,
                params: &t.params,
                owner: t.owner.as_deref(),
                since_seconds: (now - t.started_at).max(0.0),
                lease_seconds: t.lease_expires.map(|expires| expires - now),
                worker_died: t.worker_died(),
            })
            .collect();
        let finished: Vec<&TrialView> = view
            .trials
            .iter()
            .filter(|t| t.state.is_finished())
            .collect();
        let wanted = view.wanted();
        let left = wanted.saturating_sub(finished.len() as u64);
        let seconds: f64 = finished.iter().filter_map(|t| t.seconds).sum();
        let workers = running.len().max(1) as f64;
        Ok(Self {
            study: location.to_string(),
            config: &view.config,
            wanted,
            complete: view.count(TrialState::Complete),
            failed: view.count(TrialState::Failed),
            stopped: view.count(TrialState::Stopped),
            late: view.late.len(),
            best: view.best(),
            recommended: view.recommended()?,
            rungs: view.rungs(),
            eta_seconds: (left > 0 && seconds > 0.0)
                .then(|| seconds / finished.len() as f64 * left as f64 / workers),
            completed: wanted > 0 && left == 0 && running.is_empty(),
            running,
        })
    }
}

fn text(status: &Status<'_>) -> String {
    let mut out = String::new();
    let config = status.config;
    let goal = match config.direction {
        caskd_search::Direction::Minimize => "minimises",
        caskd_search::Direction::Maximize => "maximises",
    };
    let finished = status.complete + status.failed;
    let of = if status.wanted == 0 {
        String::new()
    } else {
        format!(" of {}", status.wanted.max(finished as u64))
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "study {}: {}, seed {}, {goal}\n{}{of} finished ({} with a value, {} failed), {} running, {} given back",
        status.study,
        config.sampler,
        config.seed,
        finished,
        status.complete,
        status.failed,
        status.running.len(),
        status.stopped,
    );
    if status.late > 0 {
        let _ = writeln!(out, "{} results came too late", status.late);
    }
    if let Some(eta) = status.eta_seconds {
        let _ = writeln!(out, "about {} to go", duration(eta));
    }
    for rung in &status.rungs {
        if let Some(rho) = rung.spearman {
            let verdict = if rung.trusted { "" } else { ": distrusted" };
            let _ = writeln!(
                out,
                "share {} foretells {} with rank correlation {rho:.2} over {} pairs{verdict}",
                share(rung.shares.0),
                share(rung.shares.1),
                rung.pairs
            );
        }
    }
    match status.best {
        Some(best) => {
            let value = shown(best.value.unwrap_or(f64::NAN));
            let _ = writeln!(out, "best: trial {}, {value}: {}", best.number, best.params);
        }
        None => out.push_str("no trial has a value yet\n"),
    }
    if let (Some(best), Some(other)) = (status.best, status.recommended)
        && best.number != other.number
    {
        let value = shown(other.value.unwrap_or(f64::NAN));
        let _ = writeln!(
            out,
            "recommended: trial {}, {value} (worth more by all trials together): {}",
            other.number, other.params
        );
    }
    for trial in &status.running {
        let held = match trial.lease_seconds {
            _ if trial.worker_died => "which has ended: the next worker takes it up".to_owned(),
            Some(left) if left >= 0.0 => format!("held for another {}", duration(left)),
            _ => "its lease has run out".to_owned(),
        };
        let _ = writeln!(
            out,
            "running: trial {} since {} by {}, {held}",
            trial.trial,
            duration(trial.since_seconds),
            // What follows names the machine's kernel, which nobody wants to read here.
            trial
                .owner
                .and_then(|owner| owner.split(" started").next())
                .unwrap_or("nobody"),
        );
    }
    out.truncate(out.trim_end().len());
    out
}
