//! Records that hold messages instead of token ids: the tokenizer's chat template says which tokens they are.

use serde_json::{Value, json};

use crate::support::Bench;
use crate::{before_targets, import_checked, refused, sequences};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

fn talk(index: usize) -> Value {
    json!([
        {"role": "user", "content": format!("What comes after {index}?")},
        {"role": "assistant", "content": format!("After {index} comes {}, as you know.", index + 1)},
    ])
}

/// A teacher with a chat template, and a cache of its own of the same conversations.
fn taught() -> Bench {
    let bench = Bench::new();
    bench.write(
        "teacher/tokenizer_config.json",
        &json!({"chat_template": TEMPLATE}).to_string(),
    );
    let lines: Vec<String> = (0..12)
        .map(|index| json!({"messages": talk(index)}).to_string())
        .collect();
    bench.write("talks.jsonl", &lines.join("\n"));
    let build = [
        "--teacher",
        "teacher",
        "--data",
        "talks.jsonl",
        "--out",
        "built",
    ];
    let sparse = ["--tier", "sparse", "--layers", "none", "--top-k", "8"];
    bench.ok(&[&["build"], &build[..], &sparse].concat());
    bench
}

/// The records as a generation with log-probabilities leaves them: rows of the answer's tokens, all of which were likely.
fn answers(bench: &Bench) -> String {
    let records = sequences(bench, "built").into_iter().enumerate();
    let lines: Vec<String> = records
        .map(|(index, sequence)| {
            let said = before_targets(&sequence);
            let ids: Vec<[u32; 2]> = said
                .iter()
                .map(|position| {
                    let token = sequence.token_ids[position + 1];
                    [token, (token + 1) % 256]
                })
                .collect();
            let values = vec![[-0.2, -2.0]; ids.len()];
            json!({"messages": talk(index), "logprobs": values, "target_token_ids": ids})
                .to_string()
        })
        .collect();
    lines.join("\n")
}

#[test]
fn messages_become_the_tokens_that_a_build_makes_of_them() {
    let bench = taught();
    bench.write("answers.jsonl", &answers(&bench));
    let report = bench.json(&import_checked("answers.jsonl", "imported", &["--json"]));
    assert_eq!(report["format"], "axolotl");
    assert_eq!(report["alignment"]["best_offset"], 0);
    let (built, imported) = (sequences(&bench, "built"), sequences(&bench, "imported"));
    assert_eq!(built.len(), imported.len());
    for (built, imported) in built.iter().zip(&imported) {
        assert_eq!(built.token_ids, imported.token_ids);
        assert_eq!(built.loss_mask, imported.loss_mask);
        for position in before_targets(imported) {
            let best = imported.top_k.as_ref().unwrap().ids[position * 2];
            assert_eq!(best, imported.token_ids[position + 1]);
        }
    }
    let card = |cache: &str| bench.json(&["inspect", cache, "--json"])["manifest"].clone();
    let template = card("built")["data"]["preparation"]["chat_template"].clone();
    assert!(template.is_string());
    assert_eq!(
        card("imported")["data"]["preparation"]["chat_template"],
        template
    );
}

#[test]
fn another_template_is_noticed() {
    let bench = taught();
    bench.write("answers.jsonl", &answers(&bench));
    let write = |end: &str| {
        let text = TEMPLATE.replace("{% endfor %}", &format!("{{% endfor %}}{end}"));
        bench.write("other.jinja", &text);
    };
    let other = ["--chat-template", "other.jinja"];
    write("(the end of it)");
    let text = refused(
        &bench,
        &import_checked("answers.jsonl", "other", &other),
        "other",
        "`answers.jsonl` line 1: of ",
    );
    assert!(
        text.contains("about other tokens") && text.contains("--chat-template"),
        "{text}"
    );
    // A line's end that the teacher never wrote moves everything by one.
    write("{{ '\\n' }}");
    refused(
        &bench,
        &import_checked("answers.jsonl", "other", &other),
        "other",
        "--shift -1",
    );
    let moved = [&other[..], &["--shift", "-1", "--json"]].concat();
    let report = bench.json(&import_checked("answers.jsonl", "other", &moved));
    assert_eq!(report["alignment"]["best_offset"], 0);
    for sequence in sequences(&bench, "other") {
        let targets = before_targets(&sequence);
        assert!(targets.len() > 20);
        for position in targets {
            let best = sequence.top_k.as_ref().unwrap().ids[position * 2];
            assert_eq!(best, sequence.token_ids[position + 1]);
        }
    }
    // Without any template there is nothing to go by.
    std::fs::remove_file(bench.path("teacher/tokenizer_config.json")).unwrap();
    refused(
        &bench,
        &import_checked("answers.jsonl", "none", &[]),
        "none",
        "has no chat template",
    );
}
