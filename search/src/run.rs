//! Running a study from the first trial to the last.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::config::StudyConfig;
use crate::error::{Error, Result};
use crate::ladder;
use crate::objective::{Objective, Outcome, Trial};
use crate::space::Space;
use crate::study::{Asked, Claim, Heartbeat, Holder, Location, Study};
use crate::view::{Progress, StudySummary, StudyView, TrialState, TrialView};

/// How the caller steers [`run_study`].
pub struct Control<'a> {
    /// Go on with a study that the folder already holds.
    pub resume: bool,
    /// Set to true to stop after the running trial (which sees the same flag, if the caller gives it to it).
    pub stop: &'a AtomicBool,
    /// Told of every trial that begins or ends.
    pub progress: &'a mut dyn FnMut(&Progress),
}

/// How long to wait for trials that run elsewhere before looking again.
const POLL: Duration = Duration::from_millis(100);

/// Searches `space` for the configuration with the best value, until `config.trials` trials are finished and the
/// best of them have climbed the ladder, if there is one.
///
/// A trial's artefacts are in `trials/00012/` of the study's folder. Killed at any instant and called again with
/// `control.resume`, it goes on with the same suggestions as if it had never stopped. Several processes may run the
/// same study: each takes the next trial, knowing which ones are pending.
pub fn run_study(
    location: impl Into<Location>,
    space: &Space,
    config: &StudyConfig,
    objective: &mut dyn Objective,
    control: &mut Control<'_>,
) -> Result<StudySummary> {
    let location = location.into();
    let study = if control.resume {
        Study::open_or_create(location, space, config)?
    } else {
        Study::create(location, space, config)?
    };
    work_on(study, objective, control)
}

/// Works on an open study, with others or alone, until it is complete.
pub fn work_on(
    mut study: Study,
    objective: &mut dyn Objective,
    control: &mut Control<'_>,
) -> Result<StudySummary> {
    let started = Instant::now();
    let trials = study.config().trials;
    loop {
        if control.stop.load(Ordering::Relaxed) {
            return summary(&study, started);
        }
        let thinking = Instant::now();
        match study.claim(Holder::Process, Some(trials), Some(&mut *objective))? {
            Claim::Done => return summary(&study, started),
            Claim::Wait => std::thread::sleep(POLL),
            Claim::Trial(asked) => {
                let view = study.view()?;
                (control.progress)(&Progress::Started {
                    trial: asked.trial,
                    resumed: asked.resumed,
                    params: asked.params.clone(),
                    why: asked.why.clone(),
                    suggest_seconds: thinking.elapsed().as_secs_f64(),
                    rung: asked.rung,
                    finished: finished(&view),
                    trials: view.wanted(),
                });
                if evaluate(&mut study, &asked, objective)? == Evaluated::Stopped {
                    return summary(&study, started);
                }
                let before = view.rungs();
                let view = study.view()?;
                (control.progress)(&finished_event(&view, asked.trial));
                for rung in view.rungs() {
                    let known = before.iter().any(|b| b.rung == rung.rung && !b.trusted);
                    if !rung.trusted && !known {
                        (control.progress)(&Progress::Distrusted { rung });
                    }
                }
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Evaluated {
    Told,
    Stopped,
}

/// Evaluates one trial under its lease. Whatever happens here, the trial ends with a result or is given back.
fn evaluate(study: &mut Study, asked: &Asked, objective: &mut dyn Objective) -> Result<Evaluated> {
    let lease_seconds = study.config().lease_seconds;
    let (fraction, budget) = study.config().shares(asked.rung);
    let location = study.location().clone();
    let begun = Instant::now();
    let mut held = Held {
        study,
        asked,
        begun,
        open: true,
    };
    let trial_dir = held.study.trial_dir(asked.trial)?;
    std::fs::create_dir_all(&trial_dir).map_err(|source| Error::Io {
        path: trial_dir.clone(),
        source,
    })?;
    let heartbeat = Heartbeat::start(&location, asked.trial, asked.token, lease_seconds);
    let outcome = objective.evaluate(&Trial {
        number: asked.trial,
        params: &asked.params,
        rung: asked.rung,
        fraction,
        budget,
        seed: asked.seed,
        dir: &trial_dir,
    });
    drop(heartbeat);
    let outcome = outcome.map_err(|source| Error::Objective {
        trial: asked.trial,
        source,
    })?;
    held.open = false;
    let seconds = begun.elapsed().as_secs_f64();
    held.study
        .tell(asked.trial, Some(asked.token), &outcome, seconds)?;
    Ok(if outcome == Outcome::Stopped {
        Evaluated::Stopped
    } else {
        Evaluated::Told
    })
}

/// Gives the trial back on every way out that brings no result: an error, or a panic of the objective.
struct Held<'a> {
    study: &'a mut Study,
    asked: &'a Asked,
    begun: Instant,
    open: bool,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.open {
            let seconds = self.begun.elapsed().as_secs_f64();
            // If this fails too, the lease runs out by itself.
            let _ = self.study.tell(
                self.asked.trial,
                Some(self.asked.token),
                &Outcome::Stopped,
                seconds,
            );
        }
    }
}

fn finished(view: &StudyView) -> u64 {
    (view.count(TrialState::Complete) + view.count(TrialState::Failed)) as u64
}

fn finished_event(view: &StudyView, number: u64) -> Progress {
    let trial = view.trials.iter().find(|t| t.number == number);
    let done = finished(view);
    let total: f64 = view
        .trials
        .iter()
        .filter(|t| t.state.is_finished())
        .filter_map(|t| t.seconds)
        .sum();
    let left = view.wanted().saturating_sub(done);
    let best = view.best();
    Progress::Finished {
        trial: number,
        state: trial.map_or(TrialState::Running, |t| t.state),
        value: trial.and_then(|t| t.value),
        error: trial.and_then(|t| t.error.clone()),
        seconds: trial.and_then(|t| t.seconds).unwrap_or(0.0),
        best_value: best.and_then(|t| t.value),
        best_trial: best.map(|t| t.number),
        finished: done,
        trials: view.wanted(),
        eta_seconds: (done > 0).then(|| total / done as f64 * left as f64),
    }
}

fn summary(study: &Study, started: Instant) -> Result<StudySummary> {
    let view = study.view()?;
    let rows: Vec<&TrialView> = view.trials.iter().collect();
    let suggested = rows.iter().filter(|t| t.rung == 0).count() as u64;
    Ok(StudySummary {
        completed: suggested >= view.config.trials
            && ladder::next(&view.config, &rows) == ladder::Step::Done,
        complete: view.count(TrialState::Complete) as u64,
        failed: view.count(TrialState::Failed) as u64,
        trials: view.wanted(),
        rungs: view.rungs(),
        best: view.best().cloned(),
        recommended: view.recommended()?.cloned(),
        seconds: started.elapsed().as_secs_f64(),
    })
}
