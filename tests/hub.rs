//! Models by name, from a made-up Hugging Face cache, through the command line.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::{Bench, stderr};

const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

#[test]
fn a_teacher_and_a_student_by_name() {
    let bench = Bench::new();
    bench.records("data.jsonl", 6);
    let model = bench.path("hf/hub/models--caskd--tiny");
    std::fs::create_dir_all(model.join("snapshots").join(COMMIT)).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    for entry in std::fs::read_dir(bench.path("teacher")).unwrap() {
        let entry = entry.unwrap();
        let to = model.join("snapshots").join(COMMIT).join(entry.file_name());
        std::fs::copy(entry.path(), to).unwrap();
    }
    let run = |arguments: &[&str]| {
        let mut command = bench.command(arguments);
        for key in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"] {
            command.env_remove(key);
        }
        command
            .env("HF_HOME", bench.path("hf"))
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap()
    };
    let build = |teacher: &str, out: &str| {
        run(&[
            "build",
            "--teacher",
            teacher,
            "--data",
            "data.jsonl",
            "--out",
            out,
            "--json",
        ])
    };
    let built = build("caskd/tiny", "cache");
    assert!(built.status.success(), "{}", stderr(&built));
    let manifest = std::fs::read_to_string(bench.path("cache/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["teacher"]["name"], "caskd/tiny");
    let pruned = run(&[
        "prune",
        "--model",
        "caskd/tiny",
        "--ratio",
        "0.25",
        "--out",
        "student",
    ]);
    assert!(pruned.status.success(), "{}", stderr(&pruned));

    let unknown = build("caskd/other", "other");
    let text = stderr(&unknown);
    assert_eq!(unknown.status.code(), Some(2), "{text}");
    assert!(text.contains("`caskd/other` is no path here"), "{text}");
    assert!(
        text.contains("HF_HUB_OFFLINE") && text.contains("hint: "),
        "{text}"
    );
}
