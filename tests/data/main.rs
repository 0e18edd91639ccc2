//! Data on their way into a cache: every form of record, targets, splits, duplicates, bad records.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod chats;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Int64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use support::{Bench, files, stderr};

/// In the manner of many models, written for these tests.
const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\u{17}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// One sequence of an export.
struct Row {
    source: String,
    text: String,
    /// What the loss asks for; `·` where it does not.
    learned: String,
    split: String,
}

/// Builds a cache and reads its sequences back.
fn rows(bench: &Bench, name: &str, arguments: &[&str]) -> Vec<Row> {
    build(bench, name, arguments);
    exported(bench, name)
}

fn build(bench: &Bench, name: &str, arguments: &[&str]) -> Value {
    let fixed = [
        "build",
        "--teacher",
        "teacher",
        "--out",
        name,
        "--layers",
        "none",
        "--top-k",
        "4",
        "--no-fidelity",
        "--json",
    ];
    bench.json(&[&fixed[..], arguments].concat())
}

/// The tiny teacher's tokens are bytes.
fn exported(bench: &Bench, name: &str) -> Vec<Row> {
    let out = format!("{name}.export.jsonl");
    bench.ok(&["export", name, "--to", "jsonl", "--out", &out]);
    let text = std::fs::read_to_string(bench.path(&out)).unwrap();
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let bytes: Vec<u8> = row["input_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as u8)
                .collect();
            let mask = row["loss_mask"].as_array().unwrap();
            let learned: Vec<u8> = bytes
                .iter()
                .zip(mask)
                .map(|(&byte, target)| {
                    if target.as_u64() == Some(1) || target.as_bool() == Some(true) {
                        byte
                    } else {
                        b'.'
                    }
                })
                .collect();
            Row {
                source: row["source"].as_str().unwrap().to_owned(),
                split: row["split"].as_str().unwrap().to_owned(),
                text: String::from_utf8(bytes).unwrap(),
                learned: String::from_utf8(learned).unwrap(),
            }
        })
        .collect()
}

fn lines(records: &[Value]) -> String {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    lines.join("\n") + "\n"
}

fn talk() -> Value {
    json!([
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ])
}

#[test]
fn every_form_of_record_becomes_its_tokens_and_targets() {
    let bench = Bench::new();
    bench.write("chat.jinja", TEMPLATE);
    let share_gpt = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]);
    bench.write(
        "data.jsonl",
        &lines(&[
            json!({"instruction": "Add.", "input": "1 2", "output": "3"}),
            json!({"messages": talk()}),
            json!({"conversations": share_gpt}),
            json!({"prompt": "Q: why? A:", "completion": " so"}),
            json!({"text": "a text"}),
            json!({"input_ids": [72, 105, 33], "loss_mask": [0, 0, 1]}),
        ]),
    );
    let from = ["--data", "data.jsonl", "--chat-template", "chat.jinja"];
    let all = rows(&bench, "response", &from);
    let learned: Vec<&str> = all.iter().map(|row| row.learned.as_str()).collect();
    assert!(
        all[0]
            .text
            .starts_with("Below is an instruction that describes a task, paired")
    );
    assert!(all[0].text.ends_with("### Input:\n1 2\n\n### Response:\n3"));
    assert_eq!(learned[0].trim_start_matches('.'), "3");
    assert_eq!(
        all[1].text,
        "<user>one?\u{17}\n<assistant>1\u{17}\n<user>two?\u{17}\n<assistant>2\u{17}\n"
    );
    assert_eq!(
        learned[1],
        format!("{}1\u{17}\n{}2\u{17}\n", ".".repeat(23), ".".repeat(23))
    );
    assert_eq!(all[2].text, "<user>hi\u{17}\n<assistant>hello\u{17}\n");
    assert_eq!(learned[2].trim_start_matches('.'), "hello\u{17}\n");
    assert_eq!(
        (all[3].text.as_str(), learned[3]),
        ("Q: why? A: so", ".......... so")
    );
    assert_eq!((all[4].text.as_str(), learned[4]), ("a text", "a text"));
    assert_eq!((all[5].text.as_str(), learned[5]), ("Hi!", "..!"));
    assert_eq!(all[1].source, "data.jsonl:2");

    let all = rows(&bench, "all", &[&from[..], &["--loss-on", "all"]].concat());
    assert!(all.iter().all(|row| row.learned == row.text));

    let chat = rows(&bench, "chat", &[&from[..], &["--prompt", "chat"]].concat());
    assert_eq!(
        chat[0].text,
        "<user>Add.\n\n1 2\u{17}\n<assistant>3\u{17}\n"
    );
    assert_eq!(chat[0].learned.trim_start_matches('.'), "3\u{17}\n");
    let card = bench.json(&["inspect", "chat", "--json"]);
    assert!(card["command"].as_str().unwrap().contains("--prompt chat"));
    assert_eq!(card["manifest"]["data"]["preparation"]["records"], 6);
}

/// The same records as JSON lines, a JSON list and Parquet, under names of their own, give the same sequences.
#[test]
fn parquet_and_json_hold_the_same_records() {
    let bench = Bench::new();
    bench.write("chat.jinja", TEMPLATE);
    let texts = ["first text", "second \"text\" — ünï", "third"];
    let records: Vec<Value> = texts
        .iter()
        .map(|text| json!({"body": text, "id": 7}))
        .collect();
    bench.write("text.jsonl", &lines(&records));
    bench.write("lines.json", &lines(&records));
    bench.write("text.json", &Value::from(records).to_string());
    let column = Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
    let other = Arc::new(StringArray::from(vec!["x"; 3])) as ArrayRef;
    parquet(
        &bench.path("text.parquet"),
        vec![("title", other), ("body", column)],
        Compression::SNAPPY,
    );
    let of = |file: &str| {
        let from = ["--data", file, "--column", "text=body"];
        rows(&bench, &file.replace('.', "-"), &from)
    };
    let (lines, list, table) = (of("text.jsonl"), of("text.json"), of("text.parquet"));
    for (number, ((line, entry), row)) in (1..).zip(lines.iter().zip(&list).zip(&table)) {
        assert_eq!(line.text, texts[number - 1]);
        assert_eq!((&entry.text, &entry.learned), (&line.text, &line.learned));
        assert_eq!((&row.text, &row.learned), (&line.text, &line.learned));
        assert_eq!(line.source, format!("text.jsonl:{number}"));
        assert_eq!(entry.source, format!("text.json:{number}"));
        assert_eq!(row.source, format!("text.parquet:{number}"));
    }
    assert_eq!((lines.len(), list.len(), table.len()), (3, 3, 3));
    let by_line = of("lines.json");
    assert_eq!(by_line[2].source, "lines.json:3");
    assert_eq!(by_line[2].text, lines[2].text);

    parquet(
        &bench.path("chat.parquet"),
        chat_columns(),
        Compression::UNCOMPRESSED,
    );
    let chats = rows(
        &bench,
        "chats",
        &["--data", "chat.parquet", "--chat-template", "chat.jinja"],
    );
    assert_eq!(chats[0].text, "<user>hi\u{17}\n<assistant>hello\u{17}\n");
    assert_eq!(chats[0].learned.trim_start_matches('.'), "hello\u{17}\n");

    let mut ids = ListBuilder::new(Int64Builder::new());
    ids.append_value([Some(72), Some(105), Some(33)]);
    let ids = Arc::new(ids.finish()) as ArrayRef;
    parquet(
        &bench.path("ids.parquet"),
        vec![("input_ids", ids)],
        Compression::SNAPPY,
    );
    assert_eq!(
        rows(&bench, "ids", &["--data", "ids.parquet"])[0].text,
        "Hi!"
    );
}

fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>, compression: Compression) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// `messages` as a list of structs.
fn chat_columns() -> Vec<(&'static str, ArrayRef)> {
    let fields = vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", DataType::Utf8, true),
    ];
    let mut messages = ListBuilder::new(StructBuilder::from_fields(fields, 2));
    for (role, content) in [("user", "hi"), ("assistant", "hello")] {
        let message = messages.values();
        message
            .field_builder::<StringBuilder>(0)
            .unwrap()
            .append_value(role);
        message
            .field_builder::<StringBuilder>(1)
            .unwrap()
            .append_value(content);
        message.append(true);
    }
    messages.append(true);
    vec![("messages", Arc::new(messages.finish()) as ArrayRef)]
}

#[test]
fn bad_records_stop_the_build_or_are_named_and_counted() {
    let bench = Bench::new();
    let mut records: Vec<String> = (0..6)
        .map(|index| json!({"text": format!("text number {index}")}).to_string())
        .collect();
    records[1] = "{\"text\": \"cut off".into();
    records[3] = json!({"speech": "unknown"}).to_string();
    records[4] = json!({"input_ids": [1, 999]}).to_string();
    bench.write("data.jsonl", &(records.join("\n") + "\n"));
    let arguments = |out: &'static str, more: &[&'static str]| {
        let fixed = [
            "build",
            "--teacher",
            "teacher",
            "--data",
            "data.jsonl",
            "--out",
            out,
        ];
        [&fixed[..], &["--top-k", "4", "--json"], more].concat()
    };
    let stopped = bench.run(&arguments("stopped", &[]));
    assert_eq!(stopped.status.code(), Some(2));
    let text = stderr(&stopped);
    assert!(text.contains("`data.jsonl` line 2: not JSON"), "{text}");
    assert!(text.contains("--on-error skip"), "{text}");
    assert!(!bench.path("stopped").exists());

    let skipped = bench.run(&arguments("skipped", &["--on-error", "skip"]));
    let text = stderr(&skipped);
    assert!(skipped.status.success(), "{text}");
    for expected in [
        "skipped `data.jsonl` line 2: not JSON",
        "skipped `data.jsonl` line 4: a record of unknown form (its fields: speech)",
        "skipped `data.jsonl` line 5: token id 999",
        "3 of 6 records (50.00%) were bad",
    ] {
        assert!(text.contains(expected), "`{expected}` is not in {text}");
    }
    let report: Value = serde_json::from_slice(&skipped.stdout).unwrap();
    assert_eq!(report["bad_records"], 3);
    assert_eq!(report["records"], 6);
    assert_eq!(report["bad"][1]["number"], 4);
    let sources: Vec<String> = exported(&bench, "skipped")
        .into_iter()
        .map(|row| row.source)
        .collect();
    assert_eq!(sources, ["data.jsonl:1", "data.jsonl:3", "data.jsonl:6"]);
    let manifest = bench.json(&["inspect", "skipped", "--json"]);
    assert_eq!(
        manifest["manifest"]["data"]["preparation"]["bad_records"],
        3
    );
    bench.ok(&["verify", "skipped", "--deep"]);
}

#[test]
fn repeated_sequences_are_dropped_and_counted() {
    let bench = Bench::new();
    let record = |text: &str| json!({"text": text});
    bench.write(
        "data.jsonl",
        &lines(&[
            record("same"),
            record("other"),
            record("same"),
            record("same"),
        ]),
    );
    let report = build(&bench, "dropped", &["--data", "data.jsonl"]);
    assert_eq!(
        (report["sequences"].as_u64(), report["duplicates"].as_u64()),
        (Some(2), Some(2))
    );
    let report = build(
        &bench,
        "kept",
        &["--data", "data.jsonl", "--duplicates", "keep"],
    );
    assert_eq!(
        (report["sequences"].as_u64(), report["duplicates"].as_u64()),
        (Some(4), Some(0))
    );
}

#[test]
fn the_validation_split_is_the_same_for_everyone_and_kept_out_of_training() {
    let bench = Bench::new();
    let text = |index: usize| json!({"text": format!("a text about the number {index}")});
    let numbers: Vec<Value> = (0..60).map(text).collect();
    let backwards: Vec<Value> = (0..60).rev().map(text).collect();
    bench.write("data.jsonl", &lines(&numbers));
    bench.write("backwards.jsonl", &lines(&backwards));
    let report = build(
        &bench,
        "cache",
        &["--data", "data.jsonl", "--validation", "0.25"],
    );
    let validation = |name: &str| {
        let mut texts: Vec<String> = exported(&bench, name)
            .into_iter()
            .filter(|row| row.split == "validation")
            .map(|row| row.text)
            .collect();
        texts.sort();
        texts
    };
    let apart = validation("cache");
    assert!((5..=25).contains(&apart.len()), "{}", apart.len());
    assert_eq!(
        report["validation_sequences"].as_u64(),
        Some(apart.len() as u64)
    );
    build(
        &bench,
        "again",
        &["--data", "backwards.jsonl", "--validation", "0.25"],
    );
    assert_eq!(
        validation("again"),
        apart,
        "the order of the data changes nothing"
    );

    let prune = [
        "prune", "--model", "teacher", "--ratio", "0.25", "--out", "student",
    ];
    bench.ok(&prune);
    let train = |out: &str| {
        let of = [
            "train",
            "--cache",
            "cache",
            "--student",
            "student",
            "--out",
            out,
            "--json",
        ];
        let how = [
            "--set",
            "hard_weight=1",
            "--set",
            "soft_weight=0",
            "--set",
            "batch_size=8",
        ];
        bench.json(&[&of[..], &how].concat())
    };
    assert_eq!(
        train("run")["sequences"].as_u64(),
        Some(60 - apart.len() as u64)
    );
    // A run is judged on what it has not seen.
    let scores = bench.json(&["eval", "--model", "run", "--cache", "cache", "--json"]);
    assert_eq!(
        scores["cache"][0]["sequences"].as_u64(),
        Some(apart.len() as u64)
    );
    assert_eq!(scores["cache"][0]["split"], "validation");
    let all = [
        "eval", "--model", "run", "--cache", "cache", "--split", "all", "--json",
    ];
    assert_eq!(bench.json(&all)["cache"][0]["sequences"], 60);

    for share in ["1", "-0.1", "0.000001"] {
        let arguments = [
            "build",
            "--teacher",
            "teacher",
            "--data",
            "data.jsonl",
            "--out",
            "never",
            &format!("--validation={share}"),
        ];
        let refused = bench.run(&arguments);
        assert_eq!(refused.status.code(), Some(2), "{share}");
        assert!(stderr(&refused).contains("hint: "), "{}", stderr(&refused));
        assert!(!bench.path("never").exists());
    }
}

#[test]
fn packing_fills_sequences_and_is_the_same_every_time() {
    let bench = Bench::new();
    let records: Vec<Value> = (0..40)
        .map(|index| json!({"text": "word ".repeat(1 + index * 7 % 11) + &index.to_string()}))
        .collect();
    bench.write("data.jsonl", &lines(&records));
    let from = ["--data", "data.jsonl", "--max-len", "64"];
    let single = build(&bench, "single", &from);
    let packed = build(&bench, "packed", &[&from[..], &["--pack"]].concat());
    assert_eq!(single["positions"], packed["positions"]);
    let least = single["positions"].as_u64().unwrap().div_ceil(64);
    let sequences = packed["sequences"].as_u64().unwrap();
    assert!(
        (least..=least + 1).contains(&sequences),
        "{sequences} for {least}"
    );
    let rows = exported(&bench, "packed");
    let mut sources: Vec<&str> = rows.iter().flat_map(|row| row.source.split('+')).collect();
    sources.sort_unstable();
    sources.dedup();
    assert_eq!(sources.len(), 40);
    build(&bench, "again", &[&from[..], &["--pack"]].concat());
    assert_eq!(
        files(&bench.path("packed/shards")),
        files(&bench.path("again/shards"))
    );
    bench.ok(&["verify", "packed"]);
}

#[test]
fn what_is_cut_off_is_counted() {
    let bench = Bench::new();
    bench.write(
        "data.jsonl",
        &lines(&[
            json!({"prompt": "p", "completion": "0123456789"}),
            json!({"prompt": "p", "completion": "0"}),
            json!({"prompt": "0123456789", "completion": "lost"}),
            json!({"text": "0123456789abcdefghij"}),
        ]),
    );
    let report = build(&bench, "cache", &["--data", "data.jsonl", "--max-len", "8"]);
    let counts: Vec<u64> = ["truncated", "truncated_tokens", "skipped", "sequences"]
        .map(|name| report[name].as_u64().unwrap())
        .into();
    // 11 and 14 tokens are cut to 8; the second of them loses its answer. The text becomes windows of 8, 8 and 4.
    assert_eq!(counts, [2, 3 + 6, 1, 5]);
    let rows = exported(&bench, "cache");
    assert_eq!(rows[2].source, "data.jsonl:4:1");
    assert_eq!(rows[4].text, "ghij");
}

#[test]
fn a_limit_takes_the_first_sequences_and_is_part_of_the_plan() {
    let bench = Bench::new();
    bench.records("a.jsonl", 4200);
    bench.records("b.jsonl", 5);
    bench.write("c.txt", &"A long text without an end. ".repeat(400));
    let few = ["--data", "a.jsonl", "--data", "b.jsonl", "--limit", "7"];
    let report = build(&bench, "few", &few);
    assert_eq!(
        (&report["sequences"], &report["records"]),
        (&json!(7), &json!(7))
    );
    let sources: Vec<String> = exported(&bench, "few")
        .into_iter()
        .map(|row| row.source)
        .collect();
    assert_eq!(
        sources,
        (1..=7)
            .map(|line| format!("a.jsonl:{line}"))
            .collect::<Vec<_>>()
    );
    let manifest = |name: &str| -> Value {
        let text = std::fs::read_to_string(bench.path(name).join("manifest.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let manifest_of_few = manifest("few");
    let data = &manifest_of_few["data"];
    assert_eq!(data["preparation"]["limit"], 7);
    let card = bench.json(&["inspect", "few", "--json"]);
    assert!(card["command"].as_str().unwrap().contains(" --limit 7"));
    // The file is known whole.
    let bytes = std::fs::metadata(bench.path("a.jsonl")).unwrap().len();
    assert_eq!(data["files"].as_array().unwrap().len(), 1);
    assert_eq!(data["files"][0]["bytes"], bytes);
    assert_eq!(
        build(&bench, "text", &["--data", "c.txt", "--limit", "3"])["sequences"],
        3
    );
    // More than there is takes all.
    let all = ["--data", "b.jsonl", "--limit", "100"];
    assert_eq!(build(&bench, "all", &all)["sequences"], 5);
    build(&bench, "some", &["--data", "b.jsonl", "--limit", "2"]);
    let files_of = |name: &str| manifest(name)["data"]["files"].clone();
    assert_eq!(files_of("some"), files_of("all"));

    let plan = |limit: &str, more: &[&str]| {
        let fixed = [
            "build",
            "--teacher",
            "teacher",
            "--data",
            "a.jsonl",
            "--plan",
        ];
        let rest = ["--out", "planned", "--limit", limit];
        bench.run(&[&fixed[..], &rest, more].concat())
    };
    assert!(plan("7", &[]).status.success());
    let other = plan("8", &["--resume"]);
    assert_eq!(other.status.code(), Some(2), "{}", stderr(&other));
    assert!(stderr(&other).contains("hint: "), "{}", stderr(&other));
    let none = plan("0", &[]);
    assert_eq!(none.status.code(), Some(2), "{}", stderr(&none));
}
