//! Loss terms in whole runs: weights that change, projections that train, responses of both models.

#![allow(clippy::unwrap_used)]

mod tiny;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_trainer::{Control, StepReport, TrainConfig, train};
use tch::Tensor;
use tiny::{CacheForm, Tiny, load_student, train_quietly};

const STEPS: u64 = 6;

fn config(losses: &str) -> TrainConfig {
    let text = format!(
        "batch_size = 4\nmax_steps = {STEPS}\nlearning_rate = 0.02\ncheckpoint_every = 2\n{losses}"
    );
    TrainConfig::from_toml(&text).unwrap()
}

/// Weighted sum of the unweighted terms of a report.
fn total(report: &StepReport, weights: &[f64]) -> f64 {
    let terms = report.terms.iter().zip(weights);
    terms.map(|((_, value), weight)| value * weight).sum()
}

#[test]
fn scheduled_weights_are_those_of_the_step() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let config = config(
        "[[loss]]\nkind = \"cross-entropy\"\nschedule = \"warm-up\"\nwarmup_share = 0.5\n\
         [[loss]]\nkind = \"kl\"\nweight = 2\nschedule = \"linear\"\nfinal_weight = 0.5\n\
         [[loss]]\nkind = \"reverse-kl\"\nweight = 0\nschedule = \"cosine\"\nfinal_weight = 1",
    );
    let (_, reports) =
        train_quietly(&config, &tiny.student(), &cache, &tiny.path("run"), false).unwrap();
    assert_eq!(reports.len() as u64, STEPS);
    for (step, report) in reports.iter().enumerate() {
        let step = step as f64;
        let progress = step / 5.0;
        let weights = [
            ((step + 1.0) / 3.0).min(1.0),
            2.0 - 1.5 * progress,
            0.5 * (1.0 - (std::f64::consts::PI * progress).cos()),
        ];
        let expected = total(report, &weights);
        assert!(
            (report.loss - expected).abs() < 1e-9 * expected.abs(),
            "step {step}: {} and {expected}",
            report.loss
        );
    }
}

/// A run with a learned projection that is stopped after three steps and resumed has the same losses, adapters and
/// projections, bit for bit; and the projections have moved.
#[test]
fn projections_train_with_the_student_and_resume_exactly() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let config = config(
        "[[loss]]\nkind = \"knowledge-alignment\"\nlayers = [2, 4]\nprojection = \"learned\"\n\
         [[loss]]\nkind = \"hidden-cosine\"\nprojection = \"learned\"",
    );
    let whole = tiny.path("whole");
    let (_, reports) = train_quietly(&config, &tiny.student(), &cache, &whole, false).unwrap();
    assert!(reports[reports.len() - 1].loss < reports[0].loss);

    let parts = tiny.path("parts");
    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    let mut control = Control {
        resume: false,
        stop: &stop,
        progress: &mut |report: &StepReport| {
            seen.push(report.loss);
            stop.store(report.step == 3, Ordering::Relaxed);
        },
    };
    let student = tiny.student();
    let summary = train(
        &config,
        load_student(&student),
        &student,
        Arc::clone(&cache),
        &parts,
        &mut control,
    )
    .unwrap();
    assert_eq!((summary.steps, summary.completed), (3, false));
    let (_, rest) = train_quietly(&config, &student, &cache, &parts, true).unwrap();
    seen.extend(rest.iter().map(|report| report.loss));
    let expected: Vec<f64> = reports.iter().map(|report| report.loss).collect();
    assert_eq!(seen, expected);
    for file in [
        "adapter/adapter_model.safetensors",
        "projections.safetensors",
    ] {
        let bytes = |run: &std::path::Path| std::fs::read(run.join(file)).unwrap();
        assert!(bytes(&whole) == bytes(&parts), "{file}");
    }
    let mut projections = Tensor::read_safetensors(whole.join("projections.safetensors")).unwrap();
    projections.sort_by(|(a, _), (b, _)| a.cmp(b));
    let names: Vec<&str> = projections.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "projection.hidden-cosine.4",
            "projection.knowledge-alignment.2",
            "projection.knowledge-alignment.4"
        ]
    );
    assert!(
        projections
            .iter()
            .all(|(_, tensor)| tensor.size() == [16, 8])
    );
    let apart = (&projections[1].1 - &projections[2].1).abs().max();
    assert!(apart.double_value(&[]) > 0.0);
}

#[test]
fn the_contrastive_pair_needs_responses_of_both() {
    let tiny = Tiny::new();
    let config = config("[[loss]]\nkind = \"distillm-2\"");
    let student = tiny.student();
    let one = tiny.cache("one", &CacheForm::default());
    let error = train_quietly(&config, &student, &one, &tiny.path("refused"), false).unwrap_err();
    let said = format!("{error} / {}", error.hint().unwrap());
    assert!(
        said.contains("none by the student") && said.contains("response_by"),
        "{said}"
    );
    assert!(!tiny.path("refused").exists());

    let form = CacheForm {
        student_responses: true,
        ..CacheForm::default()
    };
    let both = tiny.cache("both", &form);
    let (summary, reports) =
        train_quietly(&config, &student, &both, &tiny.path("run"), false).unwrap();
    assert!(summary.final_loss < reports[0].loss);
}
