//! The file that llama.cpp keeps logits in.

use serde_json::json;

use crate::support::{Bench, tiny_model};
use crate::{
    before_targets, floats, import, log_probabilities, refused, sequences, teacher_logits, train,
};

/// What `llama-perplexity --save-all-logits` writes for windows of tokens and their logits.
pub(crate) fn llama_file(
    context: usize,
    windows: &[(Vec<u32>, Vec<f32>)],
    vocab_size: usize,
) -> Vec<u8> {
    let mut file = b"_logits_".to_vec();
    for number in [context, vocab_size, windows.len()] {
        file.extend((number as i32).to_le_bytes());
    }
    for (tokens, _) in windows {
        file.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
    for (_, logits) in windows {
        for row in logits
            .chunks(vocab_size)
            .take(context - 1)
            .skip(context / 2)
        {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let min = row.iter().copied().fold(f32::MAX, f32::min).max(max - 16.0);
            let log_sum_exp = row
                .iter()
                .map(|logit| f64::from(logit - max).exp())
                .sum::<f64>()
                .ln() as f32;
            let scale = (max - min) / 65535.0;
            file.extend(scale.to_le_bytes());
            file.extend((min - max - log_sum_exp).to_le_bytes());
            let quantise = |logit: &f32| {
                if *logit > min {
                    ((logit - min) / scale).round() as u16
                } else {
                    0
                }
            };
            file.extend(row.iter().flat_map(|logit| quantise(logit).to_le_bytes()));
            if vocab_size % 2 == 1 {
                file.extend([0; 2]);
            }
        }
    }
    file
}

#[test]
fn llama_cpp_s_windows_are_known_in_their_second_half() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    bench.write(
        "text.txt",
        &"A text that is long enough for several windows of tokens. ".repeat(6),
    );
    bench.ok(&[
        "build",
        "--teacher",
        "teacher",
        "--data",
        "text.txt",
        "--tier",
        "sparse",
        "--layers",
        "none",
        "--top-k",
        "8",
        "--max-len",
        "32",
        "--out",
        "cache",
    ]);
    let whole: Vec<(Vec<u32>, Vec<f32>)> = sequences(&bench, "cache")
        .into_iter()
        .zip(teacher_logits(&bench, "cache"))
        .filter(|(sequence, _)| sequence.token_ids.len() == 32)
        .map(|(sequence, logits)| (sequence.token_ids, floats(&logits)))
        .collect();
    assert!(whole.len() >= 10);
    let file = llama_file(32, &whole, 256);
    std::fs::write(bench.path("logits.bin"), &file).unwrap();
    let report = bench.json(&import("logits.bin", "llama", &["--top-k", "8", "--json"]));
    assert_eq!(report["format"], "llama-cpp");
    assert_eq!(report["targets"], 15 * whole.len());
    assert_eq!(
        report["origin"]["statistics"],
        json!(["max", "log_sum_exp"])
    );
    assert_eq!(report["origin"]["positions"], "targets");
    assert_eq!(report["origin"]["values"], "log-probabilities");
    for (window, (one, other)) in sequences(&bench, "cache")
        .iter()
        .zip(sequences(&bench, "llama"))
        .enumerate()
    {
        assert_eq!(before_targets(&other), (16..31).collect::<Vec<_>>());
        assert_eq!(other.source, format!("logits.bin:{}", window + 1));
        for position in before_targets(&other) {
            for (one, other) in log_probabilities(one, position)
                .iter()
                .zip(log_probabilities(&other, position))
            {
                assert!((one.1 - other.1).abs() < 1e-3, "{one:?} and {other:?}");
            }
        }
        // Where nothing is known stands the even distribution.
        assert!(
            log_probabilities(&other, 3)
                .iter()
                .all(|(_, value)| (value + 256f32.ln()).abs() < 1e-6)
        );
    }
    assert_eq!(
        bench.run(&["verify", "llama", "--deep"]).status.code(),
        Some(0)
    );
    let loss = train(&bench, "llama", "run", &["--set", "tail=ghost"]);
    assert!(loss.is_finite());

    refused(
        &bench,
        &import("logits.bin", "warm", &["--temperature", "2"]),
        "warm",
        "computes at temperature 1",
    );
    // The file's values are normalised, whatever the clipped ones add up to.
    for sequence in sequences(&bench, "llama") {
        let statistics = sequence.statistics.unwrap();
        assert!(statistics.log_sum_exp.iter().all(|sum| *sum == 0.0));
    }

    std::fs::write(bench.path("cut.bin"), &file[..file.len() - 100]).unwrap();
    let left = whole.len() - 1;
    let hint = format!("--limit {left}");
    let text = refused(
        &bench,
        &import("cut.bin", "cut", &["--top-k", "8"]),
        "cut",
        &format!("holds {left} of its {} windows", whole.len()),
    );
    assert!(text.contains(&hint), "{text}");
    let left = left.to_string();
    bench.ok(&import(
        "cut.bin",
        "cut",
        &["--top-k", "8", "--limit", &left],
    ));
    bench.ok(&import(
        "logits.bin",
        "started",
        &["--top-k", "8", "--window-start", "7"],
    ));
    assert!(
        sequences(&bench, "started")
            .iter()
            .all(|sequence| sequence.token_ids[0] == 7)
    );
    std::fs::write(bench.path("header.bin"), &file[..15]).unwrap();
    refused(
        &bench,
        &import("header.bin", "header", &[]),
        "header",
        "shorter than its header",
    );
}

#[test]
fn an_odd_vocabulary_has_one_more_number_a_position() {
    let bench = Bench::empty();
    caskd_models::save_model(&tiny_model(257, 3), &bench.path("teacher")).unwrap();
    let window = |seed: u32| {
        let tokens: Vec<u32> = (0..16).map(|at| (at * 37 + seed) % 257).collect();
        let logits: Vec<f32> = (0..16 * 257)
            .map(|at| ((at * 7919 + seed) % 1000) as f32 / 100.0)
            .collect();
        (tokens, logits)
    };
    let windows: Vec<_> = (0..3).map(window).collect();
    std::fs::write(bench.path("odd.bin"), llama_file(16, &windows, 257)).unwrap();
    bench.ok(&import("odd.bin", "odd", &["--top-k", "4"]));
    for (sequence, (_, logits)) in sequences(&bench, "odd").iter().zip(&windows) {
        for position in 8..15 {
            let row = &logits[position * 257..(position + 1) * 257];
            let (best, value) = log_probabilities(sequence, position)[0];
            assert_eq!(
                row[best as usize],
                row.iter().copied().fold(f32::MIN, f32::max)
            );
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            assert!((f64::from(value) - (f64::from(row[best as usize]) - sum.ln())).abs() < 1e-3);
        }
    }
}
