//! Studies: durable, resumable, deterministic, and never twice at the same point.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_search::{
    BoxError, Climb, Control, Direction, Discrepancy, Error, Holder, Ladder, Objective, Outcome,
    Params, Progress, SamplerKind, Space, Study, StudyConfig, StudySummary, Told, Trial,
    TrialState, TrialView, Value, read_study, run_study,
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

struct Breaks(Bowl);

impl Objective for Breaks {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        if trial.number == 9 {
            return Err("no space left".into());
        }
        self.0.evaluate(trial)
    }
    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        self.0.discrepancy(params)
    }
}

struct Panics;

impl Objective for Panics {
    fn evaluate(&mut self, _: &Trial<'_>) -> Result<Outcome, BoxError> {
        panic!("a bug in the objective");
    }
    fn discrepancy(&mut self, _: &Params) -> Result<Discrepancy, BoxError> {
        Ok(Discrepancy::default())
    }
}

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

/// Killed between ask and tell at every trial: the process of the first attempt is gone, which a second `ask` under
/// an expired lease stands for here (real kills are in `kills.rs`).
#[test]
fn interrupted_equals_uninterrupted() {
    for sampler in [
        SamplerKind::Random,
        SamplerKind::Gp,
        SamplerKind::Sabo,
        SamplerKind::Tpe,
    ] {
        let config = config(sampler, 16);
        let whole = tempfile::tempdir().unwrap();
        run(
            whole.path(),
            &Space::table2(),
            &config,
            &mut Bowl::new(),
            false,
        )
        .unwrap();

        let pieces = tempfile::tempdir().unwrap();
        let mut objective = Bowl::new();
        let mut study = Study::create(pieces.path(), &Space::table2(), &config).unwrap();
        for number in 0..16 {
            let first = study
                .ask_measured(Holder::External { seconds: -1.0 }, &mut objective)
                .unwrap();
            assert_eq!((first.trial, first.resumed), (number, false));
            study = Study::open(pieces.path()).unwrap();
            let second = study.ask(Holder::External { seconds: 100.0 }).unwrap();
            assert_eq!((second.trial, second.resumed), (number, true));
            assert_eq!(
                (second.params.clone(), second.seed),
                (first.params, first.seed)
            );
            let outcome = Outcome::Value(bowl(&second.params));
            let told = study
                .tell(number, Some(second.token), &outcome, 0.0)
                .unwrap();
            assert_eq!(told, Told::Recorded);
            let late = study
                .tell(number, Some(first.token), &Outcome::Value(0.0), 0.0)
                .unwrap();
            assert_eq!(late, Told::Late);
            study = Study::open(pieces.path()).unwrap();
        }
        assert_eq!(
            suggestions(whole.path()),
            suggestions(pieces.path()),
            "{sampler}"
        );
        assert_eq!(read_study(pieces.path()).unwrap().late.len(), 16);
    }
}

#[test]
fn stopped_and_broken_trials_are_given_back() {
    let config = config(SamplerKind::Gp, 14);
    let whole = tempfile::tempdir().unwrap();
    run(
        whole.path(),
        &Space::table2(),
        &config,
        &mut Bowl::new(),
        false,
    )
    .unwrap();

    let dir = tempfile::tempdir().unwrap();
    let mut objective = Bowl::new();
    objective.script = |n| (n == 4).then_some(Outcome::Stopped);
    let summary = run(dir.path(), &Space::table2(), &config, &mut objective, false).unwrap();
    assert!(!summary.completed);
    let view = read_study(dir.path()).unwrap();
    assert_eq!(view.trials[4].state, TrialState::Stopped);

    let error = run(
        dir.path(),
        &Space::table2(),
        &config,
        &mut Breaks(Bowl::new()),
        true,
    )
    .unwrap_err();
    assert!(
        matches!(error, Error::Objective { trial: 9, .. }),
        "{error}"
    );
    assert!(!error.is_user());

    let panicked =
        std::panic::catch_unwind(|| run(dir.path(), &Space::table2(), &config, &mut Panics, true));
    assert!(panicked.is_err());

    let mut objective = Bowl::new();
    let summary = run(dir.path(), &Space::table2(), &config, &mut objective, true).unwrap();
    assert!(summary.completed);
    assert_eq!(objective.calls, [9, 10, 11, 12, 13]);
    assert_eq!(suggestions(whole.path()), suggestions(dir.path()));
}

#[test]
fn the_stop_flag_ends_the_study_between_trials() {
    let dir = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let mut seen = 0;
    let mut progress = |event: &Progress| {
        if let Progress::Finished {
            finished,
            eta_seconds,
            best_value,
            ..
        } = event
        {
            seen = *finished;
            assert!(eta_seconds.is_some() && best_value.is_some());
            if *finished == 3 {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    let mut control = Control {
        resume: false,
        stop: &stop,
        progress: &mut progress,
    };
    let config = config(SamplerKind::Random, 10);
    let summary = run_study(
        dir.path(),
        &Space::table2(),
        &config,
        &mut Bowl::new(),
        &mut control,
    )
    .unwrap();
    assert!(!summary.completed);
    assert_eq!((summary.complete, seen), (3, 3));
}

#[test]
fn an_existing_study_needs_resume_and_the_same_settings() {
    let dir = tempfile::tempdir().unwrap();
    let first = config(SamplerKind::Random, 3);
    run(
        dir.path(),
        &Space::table2(),
        &first,
        &mut Bowl::new(),
        false,
    )
    .unwrap();
    let check = |space: &Space, config: &StudyConfig, resume, expected: &[&str]| {
        let error = run(dir.path(), space, config, &mut Bowl::new(), resume).unwrap_err();
        assert!(error.is_user());
        assert!(error.hint().is_some());
        for part in expected {
            assert!(error.to_string().contains(part), "{error}");
        }
    };
    check(&Space::table2(), &first, false, &["already holds a study"]);
    let other = StudyConfig {
        seed: 12,
        ..first.clone()
    };
    check(
        &Space::table2(),
        &other,
        true,
        &["another seed", "has 11", "asked for 12"],
    );
    let other = StudyConfig {
        sampler: SamplerKind::Gp,
        ..first.clone()
    };
    check(
        &Space::table2(),
        &other,
        true,
        &["another sampler", "random", "gp"],
    );
    check(&mixed(), &first, true, &["search space", "hard_weight"]);
    // More trials are no difference.
    let more = StudyConfig { trials: 5, ..first };
    assert_eq!(
        run(dir.path(), &Space::table2(), &more, &mut Bowl::new(), true)
            .unwrap()
            .complete,
        5
    );
    let nowhere = tempfile::tempdir().unwrap();
    assert!(matches!(
        read_study(nowhere.path()),
        Err(Error::StudyMissing { .. })
    ));
    assert!(matches!(
        Study::open(nowhere.path()),
        Err(Error::StudyMissing { .. })
    ));
}

#[test]
fn foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("study.sqlite"),
        "this is no database, whatever its name says. ".repeat(50),
    )
    .unwrap();
    for error in [
        Study::create(dir.path(), &Space::table2(), &StudyConfig::default()).err(),
        read_study(dir.path()).err(),
    ] {
        assert!(
            matches!(error, Some(Error::StudyForeign { .. })),
            "{error:?}"
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

#[test]
fn looking_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    // What a file's address must quote is part of the path.
    let folder = dir.path().join("a study? 50% of it #1");
    let config = config(SamplerKind::Random, 3);
    let mut study = Study::create(folder.as_path(), &Space::table2(), &config).unwrap();
    let asked = study.ask(Holder::External { seconds: 60.0 }).unwrap();
    let listed = || {
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    // While somebody works on it, a look sees what is in the log only.
    assert_eq!(read_study(folder.as_path()).unwrap().trials.len(), 1);
    study
        .tell(asked.trial, None, &Outcome::Value(1.0), 0.0)
        .unwrap();
    drop(study);
    assert_eq!(listed(), ["study.sqlite"]);
    let before = std::fs::read(folder.join("study.sqlite")).unwrap();
    let view = read_study(folder.as_path()).unwrap();
    assert_eq!(view.trials[0].value, Some(1.0));
    assert_eq!(listed(), ["study.sqlite"]);
    assert_eq!(std::fs::read(folder.join("study.sqlite")).unwrap(), before);
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
fn threads_share_a_study() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(SamplerKind::Random, 40);
    Study::create(dir.path(), &Space::table2(), &config).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let summary = run(
                    dir.path(),
                    &Space::table2(),
                    &config,
                    &mut Bowl::new(),
                    true,
                )
                .unwrap();
                assert!(summary.completed);
            });
        }
    });
    let view = read_study(dir.path()).unwrap();
    assert_eq!(view.trials.len(), 40);
    assert_eq!(view.count(TrialState::Complete), 40);
    assert!(view.late.is_empty());
    let distinct: BTreeSet<_> = view.trials.iter().map(|t| t.params.to_json()).collect();
    assert_eq!(distinct.len(), 40);
}

#[test]
fn telling_checks_its_trial() {
    let dir = tempfile::tempdir().unwrap();
    let mut study = Study::create(
        dir.path(),
        &Space::table2(),
        &config(SamplerKind::Random, 3),
    )
    .unwrap();
    let value = Outcome::Value(1.0);
    assert!(matches!(
        study.tell(0, None, &value, 0.0),
        Err(Error::TrialUnknown { trial: 0 })
    ));
    assert!(matches!(
        study.tell(0, None, &Outcome::Stopped, 0.0),
        Err(Error::TrialUnknown { trial: 0 })
    ));
    let asked = study.ask(Holder::External { seconds: 10.0 }).unwrap();
    let tell = |study: &mut Study, token, outcome| study.tell(asked.trial, token, outcome, 0.0);
    assert_eq!(tell(&mut study, None, &value).unwrap(), Told::Recorded);
    // The same once more changes nothing; another result is refused, or kept apart under a lease.
    assert_eq!(tell(&mut study, None, &value).unwrap(), Told::Known);
    assert_eq!(
        tell(&mut study, Some(asked.token), &value).unwrap(),
        Told::Known
    );
    let other = Outcome::Value(2.0);
    assert_eq!(
        tell(&mut study, Some(asked.token), &other).unwrap(),
        Told::Late
    );
    let error = tell(&mut study, None, &other).unwrap_err();
    assert!(matches!(error, Error::TrialFinished { trial: 0, .. }) && error.is_user());
}

#[test]
fn a_trial_that_kills_its_workers_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let config = StudyConfig {
        max_attempts: 3,
        ..config(SamplerKind::Random, 3)
    };
    let mut study = Study::create(dir.path(), &Space::table2(), &config).unwrap();
    for attempt in 0..3 {
        let asked = study.ask(Holder::External { seconds: -1.0 }).unwrap();
        assert_eq!((asked.trial, asked.resumed), (0, attempt > 0));
    }
    assert_eq!(
        study
            .ask(Holder::External { seconds: 100.0 })
            .unwrap()
            .trial,
        1
    );
    let view = study.view().unwrap();
    assert_eq!(view.trials[0].state, TrialState::Failed);
    assert!(view.trials[0].error.as_ref().unwrap().contains("3 workers"));
}

/// A metric that the cheap rung ranks rightly or wrongly.
struct Rungs {
    honest: bool,
    seen: Vec<(u64, u64, f64, f64, u64)>,
}

impl Objective for Rungs {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        self.seen.push((
            trial.number,
            trial.rung,
            trial.fraction,
            trial.budget,
            trial.seed,
        ));
        std::fs::write(trial.dir.join(format!("rung-{}", trial.rung)), "")?;
        let sign = if trial.rung == 0 && !self.honest {
            -1.0
        } else {
            1.0
        };
        Ok(Outcome::Value(sign * bowl(trial.params)))
    }
    fn discrepancy(&mut self, _: &Params) -> Result<Discrepancy, BoxError> {
        Ok(Discrepancy::default())
    }
}

fn on_a_ladder(climb: Climb, honest: bool) -> (tempfile::TempDir, Rungs, StudySummary) {
    let dir = tempfile::tempdir().unwrap();
    let config = StudyConfig {
        ladder: Some(Ladder {
            climb,
            shares: vec![0.05, 0.2, 1.0],
            promote: 4,
            keep: 0.5,
            trust: 0.5,
        }),
        ..config(SamplerKind::Gp, 12)
    };
    let mut objective = Rungs {
        honest,
        seen: Vec::new(),
    };
    let space = Space::table2();
    let summary = run(dir.path(), &space, &config, &mut objective, false).unwrap();
    assert!(summary.completed);
    // A finished ladder has nothing left to do.
    let again = run(dir.path(), &space, &config, &mut objective, true).unwrap();
    assert_eq!(again.complete, summary.complete);
    (dir, objective, summary)
}

#[test]
fn the_best_climb_the_ladder_with_fresh_seeds_on_more_data() {
    let (dir, objective, summary) = on_a_ladder(Climb::Data, true);
    let by_rung = |rung| objective.seen.iter().filter(move |seen| seen.1 == rung);
    assert_eq!(
        [0, 1, 2].map(|rung| by_rung(rung).count()),
        [12, 4, 2],
        "{:?}",
        objective.seen
    );
    for (rung, fraction) in [(0, 0.05), (1, 0.2), (2, 1.0)] {
        assert!(by_rung(rung).all(|seen| seen.2 == fraction && seen.3 == 1.0));
    }
    let seeds: BTreeSet<u64> = objective.seen.iter().map(|seen| seen.4).collect();
    assert_eq!(seeds.len(), 18);
    assert_eq!((summary.trials, summary.best.unwrap().rung), (18, 2));
    assert!(
        summary
            .rungs
            .iter()
            .all(|r| r.trusted && r.spearman.is_none_or(|rho| rho == 1.0))
    );
    // Promotions are no observations: the suggestions are those of a study without a ladder.
    let mut study = Study::open(dir.path()).unwrap();
    for trial in read_study(dir.path()).unwrap().trials {
        assert_eq!(study.replay(trial.number).unwrap().0, trial.params);
    }
}

#[test]
fn halving_goes_on_with_the_same_training() {
    let (dir, objective, _) = on_a_ladder(Climb::Steps, true);
    let view = read_study(dir.path()).unwrap();
    for (number, rung, fraction, budget, seed) in &objective.seen {
        let root = view.root(*number);
        assert_eq!(*seed, view.trials[root as usize].seed);
        assert_eq!(
            (*fraction, *budget),
            (0.05, [0.05, 0.2, 1.0][*rung as usize])
        );
        assert!(
            dir.path()
                .join(format!("trials/{root:05}/rung-{rung}"))
                .exists()
        );
    }
}

#[test]
fn a_rung_that_ranks_wrongly_is_distrusted() {
    let (_dir, objective, summary) = on_a_ladder(Climb::Data, false);
    let promoted = objective.seen.iter().filter(|seen| seen.1 == 1).count();
    assert_eq!(promoted, 8);
    assert!(!summary.rungs[0].trusted && summary.rungs[0].spearman.unwrap() < 0.0);
    assert!(summary.rungs[1].trusted);
    assert_eq!(summary.best.unwrap().rung, 2);
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
