//! Training that is killed, moved, mixed and watched, through the binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Bench, stderr};

const STEPS: usize = 60;

fn arguments<'a>(caches: &[&'a str], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", "teacher", "--out", out];
    for cache in caches {
        arguments.extend(["--cache", cache]);
    }
    let settings = [
        "max_steps=60",
        "epochs=100",
        "batch_size=4",
        "checkpoint_every=7",
        "shuffle_shards=1",
        "lora.dropout=0.1",
        "kd_type=dual-scaling",
        "layers=last",
    ];
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    arguments.extend(more);
    arguments
}

/// The log's steps without what depends on the clock.
fn steps(run: &Path) -> Vec<Value> {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    log.lines()
        .map(|line| {
            let mut step: Value = serde_json::from_str(line).unwrap();
            for clock in [
                "seconds",
                "tokens_per_second",
                "data_wait_seconds",
                "memory_bytes",
            ] {
                assert!(step[clock].is_number(), "{line}");
                step[clock] = Value::Null;
            }
            step
        })
        .collect()
}

fn adapter(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap()
}

fn two_caches() -> Bench {
    let bench = Bench::new();
    bench.cache("first", 40, &[]);
    bench.cache("second", 23, &[]);
    bench
}

/// Killed at instants spread over the run, time and again, and moved meanwhile: the same losses and
/// weights to the bit.
#[test]
fn a_training_killed_at_any_instant_resumes_to_the_same_bits() {
    let kills: u32 = std::env::var("CASKD_KILLS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(6);
    let bench = two_caches();
    let caches = ["first", "second=0.7"];
    let started = Instant::now();
    bench.ok(&arguments(&caches, "whole", &[]));
    let duration = started.elapsed();
    let expected = (steps(&bench.path("whole")), adapter(&bench.path("whole")));
    assert_eq!(expected.0.len(), STEPS);

    let (mut killed, mut between) = (0, 0);
    for run in 0..kills.div_ceil(3) {
        let out = format!("killed-{run}");
        for attempt in 0..3u32 {
            let share = (f64::from(run * 3 + attempt) * 0.618_034 + 0.3).fract();
            let prefetch = format!("prefetch={}", 1 + attempt);
            let more = ["--resume", "--set", &prefetch];
            let mut child = bench
                .command(&arguments(&caches, &out, &more))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(duration.mul_f64(0.1 + 0.9 * share));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            killed += u32::from(status.signal() == Some(9));
            let run = bench.path(&out);
            let has_steps = run.join("checkpoints").exists();
            between += u32::from(has_steps && !run.join("adapter").exists());
        }
        // Where the caches lie does not matter, nor how they are read.
        let moved = bench.path("elsewhere");
        std::fs::create_dir_all(&moved).unwrap();
        for name in ["first", "second"] {
            std::fs::rename(bench.path(name), moved.join(name)).unwrap();
        }
        let from_elsewhere = ["elsewhere/first", "elsewhere/second=0.7"];
        let more = ["--resume", "--io", "read"];
        bench.ok(&arguments(&from_elsewhere, &out, &more));
        for name in ["first", "second"] {
            std::fs::rename(moved.join(name), bench.path(name)).unwrap();
        }
        let got = (steps(&bench.path(&out)), adapter(&bench.path(&out)));
        assert!(got == expected, "{out} differs");
    }
    eprintln!("{killed} kills, {between} of them between the first checkpoint and the end");
    assert!(killed > 0);
}

#[test]
fn a_mix_says_which_cache_cannot_answer() {
    let bench = Bench::new();
    bench.cache("exact", 8, &[]);
    bench.cache("few", 9, &["--tier", "sparse"]);
    let output = bench.run(&arguments(&["exact", "few=0.5"], "run", &[]));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("few`: loss `dual-scaling`") && said.contains("hint:"),
        "{said}"
    );
    assert!(!bench.path("run").exists());
}

#[test]
fn a_mix_is_resumed_only_as_it_was() {
    let bench = two_caches();
    let stop = ["--set", "max_steps=3"];
    bench.ok(&arguments(&["first", "second=0.7"], "run", &stop));
    let resumed = [&stop[..], &["--resume"]].concat();
    let refused = |caches: &[&str], said: &str| {
        let output = bench.run(&arguments(caches, "run", &resumed));
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(said), "{}", stderr(&output));
    };
    refused(&["first", "second=0.8"], "second`=0.8");
    refused(&["second=0.7", "first"], "the cache was");
    refused(&["first"], "the cache was");
    refused(&["first", "first=2"], "given before");
    refused(&["first=0"], "weight 0");
    refused(&["first", "third"], "third");
    bench.ok(&arguments(&["first", "second=0.7"], "run", &resumed));
}

#[test]
fn the_newest_damaged_checkpoint_is_passed_over_with_a_word() {
    let bench = Bench::new();
    bench.cache("cache", 40, &[]);
    let whole = arguments(&["cache"], "whole", &[]);
    bench.ok(&whole);
    let started = bench
        .command(&arguments(&["cache"], "run", &[]))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = started.unwrap();
    let newest = bench.path("run/checkpoints/step-000014");
    let since = Instant::now();
    while !newest.exists() {
        assert!(since.elapsed() < Duration::from_mins(2));
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let mut newest: Vec<_> = std::fs::read_dir(bench.path("run/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("step-"))
        .collect();
    newest.sort();
    let newest = newest.pop().unwrap();
    let file = newest.join("adapters.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let output = bench.ok(&arguments(&["cache"], "run", &["--resume"]));
    let name = newest.file_name().unwrap().to_string_lossy().into_owned();
    let said = stderr(&output);
    assert!(
        said.contains(&name) && said.contains("damaged") && said.contains("going on from step"),
        "{said}"
    );
    assert_eq!(steps(&bench.path("run")), steps(&bench.path("whole")));
    assert_eq!(adapter(&bench.path("run")), adapter(&bench.path("whole")));
}

#[test]
fn what_is_not_finite_stops_with_its_name() {
    let bench = Bench::new();
    bench.cache("cache", 20, &[]);
    let more = [
        "--set",
        "learning_rate=1e30",
        "--set",
        "warmup_ratio=0",
        "--set",
        "checkpoint_every=1",
    ];
    let output = bench.run(&arguments(&["cache"], "run", &more));
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    for part in ["not finite at step", "cache.jsonl:", "step-00000"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn a_cache_of_another_tokenizer_is_refused() {
    let bench = Bench::new();
    bench.cache("cache", 5, &[]);
    let manifest = std::fs::read_to_string(bench.path("teacher/tokenizer.json")).unwrap();
    bench.ok(&[
        "prune", "--model", "teacher", "--ratio", "0.25", "--out", "student",
    ]);
    let mut tokenizer: Value = serde_json::from_str(&manifest).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let names: Vec<String> = vocabulary.keys().take(2).cloned().collect();
    let ids: Vec<Value> = names.iter().map(|name| vocabulary[name].clone()).collect();
    vocabulary.insert(names[0].clone(), ids[1].clone());
    vocabulary.insert(names[1].clone(), ids[0].clone());
    std::fs::write(bench.path("student/tokenizer.json"), tokenizer.to_string()).unwrap();
    let output = bench.run(&[
        "train",
        "--cache",
        "cache",
        "--student",
        "student",
        "--out",
        "run",
    ]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("tokenizer"), "{}", stderr(&output));
    assert!(!bench.path("run").exists());
}

/// Printed, it is a configuration with a comment on every key, and the same one again.
#[test]
fn the_printed_configuration_can_be_used() {
    let bench = Bench::new();
    bench.cache("cache", 8, &[]);
    let printed = bench.ok(&[
        "train",
        "--print-config",
        "--set",
        "max_steps=2",
        "--fraction",
        "0.9",
    ]);
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("fraction = 0.9") && printed.contains("shuffle_shards = "));
    bench.write("config.toml", &printed);
    let run = bench.json(&[
        "train",
        "--set",
        "epochs=9",
        "--config",
        "config.toml",
        "--cache",
        "cache",
        "--student",
        "teacher",
        "--out",
        "run",
        "--json",
    ]);
    assert_eq!(run["steps"], 2);
    assert!(run["sequences"].as_u64().unwrap() <= 8);
    assert!(run["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
}

/// Judged by TensorBoard itself, where $CASKD_PYTHON has it.
#[test]
fn tensorboard_reads_the_events_of_a_resumed_run() {
    let bench = Bench::new();
    bench.cache("cache", 40, &[]);
    let more = ["--tensorboard", "board"];
    let mut child = bench
        .command(&arguments(&["cache"], "run", &more))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while !bench.path("run/checkpoints/step-000014").exists() {
        assert!(since.elapsed() < Duration::from_mins(2));
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    bench.ok(&arguments(
        &["cache"],
        "run",
        &["--tensorboard", "board", "--resume"],
    ));
    assert_eq!(std::fs::read_dir(bench.path("board")).unwrap().count(), 2);
    let script = "\
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator('board')
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}))";
    let Some(python) = std::env::var_os("CASKD_PYTHON") else {
        eprintln!("skipped: CASKD_PYTHON does not name a Python");
        return;
    };
    let output = Command::new(python)
        .args(["-c", script])
        .current_dir(bench.folder.path())
        .output()
        .unwrap();
    if stderr(&output).contains("No module named") {
        eprintln!("skipped: CASKD_PYTHON has no tensorboard");
        return;
    }
    assert!(output.status.success(), "{}", stderr(&output));
    let scalars: Value = serde_json::from_slice(&output.stdout).unwrap();
    let log = steps(&bench.path("run"));
    let check = |tag: &str, of: &dyn Fn(&Value) -> f64| {
        let events = scalars[tag].as_array().unwrap();
        assert_eq!(events.len(), STEPS, "{tag}");
        for (event, step) in events.iter().zip(&log) {
            assert_eq!(event[0], step["step"]);
            let (got, expected) = (event[1].as_f64().unwrap(), of(step));
            assert!(
                (got - expected).abs() <= 1e-6 * expected.abs(),
                "{tag}: {got} and {expected}"
            );
        }
    };
    check("loss/total", &|step| step["loss"].as_f64().unwrap());
    check("gradient_norm", &|step| step["grad_norm"].as_f64().unwrap());
    check("loss/dual-scaling", &|step| {
        step["terms"][1][1].as_f64().unwrap()
    });
    for tag in [
        "speed/tokens_per_second",
        "speed/data_wait_seconds",
        "memory_bytes",
    ] {
        assert_eq!(scalars[tag].as_array().unwrap().len(), STEPS);
    }
}

/// Rotary embeddings go on beyond the positions that a student was made for; nobody would see it.
#[test]
fn sequences_beyond_the_students_positions_are_told() {
    let bench = Bench::new();
    bench.records("train.jsonl", 12);
    bench.json(&[
        "build",
        "--teacher",
        "teacher",
        "--data",
        "train.jsonl",
        "--out",
        "cache",
        "--json",
    ]);
    let train = |student: &str| {
        let out = format!("run-{student}");
        let output = bench.run(&[
            "train",
            "--cache",
            "cache",
            "--student",
            student,
            "--out",
            &out,
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
            .matches("longer than the 9 positions")
            .count()
    };
    assert_eq!(train("teacher"), 0);
    bench.json(&["export-model", "teacher", "--out", "short", "--json"]);
    let config = bench.path("short/config.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["max_position_embeddings"] = 9.into();
    std::fs::write(&config, fields.to_string()).unwrap();
    assert_eq!(train("short"), 1);
}
