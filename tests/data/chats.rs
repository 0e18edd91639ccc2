//! Conversations, by templates as transformers has them.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Bench, files, python_with, stderr};
use crate::{build, lines, rows, talk};

/// `cache-builder/tests/golden/make_chat.py` has the same conversations tokenized by transformers.
#[test]
fn the_real_teachers_chats_are_those_of_transformers() {
    let Some(teacher) = std::env::var_os("CASKD_TEACHER") else {
        eprintln!("skipped: CASKD_TEACHER is not set");
        return;
    };
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("cache-builder/tests/golden/chat_teacher.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let bench = Bench::empty();
    // Two of the conversations have no answer; all tokens are asked for where there is none to learn from.
    let learned = |case: &&Value| {
        let mask = case["loss_mask"].as_array().unwrap();
        mask.iter().any(|flag| flag == 1)
    };
    let cases: Vec<&Value> = cases.iter().filter(learned).collect();
    assert!(cases.len() >= 4);
    let records: Vec<Value> = cases
        .iter()
        .map(|case| json!({"messages": case["messages"]}))
        .collect();
    bench.write("data.jsonl", &lines(&records));
    let teacher = teacher.to_str().unwrap();
    bench.ok(&[
        "build",
        "--teacher",
        teacher,
        "--data",
        "data.jsonl",
        "--out",
        "cache",
        "--tier",
        "sparse",
        "--layers",
        "none",
        "--top-k",
        "2",
        "--no-fidelity",
    ]);
    bench.ok(&["export", "cache", "--to", "jsonl", "--out", "out.jsonl"]);
    let out = std::fs::read_to_string(bench.path("out.jsonl")).unwrap();
    for (line, case) in out.lines().zip(cases) {
        let row: Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["input_ids"], case["input_ids"], "{}", case["messages"]);
        let flags = |list: &Value| -> Vec<bool> {
            let list = list.as_array().unwrap().iter();
            list.map(|flag| flag == 1 || flag == true).collect()
        };
        assert_eq!(
            flags(&row["loss_mask"]),
            flags(&case["loss_mask"]),
            "{}",
            case["messages"]
        );
    }
}

/// Templates of one tokenizer: without tools, and with them.
const WITHOUT_TOOLS: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
const WITH_TOOLS: &str = "[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]{% for m in messages %}<{{ m.role }}|{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<assistant|{% endif %}";

/// Conversations with tools, with an empty list of them, and without.
fn talks_with_tools() -> String {
    let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}});
    let tools = [json!([tool]), json!([]), Value::Null];
    let mut talks: Vec<Value> = tools
        .iter()
        .enumerate()
        .map(|(index, tools)| {
            json!({"tools": tools, "messages": [
                {"role": "user", "content": format!("What is 1 + {index}?")},
                {"role": "assistant", "content": format!("It is {}.", index + 1)},
            ]})
        })
        .collect();
    talks.push(json!({"messages": talk()}));
    lines(&talks)
}

#[test]
fn conversations_with_tools_have_their_own_template() {
    let bench = Bench::new();
    bench.write("data.jsonl", &talks_with_tools());
    let both = json!([{"name": "default", "template": WITHOUT_TOOLS}, {"name": "tool_use", "template": WITH_TOOLS}]);
    bench.write(
        "teacher/tokenizer_config.json",
        &json!({"chat_template": both}).to_string(),
    );
    let listed = rows(&bench, "listed", &["--data", "data.jsonl"]);
    let begins: Vec<&str> = listed.iter().map(|row| &row.text[..2]).collect();
    assert_eq!(begins, ["[{", "[]", "<u", "<u"]);
    assert!(listed[0].text.ends_with("<assistant|It is 1.>"));

    // Beside the configuration, where they count before what is inside.
    bench.write(
        "teacher/tokenizer_config.json",
        &json!({"chat_template": "not this one"}).to_string(),
    );
    std::fs::create_dir(bench.path("teacher/additional_chat_templates")).unwrap();
    bench.write("teacher/chat_template.jinja", WITHOUT_TOOLS);
    bench.write(
        "teacher/additional_chat_templates/tool_use.jinja",
        WITH_TOOLS,
    );
    build(&bench, "beside", &["--data", "data.jsonl"]);
    assert_eq!(files(&bench.path("listed")), files(&bench.path("beside")));

    let named = ["--data", "data.jsonl", "--chat-template", "default"];
    let named = rows(&bench, "named", &named);
    assert!(named.iter().all(|row| row.text.starts_with("<user>")));
    let output = bench.run(&[
        "build",
        "--teacher",
        "teacher",
        "--data",
        "data.jsonl",
        "--out",
        "unknown",
        "--chat-template",
        "tools",
    ]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("(it has: default, tool_use)") && text.contains("hint: "),
        "{text}"
    );
    assert!(!bench.path("unknown").exists());
}

/// Set CASKD_PYTHON to a Python with transformers.
#[test]
fn the_template_for_tools_is_the_one_that_transformers_chooses() {
    let Some(python) = python_with("transformers") else {
        return;
    };
    let bench = Bench::new();
    bench.write("data.jsonl", &talks_with_tools());
    let config = |template: Value| {
        let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
        if !template.is_null() {
            config["chat_template"] = template;
        }
        bench.write("teacher/tokenizer_config.json", &config.to_string());
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/witness_templates.py");
    let check = |name: &str| {
        let output = std::process::Command::new(&python)
            .arg(&script)
            .args(["teacher", "data.jsonl"])
            .current_dir(bench.folder.path())
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let expected: Vec<String> = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let found = rows(&bench, name, &["--data", "data.jsonl"]);
        let found: Vec<&String> = found.iter().map(|row| &row.text).collect();
        assert_eq!(found, expected.iter().collect::<Vec<_>>(), "{name}");
    };
    config(
        json!([{"name": "default", "template": WITHOUT_TOOLS}, {"name": "tool_use", "template": WITH_TOOLS}]),
    );
    check("listed");
    config(
        json!([{"name": "rag", "template": "rag"}, {"name": "default", "template": WITHOUT_TOOLS}]),
    );
    check("no-tools");
    config(json!(
        WITH_TOOLS.replace("for tool in tools", "for tool in tools or []")
    ));
    check("one");
    std::fs::create_dir(bench.path("teacher/additional_chat_templates")).unwrap();
    bench.write(
        "teacher/additional_chat_templates/tool_use.jinja",
        WITH_TOOLS,
    );
    bench.write("teacher/chat_template.jinja", WITHOUT_TOOLS);
    check("files");
}
