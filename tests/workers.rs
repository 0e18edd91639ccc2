//! A build done by many processes: planned, shared, killed, joined; through the binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use support::{Bench, files, stderr};

/// Several shards: the longer a sequence may be, the fewer go into a shard.
const RECORDS: usize = 96;

fn bench() -> Bench {
    let bench = Bench::new();
    bench.records("data.jsonl", RECORDS);
    bench
}

fn build<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let build = [
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--max-len",
        "65536",
        "--out",
        out,
    ];
    [&build[..], more].concat()
}

fn plan<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    build(out, &[&["--plan"], more].concat())
}

fn worker<'a>(out: &'a str, share: &'a str) -> Vec<&'a str> {
    vec!["build", "--worker", share, "--out", out]
}

fn commit(out: &str) -> Vec<&str> {
    vec!["build", "--commit", "--out", out]
}

fn spawn(bench: &Bench, arguments: &[&str]) -> Child {
    let mut command = bench.command(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn tree(bench: &Bench, out: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    files(&bench.path(out))
}

/// What Linux says of the file locks of a process.
fn holds_a_lock(process: u32) -> bool {
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let process = process.to_string();
    locks
        .lines()
        .any(|lock| lock.contains("FLOCK") && lock.split_whitespace().any(|word| word == process))
}

fn refused(bench: &Bench, arguments: &[&str], part: &str) {
    let output = bench.run(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    assert!(text.contains(part), "{arguments:?}: {text} lacks {part}");
}

#[test]
fn any_number_of_workers_makes_the_cache_of_one_build() {
    let bench = bench();
    for (tier, more) in [
        ("sparse", &["--top-k", "8", "--layers", "last,middle"][..]),
        ("exact", &[]),
        ("compact", &["--rate", "100", "--layers", "last,middle"]),
    ] {
        let more = [&["--tier", tier], more].concat();
        let whole = format!("whole-{tier}");
        bench.ok(&build(&whole, &more));
        let expected = tree(&bench, &whole);
        let shards = expected.keys().filter(|name| name.starts_with("shards"));
        assert!(shards.count() >= 3, "shares should hold some");

        // One after the other; then four at once, and one of them twice.
        let one = format!("one-{tier}");
        bench.ok(&plan(&one, &more));
        bench.ok(&worker(&one, "0/1"));
        bench.ok(&commit(&one));
        assert!(tree(&bench, &one) == expected, "{one}");

        let many = format!("many-{tier}");
        bench.ok(&plan(&many, &more));
        let shares = ["0/4", "1/4", "2/4", "3/4", "1/4"];
        let mut workers: Vec<Child> = shares
            .iter()
            .map(|share| spawn(&bench, &worker(&many, share)))
            .collect();
        for (worker, share) in workers.iter_mut().zip(shares) {
            assert!(worker.wait().unwrap().success(), "{many} {share}");
        }
        bench.ok(&commit(&many));
        assert!(tree(&bench, &many) == expected, "{many}");
        bench.ok(&["verify", &many, "--deep"]);
        // What is finished stays as it is.
        bench.ok(&commit(&many));
        assert!(tree(&bench, &many) == expected, "{many} committed twice");
    }
}

#[test]
fn workers_killed_at_any_instant_lose_nothing_but_time() {
    let kills: u32 = std::env::var("CASKD_KILLS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(4);
    let bench = bench();
    bench.ok(&build("whole", &[]));
    let expected = tree(&bench, "whole");
    bench.ok(&plan("timed", &[]));
    let started = Instant::now();
    bench.ok(&worker("timed", "0/2"));
    let duration = started.elapsed();
    let mut killed = 0;
    for kill in 0..kills {
        let out = format!("killed-{kill}");
        bench.ok(&plan(&out, &[]));
        // Two workers, both killed, at different instants; then the rest by workers cut in another way.
        let mut workers = ["0/2", "1/2"].map(|share| spawn(&bench, &worker(&out, share)));
        for (index, worker) in workers.iter_mut().enumerate() {
            let share = (f64::from(kill * 2 + index as u32) * 0.618_034).fract();
            std::thread::sleep(duration.mul_f64(0.6 * share + 0.05));
            worker.kill().unwrap();
            killed += u32::from(worker.wait().unwrap().code().is_none());
        }
        let shards = expected
            .iter()
            .filter(|(name, _)| name.starts_with("shards"));
        for (name, bytes) in shards {
            let path = bench.path(&out).join(name);
            assert!(!path.exists() || std::fs::read(path).unwrap() == *bytes);
        }
        if kill % 2 == 0 {
            for share in ["2/3", "0/3", "1/3"] {
                bench.ok(&worker(&out, share));
            }
            bench.ok(&commit(&out));
        } else {
            // Or by a single build that goes on alone.
            bench.ok(&build(&out, &["--resume"]));
        }
        assert!(tree(&bench, &out) == expected, "{out} differs");
    }
    eprintln!("{killed} workers killed");
    assert!(killed > 0);
}

#[test]
fn a_killed_planner_goes_on() {
    let bench = bench();
    bench.ok(&build("whole", &[]));
    let started = Instant::now();
    bench.ok(&plan("timed", &[]));
    let duration = started.elapsed();
    for kill in 0..4 {
        let out = format!("plan-{kill}");
        let mut planner = spawn(&bench, &plan(&out, &[]));
        std::thread::sleep(duration.mul_f64(0.5 + 0.12 * f64::from(kill)));
        planner.kill().unwrap();
        planner.wait().unwrap();
        bench.ok(&plan(&out, &["--resume"]));
        bench.ok(&worker(&out, "0/1"));
        bench.ok(&commit(&out));
        assert!(tree(&bench, &out) == tree(&bench, "whole"), "{out}");
    }
}

#[test]
fn a_commit_says_what_is_missing_and_waits_for_the_living() {
    let bench = bench();
    bench.ok(&plan("cache", &[]));
    let report = bench.json(&[&worker("cache", "1/3")[..], &["--json"]].concat());
    assert_eq!(report["completed"], true);
    assert_eq!(report["tasks_done"], report["tasks"]);
    assert_eq!(report["worker"]["index"], 1);
    let tasks = report["tasks"].as_u64().unwrap() + report["tasks_left"].as_u64().unwrap();
    refused(
        &bench,
        &commit("cache"),
        &format!("of {tasks} in `cache` are not done"),
    );
    refused(&bench, &commit("cache"), "error: tasks 0, 2");
    // A second run finds everything done.
    let again = bench.json(&[&worker("cache", "1/3")[..], &["--json"]].concat());
    assert_eq!(again["tasks_done"], 0);
    assert_eq!(again["tasks_found"], again["tasks"]);
    assert_eq!(again["teacher_positions"], 0);

    let mut living = spawn(&bench, &worker("cache", "0/1"));
    let signal = |process: &Child, signal: &str| {
        let pid = process.id().to_string();
        let sent = std::process::Command::new("kill")
            .args([signal, &pid])
            .status();
        assert!(sent.unwrap().success());
    };
    // Stopped once it holds the lock, so that it cannot end before the commit has looked.
    while !holds_a_lock(living.id()) {
        assert_eq!(living.try_wait().unwrap(), None, "the worker ended early");
        std::thread::sleep(Duration::from_millis(1));
    }
    signal(&living, "-STOP");
    refused(&bench, &commit("cache"), "another process is building");
    signal(&living, "-TERM");
    signal(&living, "-CONT");
    let ended = living.wait().unwrap().code();
    assert!(ended == Some(75) || ended == Some(0), "{ended:?}");
    bench.ok(&worker("cache", "0/1"));
    bench.ok(&commit("cache"));
}

#[test]
fn a_worker_takes_its_share_from_the_environment() {
    let bench = bench();
    bench.ok(&plan("cache", &[]));
    let run = |variables: &[(&str, &str)]| {
        let mut command = bench.command(&["build", "--worker", "--out", "cache", "--json"]);
        command
            .env_remove("WORLD_SIZE")
            .env_remove("SLURM_ARRAY_TASK_ID");
        command.env_remove("JOB_COMPLETION_INDEX");
        command.envs(variables.iter().copied()).output().unwrap()
    };
    let array = run(&[
        ("SLURM_ARRAY_TASK_ID", "6"),
        ("SLURM_ARRAY_TASK_MIN", "5"),
        ("SLURM_ARRAY_TASK_COUNT", "2"),
        ("RANK", "0"),
        ("WORLD_SIZE", "8"),
    ]);
    let text = stderr(&array);
    assert!(text.contains("worker 1/2, says the Slurm array"), "{text}");
    assert!(
        text.contains("warning: torchrun is in the environment too"),
        "{text}"
    );
    let job = run(&[("JOB_COMPLETION_INDEX", "0"), ("JOB_COMPLETIONS", "2")]);
    assert!(stderr(&job).contains("worker 0/2, says the Kubernetes Indexed Job"));
    assert!(stderr(&job).contains("nothing is left"), "{}", stderr(&job));
    let none = run(&[]);
    assert_eq!(none.status.code(), Some(2));
    assert!(stderr(&none).contains("nothing in the environment says which"));
    bench.ok(&commit("cache"));
}

#[test]
fn what_does_not_fit_the_plan_is_refused() {
    let bench = bench();
    refused(&bench, &worker("nowhere", "0/1"), "holds no finished plan");
    refused(&bench, &commit("nowhere"), "holds no finished plan");
    assert!(
        !bench.path("nowhere").exists(),
        "nothing is made of a wrong path"
    );
    bench.ok(&build("finished", &[]));
    refused(&bench, &worker("finished", "0/1"), "a finished cache");
    bench.ok(&plan("cache", &[]));
    refused(&bench, &plan("cache", &[]), "an unfinished build");
    refused(
        &bench,
        &plan("cache", &["--resume", "--tier", "sparse"]),
        "another plan",
    );
    refused(&bench, &worker("cache", "2/2"), "counted from 0");
    for (more, part) in [
        (&["--tier", "sparse"][..], "cannot be used with"),
        (&["--max-len", "9"], "cannot be used with"),
        (&["--commit"], "cannot be used with"),
        (&["--plan"], "cannot be used with"),
    ] {
        refused(&bench, &[&worker("cache", "0/1")[..], more].concat(), part);
    }
    caskd_models::save_model(&support::tiny_model(256, 2), &bench.path("other")).unwrap();
    let other = [&worker("cache", "0/1")[..], &["--teacher", "other"]].concat();
    refused(&bench, &other, "is not the teacher of the plan");

    // A bit flipped in a task, in a shard after its receipt, in a receipt.
    let flip = |path: &PathBuf, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let first = |folder: &str| {
        let mut names: Vec<PathBuf> = std::fs::read_dir(bench.path("cache").join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort();
        names.remove(0)
    };
    flip(&first("tasks"), 40);
    refused(&bench, &worker("cache", "0/1"), "its digest does not match");
    flip(&first("tasks"), 40);
    bench.ok(&worker("cache", "0/1"));
    let shard = first("shards");
    let length = std::fs::metadata(&shard).unwrap().len() as usize;
    flip(&shard, length - 20);
    refused(
        &bench,
        &commit("cache"),
        "not the shard that its receipt describes",
    );
    flip(&shard, length - 20);
    let receipt = first("receipts");
    let text = std::fs::read_to_string(&receipt).unwrap();
    for (found, made) in [
        ("\"positions\": ", "\"positions\": 1"),
        ("\"work\": \"", "\"work\": \"0"),
    ] {
        std::fs::write(&receipt, text.replacen(found, made, 1)).unwrap();
        refused(&bench, &commit("cache"), "is damaged");
    }
    std::fs::write(&receipt, text).unwrap();
    bench.ok(&commit("cache"));
    bench.ok(&["verify", "cache", "--deep"]);
}

#[test]
fn a_teacher_without_finite_values_stops_its_worker_by_name() {
    let bench = bench();
    let model = support::tiny_model(256, 1);
    let (_, weight) = model.network.parameters().into_iter().nth(3).unwrap();
    let _ = weight.shallow_clone().get(0).fill_(f64::NAN);
    caskd_models::save_model(&model, &bench.path("sick")).unwrap();
    let mut arguments = plan("cache", &[]);
    arguments[2] = "sick";
    bench.ok(&arguments);
    refused(&bench, &worker("cache", "0/1"), "not finite: the teacher's");
    refused(&bench, &worker("cache", "0/1"), "data.jsonl:");
    refused(&bench, &commit("cache"), "are not done");
}
