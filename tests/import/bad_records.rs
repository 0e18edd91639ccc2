//! Records that cannot be used, and imports that are killed.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::llama_cpp::llama_file;
use crate::served::known_text;
use crate::support::{Bench, files, stderr};
use crate::whole::npy;
use crate::{import, import_checked, refused, sequences};

#[test]
fn bad_lines_are_named_and_skipped_when_asked() {
    let bench = Bench::new();
    let good = known_text(0, 12);
    let mut lines: Vec<&str> = good.lines().collect();
    lines.insert(2, "{\"input_ids\": [1, 2");
    lines.insert(5, "{\"input_ids\": [1, 2], \"prompt_logprobs\": [null]}");
    lines.insert(6, "{\"input_ids\": [1, 2], \"prompt_logprobs\": [null, {\"7\": -0.1, \"8\": 0.3, \"9\": -4.0}]}");
    lines.insert(9, "{\"input_ids\": [1, 999], \"prompt_logprobs\": [null, {\"7\": -0.1, \"8\": -3.0, \"9\": -4.0}]}");
    bench.write("good.jsonl", &good);
    bench.write("bad.jsonl", &lines.join("\n"));
    let text = refused(
        &bench,
        &import_checked("bad.jsonl", "stopped", &[]),
        "stopped",
        "line 3",
    );
    assert!(text.contains("--on-error skip"), "{text}");

    let skipping = import_checked("bad.jsonl", "bad", &["--on-error", "skip", "--json"]);
    let output = bench.ok(&skipping);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let places: Vec<&str> = report["bad"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bad| bad["place"].as_str().unwrap())
        .collect();
    assert_eq!(places, ["line 3", "line 6", "line 7", "line 10"]);
    assert_eq!(
        (&report["bad_records"], &report["sequences"]),
        (&json!(4), &json!(12))
    );
    assert!(
        stderr(&output)
            .contains("skipped `bad.jsonl` line 7: position 0: its probabilities add up")
    );
    let manifest = bench.json(&["inspect", "bad", "--json"])["manifest"].clone();
    assert_eq!(manifest["data"]["preparation"]["bad_records"], 4);

    bench.ok(&import_checked("good.jsonl", "good", &[]));
    let (good, bad) = (sequences(&bench, "good"), sequences(&bench, "bad"));
    assert_eq!(good.len(), bad.len());
    for (good, bad) in good.iter().zip(&bad) {
        assert_eq!((&good.token_ids, &good.top_k), (&bad.token_ids, &bad.top_k));
    }
    let before = files(&bench.path("bad"));
    bench.ok(&[&skipping[..], &["--resume"]].concat());
    assert_eq!(before, files(&bench.path("bad")));
    assert_eq!(
        bench.run(&["verify", "bad", "--deep"]).status.code(),
        Some(0)
    );
}

#[test]
fn whole_vocabularies_without_meaning_are_skipped_too() {
    let bench = Bench::new();
    let logits =
        |seed: usize| (0..16 * 256).map(move |at| ((at * 7919 + seed) % 1000) as f32 / 100.0);
    // Three sequences, of which the second has a NaN.
    let mut values: Vec<f32> = (0..3).flat_map(logits).collect();
    values[20 * 256 + 9] = f32::NAN;
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let ids: Vec<u8> = (0..48u32)
        .flat_map(|at| (at * 37 % 256).to_le_bytes())
        .collect();
    std::fs::write(bench.path("logits.npy"), npy("<f4", "(3, 16, 256)", &bytes)).unwrap();
    std::fs::write(bench.path("ids.npy"), npy("<u4", "(3, 16)", &ids)).unwrap();
    let tokens = ["--tokens", "ids.npy", "--top-k", "4", "--json"];
    refused(
        &bench,
        &import("logits.npy", "stopped", &tokens),
        "stopped",
        "`logits[1]`: position 4",
    );
    let skip = ["--on-error", "skip"];
    let arguments = [&tokens[..], &skip].concat();
    let report = bench.json(&import("logits.npy", "arrays", &arguments));
    assert_eq!(
        (&report["bad_records"], &report["sequences"]),
        (&json!(1), &json!(2))
    );
    let kept = sequences(&bench, "arrays");
    // What follows the bad one is read from its own place.
    let best = |row: &[f32]| {
        let highest = row.iter().copied().fold(f32::MIN, f32::max);
        row.iter().position(|value| *value == highest).unwrap() as u32
    };
    for (sequence, of_file) in kept.iter().zip([0, 2]) {
        for (position, row) in values[of_file * 4096..(of_file + 1) * 4096]
            .chunks(256)
            .enumerate()
        {
            assert_eq!(
                sequence.top_k.as_ref().unwrap().ids[position * 4],
                best(row)
            );
        }
    }

    let windows: Vec<(Vec<u32>, Vec<f32>)> = (0..3)
        .map(|seed| ((0..16).map(|at| at * 11).collect(), logits(seed).collect()))
        .collect();
    let mut file = llama_file(16, &windows, 256);
    let window = 7 * (8 + 2 * 256);
    let second = 20 + 3 * 16 * 4 + window;
    file[second..second + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(bench.path("logits.bin"), &file).unwrap();
    refused(
        &bench,
        &import("logits.bin", "stopped", &[]),
        "stopped",
        "window 2: position 8",
    );
    let arguments = [&skip[..], &["--top-k", "4", "--json"]].concat();
    let report = bench.json(&import("logits.bin", "llama", &arguments));
    assert_eq!(report["bad"][0]["place"], "window 2");
    let sources: Vec<String> = sequences(&bench, "llama")
        .into_iter()
        .map(|sequence| sequence.source)
        .collect();
    assert_eq!(sources, ["logits.bin:1", "logits.bin:3"]);
}

#[test]
fn an_import_killed_at_any_instant_resumes_to_the_same_bytes() {
    let kills: u32 = std::env::var("CASKD_KILLS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(4);
    let bench = Bench::new();
    bench.write("served.jsonl", &known_text(0, 1500));
    let started = Instant::now();
    bench.ok(&import_checked("served.jsonl", "whole", &[]));
    let duration = started.elapsed();
    let expected = files(&bench.path("whole"));
    let shards = expected.keys().filter(|path| path.starts_with("shards"));
    assert!(shards.count() >= 3, "a kill should find some shards done");
    let mut with_shards = 0;
    for kill in 0..kills {
        let out = format!("killed-{kill}");
        // The first pass writes nothing: most kills go to the second.
        let share = 0.3 + 0.7 * (f64::from(kill) * 0.618_034).fract();
        let mut child = bench
            .command(&import_checked("served.jsonl", &out, &[]))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(duration.mul_f64(share).max(Duration::from_millis(1)));
        child.kill().unwrap();
        child.wait().unwrap();
        let folder = bench.path(&out);
        let done = std::fs::read_dir(folder.join("shards")).map_or(0, Iterator::count);
        with_shards += u32::from(done > 0 && !folder.join("manifest.json").exists());
        bench.ok(&import_checked("served.jsonl", &out, &["--resume"]));
        assert!(files(&folder) == expected, "{out} differs");
    }
    eprintln!("{kills} kills, {with_shards} of them with some shards done");
}
