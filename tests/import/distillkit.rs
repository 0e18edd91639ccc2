//! DistillKit's Parquet.

use serde_json::Value;

use crate::support::Bench;
use crate::{import, refused, sequences};

/// Files that a script wrote from DistillKit's documented layout (tests/golden/import), and what is in them.
#[test]
fn distillkit_s_parquet_is_unpacked() {
    let bench = Bench::new();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import");
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(golden.join("expected.json")).unwrap())
            .unwrap();
    for case in expected["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let file = golden.join(format!("{name}.parquet"));
        // Centred logits add up to more than 1; the older form holds nothing else.
        let kind = if case["values"] == "logits" {
            "logits"
        } else {
            "auto"
        };
        let config = golden.join(format!("{name}.yml"));
        let (file, config) = (file.to_str().unwrap(), config.to_str().unwrap());
        let report = bench.json(&import(
            file,
            name,
            &["--compression-config", config, "--values", kind, "--json"],
        ));
        assert_eq!(report["format"], "distillkit");
        assert_eq!(report["origin"]["values"], case["values"], "{name}");
        let kept = sequences(&bench, name);
        let rows = case["rows"].as_array().unwrap();
        assert_eq!(kept.len(), rows.len());
        for (sequence, row) in kept.iter().zip(rows) {
            for (position, row) in row.as_array().unwrap().iter().enumerate() {
                let top_k = sequence.top_k.as_ref().unwrap();
                let entries = position * top_k.k..(position + 1) * top_k.k;
                let values: Vec<f64> = row["values"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|value| value.as_f64().unwrap())
                    .collect();
                let ids: Vec<u64> = row["ids"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|id| id.as_u64().unwrap())
                    .collect();
                let mut both: Vec<(f64, u64)> = values.into_iter().zip(ids).collect();
                both.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                for ((logit, id), (value, wanted)) in top_k.logits[entries.clone()]
                    .iter()
                    .zip(&top_k.ids[entries])
                    .zip(both)
                {
                    // The cache keeps distances to the first in 11 bits.
                    assert!(
                        (f64::from(*logit) - value).abs() < 2e-3 * (1.0 + value.abs()),
                        "{name}: {logit} for {value}"
                    );
                    assert!(
                        u64::from(*id) == wanted || (f64::from(*logit) - value).abs() < 1e-3,
                        "{name}: {id} for {wanted}"
                    );
                }
            }
        }
        refused(
            &bench,
            &import(file, "unknown", &[]),
            "unknown",
            "codec's parameters do not stand in the file",
        );
    }
    let codec = golden.join("logprobs.yml");
    let text = std::fs::read_to_string(codec)
        .unwrap()
        .replace("exact_k: 12", "exact_k: 11");
    let wrong = bench.write("wrong.yml", &text);
    let file = golden.join("logprobs.parquet");
    refused(
        &bench,
        &import(
            file.to_str().unwrap(),
            "wrong",
            &["--compression-config", wrong.to_str().unwrap()],
        ),
        "wrong",
        "row 1: position 0: ",
    );
}
