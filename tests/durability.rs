//! Builds that are killed, locked out, or run out of disk, through the binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{Bench, files, stderr};

/// Several shards, so that a kill finds some of them done: the longer a sequence may be, the fewer go into a shard.
const RECORDS: usize = 96;
const MAX_LEN: &str = "65536";

fn arguments<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let build = [
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--top-k",
        "8",
        "--max-len",
        MAX_LEN,
        "--out",
        out,
    ];
    [&build[..], more].concat()
}

fn bench() -> Bench {
    let bench = Bench::new();
    bench.records("data.jsonl", RECORDS);
    bench
}

fn reference(bench: &Bench) -> (BTreeMap<PathBuf, Vec<u8>>, Duration) {
    let started = Instant::now();
    bench.ok(&arguments("whole", &[]));
    let files = files(&bench.path("whole"));
    let shards = files.keys().filter(|path| path.starts_with("shards"));
    assert!(shards.count() >= 3, "a kill should find some shards done");
    (files, started.elapsed())
}

fn spawn(bench: &Bench, arguments: &[&str]) -> Child {
    let mut command = bench.command(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Nothing under a final name that is not whole: shards carry their digest in their name.
fn assert_no_torn_files(folder: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>) {
    if !folder.exists() {
        return;
    }
    for (name, bytes) in files(folder) {
        let file_name = name.file_name().unwrap().to_string_lossy().into_owned();
        let is_unfinished = file_name.starts_with(".tmp-");
        if !is_unfinished && file_name != ".lock" && file_name != "plan.json" {
            assert_eq!(expected.get(&name), Some(&bytes), "{}", name.display());
        }
    }
}

#[test]
fn a_build_killed_at_any_instant_resumes_to_the_same_bytes() {
    let kills: u32 = std::env::var("CASKD_KILLS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(4);
    let bench = bench();
    let (expected, duration) = reference(&bench);
    let (mut killed, mut with_shards) = (0, 0);
    for kill in 0..kills {
        let out = format!("killed-{kill}");
        // Instants spread over the build; every other build is killed again while it resumes.
        for attempt in 0..=kill % 2 {
            let share = (f64::from(kill * 2 + attempt) * 0.618_034).fract();
            let mut child = spawn(&bench, &arguments(&out, &["--resume"]));
            std::thread::sleep(duration.mul_f64(0.05 + 0.95 * share));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            killed += u32::from(status.signal() == Some(9));
            let folder = bench.path(&out);
            assert_no_torn_files(&folder, &expected);
            let is_finished = folder.join("manifest.json").exists();
            let done = std::fs::read_dir(folder.join("shards")).map_or(0, Iterator::count);
            with_shards += u32::from(!is_finished && done > 0);
            // A folder with a manifest is a whole cache; one without is said to be unfinished.
            let verdict = bench.run(&["verify", &out]).status.code();
            assert_eq!(verdict, Some(if is_finished { 0 } else { 2 }));
        }
        bench.ok(&arguments(&out, &["--resume"]));
        assert!(files(&bench.path(&out)) == expected, "{out} differs");
    }
    eprintln!("{killed} kills, {with_shards} of them with some shards done");
    assert!(killed > 0);
}

#[test]
fn a_second_builder_is_refused_until_the_first_dies() {
    let bench = bench();
    let mut first = spawn(&bench, &arguments("cache", &[]));
    let lock = bench.path("cache/plan.json");
    while !lock.exists() {
        assert_eq!(
            first.try_wait().unwrap(),
            None,
            "the first build ended early"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    // Stopped, so that it cannot end before the second has looked.
    let stop = |signal: &str| {
        let pid = first.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    };
    stop("-STOP");
    for more in [&[][..], &["--resume"]] {
        let second = bench.run(&arguments("cache", more));
        assert_eq!(second.status.code(), Some(2));
        assert!(
            stderr(&second).contains("another process is building"),
            "{}",
            stderr(&second)
        );
    }
    stop("-KILL");
    first.wait().unwrap();
    bench.ok(&arguments("cache", &["--resume"]));
    bench.ok(&["verify", "cache", "--deep"]);
}

/// What can't stop cleanly does not say that it will.
#[test]
fn the_first_interrupt_ends_a_command_without_steps() {
    let bench = Bench::new();
    // Nobody writes into it, so whoever reads it waits.
    let pipe = bench.path("text.txt");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let mut child = spawn(
        &bench,
        &["eval", "--model", "teacher", "--text", "text.txt"],
    );
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
    let kill = |signal: &str| {
        let pid = child.id().to_string();
        Command::new("kill").args([signal, &pid]).status().unwrap()
    };
    assert!(kill("-INT").success());
    std::thread::sleep(Duration::from_secs(2));
    kill("-KILL");
    assert_eq!(child.wait().unwrap().signal(), Some(2));
}

#[test]
fn a_full_disk_stops_the_build_and_it_resumes() {
    let bench = bench();
    let (expected, _) = reference(&bench);
    // No file may grow beyond 40 KiB: the head fits, no shard does. With the signal ignored a write fails as on a full disk.
    let script = "trap '' XFSZ; ulimit -f 80; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_caskd")])
        .args(arguments("cache", &[]))
        .current_dir(bench.folder.path())
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(
        text.contains("no space left") && text.contains("--resume"),
        "{text}"
    );
    let left = files(&bench.path("cache"));
    assert!(
        left.keys()
            .all(|name| !name.to_string_lossy().contains(".tmp-")),
        "what could not be written gives its space back: {:?}",
        left.keys()
    );
    assert!(!left.contains_key(Path::new("manifest.json")));
    assert_no_torn_files(&bench.path("cache"), &expected);
    bench.ok(&arguments("cache", &["--resume"]));
    assert!(files(&bench.path("cache")) == expected);
}
