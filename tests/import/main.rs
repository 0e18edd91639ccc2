//! Values that other programs computed, in through `caskd import` and out through `caskd export`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bad_records;
mod conversations;
mod distillkit;
mod exported;
mod llama_cpp;
mod served;
#[path = "../support/mod.rs"]
mod support;
mod whole;

use caskd_formats::{Cache, Columns, Io, Sequence};
use support::{Bench, stderr};
use tch::{Kind, Tensor};

/// All sequences of a cache with statistics and top-k.
fn sequences(bench: &Bench, cache: &str) -> Vec<Sequence> {
    let cache = Cache::open(&bench.path(cache), Io::Read).unwrap();
    let columns = Columns {
        statistics: true,
        top_k: true,
        ..Columns::default()
    };
    let rows = cache.rows().unwrap();
    rows.iter()
        .map(|row| {
            cache
                .read(row.shard, &[row.row], &columns)
                .unwrap()
                .pop()
                .unwrap()
        })
        .collect()
}

/// The kept log-probabilities at a position.
fn log_probabilities(sequence: &Sequence, position: usize) -> Vec<(u32, f32)> {
    let (top_k, statistics) = (
        sequence.top_k.as_ref().unwrap(),
        sequence.statistics.as_ref().unwrap(),
    );
    let entries = position * top_k.k..(position + 1) * top_k.k;
    let values = top_k.logits[entries.clone()]
        .iter()
        .map(|logit| logit - statistics.log_sum_exp[position]);
    top_k.ids[entries].iter().copied().zip(values).collect()
}

/// Positions before a target.
fn before_targets(sequence: &Sequence) -> Vec<usize> {
    (0..sequence.token_ids.len() - 1)
        .filter(|position| sequence.loss_mask[position + 1])
        .collect()
}

/// Both caches say the same before every target, within `tolerance` nats.
fn assert_same(bench: &Bench, one: &str, other: &str, tolerance: f32) {
    let (one, other) = (sequences(bench, one), sequences(bench, other));
    assert_eq!(one.len(), other.len());
    let mut compared = 0;
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one.token_ids, other.token_ids);
        assert_eq!(
            before_targets(one),
            before_targets(other),
            "{}",
            other.source
        );
        for position in before_targets(one) {
            for ((id, value), (other_id, other_value)) in log_probabilities(one, position)
                .into_iter()
                .zip(log_probabilities(other, position))
            {
                // Equal values may change places when they are rounded.
                assert!(id == other_id || (value - other_value).abs() < tolerance);
                assert!(
                    (value - other_value).abs() < tolerance,
                    "{}: {value} and {other_value}",
                    other.source
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 100);
}

/// The tiny teacher repeats what it reads, so its values fit the tokens one place before: it is insisted on theirs.
fn import<'a>(file: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let insisting = [
        "import",
        file,
        "--tokenizer",
        "teacher",
        "--out",
        out,
        "--shift",
        "0",
    ];
    [&insisting[..], more].concat()
}

/// With the places left to the alignment check.
fn import_checked<'a>(file: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let arguments = ["import", file, "--tokenizer", "teacher", "--out", out];
    [&arguments[..], more].concat()
}

/// Exit code 2 and this in the message; nothing is left behind.
fn refused(bench: &Bench, arguments: &[&str], out: &str, part: &str) -> String {
    let output = bench.run(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    assert!(text.contains(part), "{part:?} is not in: {text}");
    assert!(text.contains("hint: "), "{text}");
    assert!(!bench.path(out).join("manifest.json").exists());
    text
}

/// Steps of training from a cache: the mean loss of the last one.
fn train(bench: &Bench, cache: &str, run: &str, loss: &[&str]) -> f64 {
    let arguments = [
        &[
            "train",
            "--cache",
            cache,
            "--student",
            "teacher",
            "--out",
            run,
            "--set",
            "max_steps=4",
            "--set",
            "batch_size=4",
            "--json",
        ][..],
        loss,
    ]
    .concat();
    bench.json(&arguments)["final_loss"].as_f64().unwrap()
}

/// Logits of the tiny teacher for the sequences of a cache, each [T, V].
fn teacher_logits(bench: &Bench, cache: &str) -> Vec<Tensor> {
    let teacher = caskd_models::load(
        &bench.path("teacher"),
        &caskd_models::LoadOptions::default(),
    )
    .unwrap();
    let of_sequence = |sequence: &Sequence| {
        let ids: Vec<i64> = sequence.token_ids.iter().map(|id| i64::from(*id)).collect();
        tch::no_grad(|| {
            let forward =
                teacher
                    .network
                    .forward(&Tensor::from_slice(&ids).unsqueeze(0), &[], false);
            teacher
                .network
                .logits(&forward.last_hidden)
                .to_kind(Kind::Float)
                .get(0)
        })
    };
    sequences(bench, cache).iter().map(of_sequence).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.contiguous().view(-1)).unwrap()
}
