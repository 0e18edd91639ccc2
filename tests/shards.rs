//! Caches whose shards lie in other folders than their manifest, through the binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use serde_json::Value;
use support::{Bench, files, stderr};

const ELSEWHERE: [&str; 4] = ["--shards", "far/one", "--shards", "far/two"];

/// `cache` with all its shards beside the manifest, and `spread` whose first is there, the second in `far/one` and the
/// third in `far/two`.
fn bench() -> Bench {
    let bench = Bench::new();
    // The longer a sequence may be, the fewer go into a shard.
    bench.cache("cache", 40, &["--max-len", "262144"]);
    for (name, bytes) in files(&bench.path("cache")) {
        let place = match name.to_str().unwrap() {
            shard if shard.starts_with("shards/00001") => bench.path("far/one"),
            shard if shard.starts_with("shards/00002") => bench.path("far/two"),
            _ => bench.path("spread").join(name.parent().unwrap()),
        };
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join(name.file_name().unwrap()), bytes).unwrap();
    }
    bench
}

/// The only file of a folder.
fn only(bench: &Bench, folder: &str) -> PathBuf {
    let found: Vec<_> = files(&bench.path(folder)).into_keys().collect();
    assert_eq!(found.len(), 1, "{found:?}");
    bench.path(folder).join(&found[0])
}

fn train(cache: &str, out: &str, more: &[&str]) -> Vec<String> {
    let arguments = ["train", "--cache", cache, "--student", "teacher", "--out"];
    let settings = [
        "max_steps=12",
        "epochs=9",
        "batch_size=4",
        "shuffle_shards=1",
    ];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let all = arguments.into_iter().chain([out]).chain(settings);
    all.chain(more.iter().copied()).map(str::to_owned).collect()
}

fn run(bench: &Bench, arguments: &[String]) {
    bench.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

fn losses(bench: &Bench, run: &str) -> Vec<String> {
    let log = std::fs::read_to_string(bench.path(run).join("log.jsonl")).unwrap();
    let steps = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    steps.map(|step| step["loss"].to_string()).collect()
}

#[test]
fn a_run_does_not_depend_on_where_the_shards_lie() {
    let bench = bench();
    let adapter = |run: &str| {
        std::fs::read(bench.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    };
    run(&bench, &train("cache", "whole", &[]));
    run(&bench, &train("spread", "run", &ELSEWHERE));
    run(
        &bench,
        &train(
            "spread",
            "read",
            &[&ELSEWHERE[..], &["--io", "read"]].concat(),
        ),
    );
    let config = "shards = [\"far/two\", \"far/one\"]\n";
    bench.write("config.toml", config);
    run(
        &bench,
        &train("spread", "configured", &["--config", "config.toml"]),
    );
    assert_eq!(losses(&bench, "whole").len(), 12);
    for name in ["run", "read", "configured"] {
        assert_eq!(losses(&bench, name), losses(&bench, "whole"), "{name}");
        assert!(adapter(name) == adapter("whole"), "{name}");
    }

    // The run knows where its cache's shards lie, from whatever folder it is asked.
    std::fs::create_dir(bench.path("away")).unwrap();
    let mut eval = bench.command(&["eval", "--model", "../run", "--json"]);
    let output = eval.current_dir(bench.path("away")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let scored: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = bench.json(&["eval", "--model", "whole", "--json"]);
    for key in ["perplexity", "kl"] {
        assert_eq!(scored["cache"][0][key], expected["cache"][0][key]);
    }

    // A run is resumed wherever the shards lie now.
    std::fs::rename(bench.path("far"), bench.path("moved")).unwrap();
    let moved = ["--shards", "moved/one", "--shards", "moved/two", "--resume"];
    run(&bench, &train("spread", "run", &moved));
}

#[test]
fn every_command_that_reads_a_cache_finds_its_shards() {
    let bench = bench();
    let student = ["--model", "teacher", "--ratio", "0.25", "--cache"];
    let commands: [Vec<&str>; 6] = [
        vec!["inspect", "CACHE", "--json"],
        vec!["fidelity", "CACHE", "--teacher", "teacher", "--json"],
        vec!["export", "CACHE", "--to", "jsonl", "--out", "OUT", "--json"],
        vec!["eval", "--model", "teacher", "--cache", "CACHE", "--json"],
        [
            &["prune"],
            &student[..],
            &["CACHE", "--out", "OUT", "--json"],
        ]
        .concat(),
        vec![
            "verify",
            "CACHE",
            "--deep",
            "--teacher",
            "teacher",
            "--json",
        ],
    ];
    for command in commands {
        let of = |cache: &str, out: &str, more: &[&str]| -> Value {
            let named = command.iter().map(|&word| match word {
                "CACHE" => cache.to_owned(),
                "OUT" => format!("{out}-{}", command[0]),
                word => word.to_owned(),
            });
            let arguments: Vec<String> =
                named.chain(more.iter().map(|&word| word.into())).collect();
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut found = bench.json(&arguments);
            for place in ["out", "seconds"] {
                found.as_object_mut().unwrap().remove(place);
            }
            if let Some(scored) = found["cache"].get_mut(0).and_then(Value::as_object_mut) {
                for key in ["path", "seconds", "tokens_per_second"] {
                    scored.remove(key);
                }
            }
            found
        };
        assert_eq!(
            of("spread", "spread", &ELSEWHERE),
            of("cache", "whole", &[]),
            "{command:?}"
        );
    }
    assert_eq!(
        std::fs::read(bench.path("spread-export")).unwrap(),
        std::fs::read(bench.path("whole-export")).unwrap()
    );
    let teacher = ["--student", "teacher", "--out"];
    let search = ["search", "--trials", "2", "--fraction", "0.5", "--cache"];
    let search = [&search[..], &["spread"], &teacher].concat();
    bench.ok(&[&search[..], &["study"], &ELSEWHERE].concat());
    // The study knows where they are, as does its best configuration.
    bench.ok(&["search", "--out", "study", "--resume", "--trials", "3"]);
    run(
        &bench,
        &train("spread", "best", &["--config", "study/best.toml"]),
    );
    let ask = ["ask", "other", "--cache", "spread", "--student", "teacher"];
    bench.ok(&[&ask[..], &ELSEWHERE].concat());
}

#[test]
fn missing_and_wrong_shards_are_refused_and_named() {
    let bench = bench();
    let refused = |arguments: &[&str], said: &[&str]| {
        let output = bench.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let all = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
        for said in said {
            assert!(all.contains(said), "{arguments:?}: {said} is not in {all}");
        }
    };
    let inspect = ["inspect", "spread"];
    refused(
        &inspect,
        &[
            "shards/00001-",
            "missing",
            "hint: name the folder",
            "--shards",
        ],
    );
    let first = [&inspect[..], &ELSEWHERE[..2]].concat();
    refused(&first, &["shards/00002-", "`spread/shards`", "`far/one`"]);
    refused(
        &[&inspect[..], &["--shards", "nowhere"]].concat(),
        &["nowhere"],
    );

    // A file of the right name, length and place that holds something else.
    let (one, two) = (only(&bench, "far/one"), only(&bench, "far/two"));
    let whole = std::fs::read(&two).unwrap();
    let verify = [&["verify", "spread"], &ELSEWHERE[..]].concat();
    let train = train("spread", "run", &ELSEWHERE);
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let far = "far/two/00002-";
    let mut other = std::fs::read(&one).unwrap();
    std::fs::write(&two, &other).unwrap();
    refused(&verify, &[far, "bytes, the manifest says"]);
    refused(&train, &[far, "bytes, the manifest says"]);
    other.resize(whole.len(), 0);
    std::fs::write(&two, &other).unwrap();
    refused(&verify, &[far, "digest"]);
    refused(&train, &[far, "damaged"]);
    std::fs::write(&two, &whole).unwrap();
    bench.ok(&verify);
}
