//! Cheap trials first.

use std::collections::BTreeSet;

use caskd_search::{
    BoxError, Climb, Discrepancy, Ladder, Objective, Outcome, Params, SamplerKind, Space, Study,
    StudyConfig, StudySummary, Trial, read_study,
};

use super::{bowl, config, run};

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
