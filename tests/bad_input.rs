//! Bad input: a clear error with a hint, exit code 2, nothing half-written under a final name.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use caskd_models::save_model;
use support::{Bench, stderr, tiny_model};

/// Runs, and wants exit code 2, a hint, and each of `expected` in the message.
fn refused(bench: &Bench, arguments: &[&str], expected: &[&str]) {
    let output = bench.run(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote to stdout");
    assert!(text.contains("hint: "), "{arguments:?} has no hint: {text}");
    assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    for words in expected {
        assert!(
            text.contains(words),
            "{arguments:?}: `{words}` is not in: {text}"
        );
    }
}

#[test]
fn bad_data_for_a_build() {
    let bench = Bench::new();
    bench.write("empty.jsonl", "\n\n");
    bench.write(
        "no-output.jsonl",
        "{\"instruction\":\"a\",\"output\":\"b\"}\n{\"instruction\":\"a\",\"input\":\"\"}\n",
    );
    bench.write("not-json.jsonl", "hello\n");
    bench.write("ids.jsonl", "{\"input_ids\":[1,2,256]}\n");
    bench.write("table.csv", "a,b\n");
    bench.records("good.jsonl", 3);
    let build = |data: &str, more: &[&str], expected: &[&str]| {
        refused(
            &bench,
            &[
                &[
                    "build",
                    "--teacher",
                    "teacher",
                    "--data",
                    data,
                    "--out",
                    "cache",
                ],
                more,
            ]
            .concat(),
            expected,
        );
        assert!(!bench.path("cache/manifest.json").exists());
    };
    build("missing.jsonl", &[], &["missing.jsonl"]);
    build("empty.jsonl", &[], &["no sequence"]);
    build("no-output.jsonl", &[], &["line 2", "no `output`"]);
    build("not-json.jsonl", &[], &["line 1", "not JSON"]);
    build("ids.jsonl", &[], &["256", "vocabulary"]);
    build("table.csv", &[], &["table.csv", ".jsonl"]);
    build("good.jsonl", &["--top-k", "257"], &["--top-k 257", "256"]);
    build("good.jsonl", &["--top-k", "0"], &["--top-k 0"]);
    build("good.jsonl", &["--max-len", "1"], &["--max-len"]);
    build(
        "good.jsonl",
        &["--max-len", "8"],
        &["no sequence", "3 without a target"],
    );
    build("good.jsonl", &["--layers", "5"], &["no layer 5"]);
    build("good.jsonl", &["--layers", "first"], &["first"]);
    build("good.jsonl", &["--device", "cuda:7"], &["CUDA device 7"]);
    build("good.jsonl", &["--device", "tpu"], &["tpu"]);
}

#[test]
fn truncation_is_counted_and_reported() {
    let bench = Bench::new();
    bench.records("data.jsonl", 5);
    bench.write(
        "token-ids.jsonl",
        "{\"input_ids\":[1,2,3,4,5,6,7,8,9,10,11,12]}\n{\"input_ids\":[1,2],\"loss_mask\":[0,0]}\n",
    );
    let report = bench.json(&[
        "build",
        "--teacher",
        "teacher",
        "--data",
        "token-ids.jsonl",
        "--out",
        "cache",
        "--max-len",
        "8",
        "--json",
    ]);
    assert_eq!(
        (
            report["truncated"].as_u64(),
            report["skipped"].as_u64(),
            report["positions"].as_u64()
        ),
        (Some(1), Some(1), Some(8))
    );
}

#[test]
fn a_teacher_that_is_none() {
    let bench = Bench::new();
    bench.records("good.jsonl", 3);
    bench.write("model.gguf", "GGUF and nothing more");
    std::fs::create_dir(bench.path("other")).unwrap();
    bench.write("other/config.json", "{\"model_type\":\"mamba\"}");
    let build = |teacher: &str, expected: &[&str]| {
        refused(
            &bench,
            &[
                "build",
                "--teacher",
                teacher,
                "--data",
                "good.jsonl",
                "--out",
                "cache",
            ],
            expected,
        );
        assert!(!bench.path("cache").exists());
    };
    build("nowhere", &["nowhere"]);
    build("model.gguf", &["model.gguf"]);
    build("other", &["mamba"]);
}

/// What is wrong with a teacher shows before the data are read, as far as it stands in its small files and headers.
#[test]
fn a_teacher_that_is_damaged() {
    let bench = Bench::new();
    let build = |data: &str, expected: &[&str]| {
        let arguments = ["--teacher", "teacher", "--data", data, "--out", "cache"];
        refused(&bench, &[&["build"][..], &arguments].concat(), expected);
        assert!(!bench.path("cache/manifest.json").exists());
    };
    let config = std::fs::read_to_string(bench.path("teacher/config.json")).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut changed: serde_json::Value = serde_json::from_str(&config).unwrap();
        changed[key] = value;
        bench.write("teacher/config.json", &changed.to_string());
    };
    with("num_hidden_layers", 6.into());
    build("missing.jsonl", &["no tensor `model.layers.4."]);
    with("vocab_size", (1 << 29).into());
    build(
        "missing.jsonl",
        &["`model.embed_tokens.weight` has shape [256, 16]"],
    );
    with("eos_token_id", 999.into());
    build("missing.jsonl", &["`eos_token_id` = 999"]);
    with("num_attention_heads", 0.into());
    build("missing.jsonl", &["`num_attention_heads` = 0"]);
    bench.write("teacher/config.json", "{\"model_type\": ");
    build("missing.jsonl", &["teacher/config.json", "not the JSON"]);
    bench.write("teacher/config.json", &config);

    let weights = bench.path("teacher/model.safetensors");
    let tensors = tch::Tensor::read_safetensors(&weights).unwrap();
    let bad = tensors
        .iter()
        .find(|(name, _)| name == "model.layers.2.mlp.down_proj.weight");
    let _ = bad.unwrap().1.get(3).get(5).fill_(f64::NAN);
    tch::Tensor::write_safetensors(&tensors, &weights).unwrap();
    bench.records("good.jsonl", 3);
    build(
        "good.jsonl",
        &["not finite: the teacher's logits of good.jsonl:"],
    );

    let mut gguf = b"GGUF".to_vec();
    gguf.extend(3_u32.to_le_bytes());
    gguf.extend([0_u64, 1].map(u64::to_le_bytes).concat());
    gguf.extend(17_u64.to_le_bytes());
    gguf.extend(b"general.alignment");
    gguf.extend([4_u32, 0].map(u32::to_le_bytes).concat());
    std::fs::write(bench.path("flat.gguf"), gguf).unwrap();
    refused(
        &bench,
        &[
            "build",
            "--teacher",
            "flat.gguf",
            "--data",
            "good.jsonl",
            "--out",
            "none",
        ],
        &["flat.gguf", "its alignment is 0"],
    );
}

#[test]
fn an_output_that_exists_is_never_written_over() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    bench.ok(&["prune", "--model", "teacher", "--out", "student"]);
    bench.write("file", "precious");
    let cache_jsonl = bench.path("cache.jsonl");
    refused(
        &bench,
        &[
            "build",
            "--teacher",
            "teacher",
            "--data",
            cache_jsonl.to_str().unwrap(),
            "--out",
            "cache",
            "--top-k",
            "8",
        ],
        &["cache"],
    );
    refused(
        &bench,
        &["prune", "--model", "teacher", "--out", "student"],
        &["student", "exists"],
    );
    refused(
        &bench,
        &["export", "cache", "--to", "jsonl", "--out", "file"],
        &["file", "exists"],
    );
    refused(
        &bench,
        &[
            "train",
            "--cache",
            "cache",
            "--student",
            "student",
            "--out",
            "student",
        ],
        &["student"],
    );
    refused(
        &bench,
        &[
            "search",
            "--cache",
            "cache",
            "--student",
            "student",
            "--out",
            "student",
            "--fraction",
            "0.5",
        ],
        &["student"],
    );
    refused(
        &bench,
        &["demo", "--teacher", "teacher", "--out", "student"],
        &["student", "not a demo"],
    );
    assert_eq!(
        std::fs::read_to_string(bench.path("file")).unwrap(),
        "precious"
    );
}

#[test]
fn a_damaged_cache() {
    let bench = Bench::new();
    let cache = bench.cache("cache", 6, &[]);
    let shard = std::fs::read_dir(cache.join("shards"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let whole = std::fs::read(&shard).unwrap();
    let everyone = |expected: &[&str]| {
        refused(&bench, &["inspect", "cache"], expected);
        refused(
            &bench,
            &[
                "train",
                "--cache",
                "cache",
                "--student",
                "teacher",
                "--out",
                "run",
            ],
            expected,
        );
        assert_eq!(bench.run(&["verify", "cache"]).status.code(), Some(2));
    };
    std::fs::write(&shard, &whole[..whole.len() - 10]).unwrap();
    everyone(&["shards/"]);
    std::fs::remove_file(&shard).unwrap();
    everyone(&["shards/"]);
    let mut flipped = whole.clone();
    let middle = flipped.len() / 3;
    flipped[middle] ^= 4;
    std::fs::write(&shard, flipped).unwrap();
    assert_eq!(bench.run(&["verify", "cache"]).status.code(), Some(2));
    std::fs::write(&shard, whole).unwrap();
    bench.ok(&["verify", "cache", "--deep"]);
    refused(&bench, &["inspect", "nowhere"], &["nowhere"]);
}

#[test]
fn a_student_that_does_not_fit() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    caskd_models::save_model(&tiny_model(300, 1), &bench.path("wider")).unwrap();
    refused(
        &bench,
        &[
            "train",
            "--cache",
            "cache",
            "--student",
            "wider",
            "--out",
            "run",
        ],
        &["tokenizer"],
    );
    refused(
        &bench,
        &["eval", "--model", "wider", "--cache", "cache"],
        &["tokenizer"],
    );
    refused(
        &bench,
        &[
            "search",
            "--cache",
            "cache",
            "--student",
            "wider",
            "--out",
            "study",
            "--fraction",
            "0.5",
        ],
        &["tokenizer"],
    );
    refused(
        &bench,
        &[
            "search",
            "--cache",
            "cache",
            "--student",
            "wider",
            "--out",
            "study",
            "--set",
            "teacher_tokenizer=teacher",
        ],
        &["can't judge a trial", "--command"],
    );
    assert!(!bench.path("study").exists() && !bench.path("run").exists());
}

#[test]
fn a_loss_that_the_cache_cannot_answer() {
    let bench = Bench::new();
    bench.cache("cache", 6, &["--tier", "sparse", "--layers", "none"]);
    let train = |setting: &[&str], expected: &[&str]| {
        let mut arguments = vec![
            "train",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            "run",
        ];
        for setting in setting {
            arguments.extend(["--set", setting]);
        }
        refused(&bench, &arguments, expected);
        assert!(!bench.path("run").exists());
    };
    train(&["kd_type=dual-scaling"], &["exact"]);
    train(&["kd_type=kl", "scaling_value=4"], &["exact"]);
    refused(
        &bench,
        &["export", "cache", "--to", "jsonl", "--out", "x", "--logits"],
        &["exact"],
    );
}

#[test]
fn bad_settings() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    let train = |setting: &str, expected: &[&str]| {
        refused(
            &bench,
            &[
                "train",
                "--cache",
                "cache",
                "--student",
                "teacher",
                "--out",
                "run",
                "--set",
                setting,
            ],
            expected,
        );
    };
    train("learning_rat=1", &["learning_rate"]);
    train("learning_rate=fast", &["learning_rate"]);
    train("nonsense", &["KEY=VALUE"]);
    train("fraction=0", &["fraction"]);
    train("=4", &["unknown configuration key"]);
    bench.write(
        "twice.toml",
        "[[loss]]\nkind = \"kl\"\ntau = 3\ntemperature = 4\n",
    );
    let config = ["--config", "twice.toml"];
    let run = ["train", "--cache", "cache", "--student", "teacher", "--out"];
    refused(
        &bench,
        &[run.as_slice(), &["run"], &config].concat(),
        &["`tau` = 3", "`temperature`", "given too"],
    );
    refused(
        &bench,
        &[run.as_slice(), &["twice.toml/run"]].concat(),
        &["cannot create `twice.toml/run`"],
    );
    let prune = |more: &[&str], expected: &[&str]| {
        let all = [&["prune", "--model", "teacher", "--out", "s"], more].concat();
        refused(&bench, &all, expected);
        assert!(!bench.path("s").exists());
    };
    prune(&["--ratio", "1.5"], &["1.5"]);
    // Of four heads a fifth is none.
    prune(
        &["--ratio", "0.2", "--parts", "heads"],
        &["rounds down to none"],
    );
    bench.ok(&[
        "prune",
        "--model",
        "teacher",
        "--sparsity",
        "2:4",
        "--out",
        "masked",
    ]);
    for more in [["--ratio", "0.5"], ["--sparsity", "2:4"]] {
        let all = ["prune", "--model", "masked", "--out", "s"];
        let all = [all.as_slice(), &more].concat();
        refused(&bench, &all, &["masked already (2:4)", "then mask"]);
        assert!(!bench.path("s").exists());
    }
    refused(
        &bench,
        &["eval", "--model", "teacher"],
        &["nothing to evaluate"],
    );
    bench.write(
        "openbookqa.jsonl",
        "\u{feff}{\"query\":\"q\",\"choices\":[\"a\",\"b\"],\"gold\":0}\r\n",
    );
    bench.write("empty.txt", "");
    bench.write("text.txt", &"abc ".repeat(600));
    let eval = ["eval", "--model", "teacher"];
    let task = ["--task", "openbookqa.jsonl"];
    let text = ["--text", "text.txt"];
    bench.ok(&[eval.as_slice(), &task].concat());
    refused(
        &bench,
        &[eval.as_slice(), &task, &["--stride", "4"]].concat(),
        &["--stride"],
    );
    refused(
        &bench,
        &[eval.as_slice(), &["--task", "openbookqa=empty.txt"]].concat(),
        &["holds no item"],
    );
    refused(
        &bench,
        &[eval.as_slice(), &["--text", "empty.txt"]].concat(),
        &["a longer text"],
    );
    let limited = bench.run(&[eval.as_slice(), &text, &["--limit", "2"]].concat());
    assert_eq!(limited.status.code(), Some(2));
    let long = bench.ok(&[eval.as_slice(), &text, &["--max-len", "2049"]].concat());
    assert!(stderr(&long).contains("2048 positions"));
    refused(
        &bench,
        &["report", "teacher", "--out", "r.html"],
        &["neither a study nor a run"],
    );
    refused(
        &bench,
        &[
            "search",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            "s",
            "--fraction",
            "0.95",
        ],
        &["--fraction 0.95"],
    );
    bench.write("space.toml", "what = 1\n");
    refused(
        &bench,
        &[
            "search",
            "--cache",
            "cache",
            "--student",
            "teacher",
            "--out",
            "s",
            "--space",
            "space.toml",
        ],
        &[],
    );
    assert_eq!(bench.run(&["build"]).status.code(), Some(2));
    assert_eq!(bench.run(&["no-such-command"]).status.code(), Some(2));
}

#[test]
fn a_model_whose_numbers_are_not_finite() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    bench.write("text.txt", "Some words, and some more.");
    let model = tiny_model(256, 3);
    for (name, weight) in model.network.parameters() {
        if name.ends_with("2.self_attn.v_proj.weight") {
            let _ = tch::no_grad(|| weight.get(0).fill_(f64::NAN));
        }
    }
    save_model(&model, &bench.path("nan")).unwrap();
    for arguments in [
        &["eval", "--model", "nan", "--cache", "cache"][..],
        &["eval", "--model", "nan", "--text", "text.txt"],
        &["prune", "--model", "nan", "--cache", "cache", "--out", "x"],
        &[
            "prune",
            "--model",
            "nan",
            "--method",
            "magnitude",
            "--parts",
            "all",
            "--out",
            "x",
        ],
        &[
            "train",
            "--student",
            "nan",
            "--cache",
            "cache",
            "--out",
            "run",
        ],
    ] {
        refused(&bench, arguments, &["not finite"]);
    }
    assert!(!bench.path("x").exists());
}

#[test]
fn a_device_is_not_written_over() {
    let bench = Bench::new();
    bench.cache("cache", 6, &[]);
    let device = bench.path("device");
    std::os::unix::fs::symlink("/dev/null", &device).unwrap();
    bench.write(
        "items.jsonl",
        "{\"context\": \"a b\", \"continuation\": \"c\"}\n",
    );
    let output = bench.run(&[
        "eval",
        "--model",
        "teacher",
        "--task",
        "lambada=items.jsonl",
        "--per-item",
        "device",
    ]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("no file"), "{}", stderr(&output));
    assert!(device.symlink_metadata().unwrap().is_symlink());
}
