//! Every loss, by its name in `[[loss]]` entries: against PyTorch's values, another package's, finite
//! differences, and in training on caches that hold less than it would like.

#![allow(clippy::unwrap_used)]

mod tiny;

use std::path::Path;

use caskd_formats::Tier;
use caskd_models::SeededRng;
use caskd_trainer::{Error, LossTerm, LossValues, TrainConfig, loss_values};
use tch::{Kind, Tensor};
use tiny::{CacheForm, Tiny, train_quietly};

type Tensors = Vec<(String, Tensor)>;

/// A term from TOML keys beside its kind.
fn term(kind: &str, keys: &str) -> LossTerm {
    LossTerm::from_table(&format!("kind = \"{kind}\"\n{keys}").parse().unwrap()).unwrap()
}

fn find<'a>(tensors: &'a Tensors, name: &str) -> &'a Tensor {
    &tensors.iter().find(|(of, _)| of == name).unwrap().1
}

/// Both tensors of a result within `tolerance` of the largest value.
fn agrees(name: &str, got: &LossValues, expected: &Tensors, tolerance: f64) {
    for (got, part) in [(&got.value, "value"), (&got.grad, "grad")] {
        let expected = find(expected, &format!("{name}.{part}")).to_kind(Kind::Double);
        assert_eq!(got.size(), expected.size(), "{name}.{part}");
        let error = (got.to_kind(Kind::Double) - &expected)
            .abs()
            .max()
            .double_value(&[]);
        let largest = expected.abs().max().double_value(&[]);
        assert!(
            error <= tolerance * largest,
            "{name}.{part}: off by {error} of {largest}"
        );
    }
}

/// Written from the papers' formulas by `golden/make_losses.py`.
#[test]
fn pytorch_gives_the_same_values_and_gradients() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let golden = Tensor::read_safetensors(folder.join("losses.safetensors")).unwrap();
    let cases: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(folder.join("losses.json")).unwrap()).unwrap();
    assert!(cases.len() > 20);
    for (name, case) in &cases {
        let mut keys: toml::Table = serde_json::from_value(case["set"].clone()).unwrap();
        keys.insert("kind".into(), case["kind"].as_str().unwrap().into());
        let term = LossTerm::from_table(&keys).unwrap();
        let inputs: Tensors = golden
            .iter()
            .filter(|(of, _)| of != "teacher")
            .map(|(of, tensor)| (of.clone(), tensor.shallow_clone()))
            .chain([(
                "teacher".to_owned(),
                find(&golden, case["teacher"].as_str().unwrap()).shallow_clone(),
            )])
            .collect();
        agrees(name, &loss_values(&term, &inputs).unwrap(), &golden, 1e-9);
    }
}

/// The BiLD authors' package, in the folder `reference` of `CASKD_SHARED`. Its reverse KL computes in
/// f32, which at high temperatures leaves four digits of a value.
#[test]
fn another_package_gives_the_same_values_and_gradients() {
    let Some(shared) = std::env::var_os("CASKD_SHARED") else {
        eprintln!(
            "SKIPPED: set CASKD_SHARED to the folder that holds reference/losses_bild_11.safetensors"
        );
        return;
    };
    let path = Path::new(&shared).join("reference/losses_bild_11.safetensors");
    let reference = Tensor::read_safetensors(path).unwrap();
    let check = |name: &str, kind: &str, keys: &str, tolerance: f64| {
        let values = loss_values(&term(kind, keys), &reference).unwrap();
        assert_eq!(values.value.kind(), Kind::Double);
        agrees(name, &values, &reference, tolerance);
    };
    for tau in [1, 2, 3, 8, 20] {
        let keys = format!("tau = {tau}");
        check(&format!("kl.tau{tau}"), "kl", &keys, 1e-11);
        check(
            &format!("rkl.tau{tau}"),
            "reverse-kl",
            &format!("{keys}\nsingle_precision = true"),
            1e-6,
        );
        check(&format!("rkl.tau{tau}"), "reverse-kl", &keys, 1e-4);
        let top = format!("{keys}\ntop_k = 16");
        check(&format!("topkl.k16.tau{tau}"), "top-k-kl", &top, 1e-11);
        for kind in ["bild", "bild-teacher-led", "bild-student-led"] {
            let name = format!("{}.k8.tau{tau}", kind.replace('-', "_"));
            check(&name, kind, &keys, 1e-11);
        }
    }
    check("dkd", "dkd", "", 1e-11);
    check("nkd", "nkd", "", 1e-11);
    check("normkd", "norm-kd", "", 1e-11);
}

fn random(rng: &mut SeededRng, shape: &[i64], scale: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let values: Vec<f64> = (0..count).map(|_| scale * rng.normal()).collect();
    Tensor::from_slice(&values).view(shape)
}

/// [2, 3, 11] logits and [2, 3, 6] hidden states, labels with a hole.
fn inputs() -> Tensors {
    let mut rng = SeededRng::new(4);
    vec![
        ("teacher".into(), random(&mut rng, &[2, 3, 11], 3.0)),
        ("student".into(), random(&mut rng, &[2, 3, 11], 2.0)),
        (
            "labels".into(),
            Tensor::from_slice(&[3i64, -1, 0, 10, 5, 5]).view([2, 3]),
        ),
        ("teacher_hidden".into(), random(&mut rng, &[2, 3, 6], 1.0)),
        ("student_hidden".into(), random(&mut rng, &[2, 3, 4], 1.0)),
        (
            "of_student".into(),
            Tensor::from_slice(&[0i64, 0, 0, 1, 1, 1]).view([2, 3]),
        ),
    ]
}

fn with(mut tensors: Tensors, name: &str, tensor: Tensor) -> Tensors {
    tensors.retain(|(of, _)| of != name);
    tensors.push((name.to_owned(), tensor));
    tensors
}

#[test]
fn every_gradient_is_that_of_finite_differences() {
    let inputs = inputs();
    for kind in LossTerm::kinds() {
        let on_logits = LossTerm::with_defaults(kind)
            .unwrap()
            .requirement()
            .is_some();
        let name = if on_logits {
            "student"
        } else {
            "student_hidden"
        };
        let has_k = LossTerm::with_defaults(kind)
            .unwrap()
            .to_table()
            .contains_key("k");
        let keys = match kind {
            // A constant σ is no derivative.
            "dual-scaling" => "detach_sigma = false",
            _ if has_k => "k = 4",
            _ => "",
        };
        let norms: &[&str] = if on_logits {
            &[
                "logits_norm = \"none\"",
                "logits_norm = \"max-min\"",
                "logits_norm = \"standardize\"",
            ]
        } else {
            &[""]
        };
        for norm in norms {
            let term = term(kind, &format!("{keys}\n{norm}"));
            let got = loss_values(&term, &inputs).unwrap();
            let student = find(&inputs, name);
            let gradient: Vec<f64> = Vec::try_from(got.grad.view(-1)).unwrap();
            for (index, gradient) in gradient.into_iter().enumerate() {
                let moved = |by: f64| {
                    let moved = student.copy();
                    let mut element = moved.view(-1).get(index as i64);
                    let _ = element.g_add_scalar_(by);
                    loss_values(&term, &with(self::inputs(), name, moved))
                        .unwrap()
                        .mean
                };
                let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!(
                    (gradient - difference).abs() < 1e-7 * difference.abs().max(1.0),
                    "{kind} {norm}: {gradient} and {difference}"
                );
            }
        }
    }
}

#[test]
fn rows_that_are_left_out_are_zero_and_change_no_other() {
    let inputs = inputs();
    let mask = Tensor::from_slice(&[1i64, 1, 0, 1, 1, 0]).view([2, 3]);
    let masked = loss_values(&term("kl", ""), &with(self::inputs(), "mask", mask)).unwrap();
    let all = loss_values(&term("kl", ""), &inputs).unwrap();
    assert_eq!((masked.positions, masked.counted, all.counted), (6, 4, 6));
    for (b, t) in [(0, 2), (1, 2)] {
        assert_eq!(masked.value.double_value(&[b, t]), 0.0);
        assert_eq!(masked.grad.get(b).get(t).abs().max().double_value(&[]), 0.0);
    }
    for (b, t) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        assert_eq!(
            masked.value.double_value(&[b, t]),
            all.value.double_value(&[b, t])
        );
        assert_eq!(masked.grad.get(b).get(t), all.grad.get(b).get(t));
    }
    // A row without a label has no cross-entropy; DKD takes the teacher's first token there.
    let hard = loss_values(&term("cross-entropy", ""), &inputs).unwrap();
    assert_eq!((hard.counted, hard.value.double_value(&[0, 1])), (5, 0.0));
    let mut alone = self::inputs();
    alone.retain(|(name, _)| name != "teacher");
    let alone = loss_values(&term("cross-entropy", ""), &alone).unwrap();
    assert_eq!(alone.value, hard.value);
    let decoupled = loss_values(&term("dkd", ""), &inputs).unwrap();
    assert_eq!(decoupled.counted, 6);
    // Rows without a sequence, in f32 from f32.
    let flat: Tensors = ["teacher", "student"]
        .iter()
        .map(|name| {
            let rows = find(&inputs, name).view([6, 11]).to_kind(Kind::Float);
            ((*name).to_owned(), rows)
        })
        .collect();
    let flat = loss_values(&term("kl", ""), &flat).unwrap();
    assert_eq!(
        (flat.value.kind(), flat.value.size()),
        (Kind::Float, vec![6])
    );
    assert!((flat.mean - all.mean).abs() < 1e-6);
}

#[test]
fn bad_tensors_are_named() {
    let check = |kind: &str, tensors: Tensors, message: &str| {
        let error = loss_values(&term(kind, ""), &tensors).unwrap_err();
        let said = format!("{error} / {}", error.hint().unwrap());
        assert!(said.contains(message), "{said:?} should say {message:?}");
        assert!(error.is_user() && matches!(error, Error::LossTensor { .. }));
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, tch::Device::Cpu));
    let without = |name: &str| -> Tensors {
        let mut tensors = inputs();
        tensors.retain(|(of, _)| of != name);
        tensors
    };
    check(
        "kl",
        without("student"),
        "`student` is missing: the file holds teacher",
    );
    check("kl", vec![], "the file holds none");
    check("dkd", without("labels"), "`labels` is missing");
    check(
        "patient-kd",
        without("teacher_hidden"),
        "`teacher_hidden` is missing",
    );
    let other = zeros(&[2, 3, 12]);
    check(
        "kl",
        with(inputs(), "teacher", other.shallow_clone()),
        "`uld` compares",
    );
    loss_values(&term("uld", ""), &with(inputs(), "teacher", other)).unwrap();
    check(
        "kl",
        with(inputs(), "teacher", zeros(&[3, 2, 11])),
        "positions [3, 2]",
    );
    check("kl", with(inputs(), "teacher", zeros(&[66])), "shape [66]");
    check(
        "kl",
        with(inputs(), "teacher", zeros(&[2, 3, 0])),
        "no side 0",
    );
    check(
        "kl",
        with(inputs(), "mask", zeros(&[6])),
        "`mask` has the shape [6]",
    );
    check(
        "dkd",
        with(inputs(), "labels", zeros(&[2, 3])),
        "must hold integers",
    );
    let large = Tensor::full([2, 3], 11, (Kind::Int64, tch::Device::Cpu));
    check(
        "dkd",
        with(inputs(), "labels", large.shallow_clone()),
        "outside the vocabulary of 11",
    );
    check(
        "kl",
        with(inputs(), "student", large.unsqueeze(-1)),
        "floating-point",
    );
    let infinite = Tensor::full([2, 3, 11], f64::INFINITY, (Kind::Double, tch::Device::Cpu));
    check(
        "kl",
        with(inputs(), "student", infinite),
        "`student` holds NaN or an infinity",
    );
    let extreme = Tensor::arange(11, (Kind::Double, tch::Device::Cpu)) * 1e200;
    let extreme = extreme.expand([2, 3, 11], false);
    check("norm-kd", with(inputs(), "teacher", extreme), "not finite");
}

fn config(entries: &[String]) -> TrainConfig {
    let entries: Vec<String> = entries
        .iter()
        .map(|entry| format!("[[loss]]\n{entry}\n"))
        .collect();
    TrainConfig::from_toml(&format!(
        "max_steps = 2\nbatch_size = 4\n{}",
        entries.concat()
    ))
    .unwrap()
}

/// Every kind trains on the exact tier; which of them a sparse cache serves is a list.
#[test]
fn caches_serve_what_they_can_and_refuse_the_rest() {
    let tiny = Tiny::new();
    let exact_form = CacheForm {
        student_responses: true,
        ..CacheForm::default()
    };
    let exact = tiny.cache("exact", &exact_form);
    let sparse_form = CacheForm {
        tier: Tier::Sparse,
        layers: vec![4],
        ..CacheForm::default()
    };
    let sparse = tiny.cache("sparse", &sparse_form);
    let student = tiny.student();
    let all: Vec<String> = LossTerm::kinds()
        .map(|kind| format!("kind = \"{kind}\""))
        .collect();
    let (summary, _) =
        train_quietly(&config(&all), &student, &exact, &tiny.path("all"), false).unwrap();
    assert_eq!(summary.terms.len(), all.len());
    assert!(summary.terms.iter().all(|(_, value)| value.is_finite()));
    assert_eq!(summary.missing_teacher_logits.asked, 0);

    let served = [
        "cross-entropy",
        "top-k-kl",
        "ghost-kl",
        "uniform-tail-kl",
        "bild",
        "bild-teacher-led",
        "bild-student-led",
        "knowledge-alignment",
        "patient-kd",
        "hidden-cosine",
    ];
    for kind in LossTerm::kinds() {
        let has_k = LossTerm::with_defaults(kind)
            .unwrap()
            .to_table()
            .contains_key("k");
        let k = if has_k { "k = 5" } else { "" };
        let config = config(&[format!("kind = \"{kind}\"\n{k}")]);
        let out = tiny.path(&format!("sparse-{kind}"));
        let trained = train_quietly(&config, &student, &sparse, &out, false);
        if served.contains(&kind) {
            let (summary, _) = trained.unwrap();
            let led = ["bild", "bild-student-led"].contains(&kind);
            let missing = summary.missing_teacher_logits;
            assert_eq!(missing.asked > 0, led, "{kind}");
            if led {
                // A random student's first tokens are mostly not the teacher's.
                assert!(missing.missing > missing.asked / 4, "{missing:?}");
                assert!(summary.notes[0].contains("not among the cached top K"));
            }
        } else {
            let error = trained.unwrap_err();
            assert!(
                matches!(error, Error::TierCannotAnswer { .. }),
                "{kind}: {error}"
            );
            assert!(!out.exists());
        }
    }
    let refused = |entry: &str, message: &str| {
        let config = config(&[entry.to_owned()]);
        let error = train_quietly(&config, &student, &sparse, &tiny.path("no"), false).unwrap_err();
        let said = format!("{error} / {}", error.hint().unwrap());
        assert!(said.contains(message), "{said}");
    };
    refused(
        "kind = \"bild\"",
        "the teacher's 8 largest logits, and the cache holds 5",
    );
    refused("kind = \"ghost-kl\"", "set its `k` to 5");
    refused(
        "kind = \"bild\"\nk = 4\nlogits_norm = \"standardize\"",
        "logits of the whole vocabulary",
    );
}

#[test]
fn missing_teacher_logits_add_up_over_a_run() {
    let tiny = Tiny::new();
    let form = CacheForm {
        tier: Tier::Sparse,
        layers: vec![],
        ..CacheForm::default()
    };
    let sparse = tiny.cache("sparse", &form);
    let config = config(&["kind = \"bild-student-led\"\nk = 4".to_owned()]);
    let out = tiny.path("run");
    let (summary, reports) = train_quietly(&config, &tiny.student(), &sparse, &out, false).unwrap();
    let asked: u64 = reports
        .iter()
        .map(|report| report.missing_teacher_logits.asked)
        .sum();
    let targets: u64 = reports.iter().map(|report| report.targets).sum();
    assert_eq!(
        (asked, summary.missing_teacher_logits.asked),
        (4 * targets, asked)
    );
    let (again, _) = train_quietly(&config, &tiny.student(), &sparse, &out, true).unwrap();
    assert_eq!(again.missing_teacher_logits, summary.missing_teacher_logits);
}
