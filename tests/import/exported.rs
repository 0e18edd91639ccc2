//! What `caskd export --to jsonl` writes comes back.

use caskd_formats::{Cache, Io, Statistic};
use serde_json::json;

use crate::support::Bench;
use crate::{assert_same, import, refused, sequences, train};

#[test]
fn what_is_exported_comes_back_and_trains_the_same() {
    let bench = Bench::new();
    bench.cache("cache", 24, &["--tier", "sparse", "--layers", "none"]);
    bench.ok(&[
        "export",
        "cache",
        "--to",
        "jsonl",
        "--training-only",
        "--out",
        "train.jsonl",
    ]);
    let report = bench.json(&import("train.jsonl", "back", &["--json"]));
    assert_eq!(report["format"], "axolotl");
    assert_eq!(
        (&report["sequences"], &report["top_k"]),
        (&json!(24), &json!(8))
    );
    assert_eq!(report["origin"]["values"], "log-probabilities");
    assert_eq!(
        report["origin"]["statistics"],
        json!(["max", "log_sum_exp"])
    );
    assert_same(&bench, "cache", "back", 1e-5);
    assert_eq!(
        bench.run(&["verify", "back", "--deep"]).status.code(),
        Some(0)
    );

    let ghost = ["--set", "tail=ghost"];
    let (first, second) = (
        train(&bench, "cache", "run-1", &ghost),
        train(&bench, "back", "run-2", &ghost),
    );
    assert!(
        (first - second).abs() < 1e-4 * first.abs().max(1e-3),
        "{first} and {second}"
    );

    let card = String::from_utf8(bench.ok(&["inspect", "back"]).stdout).unwrap();
    assert!(
        card.contains(
            "values       log-probabilities, given at temperature 1, imported from axolotl"
        ),
        "{card}"
    );
    assert!(
        card.contains("caskd import --from axolotl train.jsonl"),
        "{card}"
    );
    // Mean and deviation are not known, and nobody can compute with what stands there.
    let statistics = sequences(&bench, "back")[0].statistics.clone().unwrap();
    assert!(
        statistics
            .mean
            .iter()
            .chain(&statistics.min)
            .all(|value| *value == f32::NEG_INFINITY)
    );
    assert!(statistics.std.iter().all(|value| *value == f32::INFINITY));
    let manifest = Cache::open(&bench.path("back"), Io::Read).unwrap();
    let knows = |statistic| manifest.manifest().knows(statistic);
    assert!(knows(Statistic::LogSumExp) && !knows(Statistic::Mean) && !knows(Statistic::Std));
}

#[test]
fn renormalised_values_serve_what_needs_no_mass() {
    let bench = Bench::new();
    bench.cache("cache", 24, &["--tier", "sparse", "--layers", "none"]);
    bench.ok(&[
        "export",
        "cache",
        "--to",
        "jsonl",
        "--renormalize",
        "--out",
        "kept.jsonl",
    ]);
    let report = bench.json(&import("kept.jsonl", "kept", &["--json"]));
    assert_eq!(report["origin"]["values"], "renormalised-log-probabilities");
    assert_eq!(report["origin"]["statistics"], json!(["max"]));

    let config = bench.write("top-k.toml", "[[loss]]\nkind = \"top-k-kl\"\nk = 8\n");
    let top_k = ["--config", config.to_str().unwrap()];
    let (first, second) = (
        train(&bench, "cache", "run-1", &top_k),
        train(&bench, "kept", "run-2", &top_k),
    );
    assert!(
        (first - second).abs() < 1e-4 * first.abs().max(1e-3),
        "{first} and {second}"
    );
    refused(
        &bench,
        &[
            "train",
            "--cache",
            "kept",
            "--student",
            "teacher",
            "--out",
            "run-3",
            "--set",
            "tail=ghost",
        ],
        "run-3",
        "do not say what the others weigh",
    );
    refused(
        &bench,
        &[
            "train",
            "--cache",
            "kept",
            "--student",
            "teacher",
            "--out",
            "run-3",
        ],
        "run-3",
        "imported",
    );
    // At another temperature the kept tokens can be brought back, the mass of the others cannot.
    bench.ok(&[
        "export",
        "cache",
        "--to",
        "jsonl",
        "--temperature",
        "4",
        "--out",
        "warm.jsonl",
    ]);
    bench.ok(&import("warm.jsonl", "warm", &["--temperature", "4"]));
    let third = train(&bench, "warm", "run-4", &top_k);
    assert!(
        (first - third).abs() < 1e-3 * first.abs().max(1e-3),
        "{first} and {third}"
    );
    bench.ok(&["export", "cache", "--to", "jsonl", "--out", "cold.jsonl"]);
    refused(
        &bench,
        &import("cold.jsonl", "cold", &["--temperature", "2"]),
        "cold",
        "do not tell what the other tokens weigh",
    );
}
