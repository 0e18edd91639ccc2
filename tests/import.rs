//! Values that other programs computed, in through `caskd import` and out through `caskd export`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fmt::Write as _;

use caskd_formats::{Cache, Columns, Io, Sequence, Statistic};
use serde_json::{Value, json};
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

/// Writes the logits of a cache as vLLM would serve them: the prompt's own token beside the largest ones.
fn as_vllm(bench: &Bench, cache: &str) -> String {
    let mut lines = String::new();
    for sequence in sequences(bench, cache) {
        let mut entries = vec![Value::Null];
        for position in 0..sequence.token_ids.len() - 1 {
            let mut entry = serde_json::Map::new();
            for (rank, (id, value)) in log_probabilities(&sequence, position)
                .into_iter()
                .enumerate()
            {
                entry.insert(
                    id.to_string(),
                    json!({"logprob": value, "rank": rank + 1, "decoded_token": "x"}),
                );
            }
            let next = sequence.token_ids[position + 1].to_string();
            entry
                .entry(next)
                .or_insert(json!({"logprob": -9.5, "rank": 200, "decoded_token": "y"}));
            entries.push(Value::Object(entry));
        }
        let mask: Vec<u8> = sequence
            .loss_mask
            .iter()
            .map(|target| u8::from(*target))
            .collect();
        let record = json!({"model": "served", "prompt_token_ids": sequence.token_ids, "prompt_logprobs": entries, "loss_mask": mask});
        let _ = writeln!(lines, "{record}");
    }
    lines
}

#[test]
fn served_log_probabilities_are_about_their_own_token() {
    let bench = Bench::new();
    bench.cache("cache", 12, &["--tier", "sparse", "--layers", "none"]);
    let lines = as_vllm(&bench, "cache");
    bench.write("served.jsonl", &lines);
    let report = bench.json(&import("served.jsonl", "served", &["--json"]));
    assert_eq!(report["format"], "vllm");
    assert_eq!(report["top_k"], 8);
    assert_same(&bench, "cache", "served", 1e-5);
    let card = bench.json(&["inspect", "served", "--json"]);
    assert_eq!(card["manifest"]["teacher"]["name"], "served");
    // Interrupted after its plan, or finished: the same bytes again.
    let before = support::files(&bench.path("served"));
    bench.ok(&import("served.jsonl", "served", &["--resume"]));
    assert_eq!(before, support::files(&bench.path("served")));
    refused(
        &bench,
        &import("served.jsonl", "served", &[]),
        "nowhere",
        "already holds a finished cache",
    );

    // A broken line is named, and nothing is written.
    let mut broken: Vec<&str> = lines.lines().collect();
    broken[4] = "{\"prompt_token_ids\": [1, 2], \"prompt_logprobs\": [null]}";
    bench.write("broken.jsonl", &broken.join("\n"));
    refused(
        &bench,
        &import("broken.jsonl", "broken", &[]),
        "broken",
        "`broken.jsonl` line 5: `prompt_logprobs` has 1 entries for 2 token ids",
    );
    assert!(!bench.path("broken").exists());
    bench.write(
        "logits.jsonl",
        "{\"input_ids\": [1, 2], \"prompt_logprobs\": [null, {\"3\": 4.5, \"4\": 1.0}]}\n",
    );
    refused(
        &bench,
        &import("logits.jsonl", "logits", &[]),
        "logits",
        "line 1: position 0: its probabilities add up to",
    );
    refused(
        &bench,
        &import("served.jsonl", "more", &["--top-k", "9"]),
        "more",
        "give --top-k 8 or less",
    );
    refused(
        &bench,
        &import("missing.jsonl", "missing", &[]),
        "missing",
        "missing.jsonl",
    );
    bench.write("other.jsonl", "{\"text\": \"nothing\"}\n");
    refused(
        &bench,
        &import("other.jsonl", "other", &[]),
        "other",
        "holds no log-probabilities",
    );
}

/// A text that its teacher mostly knows, with its values moved by `shift`.
fn known_text(shift: i64) -> String {
    let mut lines = String::new();
    let mut state = 7u64;
    let mut draw = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..12 {
        let tokens: Vec<u64> = (0..30).map(|_| draw(200)).collect();
        let mut entries = Vec::new();
        for token in 0..30i64 {
            let known = usize::try_from(token - shift)
                .ok()
                .and_then(|at| tokens.get(at));
            let first = match known {
                Some(token) if draw(4) > 0 => *token,
                _ => draw(200),
            };
            entries.push(json!({first.to_string(): -0.1, ((first + 1) % 256).to_string(): -3.0, ((first + 2) % 256).to_string(): -4.0}));
        }
        let _ = writeln!(
            lines,
            "{}",
            json!({"input_ids": tokens, "prompt_logprobs": entries})
        );
    }
    lines
}

#[test]
fn values_beside_their_place_are_noticed() {
    let bench = Bench::new();
    bench.write("right.jsonl", &known_text(0));
    let report = bench.json(&import_checked("right.jsonl", "right", &["--json"]));
    assert_eq!(report["alignment"]["best_offset"], 0);
    for (shift, wanted) in [(1, "--shift -1"), (-1, "--shift 1")] {
        bench.write("moved.jsonl", &known_text(shift));
        let out = format!("moved{shift}");
        let text = refused(
            &bench,
            &import_checked("moved.jsonl", &out, &[]),
            &out,
            "do not fit the tokens that follow",
        );
        assert!(text.contains(wanted), "{text}");
        let number = wanted.trim_start_matches("--shift ");
        let report = bench.json(&import_checked(
            "moved.jsonl",
            &out,
            &["--shift", number, "--json"],
        ));
        assert_eq!(report["alignment"]["best_offset"], 0);
        assert_eq!(report["shift"].to_string(), number);
        // Who insists is warned.
        let insisting = format!("insisting{shift}");
        let output = bench.ok(&import_checked(
            "moved.jsonl",
            &insisting,
            &["--shift", "0"],
        ));
        assert!(
            stderr(&output).contains("warning: the values do not fit"),
            "{}",
            stderr(&output)
        );
    }
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

#[test]
fn whole_vocabularies_keep_every_statistic() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    bench.cache("cache", 6, &["--tier", "sparse", "--layers", "none"]);
    let logits = teacher_logits(&bench, "cache");
    let mut tensors = Vec::new();
    for (index, (logits, sequence)) in logits.iter().zip(sequences(&bench, "cache")).enumerate() {
        let ids: Vec<i64> = sequence.token_ids.iter().map(|id| i64::from(*id)).collect();
        let mask: Vec<u8> = sequence
            .loss_mask
            .iter()
            .map(|target| u8::from(*target))
            .collect();
        tensors.push((format!("logits.{index}"), logits.shallow_clone()));
        tensors.push((format!("input_ids.{index}"), Tensor::from_slice(&ids)));
        tensors.push((format!("loss_mask.{index}"), Tensor::from_slice(&mask)));
    }
    Tensor::write_safetensors(&tensors, bench.path("whole.safetensors")).unwrap();
    let report = bench.json(&import(
        "whole.safetensors",
        "whole",
        &["--top-k", "8", "--json"],
    ));
    assert_eq!(report["format"], "safetensors");
    assert_eq!(report["origin"]["values"], "logits");
    assert_same(&bench, "cache", "whole", 5e-4);
    for (one, other) in sequences(&bench, "cache")
        .iter()
        .zip(&sequences(&bench, "whole"))
    {
        let (one, other) = (
            one.statistics.as_ref().unwrap(),
            other.statistics.as_ref().unwrap(),
        );
        for (one, other) in [
            (&one.mean, &other.mean),
            (&one.std, &other.std),
            (&one.min, &other.min),
            (&one.max, &other.max),
        ] {
            assert!(
                one.iter()
                    .zip(other)
                    .all(|(one, other)| (one - other).abs() < 1e-4)
            );
        }
    }

    // As log-probabilities at temperature 2: brought back to 1.
    let warm: Vec<(String, Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let is_logits = name.starts_with("logits");
            let tensor = if is_logits {
                (tensor / 2.0).log_softmax(-1, Kind::Float)
            } else {
                tensor.shallow_clone()
            };
            (name.clone(), tensor)
        })
        .collect();
    Tensor::write_safetensors(&warm, bench.path("warm.safetensors")).unwrap();
    let report = bench.json(&import(
        "warm.safetensors",
        "warm",
        &["--top-k", "8", "--temperature", "2", "--json"],
    ));
    assert_eq!(report["origin"]["values"], "log-probabilities");
    assert_eq!(report["origin"]["temperature"], 2.0);
    assert_same(&bench, "cache", "warm", 5e-4);

    // NumPy, one sequence.
    let rows = logits[0].size()[0] as usize;
    let ids: Vec<u8> = sequences(&bench, "cache")[0]
        .token_ids
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    let values: Vec<u8> = floats(&logits[0])
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    std::fs::write(
        bench.path("logits.npy"),
        npy("<f4", &format!("({rows}, 256)"), &values),
    )
    .unwrap();
    std::fs::write(
        bench.path("ids.npy"),
        npy("<u4", &format!("({rows},)"), &ids),
    )
    .unwrap();
    bench.ok(&import(
        "logits.npy",
        "numpy",
        &["--tokens", "ids.npy", "--top-k", "8"],
    ));
    let (one, other) = (
        &sequences(&bench, "cache")[0],
        &sequences(&bench, "numpy")[0],
    );
    for position in 0..rows - 1 {
        for (one, other) in log_probabilities(one, position)
            .iter()
            .zip(log_probabilities(other, position))
        {
            assert!((one.1 - other.1).abs() < 5e-4);
        }
    }
    refused(
        &bench,
        &import("logits.npy", "alone", &[]),
        "alone",
        "holds one array",
    );
    let cut = std::fs::read(bench.path("logits.npy")).unwrap();
    std::fs::write(bench.path("cut.npy"), &cut[..cut.len() / 2]).unwrap();
    refused(
        &bench,
        &import("cut.npy", "cut", &["--tokens", "ids.npy"]),
        "cut",
        "is cut short",
    );
    let mut bad = cut;
    let at = bad.len() - 1024;
    bad[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(bench.path("nan.npy"), &bad).unwrap();
    refused(
        &bench,
        &import("nan.npy", "nan", &["--tokens", "ids.npy"]),
        "nan",
        "the value of token 0 is NaN",
    );
}

/// A .npy file.
fn npy(dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    [
        b"\x93NUMPY\x01\x00",
        &(header.len() as u16).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// What `llama-perplexity --save-all-logits` writes for windows of tokens and their logits.
fn llama_file(context: usize, windows: &[(Vec<u32>, Vec<f32>)], vocab_size: usize) -> Vec<u8> {
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
    caskd_models::save_model(&support::tiny_model(257, 3), &bench.path("teacher")).unwrap();
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
