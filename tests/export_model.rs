//! Runs and models as folders for transformers and PEFT, through the binary; and with `CASKD_PYTHON`, a Python that has
//! transformers and peft, loaded there.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use caskd_models::{LoadOptions, LoadedModel, load, load_adapters};
use caskd_trainer::load_run;
use support::{Bench, python_with, stderr};
use tch::{Device, Kind, Tensor};

/// A pruned student with a run of adapters (`run`), one of adapters on a base in 8 bits (`eight`) and one of all weights
/// (`full`).
fn bench() -> Bench {
    let bench = Bench::new();
    bench.cache("cache", 24, &[]);
    bench.ok(&[
        "prune", "--model", "teacher", "--method", "taylor", "--cache", "cache", "--out", "student",
    ]);
    for (out, mode) in [
        ("run", "mode=lora"),
        ("eight", "quantize=int8"),
        ("full", "mode=full"),
    ] {
        bench.ok(&[
            "train",
            "--cache",
            "cache",
            "--student",
            "student",
            "--out",
            out,
            "--set",
            "max_steps=3",
            "--set",
            "learning_rate=0.05",
            "--set",
            mode,
        ]);
    }
    bench
}

fn logits(model: &LoadedModel, ids: &Tensor) -> Tensor {
    tch::no_grad(|| {
        let hidden = model.network.forward(ids, &[], false).last_hidden;
        model.network.logits(&hidden)
    })
}

fn ids() -> Tensor {
    (Tensor::arange(26, (Kind::Int64, Device::Cpu)) * 37)
        .remainder(256)
        .view([2, 13])
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn exported_models_give_the_runs_numbers() {
    let bench = bench();
    let options = LoadOptions::default();
    let ids = ids();
    for run in ["run", "eight", "full"] {
        let expected = logits(&load_run(&bench.path(run), &options).unwrap(), &ids);
        let untrained = load(&bench.path("student"), &options).unwrap();
        assert!(
            difference(&logits(&untrained, &ids), &expected) > 1e-2,
            "{run} did not train"
        );
        for (form, padded) in [("padded", true), ("own-config", false)] {
            let out = format!("{run}-{form}");
            let told = bench.json(&[
                "export-model",
                run,
                "--pruned",
                form,
                "--out",
                &out,
                "--json",
            ]);
            assert_eq!(told["padded"], padded);
            let exported = load(&bench.path(&out), &options).unwrap();
            assert_eq!(exported.network.config().is_pruned(), !padded);
            assert!(
                difference(&logits(&exported, &ids), &expected) < 1e-4,
                "{out}"
            );
        }
    }
    // Adapters that were trained on a base in 8 bits come with that base.
    bench.ok(&["export-model", "eight", "--peft", "--out", "peft"]);
    let mut exported = load(&bench.path("peft/base"), &options).unwrap();
    load_adapters(&mut exported.network, &bench.path("peft")).unwrap();
    let expected = load_run(&bench.path("eight"), &options).unwrap();
    assert!(difference(&logits(&exported, &ids), &logits(&expected, &ids)) < 1e-4);

    let config = std::fs::read_to_string(bench.path("run-padded/config.json")).unwrap();
    assert!(!config.contains("caskd"), "{config}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let bench = bench();
    let check = |arguments: &[&str], message: &str| {
        let output = bench.run(&[&["export-model"], arguments].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(message) && said.contains("hint:"), "{said}");
    };
    check(&["student", "--peft", "--out", "x"], "is no run");
    check(&["full", "--peft", "--out", "x"], "has no adapters");
    check(&["run", "--out", "student"], "exists already");
    check(&["nothing", "--out", "x"], "nothing");
    bench.ok(&[
        "prune",
        "--model",
        "teacher",
        "--sparsity",
        "2:4",
        "--out",
        "masked",
    ]);
    bench.ok(&[
        "train",
        "--cache",
        "cache",
        "--student",
        "masked",
        "--out",
        "masked-run",
        "--set",
        "max_steps=2",
    ]);
    check(&["masked-run", "--peft", "--out", "x"], "is masked");
    assert!(!bench.path("x").exists());

    // The merged student still has two zeros in every four inputs.
    bench.ok(&["export-model", "masked-run", "--out", "merged"]);
    let merged = load(&bench.path("merged"), &LoadOptions::default()).unwrap();
    assert_eq!(merged.network.sparsity().unwrap().pattern, "2:4");
    let (_, weight) = merged
        .network
        .parameters()
        .into_iter()
        .find(|(name, _)| name == "model.layers.1.mlp.up_proj.weight")
        .unwrap();
    let zeros = weight
        .eq(0)
        .view([-1, 4])
        .sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    assert!(bool::try_from(zeros.eq(2).all()).unwrap());
}

/// transformers and peft give the same logits to 1e-3.
#[test]
fn transformers_and_peft_agree() {
    let Some(python) = python_with("transformers, peft") else {
        return;
    };
    let bench = bench();
    bench.ok(&["export-model", "run", "--out", "padded"]);
    bench.ok(&[
        "export-model",
        "run",
        "--pruned",
        "own-config",
        "--out",
        "own",
    ]);
    bench.ok(&["export-model", "run", "--peft", "--out", "peft"]);
    let run = load_run(&bench.path("run"), &LoadOptions::default()).unwrap();
    let forms = ["model=padded", "own=own", "peft=peft"];
    transformers_agree(&bench, &python, &run, &forms);

    // Of BLOOM's heads those that stay keep the position biases of their places.
    let bloom = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/bloom_7_bare");
    let (bloom, scope) = (bloom.to_string_lossy(), "0-1");
    bench.ok(&[
        "prune", "--model", &bloom, "--parts", "all", "--ratio", "0.5", "--scope", scope, "--out",
        "bloom",
    ]);
    for (form, out) in [("padded", "bloom-padded"), ("own-config", "bloom-own")] {
        bench.ok(&["export-model", "bloom", "--pruned", form, "--out", out]);
    }
    let bloom = load(&bench.path("bloom"), &LoadOptions::default()).unwrap();
    let forms = ["model=bloom-padded", "own=bloom-own"];
    transformers_agree(&bench, &python, &bloom, &forms);
}

/// `forms` are those of the script.
fn transformers_agree(bench: &Bench, python: &OsStr, model: &LoadedModel, forms: &[&str]) {
    let ids = ids().remainder(model.network.vocab_size() as i64);
    let expected = [("logits", logits(model, &ids)), ("ids", ids)];
    let expected_path = bench.path("expected.safetensors");
    Tensor::write_safetensors(&expected, &expected_path).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/witness_transformers.py");
    let output = Command::new(python)
        .arg(script)
        .arg(&expected_path)
        .args(forms)
        .current_dir(bench.folder.path())
        .env("OMP_NUM_THREADS", "1")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let differences: BTreeMap<String, f64> =
        serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(differences.len(), forms.len());
    for (folder, difference) in differences {
        assert!(difference < 1e-3, "{folder}: {difference}");
    }
}
