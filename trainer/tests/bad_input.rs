//! What does not fit is refused before anything is written, with a message that names it and a hint.

#![allow(clippy::unwrap_used)]

mod tiny;

use caskd_formats::Tier;
use caskd_models::{LoadOptions, save_model};
use caskd_trainer::{Error, KdType, Layers, TrainConfig, check_fit, load_run};
use tiny::{CacheForm, Tiny, VOCABULARY, model, train_quietly};

fn kl(temperature: f64) -> TrainConfig {
    TrainConfig {
        kd_type: KdType::Kl,
        scaling_value: temperature,
        max_steps: Some(1),
        ..TrainConfig::default()
    }
}

fn refused(error: &Error, message: &str, hint: &str) {
    let (said, hinted) = (error.to_string(), error.hint().unwrap_or_default());
    assert!(said.contains(message), "{said:?} should say {message:?}");
    assert!(hinted.contains(hint), "{hinted:?} should say {hint:?}");
    assert!(error.is_user());
}

#[test]
fn what_does_not_fit_is_refused() {
    let tiny = Tiny::new();
    let exact = tiny.cache("exact", &CacheForm::default());
    let sparse = tiny.cache(
        "sparse",
        &CacheForm {
            tier: Tier::Sparse,
            layers: vec![2],
            ..CacheForm::default()
        },
    );
    let foreign = tiny.cache(
        "foreign",
        &CacheForm {
            fingerprint: Some("f0".repeat(32)),
            ..CacheForm::default()
        },
    );
    let student = tiny.student();
    let run = tiny.path("run");
    let check = |student, cache, config: &TrainConfig, message: &str, hint: &str| {
        let error = train_quietly(config, student, cache, &run, false).unwrap_err();
        refused(&error, message, hint);
        assert!(!run.exists(), "nothing is left behind after {message:?}");
    };
    check(
        &student,
        &foreign,
        &kl(1.0),
        "tokenizer of student",
        "tokenizer",
    );
    let error = check_fit(&model(2, 8, 30, 2), &exact).unwrap_err();
    refused(
        &error,
        "30 rows in its head, the teacher 43, their tokenizer 40",
        "padding rows",
    );
    check(
        &student,
        &sparse,
        &kl(2.0),
        "loss `kl` cannot be answered by this sparse cache",
        "--tier exact",
    );
    check(
        &student,
        &sparse,
        &kl(1.0),
        "loss `kl` cannot be answered",
        "`tail`",
    );
    let dual = TrainConfig {
        kd_type: KdType::DualScaling,
        ..kl(1.0)
    };
    check(
        &student,
        &sparse,
        &dual,
        "loss `dual-scaling` cannot be answered",
        "--tier exact",
    );
    let layers = TrainConfig {
        layers: Layers::LastMiddle,
        soft_weight: 1.0,
        ..kl(1.0)
    };
    let wrong_layers = TrainConfig {
        layers: Layers::Listed(vec![1, 2, 3]),
        ..layers
    };
    check(
        &student,
        &exact,
        &wrong_layers,
        "no teacher layer 1, 3; it has 2, 4",
        "`layers`",
    );
    check(
        &student,
        &exact,
        &TrainConfig {
            fraction: 1e-12,
            ..kl(1.0)
        },
        "no sequence",
        "fraction",
    );
    check(
        &student,
        &exact,
        &TrainConfig {
            batch_size: 0,
            ..kl(1.0)
        },
        "`batch_size` = 0",
        "",
    );
}

#[test]
fn padding_rows_may_differ() {
    let tiny = Tiny::new();
    let padded = tiny.cache(
        "padded",
        &CacheForm {
            vocabulary: VOCABULARY + 21,
            ..CacheForm::default()
        },
    );
    let (summary, _) =
        train_quietly(&kl(2.0), &tiny.student(), &padded, &tiny.path("run"), false).unwrap();
    assert!(summary.completed && summary.final_loss.is_finite());
}

#[test]
fn a_run_is_only_resumed_as_what_it_was() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let student = tiny.student();
    let run = tiny.path("run");
    train_quietly(&kl(1.0), &student, &cache, &run, false).unwrap();
    refused(
        &train_quietly(&kl(1.0), &student, &cache, &run, false).unwrap_err(),
        "exists already",
        "--resume",
    );
    let other = TrainConfig {
        learning_rate: 5e-4,
        ..kl(1.0)
    };
    let error = train_quietly(&other, &student, &cache, &run, true).unwrap_err();
    refused(
        &error,
        "`learning_rate` was 0.001 and is now 0.0005",
        "another folder",
    );
    let error = train_quietly(
        &kl(1.0),
        &student,
        &tiny.cache(
            "other",
            &CacheForm {
                top_k: 3,
                ..CacheForm::default()
            },
        ),
        &run,
        true,
    );
    refused(&error.unwrap_err(), "the cache was", "another folder");
    let error = train_quietly(&kl(1.0), &student, &cache, &tiny.path("student"), true).unwrap_err();
    refused(&error, "is not a run folder", "caskd train");
    refused(
        &load_run(&tiny.path("cache"), &LoadOptions::default()).unwrap_err(),
        "is not a run folder",
        "caskd train",
    );
    // No student, then another one, under the old path.
    std::fs::remove_dir_all(&student).unwrap();
    refused(
        &load_run(&run, &LoadOptions::default()).unwrap_err(),
        "has only adapters",
        "put the student back",
    );
    save_model(&model(2, 8, VOCABULARY, 77), &student).unwrap();
    refused(
        &load_run(&run, &LoadOptions::default()).unwrap_err(),
        "has changed since run",
        "train again",
    );
}
