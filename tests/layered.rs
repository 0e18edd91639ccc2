//! Teachers that are larger than the memory they may take, through the binary: the same bytes as in memory.
#![allow(clippy::unwrap_used)]

mod support;

use support::{Bench, files, stderr};

/// Less than any build takes whole, more than it takes layer by layer, for a network of these sizes.
fn budget(bench: &Bench, build: &[&str]) -> String {
    let estimate = bench.json(&[build, &["--estimate", "--json"]].concat());
    let whole = estimate["in_memory_bytes"].as_u64().unwrap();
    let least = estimate["least_bytes"].as_u64().unwrap();
    assert!(least < whole, "{least} layer by layer, {whole} whole");
    assert_eq!(estimate["memory"]["layered"], false);
    format!("{}", whole - 1)
}

/// A network whose weights matter beside everything else.
fn model() -> caskd_models::LoadedModel {
    let shape = caskd_models::LayerShape {
        heads: 8,
        kv_heads: 4,
        intermediate_size: 1024,
    };
    let mut config = support::tiny_config(256);
    config.hidden_size = 256;
    config.head_dim = 32;
    config.dense = shape;
    config.layers = vec![shape; 10];
    support::model_of(&config, 1)
}

fn bench() -> Bench {
    let bench = Bench::empty();
    caskd_models::save_model(&model(), &bench.path("teacher")).unwrap();
    bench.records("data.jsonl", 60);
    bench
}

#[test]
fn layer_by_layer_the_cache_is_the_same() {
    let bench = bench();
    for (name, more) in [
        ("exact", &["--layers", "0,middle,last"][..]),
        ("sparse", &["--tier", "sparse", "--dtype", "bf16"]),
        ("compact", &["--tier", "compact", "--rate", "200"]),
    ] {
        let build = [
            &[
                "build",
                "--teacher",
                "teacher",
                "--data",
                "data.jsonl",
                "--max-len",
                "2048",
            ][..],
            more,
        ]
        .concat();
        let budget = budget(&bench, &build);
        let whole = [
            &build[..],
            &["--memory-budget", "100GiB", "--out", name, "--json"],
        ]
        .concat();
        assert_eq!(bench.json(&whole)["block_positions"], 0);
        let expected = files(&bench.path(name));
        std::fs::create_dir_all(bench.path("spill")).unwrap();
        for spill in [&[][..], &["--spill", "spill"]] {
            let out = format!("{name}-layered-{}", spill.len());
            let layered = [
                &build[..],
                &["--memory-budget", &budget, "--out", &out, "--json"],
                spill,
            ]
            .concat();
            let report = bench.json(&layered);
            assert!(report["block_positions"].as_u64().unwrap() > 0, "{report}");
            assert!(files(&bench.path(&out)) == expected, "{out} differs");
        }
        // Workers differ in memory, too.
        let planned = format!("{name}-planned");
        bench.ok(&[
            &build[..],
            &["--plan", "--memory-budget", &budget, "--out", &planned],
        ]
        .concat());
        for (share, budget) in [("0/2", budget.as_str()), ("1/2", "100GiB")] {
            bench.ok(&[
                "build",
                "--worker",
                share,
                "--out",
                &planned,
                "--memory-budget",
                budget,
            ]);
        }
        bench.ok(&[
            "build",
            "--commit",
            "--out",
            &planned,
            "--memory-budget",
            &budget,
        ]);
        assert!(
            files(&bench.path(&planned)) == expected,
            "{planned} differs"
        );
    }
    let left = std::fs::read_dir(bench.path("spill")).unwrap().count();
    assert_eq!(left, 0, "nothing stays in the spill folder");
}

/// What the head computes is part of the way: while it does, no position counts as done ahead of its batch.
#[test]
fn layer_by_layer_only_the_last_batch_ends_the_progress() {
    use caskd_cache_builder::{BuildOptions, DataOptions, LayerChoice, Placement, Stage};
    let bench = bench();
    let build = ["build", "--teacher", "teacher", "--data", "data.jsonl"];
    let build = [&build[..], &["--tier", "sparse", "--layers", "none"]].concat();
    let budget = budget(&bench, &build).parse().unwrap();
    let options = BuildOptions {
        teacher: bench.path("teacher"),
        data: vec![bench.path("data.jsonl")],
        preparation: DataOptions::default(),
        tier: caskd_formats::Tier::Sparse,
        top_k: None,
        code_target: caskd_formats::CodeTarget::Rate(130),
        layers: LayerChoice::None,
        hidden_codec: caskd_formats::HiddenCodec::Int8,
        max_len: 512,
        kind: tch::Kind::Float,
        batch_tokens: 2048,
        out: bench.path("cache"),
        placement: Placement {
            devices: vec![tch::Device::Cpu],
            memory_budget: Some(budget),
            spill: None,
        },
        resume: false,
        fidelity: false,
    };
    let mut left = Vec::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let report = caskd_cache_builder::build(&options, &stop, &mut |progress| {
        if progress.stage == Stage::Building {
            left.push(progress.positions_total - progress.positions_done);
        }
    })
    .unwrap();
    assert!(report.block_positions > 0);
    assert!(
        left.is_sorted_by(|before, after| before >= after),
        "{left:?}"
    );
    let early = left.iter().filter(|left| **left == 0).count();
    assert!(early == 1 && left.last() == Some(&0), "{left:?}");
}

#[test]
fn an_estimate_writes_nothing_and_comes_near() {
    let bench = bench();
    let build = ["build", "--teacher", "teacher", "--data", "data.jsonl"];
    let output = bench.ok(&[&build[..], &["--estimate"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("<- --tier") && text.contains("tokens/s"),
        "{text}"
    );
    let estimate = bench.json(&[&build[..], &["--estimate", "--json"]].concat());
    let names: Vec<_> = std::fs::read_dir(bench.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let report = bench.json(&[&build[..], &["--out", "cache", "--json"]].concat());
    for field in ["sequences", "positions", "targets"] {
        assert_eq!(estimate[field], report[field], "{field}");
    }
    let tier = &estimate["tiers"]["exact"];
    let expected = tier["shard_bytes"].as_f64().unwrap() + tier["shared_bytes"].as_f64().unwrap();
    let found = report["cache_bytes"].as_f64().unwrap();
    // The constants are those of a real teacher and real text.
    assert!(
        (0.5..2.0).contains(&(found / expected)),
        "{found} bytes, {expected} expected"
    );
    assert!(estimate["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn budgets_and_devices_that_make_no_sense_are_refused() {
    let bench = bench();
    let build = [
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--out",
        "cache",
    ];
    for (more, part) in [
        (&["--memory-budget", "4 apples"][..], "is no size"),
        (
            &["--memory-budget", "1MiB"],
            "even layer by layer the build takes",
        ),
        (&["--spill", "nowhere"], "is no folder"),
        (&["--device", "cpu,cpu"], "does not name different GPUs"),
        (&["--device", "cuda:0,cuda:1"], "there is no CUDA device 0"),
        (&["--device", "tpu"], "is no device"),
        (&["--estimate", "--plan"], "cannot be used with"),
    ] {
        let output = bench.run(&[&build[..], more].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {text}");
        assert!(text.contains(part), "{more:?}: {text}");
        assert!(
            part == "cannot be used with" || text.contains("hint: "),
            "{text}"
        );
        assert!(!bench.path("cache").exists());
    }
}

#[test]
fn a_teacher_without_finite_values_is_named_layer_by_layer_too() {
    let bench = bench();
    let model = model();
    let (_, weight) = model.network.parameters().into_iter().nth(3).unwrap();
    let _ = weight.shallow_clone().get(0).fill_(f64::INFINITY);
    caskd_models::save_model(&model, &bench.path("sick")).unwrap();
    for more in [
        &[][..],
        &["--layers", "none", "--tier", "sparse"],
        &["--tier", "compact"],
    ] {
        let build = [
            &["build", "--teacher", "sick", "--data", "data.jsonl"][..],
            more,
        ]
        .concat();
        let budget = budget(&bench, &build);
        for budget in [budget.as_str(), "100GiB"] {
            let arguments = [&build[..], &["--memory-budget", budget, "--out", "cache"]].concat();
            let output = bench.run(&arguments);
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{text}");
            assert!(text.contains("not finite: the teacher's"), "{text}");
            assert!(text.contains("data.jsonl:"), "{text}");
            assert!(!bench.path("cache/manifest.json").exists());
            let _ = std::fs::remove_dir_all(bench.path("cache"));
        }
    }
}
