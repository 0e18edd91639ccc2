//! What is suggested: never twice, replayable, and the same seen from either direction.

use std::collections::BTreeSet;
use std::path::Path;

use caskd_search::{
    BoxError, Direction, Discrepancy, Holder, Objective, Outcome, Params, SamplerKind, Space,
    Study, StudyConfig, Trial, TrialView, Value, read_study,
};

use super::{Bowl, bowl, config, mixed, run, suggestions};

struct Negated(Bowl);

impl Objective for Negated {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        Ok(match self.0.evaluate(trial)? {
            Outcome::Value(value) => Outcome::Value(-value),
            other => other,
        })
    }
    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        self.0.discrepancy(params)
    }
}

#[test]
fn every_sampler_finishes_never_repeats_and_replays() {
    for space in [Space::table2(), mixed()] {
        for sampler in SamplerKind::ALL {
            let dir = tempfile::tempdir().unwrap();
            let mut objective = Bowl::new();
            objective.script = |n| match n % 7 {
                3 => Some(Outcome::Failed("diverged".to_owned())),
                5 => Some(Outcome::Value(f64::NAN)),
                _ => None,
            };
            let summary = run(
                dir.path(),
                &space,
                &config(sampler, 24),
                &mut objective,
                false,
            )
            .unwrap();
            assert!(summary.completed);
            assert_eq!((summary.complete, summary.failed), (18, 6), "{sampler}");
            let all = suggestions(dir.path());
            let distinct: BTreeSet<_> = all.iter().map(|(params, _)| params).collect();
            assert_eq!(distinct.len(), 24, "{sampler}");
            let mut study = Study::open(dir.path()).unwrap();
            for (number, (params, why)) in all.iter().enumerate() {
                let (again, again_why) = study.replay(number as u64).unwrap();
                assert_eq!(&again.to_json(), params, "{sampler} {number}");
                assert_eq!(
                    &serde_json::to_string(&again_why).unwrap(),
                    why,
                    "{sampler} {number}"
                );
            }
        }
    }
}

#[test]
fn why_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    run(
        dir.path(),
        &Space::table2(),
        &config(SamplerKind::Sabo, 12),
        &mut Bowl::new(),
        false,
    )
    .unwrap();
    let view = read_study(dir.path()).unwrap();
    assert_eq!(view.trials[0].why.by, "startup");
    let why = &view.trials[11].why;
    assert_eq!(why.by, "sabo");
    let (ei, s, alpha) = (
        why.expected_improvement.unwrap(),
        why.discrepancy.unwrap(),
        why.alpha.unwrap(),
    );
    assert!((why.score.unwrap() - (ei + alpha * s)).abs() < 1e-12);
}

#[test]
fn parallel_workers_condition_on_pending_points_and_replay() {
    for sampler in [
        SamplerKind::Gp,
        SamplerKind::Sabo,
        SamplerKind::Tpe,
        SamplerKind::Random,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut study = Study::create(dir.path(), &Space::table2(), &config(sampler, 40)).unwrap();
        let mut open = Vec::new();
        for round in 0..32u64 {
            open.push(study.ask(Holder::External { seconds: 1e6 }).unwrap());
            if open.len() == 4 {
                // Results come out of order.
                let asked = open.remove((round % 4) as usize);
                let outcome = Outcome::Value(bowl(&asked.params));
                study
                    .tell(asked.trial, Some(asked.token), &outcome, 0.0)
                    .unwrap();
            }
        }
        let all = suggestions(dir.path());
        let distinct: BTreeSet<_> = all.iter().map(|(params, _)| params).collect();
        assert_eq!(distinct.len(), 32, "{sampler}");
        let mut again = Study::open(dir.path()).unwrap();
        for (number, (params, why)) in all.iter().enumerate() {
            let (replayed, replayed_why) = again.replay(number as u64).unwrap();
            assert_eq!(&replayed.to_json(), params);
            assert_eq!(&serde_json::to_string(&replayed_why).unwrap(), why);
        }
    }
}

#[test]
fn an_exhausted_space_is_replicated_evenly() {
    let space = Space::from_toml(
        "[[param]]\nname = 'a'\nkind = 'int'\nlow = 1\nhigh = 3\n[[param]]\nname = 'b'\nkind = 'categorical'\nvalues = ['x', 'y']\n",
    )
    .unwrap();
    for sampler in SamplerKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        run(
            dir.path(),
            &space,
            &config(sampler, 15),
            &mut Bowl::new(),
            false,
        )
        .unwrap();
        let view = read_study(dir.path()).unwrap();
        let (first, rest) = view.trials.split_at(6);
        let distinct: BTreeSet<_> = first.iter().map(|t| t.params.to_json()).collect();
        assert_eq!(distinct.len(), 6);
        assert!(rest.iter().all(|t| t.why.by == "replicate"));
        let second: BTreeSet<_> = rest[..6].iter().map(|t| t.params.to_json()).collect();
        assert_eq!(second.len(), 6);
    }
}

#[test]
fn maximising_mirrors_minimising() {
    for sampler in [SamplerKind::Gp, SamplerKind::Sabo, SamplerKind::Tpe] {
        let (down, up) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let minimise = config(sampler, 14);
        let maximise = StudyConfig {
            direction: Direction::Maximize,
            ..minimise.clone()
        };
        let low = run(
            down.path(),
            &Space::table2(),
            &minimise,
            &mut Bowl::new(),
            false,
        )
        .unwrap();
        let high = run(
            up.path(),
            &Space::table2(),
            &maximise,
            &mut Negated(Bowl::new()),
            false,
        )
        .unwrap();
        let params = |dir: &Path| {
            suggestions(dir)
                .into_iter()
                .map(|(p, _)| p)
                .collect::<Vec<_>>()
        };
        assert_eq!(params(down.path()), params(up.path()));
        assert_eq!(
            low.best.unwrap().value.unwrap(),
            -high.best.unwrap().value.unwrap()
        );
    }
}

#[test]
fn luck_is_not_recommended() {
    let space =
        Space::from_toml("[[param]]\nname = 'x'\nkind = 'int'\nlow = 0\nhigh = 20\n").unwrap();
    let mut study = Study::in_memory(&space, &config(SamplerKind::Random, 21)).unwrap();
    for _ in 0..21 {
        let asked = study.ask(Holder::External { seconds: 60.0 }).unwrap();
        let x = asked.params.get("x").and_then(Value::as_f64).unwrap();
        let noise = if (x as u64).is_multiple_of(2) {
            0.3
        } else {
            -0.3
        };
        // A bowl around 12; at 3 a trial was luckier than the bottom is deep.
        let value = if x == 3.0 {
            -1.0
        } else {
            (x - 12.0).powi(2) / 10.0 + noise
        };
        study
            .tell(asked.trial, None, &Outcome::Value(value), 0.0)
            .unwrap();
    }
    let view = study.view().unwrap();
    let x = |trial: &TrialView| trial.params.get("x").and_then(Value::as_f64).unwrap();
    assert_eq!(x(view.best().unwrap()), 3.0);
    let recommended = x(view.recommended().unwrap().unwrap());
    assert!((10.0..=14.0).contains(&recommended), "{recommended}");
    // What the line of the best values stands on is known to be worth less than it showed.
    let last = *view.incumbents().unwrap().unwrap().last().unwrap();
    assert!(
        last.trial == 20 && last.mean > 1.0 && last.deviation > 0.0,
        "{last:?}"
    );
}
