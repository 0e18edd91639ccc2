//! The main job through the binary, on a tiny teacher: build, prune, train, search, evaluate, report.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use serde_json::json;
use support::{Bench, files, stderr};

#[test]
fn the_main_job_works_from_end_to_end() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    bench.ok(&["verify", "cache", "--deep"]);

    let card = bench.json(&["inspect", "cache", "--json"]);
    assert_eq!(card["manifest"]["tier"], "exact");
    assert_eq!(card["manifest"]["data"]["sequences"], 60);
    let by_column = card["bytes_by_column"].as_object().unwrap();
    assert!(
        by_column.contains_key("hidden.4")
            && by_column.contains_key("hidden.2")
            && by_column.contains_key("top_k")
    );

    let pruned = bench.json(&[
        "prune", "--model", "teacher", "--ratio", "0.25", "--out", "student", "--json",
    ]);
    assert!(pruned["final_ratio"].as_f64().unwrap() < 1.0);

    let train = |out: &str, settings: &[&str]| {
        let mut arguments = vec![
            "train",
            "--cache",
            "cache",
            "--student",
            "student",
            "--out",
            out,
            "--json",
        ];
        for setting in settings {
            arguments.extend(["--set", setting]);
        }
        bench.json(&arguments)
    };
    let short = "max_steps=4";
    train("lora", &[short, "soft_weight=0"]);
    train("kd", &[short, "kd_type=kl", "scaling_value=4"]);
    let run = train(
        "bayeskd",
        &[
            short,
            "kd_type=dual-scaling",
            "layers=last-middle",
            "hidden_norm=max-min",
        ],
    );
    assert_eq!(run["steps"], 4);
    assert_eq!(run["completed"], true);

    let study = bench.json(&[
        "search",
        "--cache",
        "cache",
        "--student",
        "student",
        "--out",
        "study",
        "--trials",
        "3",
        "--fraction",
        "0.3",
        "--validation",
        "0.3",
        "--set",
        "max_steps=2",
        "--json",
    ]);
    assert_eq!(study["complete"], 3);
    let best = bench.path("study/best.toml");
    bench.ok(&[
        "train",
        "--cache",
        "cache",
        "--student",
        "student",
        "--out",
        "best",
        "--config",
        best.to_str().unwrap(),
    ]);

    bench.write(
        "held.txt",
        "Some words that nobody has trained on, and a few more of them.",
    );
    let scores = bench.json(&[
        "eval", "--model", "bayeskd", "--text", "held.txt", "--cache", "cache", "--json",
    ]);
    assert!(scores["text"][0]["perplexity"].as_f64().unwrap() > 1.0);
    assert!(scores["cache"][0]["kl"].as_f64().unwrap() > 0.0);
    let own = bench.json(&["eval", "--model", "bayeskd", "--json"]);
    assert_eq!(
        own["cache"][0]["targets"],
        card["manifest"]["data"]["targets"]
    );

    bench.ok(&["report", "study", "lora", "bayeskd", "--out", "report.html"]);
    let page = std::fs::read_to_string(bench.path("report.html")).unwrap();
    // Progress, parallel coordinates and workers of the study, a loss curve of each run.
    assert_eq!(page.matches("<svg").count(), 5);
    assert!(page.contains("hidden_norm"));
}

#[test]
fn the_teacher_judged_by_its_own_cache_is_almost_itself() {
    let bench = Bench::new();
    bench.cache("cache", 12, &[]);
    let scores = bench.json(&["eval", "--model", "teacher", "--cache", "cache", "--json"]);
    let score = &scores["cache"][0];
    let (own, cached) = (
        score["perplexity"].as_f64().unwrap(),
        score["teacher_perplexity"].as_f64().unwrap(),
    );
    assert!((own / cached - 1.0).abs() < 1e-2, "{own} and {cached}");
    assert!(score["kl"].as_f64().unwrap() < 1e-3);
    assert!(score["top1_agreement"].as_f64().unwrap() > 0.9);
}

#[test]
fn training_from_the_cache_brings_the_student_closer_to_the_teacher() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    bench.ok(&[
        "prune", "--model", "teacher", "--ratio", "0.5", "--out", "student",
    ]);
    bench.ok(&[
        "train",
        "--cache",
        "cache",
        "--student",
        "student",
        "--out",
        "run",
        "--set",
        "hard_weight=0",
        "--set",
        "epochs=8",
        "--set",
        "learning_rate=0.01",
    ]);
    let kl = |model: &str| {
        bench.json(&["eval", "--model", model, "--cache", "cache", "--json"])["cache"][0]["kl"]
            .as_f64()
            .unwrap()
    };
    let (before, after) = (kl("student"), kl("run"));
    assert!(after < 0.7 * before, "KL {before} before, {after} after");
}

#[test]
fn the_same_build_gives_the_same_bytes_also_after_an_interruption() {
    let bench = Bench::new();
    // Long sequences make small shards, so that there is something to resume.
    let text: String = (0..120_000)
        .map(|index| char::from(b'a' + (index * index % 23) as u8))
        .collect();
    bench.write("long.txt", &text);
    let build = |out: &str, more: &[&str]| {
        bench.command(
            &[
                &[
                    "build",
                    "--teacher",
                    "teacher",
                    "--data",
                    "long.txt",
                    "--out",
                    out,
                    "--top-k",
                    "8",
                    "--max-len",
                    "256",
                ],
                more,
            ]
            .concat(),
        )
    };
    assert!(build("whole", &[]).status().unwrap().success());

    let mut stopped = 0;
    for attempt in 0..200 {
        let mut child = build("pieces", if attempt == 0 { &[] } else { &["--resume"] })
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(150 + 70 * attempt));
        // A second signal would end the process at once, so that only one is sent.
        let pid = child.id().to_string();
        std::process::Command::new("kill")
            .args(["-TERM", &pid])
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        match child.wait().unwrap().code() {
            Some(0) => break,
            Some(75) => {
                stopped += 1;
                assert!(
                    !bench.path("pieces/manifest.json").exists(),
                    "a stopped build has no manifest"
                );
            }
            None => {} // before the handler was there
            other => panic!("exit code {other:?}"),
        }
    }
    assert!(
        stopped > 0,
        "the build was never interrupted; make it longer"
    );
    assert_eq!(files(&bench.path("whole")), files(&bench.path("pieces")));
}

#[test]
fn a_stopped_run_resumes_to_the_same_weights() {
    let bench = Bench::new();
    bench.cache("cache", 60, &[]);
    let train = |out: &str, more: &[&str]| {
        bench.command(
            &[
                &[
                    "train",
                    "--cache",
                    "cache",
                    "--student",
                    "teacher",
                    "--out",
                    out,
                    "--set",
                    "epochs=15",
                    "--set",
                    "kd_type=dual-scaling",
                    "--set",
                    "lora.dropout=0.1",
                ],
                more,
            ]
            .concat(),
        )
    };
    assert!(train("whole", &[]).status().unwrap().success());
    let mut stopped = 0;
    for attempt in 0..100 {
        let mut child = train(
            "pieces",
            if bench.path("pieces").exists() {
                &["--resume"]
            } else {
                &[]
            },
        )
        .spawn()
        .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300 + 100 * attempt));
        std::process::Command::new("kill")
            .args(["-TERM", &child.id().to_string()])
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        match child.wait().unwrap().code() {
            Some(0) => break,
            Some(75) => stopped += 1,
            None => {}
            other => panic!("exit code {other:?}"),
        }
    }
    assert!(stopped > 0, "the run was never interrupted; make it longer");
    assert_eq!(
        files(&bench.path("whole/adapter")),
        files(&bench.path("pieces/adapter"))
    );
}

#[test]
fn a_second_builder_is_refused_while_the_first_one_works() {
    let bench = Bench::new();
    let text: String = (0..200_000)
        .map(|index| char::from(b'a' + (index * index % 23) as u8))
        .collect();
    bench.write("long.txt", &text);
    let arguments = [
        "build",
        "--teacher",
        "teacher",
        "--data",
        "long.txt",
        "--out",
        "cache",
        "--top-k",
        "8",
    ];
    let mut first = bench.command(&arguments).spawn().unwrap();
    while !bench.path("cache/plan.json").exists() {
        assert!(
            first.try_wait().unwrap().is_none(),
            "the first build ended too early"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let second = bench.run(&[&arguments[..], &["--resume"]].concat());
    assert_eq!(second.status.code(), Some(2), "{}", stderr(&second));
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock dies with its process.
    bench.ok(&[&arguments[..], &["--resume"]].concat());
}

/// Pages are scored in windows as long as the model takes, as lm-evaluation-harness does it; running text is not.
#[test]
fn wikitext_has_the_models_own_window() {
    let bench = Bench::new();
    let text = "a page of the text, ".repeat(40);
    bench.write("text.txt", &text);
    bench.write("pages.jsonl", &json!({ "page": text }).to_string());
    let nats = |part: &str, more: &[&str]| {
        let given = match part {
            "text" => ["--text", "text.txt"],
            _ => ["--task", "wikitext=pages.jsonl"],
        };
        let fixed = ["eval", "--model", "teacher", "--json"];
        bench.json(&[fixed.as_slice(), &given, more].concat())[part][0]["nats"].clone()
    };
    let whole = nats("tasks", &["--max-len", "2048"]);
    let windows = nats("tasks", &["--max-len", "512"]);
    assert_ne!(whole, windows);
    assert_eq!(nats("tasks", &[]), whole);
    assert_eq!(nats("text", &[]), nats("text", &["--max-len", "512"]));
    // A longer stride than running text has by default fits the pages' window.
    assert_eq!(nats("tasks", &["--stride", "2048"]), whole);
}
