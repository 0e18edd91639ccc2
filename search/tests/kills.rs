//! Workers, and the database, killed at random moments lose nothing and change nothing.
//!
//! `CASKD_KILLS` sets how many kills there are; the whole test of 200 takes minutes.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod postgres_server;

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use caskd_search::{
    BoxError, Control, Discrepancy, Location, Objective, Outcome, Params, SamplerKind, Space,
    StudyConfig, StudySummary, StudyView, Trial, TrialState, Value, read_study, run_study,
};
use postgres_server::Server;

const STUDY: &str = "CASKD_TEST_STUDY";

fn kills(default: u32) -> u32 {
    std::env::var("CASKD_KILLS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(default)
}

struct Slow;

impl Objective for Slow {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        std::thread::sleep(Duration::from_millis(4));
        let scaling = trial
            .params
            .get("scaling_value")
            .and_then(Value::as_f64)
            .unwrap_or(0.0);
        Ok(if trial.number % 9 == 4 {
            Outcome::Failed("diverged".to_owned())
        } else {
            Outcome::Value((scaling - 13.0).powi(2) + trial.seed as f64 / 2f64.powi(53))
        })
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        let scaling = params
            .get("scaling_value")
            .and_then(Value::as_f64)
            .unwrap_or(0.0);
        Ok(Discrepancy {
            logits: scaling,
            hidden: 1.0,
        })
    }
}

fn config(sampler: SamplerKind, trials: u64) -> StudyConfig {
    StudyConfig {
        sampler,
        seed: 5,
        trials,
        max_attempts: 10_000,
        // Only death frees a trial here, never silence.
        lease_seconds: 1e6,
        ..StudyConfig::default()
    }
}

fn run(location: &Location, sampler: SamplerKind, trials: u64) -> StudySummary {
    let stop = AtomicBool::new(false);
    let mut control = Control {
        resume: true,
        stop: &stop,
        progress: &mut |_| {},
    };
    let config = config(sampler, trials);
    run_study(location, &Space::table2(), &config, &mut Slow, &mut control).unwrap()
}

/// Not a test: the process that is killed.
#[test]
#[ignore = "started by the other tests"]
fn worker() {
    let Ok(study) = std::env::var(STUDY) else {
        return;
    };
    let mut words = study.split('|');
    let mut next = || words.next().unwrap();
    let (sampler, trials, address, folder) = (next(), next(), next(), next());
    let location = Location::parse(address)
        .unwrap()
        .with_folder(folder.as_ref());
    run(&location, sampler.parse().unwrap(), trials.parse().unwrap());
}

fn start_worker(address: &str, folder: &str, sampler: SamplerKind, trials: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["worker", "--exact", "--ignored"])
        .env(STUDY, format!("{sampler}|{trials}|{address}|{folder}"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

type Finished = BTreeMap<u64, (String, Option<f64>)>;

fn finished(view: &StudyView) -> Finished {
    view.trials
        .iter()
        .filter(|t| t.state.is_finished())
        .map(|t| (t.number, (t.params.to_json(), t.value)))
        .collect()
}

fn nothing_lost(before: &Finished, after: &Finished) {
    for (number, trial) in before {
        assert_eq!(after.get(number), Some(trial), "trial {number} changed");
    }
}

/// Nothing is open, and each configuration has the value that an undisturbed study gives it.
fn whole(view: &StudyView, trials: u64) {
    let open = view.count(TrialState::Running) + view.count(TrialState::Stopped);
    assert_eq!(open, 0);
    assert_eq!(view.trials.len() as u64, trials);
}

/// The same pauses on every run.
struct Pauses(u64);

impl Pauses {
    fn below(&mut self, milliseconds: u64) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        Duration::from_millis((self.0 >> 33) % milliseconds)
    }
}

#[test]
fn killed_workers_of_a_file() {
    let wanted = kills(20);
    let mut pauses = Pauses(1);
    let mut killed = 0;
    for sampler in [SamplerKind::Random, SamplerKind::Sabo].into_iter().cycle() {
        let trials = if sampler == SamplerKind::Random {
            300
        } else {
            40
        };
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().to_str().unwrap();
        let location = Location::parse(address).unwrap();
        let look =
            || read_study(&location).map_or_else(|_| Finished::new(), |view| finished(&view));
        let mut before = Finished::new();
        while killed < wanted {
            let mut child = start_worker(address, address, sampler, trials);
            std::thread::sleep(pauses.below(120));
            let ended = child.try_wait().unwrap().is_some();
            child.kill().unwrap();
            child.wait().unwrap();
            killed += u32::from(!ended);
            for trial in read_study(&location).map_or_else(|_| Vec::new(), |view| view.trials) {
                assert_eq!(trial.worker_died(), trial.state == TrialState::Running);
            }
            let after = look();
            nothing_lost(&before, &after);
            before = after;
            if ended {
                break;
            }
        }
        assert!(run(&location, sampler, trials).completed);
        let undisturbed = tempfile::tempdir().unwrap();
        run(&Location::from(undisturbed.path()), sampler, trials);
        whole(&read_study(&location).unwrap(), trials);
        assert_eq!(
            finished(&read_study(undisturbed.path()).unwrap()),
            look(),
            "{sampler}"
        );
        if killed >= wanted {
            eprintln!("{killed} workers of a file were killed");
            return;
        }
    }
}

/// Three workers on one PostgreSQL study; one of them, or the server, is killed again and again.
#[test]
fn killed_workers_and_servers_of_postgres() {
    const TRIALS: u64 = 300;
    let Some(mut server) = Server::start() else {
        return;
    };
    let wanted = kills(20);
    let mut pauses = Pauses(2);
    let (mut killed_workers, mut killed_servers, mut round) = (0, 0, 0);
    while killed_workers + killed_servers < wanted {
        round += 1;
        let folder = tempfile::tempdir().unwrap();
        let address = server.address(&format!("kills_{round}"));
        let location = Location::parse(&address)
            .unwrap()
            .with_folder(folder.path());
        let start = || {
            start_worker(
                &address,
                folder.path().to_str().unwrap(),
                SamplerKind::Random,
                TRIALS,
            )
        };
        let mut workers: Vec<Child> = (0..3).map(|_| start()).collect();
        let mut before = Finished::new();
        while killed_workers + killed_servers < wanted {
            std::thread::sleep(pauses.below(200));
            if pauses.below(4).is_zero() {
                server.kill_and_restart();
                killed_servers += 1;
            } else {
                let victim = (pauses.below(3).as_millis()) as usize;
                let ended = workers[victim].try_wait().unwrap().is_some();
                workers[victim].kill().unwrap();
                workers[victim].wait().unwrap();
                killed_workers += u32::from(!ended);
                workers[victim] = start();
            }
            // Before the first worker has created the study there is none to read.
            let Ok(view) = read_study(&location) else {
                continue;
            };
            let after = finished(&view);
            nothing_lost(&before, &after);
            before = after;
            if before.len() as u64 == TRIALS {
                break;
            }
        }
        for mut worker in workers {
            assert!(worker.wait().unwrap().success());
        }
        let view = read_study(&location).unwrap();
        whole(&view, TRIALS);
        nothing_lost(&before, &finished(&view));
        // Each result is that of its own trial: the value depends on params and seed alone.
        for trial in view.trials.iter().filter(|t| t.number % 9 != 4) {
            let scaling = trial.params.get("scaling_value").unwrap().as_f64().unwrap();
            let value = (scaling - 13.0).powi(2) + trial.seed as f64 / 2f64.powi(53);
            assert_eq!(trial.value, Some(value));
        }
    }
    eprintln!(
        "{killed_workers} workers and {killed_servers} servers of PostgreSQL were killed in {round} studies"
    );
}
