//! Loss terms in whole runs: weights that change, projections that train, responses of both models.

#![allow(clippy::unwrap_used)]

mod tiny;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_formats::Cache;
use caskd_models::{LoadOptions, LoadedModel, save_model};
use caskd_trainer::{Control, Quantize, StepReport, TrainConfig, load_base, load_run, train};
use tch::Tensor;
use tiny::{CacheForm, TOKENS, Tiny, load_student, train_quietly};

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

/// Trains once in one go and once with a stop after three of the steps: every loss and the bytes of `files` are the
/// same. Returns the folder of the whole run and its reports.
fn resumes_exactly(
    tiny: &Tiny,
    cache: &Arc<Cache>,
    config: &TrainConfig,
    files: &[&str],
) -> (PathBuf, Vec<StepReport>) {
    let whole = tiny.path("whole");
    let (_, reports) = train_quietly(config, &tiny.student(), cache, &whole, false).unwrap();
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
        config,
        load_student(&student),
        &student,
        Arc::clone(cache),
        &parts,
        &mut control,
    )
    .unwrap();
    assert_eq!((summary.steps, summary.completed), (3, false));
    let (_, rest) = train_quietly(config, &student, cache, &parts, true).unwrap();
    seen.extend(rest.iter().map(|report| report.loss));
    let expected: Vec<f64> = reports.iter().map(|report| report.loss).collect();
    assert_eq!(seen, expected);
    for file in files {
        let bytes = |run: &Path| std::fs::read(run.join(file)).unwrap();
        assert!(bytes(&whole) == bytes(&parts), "{file}");
    }
    (whole, reports)
}

#[test]
fn projections_train_with_the_student_and_resume_exactly() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let config = config(
        "[[loss]]\nkind = \"knowledge-alignment\"\nlayers = [2, 4]\nprojection = \"learned\"\n\
         [[loss]]\nkind = \"hidden-cosine\"\nprojection = \"learned\"",
    );
    let files = [
        "adapter/adapter_model.safetensors",
        "projections.safetensors",
    ];
    let (whole, _) = resumes_exactly(&tiny, &cache, &config, &files);
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

/// All weights in bf16 passes over f32 masters: exact to resume, and the run loads with every weight changed.
#[test]
fn all_weights_train_and_resume_exactly() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let config = config("mode = \"full\"\nlayers = \"last-middle\"");
    let (whole, _) = resumes_exactly(&tiny, &cache, &config, &["model/model.safetensors"]);
    let run = load_run(&whole, &LoadOptions::default()).unwrap();
    let before = load_student(&tiny.student()).network.parameters();
    for ((name, trained), (_, old)) in run.network.parameters().iter().zip(before) {
        assert_ne!(*trained, old, "{name} did not train");
    }
}

/// A base in 8 bits: exact to resume, near the run on the base as it is, and loaded as it was trained.
#[test]
fn a_base_in_eight_bits_trains_and_resumes_exactly() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let settings = "layers = \"last-middle\"\n[lora]\ndropout = 0.1\n";
    let config_of = |quantize: &str| config(&format!("quantize = \"{quantize}\"\n{settings}"));
    let files = ["adapter/adapter_model.safetensors"];
    let (whole, reports) = resumes_exactly(&tiny, &cache, &config_of("int8"), &files);
    assert!(
        load_run(&whole, &LoadOptions::default())
            .unwrap()
            .network
            .is_quantized()
    );
    // Read block by block into 8 bits, or read whole and then put into 8 bits: the same.
    let base = load_base(&tiny.student(), &LoadOptions::default(), Quantize::Int8).unwrap();
    let mut whole = load_student(&tiny.student()).network;
    whole.quantize().unwrap();
    assert!(base.network.is_quantized());
    assert_eq!(base.network.parameters(), whole.parameters());

    let plain = tiny.path("plain");
    let (_, others) =
        train_quietly(&config_of("none"), &tiny.student(), &cache, &plain, false).unwrap();
    for (one, other) in reports.iter().zip(others) {
        let apart = (one.loss - other.loss).abs() / other.loss;
        assert!(
            apart > 0.0 && apart < 0.02,
            "{} and {}",
            one.loss,
            other.loss
        );
    }
}

/// A student whose tokenizer has the same words under other ids: refused, until the teacher's tokenizer is named and
/// the losses match no tokens.
#[test]
fn another_tokenizer_is_served_by_uld_when_asked() {
    let tiny = Tiny::new();
    let cache = tiny.cache("cache", &CacheForm::default());
    let teacher = tiny.path("teacher");
    save_model(&tiny.teacher, &teacher).unwrap();
    let words: serde_json::Map<String, serde_json::Value> = (0..TOKENS)
        .map(|id| (format!("w{id}"), (TOKENS - 1 - id).into()))
        .collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    });
    let other: tokenizers::Tokenizer = json.to_string().parse().unwrap();
    let network = tiny::model(2, 8, 47, 2).network;
    let student = tiny.path("other");
    save_model(&LoadedModel::new(network, other, "other"), &student).unwrap();

    let named = format!("teacher_tokenizer = \"{}\"\n", teacher.display());
    let refused = |text: &str, expected: &str| {
        let error = train_quietly(
            &config(text),
            &student,
            &cache,
            &tiny.path("refused"),
            false,
        )
        .unwrap_err();
        let said = format!("{error} / {}", error.hint().unwrap_or_default());
        assert!(said.contains(expected), "{said}");
    };
    refused("[[loss]]\nkind = \"uld\"", "teacher_tokenizer");
    refused(
        &format!("{named}[[loss]]\nkind = \"kl\""),
        "matches the tokens",
    );
    let wrong = format!("teacher_tokenizer = \"{}\"\n", student.display());
    refused(
        &format!("{wrong}[[loss]]\nkind = \"uld\""),
        "does not have the tokenizer",
    );

    let terms = "[[loss]]\nkind = \"uld\"\n[[loss]]\nkind = \"cross-entropy\"\nweight = 0.1";
    let text = format!("batch_size = 4\nepochs = 6\nlearning_rate = 0.02\n{named}{terms}");
    let config = TrainConfig::from_toml(&text).unwrap();
    let (_, reports) = train_quietly(&config, &student, &cache, &tiny.path("run"), false).unwrap();
    let mean = |of: &[StepReport]| of.iter().map(|report| report.loss).sum::<f64>();
    assert!(mean(&reports[reports.len() - 6..]) < mean(&reports[..6]));
    assert!(
        reports
            .iter()
            .all(|report| report.terms[0].1 > 0.0 && report.terms[0].1 <= 2.0)
    );
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
