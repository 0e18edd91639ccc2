//! Which folders are opened, and what opening leaves behind.

use caskd_search::{Error, Holder, Outcome, SamplerKind, Space, Study, StudyConfig, read_study};

use super::{Bowl, config, mixed, run};

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
