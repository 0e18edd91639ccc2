//! What leaves a cache is what the teacher said.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use caskd_models::{LoadOptions, load};
use support::Bench;
use tch::{Kind, Tensor};

#[test]
fn exported_tensors_agree_with_the_teacher() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    bench.cache("cache", 5, &["--hidden", "f16"]);
    let report = bench.json(&[
        "export",
        "cache",
        "--to",
        "safetensors",
        "--out",
        "out.safetensors",
        "--logits",
        "--limit",
        "3",
        "--json",
    ]);
    assert_eq!(report["sequences"], 3);
    let tensors = Tensor::read_safetensors(bench.path("out.safetensors")).unwrap();
    let get = |name: &str| {
        &tensors
            .iter()
            .find(|(known, _)| known == name)
            .unwrap_or_else(|| panic!("no {name}"))
            .1
    };

    let teacher = load(&bench.path("teacher"), &LoadOptions::default()).unwrap();
    let ids = get("input_ids");
    let (forward, expected) = tch::no_grad(|| {
        let forward = teacher.network.forward(ids, &[2, 4], false);
        let logits = teacher
            .network
            .logits(&forward.last_hidden)
            .to_kind(Kind::Float);
        (forward, logits)
    });
    let lengths: Vec<i64> = get("lengths").try_into().unwrap();
    assert_eq!(ids.size(), [3, *lengths.iter().max().unwrap()]);
    for (row, &length) in (0..).zip(&lengths) {
        let real = |tensor: &Tensor| tensor.get(row).narrow(0, 0, length);
        let close = |got: &Tensor, want: &Tensor, tolerance: f64, what: &str| {
            let difference = (got - want).abs().max().double_value(&[]);
            assert!(
                difference < tolerance,
                "{what} of row {row}: off by {difference}"
            );
        };
        let logits = real(&expected);
        close(&real(get("logits")), &logits, 5e-3, "logits");
        close(
            &real(get("hidden.4")),
            &real(&forward.last_hidden),
            5e-3,
            "hidden.4",
        );
        close(
            &real(get("hidden.2")),
            &real(&forward.hidden[0].1),
            5e-3,
            "hidden.2",
        );
        close(
            &real(get("statistics.log_sum_exp")),
            &logits.logsumexp([-1], false),
            1e-4,
            "log-sum-exp",
        );
        close(
            &real(get("statistics.mean")),
            &logits.mean_dim([-1].as_slice(), false, Kind::Float),
            1e-5,
            "mean",
        );
        close(
            &real(get("statistics.std")),
            &logits.std_dim([-1].as_slice(), false, false),
            1e-5,
            "std",
        );
        close(
            &real(get("statistics.max")),
            &logits.amax([-1], false),
            1e-5,
            "max",
        );
        close(
            &real(get("statistics.min")),
            &logits.amin([-1], false),
            1e-5,
            "min",
        );
        let (values, _) = logits.topk(8, -1, true, true);
        close(&real(get("top_k.logits")), &values, 5e-3, "top-k logits");
        close(
            &logits.gather(-1, &real(get("top_k.ids")), false),
            &values,
            1e-4,
            "top-k ids",
        );
    }
}

#[test]
fn jsonl_has_a_line_for_each_sequence() {
    let bench = Bench::new();
    let sparse = ["--tier", "sparse", "--layers", "last,middle"];
    bench.cache("cache", 4, &sparse);
    bench.ok(&["export", "cache", "--to", "jsonl", "--out", "out.jsonl"]);
    let text = std::fs::read_to_string(bench.path("out.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 4);
    for (index, line) in lines.iter().enumerate() {
        let positions = line["input_ids"].as_array().unwrap().len();
        assert_eq!(line["source"], format!("cache.jsonl:{}", index + 1));
        assert_eq!(line["loss_mask"].as_array().unwrap().len(), positions);
        assert_eq!(line["top_k"]["ids"].as_array().unwrap().len(), positions);
        assert_eq!(line["hidden"]["2"][0].as_array().unwrap().len(), 16);
        check_targets(line, positions);
    }
}

/// The fields that Axolotl's KD plugin trains from: row t is about token t + 1.
fn check_targets(line: &serde_json::Value, positions: usize) {
    assert_eq!(
        line["attention_mask"],
        serde_json::json!(vec![1; positions])
    );
    assert_eq!(line["target_token_ids"], line["top_k"]["ids"]);
    for position in 0..positions {
        let is_target = line["loss_mask"][position] == 1;
        let label = if is_target {
            line["input_ids"][position].clone()
        } else {
            serde_json::json!(-100)
        };
        assert_eq!(line["labels"][position], label);
        let next = u64::from(line["loss_mask"][position + 1] == 1);
        assert_eq!(
            line["target_mask"][position],
            serde_json::json!(vec![next; 8])
        );
        let log_sum_exp = line["statistics"]["log_sum_exp"][position]
            .as_f64()
            .unwrap();
        for entry in 0..8 {
            let value = line["target_logprobs"][position][entry].as_f64().unwrap();
            let logit = line["top_k"]["logits"][position][entry].as_f64().unwrap();
            assert!((value - (logit - log_sum_exp)).abs() < 1e-5);
        }
    }
}
