//! What inference servers return, and values that stand beside their place.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::support::{Bench, files, stderr};
use crate::{assert_same, import, import_checked, log_probabilities, refused, sequences};

/// Writes the logits of a cache as vLLM would serve them: the prompt's own token beside the largest ones.
pub(crate) fn as_vllm(bench: &Bench, cache: &str) -> String {
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
    let before = files(&bench.path("served"));
    bench.ok(&import("served.jsonl", "served", &["--resume"]));
    assert_eq!(before, files(&bench.path("served")));
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

/// `count` texts that their teacher mostly knows, with the values moved by `shift`.
pub(crate) fn known_text(shift: i64, count: usize) -> String {
    let mut lines = String::new();
    let mut state = 7u64;
    let mut draw = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..count {
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
    bench.write("right.jsonl", &known_text(0, 12));
    let report = bench.json(&import_checked("right.jsonl", "right", &["--json"]));
    assert_eq!(report["alignment"]["best_offset"], 0);
    for (shift, wanted) in [(1, "--shift -1"), (-1, "--shift 1")] {
        bench.write("moved.jsonl", &known_text(shift, 12));
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
