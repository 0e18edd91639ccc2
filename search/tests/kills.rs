//! Workers killed at random moments lose nothing and change nothing.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use caskd_search::{
    BoxError, Control, Discrepancy, Objective, Outcome, Params, SamplerKind, Space, StudyConfig,
    StudySummary, Trial, TrialState, Value, read_study, run_study,
};

const FOLDER: &str = "CASKD_TEST_STUDY";
const KILLS: u32 = 200;

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

fn config(sampler: SamplerKind) -> StudyConfig {
    StudyConfig {
        sampler,
        seed: 5,
        trials: if sampler == SamplerKind::Random {
            300
        } else {
            40
        },
        max_attempts: 10_000,
        // Only death frees a trial here, never silence.
        lease_seconds: 1e6,
        ..StudyConfig::default()
    }
}

fn run(dir: &Path, sampler: SamplerKind) -> StudySummary {
    let stop = AtomicBool::new(false);
    let mut control = Control {
        resume: true,
        stop: &stop,
        progress: &mut |_| {},
    };
    run_study(
        dir,
        &Space::table2(),
        &config(sampler),
        &mut Slow,
        &mut control,
    )
    .unwrap()
}

/// Not a test: the process that is killed.
#[test]
#[ignore = "started by the other test"]
fn worker() {
    let Ok(folder) = std::env::var(FOLDER) else {
        return;
    };
    let (sampler, dir) = folder.split_once(':').unwrap();
    run(Path::new(dir), sampler.parse().unwrap());
}

fn finished(dir: &Path) -> BTreeMap<u64, (String, Option<f64>)> {
    let Ok(view) = read_study(dir) else {
        return BTreeMap::new();
    };
    view.trials
        .iter()
        .filter(|t| t.state.is_finished())
        .map(|t| (t.number, (t.params.to_json(), t.value)))
        .collect()
}

#[test]
#[cfg(target_os = "linux")]
fn two_hundred_random_kills() {
    let mut state = 1u64;
    let mut kills = 0;
    let samplers = [SamplerKind::Random, SamplerKind::Sabo];
    for sampler in samplers.into_iter().cycle() {
        let pieces = tempfile::tempdir().unwrap();
        let mut before = BTreeMap::new();
        while kills < KILLS {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["worker", "--exact", "--ignored"])
                .env(FOLDER, format!("{sampler}:{}", pieces.path().display()))
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            std::thread::sleep(Duration::from_millis((state >> 33) % 120));
            let ended = child.try_wait().unwrap().is_some();
            child.kill().unwrap();
            child.wait().unwrap();
            kills += u32::from(!ended);
            let after = finished(pieces.path());
            for (number, trial) in &before {
                assert_eq!(after.get(number), Some(trial), "trial {number} changed");
            }
            before = after;
            if ended {
                break;
            }
        }
        let summary = run(pieces.path(), sampler);
        assert!(summary.completed);
        let whole = tempfile::tempdir().unwrap();
        run(whole.path(), sampler);
        assert_eq!(finished(whole.path()), finished(pieces.path()), "{sampler}");
        let view = read_study(pieces.path()).unwrap();
        assert_eq!(
            view.count(TrialState::Running) + view.count(TrialState::Stopped),
            0
        );
        if kills >= KILLS {
            return;
        }
    }
}
