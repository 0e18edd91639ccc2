//! Trials that were stopped, broken, killed or told twice, and several workers.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_search::{
    BoxError, Control, Discrepancy, Error, Holder, Objective, Outcome, Params, Progress,
    SamplerKind, Space, Study, StudyConfig, Told, Trial, TrialState, read_study, run_study,
};

use super::{Bowl, bowl, config, run, suggestions};

/// The folder of a study over Table 2 that ran without a stop.
fn uninterrupted(config: &StudyConfig) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut objective = Bowl::new();
    run(
        folder.path(),
        &Space::table2(),
        config,
        &mut objective,
        false,
    )
    .unwrap();
    folder
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
        let whole = uninterrupted(&config);

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
    let whole = uninterrupted(&config);

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
