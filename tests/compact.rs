//! The compact tier from the command line: built, resumed, verified, exported, measured, trained from.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use caskd_models::{LoadOptions, load};
use serde_json::Value;
use support::{Bench, files, stderr};
use tch::{Kind, Tensor};

/// 40 records, compact.
fn command<'a>(bench: &Bench, name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    bench.records("data.jsonl", 40);
    let command = [
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--out",
        name,
        "--tier",
        "compact",
        "--json",
    ];
    [&command, more].concat()
}

fn build(bench: &Bench, name: &str, more: &[&str]) -> Value {
    bench.json(&command(bench, name, more))
}

#[test]
fn a_finer_rate_is_nearer_to_the_teacher() {
    let bench = Bench::new();
    let measured = |name: &str, rate: &str| {
        build(&bench, name, &["--rate", rate, "--top-k", "2"]);
        bench.ok(&["verify", name, "--deep"]);
        bench.json(&["fidelity", name, "--json"])
    };
    let (coarse, fine) = (measured("coarse", "10"), measured("fine", "18"));
    for key in ["1", "2", "4", "8", "16", "20", "dual-scaling"] {
        let of = |report: &Value, what: &str| report[what][key].as_f64().unwrap();
        assert!(
            of(&fine, "kl") < of(&coarse, "kl"),
            "{key}: {fine} {coarse}"
        );
        assert!(
            of(&fine, "gradient_error") < of(&coarse, "gradient_error"),
            "{key}"
        );
    }
    let bytes = |report: &Value| report["bytes_per_position"].as_f64().unwrap();
    assert!(bytes(&coarse) < bytes(&fine));
    // The stored report is what measuring anew on the same positions would say of a larger sample.
    let anew = bench.json(&[
        "fidelity",
        "fine",
        "--teacher",
        "teacher",
        "--positions",
        "1024",
        "--json",
    ]);
    assert_eq!(anew["kl"], fine["kl"]);
    assert_eq!(anew["gradient_error"], fine["gradient_error"]);
    let card = bench.ok(&["inspect", "fine"]);
    let card = String::from_utf8_lossy(&card.stdout).into_owned();
    assert!(
        card.contains("compact, top-2") && card.contains("fidelity on"),
        "{card}"
    );
}

#[test]
fn a_distortion_is_kept_to() {
    let bench = Bench::new();
    build(&bench, "cache", &["--distortion", "0.001"]);
    let report = bench.json(&["fidelity", "cache", "--json"]);
    let kl = report["kl"]["1"].as_f64().unwrap();
    assert!(kl < 0.002 && kl > 1e-5, "{report}");
}

#[test]
fn a_rate_that_cannot_be_kept_is_refused_with_one_that_can() {
    let bench = Bench::new();
    for top_k in [&[][..], &["--top-k", "4"]] {
        let refused = bench.run(&command(
            &bench,
            "cache",
            &[&["--rate", "1"], top_k].concat(),
        ));
        let said = stderr(&refused);
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("--rate 1 is less than"), "{said}");
        assert_eq!(said.contains("a smaller --top-k"), !top_k.is_empty());
        assert!(!bench.path("cache").exists());
        let least = said.split("give at least ").nth(1).unwrap();
        let least: u32 = least.split(' ').next().unwrap().parse().unwrap();
        let name = format!("cache-{}", top_k.len());
        let rate = least.to_string();
        build(
            &bench,
            &name,
            &[&["--rate", &rate, "--no-fidelity"], top_k].concat(),
        );
        let less = (least - 1).to_string();
        let refused = bench.run(&command(
            &bench,
            "cache",
            &[&["--rate", &less], top_k].concat(),
        ));
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    }
}

#[test]
fn exported_logits_are_near_the_teachers() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    build(&bench, "cache", &["--rate", "60", "--no-fidelity"]);
    let export = [
        "export",
        "cache",
        "--to",
        "safetensors",
        "--out",
        "out.safetensors",
        "--logits",
        "--limit",
        "2",
    ];
    bench.ok(&export);
    let tensors = Tensor::read_safetensors(bench.path("out.safetensors")).unwrap();
    let get = |name: &str| &tensors.iter().find(|(known, _)| known == name).unwrap().1;
    let teacher = load(&bench.path("teacher"), &LoadOptions::default()).unwrap();
    let expected = tch::no_grad(|| {
        let forward = teacher.network.forward(get("input_ids"), &[], false);
        teacher
            .network
            .logits(&forward.last_hidden)
            .to_kind(Kind::Float)
    });
    let length = get("lengths").int64_value(&[0]);
    let real = |tensor: &Tensor| tensor.get(0).narrow(0, 0, length);
    let (found, expected) = (real(get("logits")), real(&expected));
    let error = (&found - &expected)
        .square()
        .mean(Kind::Float)
        .sqrt()
        .double_value(&[]);
    let spread = expected.std(false).double_value(&[]);
    assert!(error < 0.05 * spread, "{error} of {spread}");
    let refused = bench.run(&["fidelity", "cache"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("hint:"), "{}", stderr(&refused));
}

#[test]
fn a_build_gives_the_same_bytes_again_and_after_a_stop() {
    let bench = Bench::new();
    build(&bench, "first", &[]);
    build(&bench, "second", &[]);
    assert_eq!(files(&bench.path("first")), files(&bench.path("second")));
    // As a kill between the last shard and the manifest leaves it.
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(bench.path("second/manifest.json")).unwrap())
            .unwrap();
    let mut spec = serde_json::Map::new();
    for field in [
        "tier",
        "top_k",
        "vocab_size",
        "layers",
        "code",
        "sequences_per_shard",
        "max_len",
        "teacher",
        "tokenizer",
        "data",
    ] {
        spec.insert(field.to_owned(), manifest[field].clone());
    }
    let plan = serde_json::json!({
        "format_version": 1, "caskd_version": manifest["caskd_version"], "spec": spec,
    });
    std::fs::write(bench.path("second/plan.json"), plan.to_string()).unwrap();
    std::fs::remove_file(bench.path("second/manifest.json")).unwrap();
    let report = build(&bench, "second", &["--resume"]);
    assert_eq!(report["teacher_positions"], 0);
    assert_eq!(files(&bench.path("first")), files(&bench.path("second")));
}

#[test]
fn losses_that_run_on_exact_run_on_compact() {
    let bench = Bench::new();
    // Pruning hardly changes a random teacher, so every gradient error is large.
    build(&bench, "cache", &["--rate", "60", "--no-fidelity"]);
    for settings in [
        ["kd_type=kl", "scaling_value=1", "logits_norm=none"],
        ["kd_type=kl", "scaling_value=4", "logits_norm=none"],
        [
            "kd_type=dual-scaling",
            "scaling_value=2",
            "logits_norm=standardize",
        ],
    ] {
        let run = settings.concat();
        let mut command = vec![
            "train",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            &run,
            "--json",
        ];
        for setting in settings.iter().chain(&["max_steps=2", "batch_size=4"]) {
            command.extend(["--set", setting]);
        }
        let summary = bench.json(&command);
        assert!(
            summary["final_loss"].as_f64().unwrap().is_finite(),
            "{summary}"
        );
    }
    let score = bench.json(&["eval", "--model", "teacher", "--cache", "cache", "--json"]);
    let kl = score["cache"][0]["kl"].as_f64().unwrap();
    assert!(kl.abs() < 0.01, "{score}");
}

#[test]
fn a_loss_beyond_the_cache_is_refused_unless_allowed() {
    let bench = Bench::new();
    build(&bench, "cache", &["--distortion", "0.5", "--top-k", "1"]);
    let report = bench.json(&["fidelity", "cache", "--json"]);
    assert!(
        report["gradient_error"]["8"].as_f64().unwrap() > 0.1,
        "{report}"
    );
    let command = [
        "train",
        "--cache",
        "cache",
        "--student",
        "teacher",
        "--out",
        "run",
        "--set",
        "scaling_value=8",
        "--set",
        "max_steps=1",
    ];
    let refused = bench.run(&command);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains("--allow-low-fidelity"),
        "{}",
        stderr(&refused)
    );
    let allowed = bench.ok(&[&command[..], &["--allow-low-fidelity"]].concat());
    assert!(stderr(&allowed).contains("warning"), "{}", stderr(&allowed));
    let misplaced = bench.run(&[
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--out",
        "x",
        "--rate",
        "99",
    ]);
    assert_eq!(misplaced.status.code(), Some(2));
}
