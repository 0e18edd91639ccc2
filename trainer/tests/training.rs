//! Whole runs on a tiny student: it learns, it resumes bit for bit, it stops with a name.

#![allow(clippy::unwrap_used)]

mod tiny;

use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_formats::Tier;
use caskd_models::LoadOptions;
use caskd_trainer::losses::{LogitReduction, Normalization, Sigma};
use caskd_trainer::{
    Control, KdType, Layers, StepReport, TrainConfig, evaluate_cache, is_run, load_run, run_caches,
    train,
};
use proptest::prelude::*;
use tiny::{CacheForm, Tiny, load_student, train_quietly};

fn config() -> TrainConfig {
    let mut config = TrainConfig {
        epochs: 3,
        batch_size: 3,
        gradient_accumulation: 2,
        learning_rate: 2e-2,
        checkpoint_every: 3,
        kd_type: KdType::DualScaling,
        layers: Layers::LastMiddle,
        hidden_norm: Normalization::MaxMin,
        ..TrainConfig::default()
    };
    config.lora.rank = 2;
    config.lora.dropout = 0.1;
    config
}

fn adapter_bytes(run: &Path) -> Vec<u8> {
    fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

/// What must not depend on stops: everything but times.
fn essence(reports: &[StepReport]) -> Vec<StepReport> {
    let without_times = |report: &StepReport| StepReport {
        seconds: 0.0,
        tokens_per_second: 0.0,
        data_wait_seconds: 0.0,
        memory_bytes: None,
        ..report.clone()
    };
    reports.iter().map(without_times).collect()
}

#[test]
fn every_recipe_lowers_its_loss() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let recipes = [
        (
            "plain",
            TrainConfig {
                soft_weight: 0.0,
                ..config()
            },
        ),
        (
            "kl",
            TrainConfig {
                kd_type: KdType::Kl,
                scaling_value: 4.0,
                layers: Layers::None,
                ..config()
            },
        ),
        (
            "dual",
            TrainConfig {
                hard_weight: 0.0,
                scaling_value: 2.0,
                ..config()
            },
        ),
        (
            "sample",
            TrainConfig {
                sigma: Sigma::Sample,
                logits_norm: Normalization::Standardize,
                ..config()
            },
        ),
        (
            "paper",
            TrainConfig {
                logit_reduction: LogitReduction::Paper,
                detach_sigma: false,
                ..config()
            },
        ),
        (
            "listed",
            TrainConfig {
                layers: Layers::Listed(vec![2]),
                hidden_norm: Normalization::Standardize,
                ..config()
            },
        ),
        (
            "embeddings",
            TrainConfig {
                layers: Layers::Listed(vec![4, 2]),
                soft_weight: 1e-3,
                ..config()
            },
        ),
    ];
    for (name, recipe) in recipes {
        let run = tiny.path(name);
        let recipe = TrainConfig {
            epochs: 8,
            ..recipe
        };
        let (summary, reports) =
            train_quietly(&recipe, &tiny.student(), &cache, &run, false).unwrap();
        let mean =
            |of: &[StepReport]| of.iter().map(|report| report.loss).sum::<f64>() / of.len() as f64;
        let (first, last) = (mean(&reports[..4]), mean(&reports[reports.len() - 4..]));
        assert!(last < first, "{name}: {first} to {last}");
        assert_eq!((summary.steps, summary.completed), (8 * 4, true));
        assert_eq!(
            fs::read_to_string(run.join("log.jsonl"))
                .unwrap()
                .lines()
                .count(),
            32
        );
    }
}

#[test]
fn distillation_brings_the_student_nearer_to_its_teacher() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let run = tiny.path("run");
    let recipe = TrainConfig {
        hard_weight: 0.0,
        kd_type: KdType::Kl,
        layers: Layers::None,
        epochs: 10,
        ..config()
    };
    train_quietly(&recipe, &tiny.student(), &cache, &run, false).unwrap();
    assert!(is_run(&run) && !is_run(&tiny.student()));
    assert_eq!(
        run_caches(&run).unwrap().0,
        [cache.dir().canonicalize().unwrap()]
    );
    let kl = |model| {
        evaluate_cache(&model, &cache, None, 64, &mut |_, _| {})
            .unwrap()
            .kl
            .unwrap()
    };
    let (before, after) = (
        kl(load_student(&tiny.student())),
        kl(load_run(&run, &LoadOptions::default()).unwrap()),
    );
    assert!(
        after < 0.95 * before,
        "KL to the teacher from {before} to {after}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    /// Wherever it is stopped, however it is cut into batches, with other values where they have no
    /// effect: the same losses and weights.
    #[test]
    fn a_stopped_run_resumes_bit_for_bit(
        seed: u32,
        batch_size in 2usize..7,
        gradient_accumulation in 1usize..4,
        pauses in proptest::collection::btree_set(1u64..9, 0..4),
        sigma in prop_oneof![Just(Sigma::Position), Just(Sigma::Sample)],
    ) {
        let tiny = Tiny::new();
        let cache = tiny.cache("cache", &CacheForm::default());
        let student = tiny.student();
        let config = TrainConfig {
            seed: u64::from(seed),
            batch_size,
            gradient_accumulation,
            sigma,
            epochs: 9,
            max_steps: Some(10),
            ..config()
        };
        let (whole, expected) = train_quietly(&config, &student, &cache, &tiny.path("whole"), false).unwrap();
        prop_assert_eq!(whole.steps, 10);
        let run = tiny.path("stopped");
        let mut reports = Vec::new();
        for (attempt, pause) in pauses.into_iter().chain([99]).enumerate() {
            let stop = AtomicBool::new(false);
            let mut progress = |report: &StepReport| {
                reports.push(report.clone());
                stop.store(report.step >= pause, Ordering::Relaxed);
            };
            let mut control = Control { resume: attempt > 0, stop: &stop, progress: &mut progress };
            let config = TrainConfig { prefetch: 1 + attempt, checkpoint_every: attempt as u64 * 4, ..config.clone() };
            let summary = train(&config, load_student(&student), &student, Arc::clone(&cache), &run, &mut control);
            prop_assert_eq!(summary.unwrap().completed, pause == 99);
            prop_assert_eq!(load_run(&run, &LoadOptions::default()).is_ok(), pause == 99);
        }
        prop_assert_eq!(essence(&reports), essence(&expected));
        prop_assert_eq!(adapter_bytes(&run), adapter_bytes(&tiny.path("whole")));
        prop_assert_eq!(fs::read_to_string(run.join("log.jsonl")).unwrap().lines().count(), 10);
        // Once complete, resuming says the same again and does nothing.
        let (again, nothing) = train_quietly(&config, &student, &cache, &run, true).unwrap();
        prop_assert!(again.completed && nothing.is_empty() && again.final_loss == whole.final_loss);
    }
}

#[test]
fn a_killed_run_falls_back_to_the_last_whole_checkpoint() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let student = tiny.student();
    let (_, expected) =
        train_quietly(&config(), &student, &cache, &tiny.path("whole"), false).unwrap();
    for (name, damage) in [
        ("killed", None),
        ("cut", Some("cursor.json")),
        ("flipped", Some("optimizer.safetensors")),
    ] {
        let run = tiny.path(name);
        // A panic in the middle of step 8 is as good as a kill: nothing is written after it.
        let killed = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let stop = AtomicBool::new(false);
            let mut progress = |report: &StepReport| assert!(report.step < 8, "killed");
            let mut control = Control {
                resume: false,
                stop: &stop,
                progress: &mut progress,
            };
            train(
                &config(),
                load_student(&student),
                &student,
                Arc::clone(&cache),
                &run,
                &mut control,
            )
        }));
        assert!(killed.is_err());
        fs::create_dir_all(run.join("checkpoints/.unfinished")).unwrap();
        if let Some(file) = damage {
            let path = run.join("checkpoints/step-000006").join(file);
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        let (summary, reports) = train_quietly(&config(), &student, &cache, &run, true).unwrap();
        assert_eq!(
            reports[0].step,
            if damage.is_some() { 4 } else { 7 },
            "{name}"
        );
        assert_eq!(
            summary.notes.len(),
            usize::from(damage.is_some()),
            "{name}: {:?}",
            summary.notes
        );
        assert!(
            summary
                .notes
                .iter()
                .all(|note| note.contains("step-000006"))
        );
        assert_eq!(
            essence(&reports),
            essence(&expected[reports[0].step as usize - 1..]),
            "{name}"
        );
        assert_eq!(
            adapter_bytes(&run),
            adapter_bytes(&tiny.path("whole")),
            "{name}"
        );
        assert_eq!(
            fs::read_to_string(run.join("log.jsonl"))
                .unwrap()
                .lines()
                .count(),
            12
        );
        let checkpoints = fs::read_dir(run.join("checkpoints")).unwrap();
        let kept = checkpoints.filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("step-")
        });
        assert_eq!(kept.count(), 2);
    }
}

#[test]
fn accumulation_is_one_large_batch() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let of =
        |name: &str, batch_size: usize, gradient_accumulation: usize, reduction: LogitReduction| {
            let mut config = TrainConfig {
                batch_size,
                gradient_accumulation,
                logit_reduction: reduction,
                max_steps: Some(1),
                ..config()
            };
            config.lora.dropout = 0.0;
            config.fraction = 1.0;
            train_quietly(&config, &tiny.student(), &cache, &tiny.path(name), false)
                .unwrap()
                .1[0]
                .clone()
        };
    for reduction in [LogitReduction::Mean, LogitReduction::Paper] {
        // One batch of everything, or everything in pieces.
        let whole = of(&format!("whole-{reduction:?}"), 23, 1, reduction);
        let pieces = of(&format!("pieces-{reduction:?}"), 5, 5, reduction);
        assert_eq!(
            (whole.tokens, whole.targets),
            (pieces.tokens, pieces.targets)
        );
        for ((name, a), (_, b)) in whole.terms.iter().zip(&pieces.terms) {
            assert!((a - b).abs() < 1e-5 * a.abs(), "{name}: {a} and {b}");
        }
        assert!((whole.grad_norm - pieces.grad_norm).abs() < 1e-4 * whole.grad_norm);
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_with_a_name() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let run = tiny.path("run");
    let config = TrainConfig {
        learning_rate: 1e30,
        warmup_ratio: 0.0,
        checkpoint_every: 1,
        ..config()
    };
    let error = train_quietly(&config, &tiny.student(), &cache, &run, false).unwrap_err();
    let said = error.to_string();
    assert!(error.is_divergence() && error.is_user(), "{said}");
    assert!(
        said.contains("not finite at step 2") && said.contains("tiny.jsonl:"),
        "{said}"
    );
    assert!(
        error.hint().unwrap().contains("step-000001"),
        "{:?}",
        error.hint()
    );
}

#[test]
fn plain_fine_tuning_needs_no_teacher_column_and_sparse_kl_an_explicit_tail() {
    let tiny = Tiny::new();
    let sparse = tiny.cache(
        "sparse",
        &CacheForm {
            tier: Tier::Sparse,
            layers: vec![],
            ..CacheForm::default()
        },
    );
    let plain = TrainConfig {
        soft_weight: 0.0,
        ..config()
    };
    train_quietly(&plain, &tiny.student(), &sparse, &tiny.path("plain"), false).unwrap();
    for tail in ["uniform", "ghost"] {
        let mut config = TrainConfig {
            kd_type: KdType::Kl,
            layers: Layers::None,
            ..config()
        };
        config.set("tail", tail).unwrap();
        let (summary, _) =
            train_quietly(&config, &tiny.student(), &sparse, &tiny.path(tail), false).unwrap();
        assert!(summary.final_loss.is_finite());
    }
}
