//! The scripts of `deploy/`, run against a Slurm that a shell script plays.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Bench, files, stderr};

/// Runs what it is given at once, with the environment of an array task; the first task of an array is told to stop soon
/// after it began, as at the end of its time, and runs again where the script asks for it.
const SBATCH: &str = r#"#!/usr/bin/env bash
set -euo pipefail
array='' wrap='' script=''
for argument in "$@"; do
    case $argument in
        --array=*) array=${argument#--array=} ;;
        --wrap=*) wrap=${argument#--wrap=} ;;
        --dependency=afterok:*) [ -e "$FAKE/ok-${argument#--dependency=afterok:}" ] || { echo "DependencyNeverSatisfied" >&2; exit 1; } ;;
        --*) ;;
        *) script=$argument ;;
    esac
done
if [ -n "$wrap" ]; then
    bash -c "$wrap" >&2
    echo 43
    exit
fi
first=${array%-*} last=${array#*-}
export SLURM_ARRAY_JOB_ID=42 SLURM_CPUS_PER_TASK=1
export SLURM_ARRAY_TASK_MIN=$first SLURM_ARRAY_TASK_MAX=$last SLURM_ARRAY_TASK_COUNT=$((last - first + 1)) SLURM_ARRAY_TASK_STEP=1
run() {
    export SLURM_ARRAY_TASK_ID=$1
    bash "$script" >&2 &
    local job=$!
    if [ "$1" = "$first" ] && [ ! -e "$FAKE/told" ]; then
        touch "$FAKE/told"
        sleep 0.4
        kill -TERM "$job" 2>/dev/null || true
    fi
    wait "$job"
    if [ -e "$FAKE/requeue-42_$1" ]; then
        rm "$FAKE/requeue-42_$1"
        echo "again: $1" >>"$FAKE/log"
        run "$1"
    fi
}
tasks=()
for index in $(seq "$first" "$last"); do
    run "$index" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task"; done
touch "$FAKE/ok-42"
echo 42
"#;

const SCONTROL: &str = "#!/bin/sh\n[ \"$1\" = requeue ] && touch \"$FAKE/requeue-$2\"\n";

fn executable(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(path, mode).unwrap();
}

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy")
        .join(name)
}

#[test]
fn a_slurm_array_makes_the_cache_of_one_build() {
    let bench = Bench::new();
    bench.records("data.jsonl", 96);
    let options = [
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--max-len",
        "65536",
    ];
    bench.ok(&[&["build", "--out", "whole"][..], &options].concat());

    let fake = bench.path("fake");
    std::fs::create_dir(&fake).unwrap();
    executable(&fake.join("sbatch"), SBATCH);
    executable(&fake.join("scontrol"), SCONTROL);
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_caskd"), fake.join("caskd")).unwrap();
    let submit = || {
        Command::new(deploy("slurm-build.sh"))
            .args(["cache", "3", "--"])
            .args(options)
            .current_dir(bench.folder.path())
            .env(
                "PATH",
                format!("{}:{}", fake.display(), std::env::var("PATH").unwrap()),
            )
            .env("FAKE", &fake)
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap()
    };
    let output = submit();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    for worker in 0..3 {
        assert!(
            text.contains(&format!("worker {worker}/3, says the Slurm array")),
            "{text}"
        );
    }
    assert!(fake.join("told").exists());
    if text.contains("stopped; the same command goes on") {
        let log = std::fs::read_to_string(fake.join("log")).unwrap();
        assert_eq!(
            log, "again: 0\n",
            "a stopped worker goes back into the queue"
        );
    }
    assert!(files(&bench.path("cache")) == files(&bench.path("whole")));
    // Once more: nothing to do.
    let again = submit();
    assert!(stderr(&again).contains("is finished") && again.status.success());
}

#[test]
fn scripts_and_manifest_are_valid() {
    let output = Command::new(deploy("validate.sh")).output().unwrap();
    eprint!("{}", stderr(&output));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}
