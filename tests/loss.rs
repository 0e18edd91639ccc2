//! `caskd loss` through the binary: the result file, the reference values, and what is refused.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Bench, stderr};
use tch::{Kind, Tensor};

/// A temporary folder with `logits.safetensors`.
fn bench() -> Bench {
    let bench = Bench {
        folder: tempfile::tempdir().unwrap(),
    };
    let values = |seed: i64| {
        let x = Tensor::arange(2 * 3 * 7, (Kind::Double, tch::Device::Cpu)) * seed;
        (x.sin() * 3.0).view([2, 3, 7])
    };
    let tensors = [("teacher", values(5)), ("student", values(11))];
    Tensor::write_safetensors(&tensors, bench.path("logits.safetensors")).unwrap();
    bench
}

fn read(path: &Path) -> Vec<(String, Tensor)> {
    Tensor::read_safetensors(path).unwrap()
}

fn find<'a>(tensors: &'a [(String, Tensor)], name: &str) -> &'a Tensor {
    &tensors.iter().find(|(of, _)| of == name).unwrap().1
}

#[test]
fn values_and_gradient_are_written_whole() {
    let bench = bench();
    let told = bench.json(&[
        "loss",
        "--kind",
        "kl",
        "--set",
        "tau=2",
        "--in",
        "logits.safetensors",
        "--out",
        "kl.safetensors",
        "--json",
    ]);
    assert_eq!(told["kind"], "kl");
    assert_eq!(told["settings"]["temperature"], 2.0);
    assert_eq!(
        (&told["positions"], &told["counted"]),
        (&6.into(), &6.into())
    );
    let inputs = read(&bench.path("logits.safetensors"));
    let result = read(&bench.path("kl.safetensors"));
    let (value, grad) = (find(&result, "value"), find(&result, "grad"));
    assert_eq!((value.kind(), value.size()), (Kind::Double, vec![2, 3]));
    assert_eq!(grad.size(), [2, 3, 7]);
    let p = (find(&inputs, "teacher") / 2.0).softmax(-1, Kind::Double);
    let q = (find(&inputs, "student") / 2.0).softmax(-1, Kind::Double);
    let expected = (&p * (p.log() - q.log())).sum_dim_intlist([-1].as_slice(), false, Kind::Double);
    assert!((value - expected).abs().max().double_value(&[]) < 1e-12);
    assert!((grad - (q - p) / 12.0).abs().max().double_value(&[]) < 1e-12);
    assert!(
        (told["mean"].as_f64().unwrap() - value.mean(Kind::Double).double_value(&[])).abs() < 1e-12
    );
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let bench = bench();
    bench.write("noise.safetensors", "no tensors here");
    let check = |arguments: &[&str], message: &str| {
        let output = bench.run(&[&["loss"], arguments].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(message), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty());
        assert!(!bench.path("out.safetensors").exists());
    };
    let run = |arguments: &[&str], message: &str| {
        let files = ["--in", "logits.safetensors", "--out", "out.safetensors"];
        check(&[arguments, &files].concat(), message);
    };
    run(&["--kind", "revers-kl"], "did you mean `reverse-kl`");
    run(
        &["--kind", "kl", "--set", "temprature=2"],
        "did you mean `temperature`",
    );
    run(
        &["--kind", "kl", "--set", "temperature=0"],
        "it must be above 0",
    );
    run(&["--kind", "kl", "--set", "temperature"], "not KEY=VALUE");
    run(&["--kind", "kl", "--set", "weight=2"], "no effect");
    run(&["--kind", "cross-entropy"], "`labels` is missing");
    run(&["--kind", "patient-kd"], "`student_hidden` is missing");
    check(&["--kind", "kl"], "--in");
    check(
        &[
            "--kind",
            "kl",
            "--in",
            "noise.safetensors",
            "--out",
            "out.safetensors",
        ],
        "is not a safetensors file",
    );
    check(
        &[
            "--kind",
            "kl",
            "--in",
            "nothing.safetensors",
            "--out",
            "out.safetensors",
        ],
        "nothing.safetensors",
    );
}

#[test]
fn every_kind_is_listed_with_its_defaults() {
    let bench = bench();
    let output = bench.run(&["loss", "--list"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let kinds: Value = bench.json(&["loss", "--list", "--json"]);
    let kinds = kinds.as_array().unwrap();
    assert_eq!(text.lines().count(), kinds.len());
    let bild = kinds.iter().find(|kind| kind["kind"] == "bild").unwrap();
    assert_eq!(
        (&bild["settings"]["k"], &bild["settings"]["temperature"]),
        (&8.into(), &3.0.into())
    );
}

/// Every value of the BiLD authors' package, in the folder `reference` of `CASKD_SHARED`.
#[test]
fn the_reference_file_is_met() {
    let Some(shared) = std::env::var_os("CASKD_SHARED") else {
        eprintln!(
            "SKIPPED: set CASKD_SHARED to the folder that holds reference/losses_bild_11.safetensors"
        );
        return;
    };
    let path = Path::new(&shared).join("reference/losses_bild_11.safetensors");
    let reference = read(&path);
    let bench = bench();
    let kinds = [
        ("kl", "kl"),
        ("rkl", "reverse-kl"),
        ("topkl", "top-k-kl"),
        ("bild", "bild"),
        ("bild_teacher_led", "bild-teacher-led"),
        ("bild_student_led", "bild-student-led"),
        ("dkd", "dkd"),
        ("nkd", "nkd"),
        ("normkd", "norm-kd"),
    ];
    let cases: Vec<&str> = reference
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".value"))
        .collect();
    assert_eq!(cases.len(), 33);
    for case in cases {
        let mut parts = case.split('.');
        let name = parts.next().unwrap();
        let kind = kinds.iter().find(|(of, _)| *of == name).unwrap().1;
        let mut settings: Vec<String> = parts
            .map(|part| match part.strip_prefix("tau") {
                Some(temperature) => format!("tau={temperature}"),
                None => format!("top_k={}", part.strip_prefix('k').unwrap()),
            })
            .collect();
        if name == "rkl" {
            // That package takes these softmaxes in f32.
            settings.push("single_precision=true".to_owned());
        }
        let out = bench.path(&format!("{case}.safetensors"));
        let mut arguments = vec!["loss", "--kind", kind, "--in", path.to_str().unwrap()];
        for setting in &settings {
            arguments.extend(["--set", setting]);
        }
        arguments.extend(["--out", out.to_str().unwrap()]);
        let output = bench.run(&arguments);
        assert!(output.status.success(), "{case}: {}", stderr(&output));
        let result = read(&out);
        for part in ["value", "grad"] {
            let expected = find(&reference, &format!("{case}.{part}")).to_kind(Kind::Double);
            let error = (find(&result, part) - &expected)
                .abs()
                .max()
                .double_value(&[]);
            let largest = expected.abs().max().double_value(&[]);
            assert!(
                error <= 1e-6 * largest,
                "{case}.{part}: off by {error} of {largest}"
            );
        }
    }
}
