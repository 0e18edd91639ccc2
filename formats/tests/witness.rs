//! Readers that share no code with this crate see the same values.
#![allow(clippy::unwrap_used)]

mod sample;

use std::path::Path;
use std::process::Command;

use caskd_formats::{Cache, Columns, HiddenCodec, Io, Sequence, Tier, split_hash};
use sample::{Sample, Shape, compact, sample, small};
use serde_json::{Value, json};

/// A Python with pyarrow and numpy: `CASKD_PYTHON`, else `python3`.
fn python() -> Option<String> {
    let python = std::env::var("CASKD_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&python)
        .args(["-c", "import numpy, pyarrow.parquet"])
        .output();
    probe
        .is_ok_and(|output| output.status.success())
        .then_some(python)
}

/// JSON has no infinities: they become text.
fn numbers(values: &[f32]) -> Vec<Value> {
    let number = |value: &f32| match value {
        value if value.is_finite() => json!(value),
        value => json!(value.to_string()),
    };
    values.iter().map(number).collect()
}

fn describe(cache: &Cache, sequence: &Sequence) -> Value {
    let statistics = sequence.statistics.as_ref().unwrap();
    let head = cache.head().unwrap();
    let logits = head.map(|head| cache.rebuild_logits(&head, sequence).unwrap());
    json!({
        "source": sequence.source,
        "split_hash": split_hash(&sequence.token_ids),
        "token_ids": sequence.token_ids,
        "loss_mask": sequence.loss_mask,
        "statistics": {
            "mean": numbers(&statistics.mean), "std": numbers(&statistics.std), "min": numbers(&statistics.min),
            "max": numbers(&statistics.max), "log_sum_exp": numbers(&statistics.log_sum_exp),
        },
        "top_k": sequence.top_k.as_ref().map(|top_k| json!({ "ids": top_k.ids, "logits": top_k.logits })),
        "coefficients": sequence.coefficients.as_ref().map(|found| &found.levels),
        "hidden": sequence.hidden.iter().map(|state| json!({ "layer": state.layer, "values": state.values })).collect::<Vec<_>>(),
        "logits": logits,
    })
}

fn check(python: &str, sample: &Sample) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    sample.write(&dir);
    check_folder(python, &dir);
}

fn check_folder(python: &str, dir: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir, Io::Mmap).unwrap();
    let manifest = cache.manifest().clone();
    let mut expected = Vec::new();
    for (shard, info) in manifest.shards.iter().enumerate() {
        let rows: Vec<u32> = (0..info.sequences as u32).collect();
        let sequences = cache
            .read(shard as u32, &rows, &Columns::all(&manifest))
            .unwrap();
        expected.extend(sequences.iter().map(|sequence| describe(&cache, sequence)));
    }
    let json = folder.path().join("expected.json");
    std::fs::write(&json, Value::from(expected).to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/witness/read_with_pyarrow.py");
    let output = Command::new(python)
        .arg(script)
        .arg(dir)
        .arg(&json)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    eprintln!("{text}");
}

#[test]
fn pyarrow_duckdb_and_the_python_reader_agree() {
    let Some(python) = python() else {
        eprintln!("SKIPPED: no Python with numpy and pyarrow; set CASKD_PYTHON to one");
        return;
    };
    for tier in ["sparse", "compact", "exact"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v1");
        check_folder(&python, &golden.join(tier));
    }
    check(&python, &small());
    let mut large = sample(&Shape {
        tier: Tier::Sparse,
        top_k: 17,
        vocab_size: 131_073,
        layers: vec![(1, 24, HiddenCodec::Int8), (3, 33, HiddenCodec::F16)],
        lengths: vec![1, 300, 20, 5, 64, 31, 7],
        per_shard: 3,
    });
    large.sequences[1].top_k.as_mut().unwrap().logits[14..17].fill(f32::NEG_INFINITY);
    sample::sort_ties(large.sequences[1].top_k.as_mut().unwrap());
    large.sequences[1].statistics.as_mut().unwrap().min[0] = f32::NEG_INFINITY;
    large.sequences[1].hidden[0].values[5] = 900.0;
    check(&python, &large);
    check(&python, &compact(50, 3, vec![1, 7, 300, 64, 33]));
    check(&python, &compact(70_001, 1, vec![40, 20, 5]));
    // More than one blob in a row.
    let shape = Shape {
        tier: Tier::Sparse,
        top_k: 1,
        vocab_size: 50,
        layers: vec![(2, 1024, HiddenCodec::Int8)],
        lengths: vec![4500],
        per_shard: 1,
    };
    check(&python, &sample(&shape));
}
