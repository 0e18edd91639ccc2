//! Studies: durable, resumable, deterministic, and never twice at the same point.

#![allow(clippy::unwrap_used)]

mod interruptions;
mod ladder;
mod opening;
mod suggestions;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use caskd_search::{
    BoxError, Control, Discrepancy, Error, Objective, Outcome, Params, SamplerKind, Space,
    StudyConfig, StudySummary, Trial, Value, read_study, run_study,
};

/// A smooth bowl over whatever numbers and names a space has, with some failures.
struct Bowl {
    calls: Vec<u64>,
    /// What happens at a trial instead of a value.
    script: fn(u64) -> Option<Outcome>,
}

impl Bowl {
    fn new() -> Self {
        Self {
            calls: Vec::new(),
            script: |_| None,
        }
    }
}

fn bowl(params: &Params) -> f64 {
    params
        .iter()
        .map(|(name, value)| match (value.as_f64(), value.as_str()) {
            (Some(number), _) => ((number.abs() + 1e-9).ln() - 1.0).powi(2),
            (_, Some(text)) => (name.len() + text.len()) as f64 % 3.0,
            _ => 0.5,
        })
        .sum()
}

impl Objective for Bowl {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        assert!(trial.dir.is_dir());
        self.calls.push(trial.number);
        Ok((self.script)(trial.number).unwrap_or_else(|| Outcome::Value(bowl(trial.params))))
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        Ok(Discrepancy {
            logits: params
                .get("scaling_value")
                .and_then(Value::as_f64)
                .unwrap_or(0.0),
            hidden: params
                .get("layers")
                .map_or(0.0, |v| v.to_string().len() as f64),
        })
    }
}

fn config(sampler: SamplerKind, trials: u64) -> StudyConfig {
    StudyConfig {
        sampler,
        trials,
        seed: 11,
        ..StudyConfig::default()
    }
}

fn run(
    dir: &Path,
    space: &Space,
    config: &StudyConfig,
    objective: &mut dyn Objective,
    resume: bool,
) -> Result<StudySummary, Error> {
    let stop = AtomicBool::new(false);
    let mut control = Control {
        resume,
        stop: &stop,
        progress: &mut |_| {},
    };
    run_study(dir, space, config, objective, &mut control)
}

fn suggestions(dir: &Path) -> Vec<(String, String)> {
    read_study(dir)
        .unwrap()
        .trials
        .iter()
        .map(|t| (t.params.to_json(), serde_json::to_string(&t.why).unwrap()))
        .collect()
}

fn mixed() -> Space {
    Space::from_toml(
        r#"
        [[param]]
        name = "learning_rate"
        kind = "float"
        low = 1e-5
        high = 1.0
        log = true
        [[param]]
        name = "rank"
        kind = "int"
        low = 1
        high = 64
        log = true
        [[param]]
        name = "layers"
        kind = "categorical"
        values = ["none", "last", "last-middle"]
        [[param]]
        name = "beta"
        kind = "float"
        low = 0.0
        high = 4.0
        when = { layers = ["last", "last-middle"] }
        inactive = 1.0
        [[forbid]]
        layers = "last"
        rank = [1, 2]
        "#,
    )
    .unwrap()
}
