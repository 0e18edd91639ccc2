//! Conversations as text, and where in it the assistant speaks.

use std::ops::Range;

use minijinja::Value;

use super::jinja::{ChatTemplate, GENERATION_BEGINS, GENERATION_ENDS};

/// A conversation as the template writes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RenderedChat {
    /// The text, special tokens included.
    pub(crate) text: String,
    /// Byte ranges of the assistant's turns: what it says and the token that ends its turn, ascending.
    pub(crate) turns: Vec<Range<usize>>,
}

/// A word that stands for an answer while its place is looked for.
const STAND_IN: &str = "\u{10FFF2}answer\u{10FFF3}";

/// Renders a conversation and finds the assistant's turns.
///
/// Where the template marks them itself (`{% generation %}`), the marks count. Else a turn is what the template writes
/// between the prompt that asks for it (the messages before it with the generation prompt) and the conversation up to
/// its end. Templates that rewrite earlier turns once later ones are there fail that; then a turn is where its content
/// stands. `special` are the tokenizer's special tokens: whitespace behind the one that ends a turn belongs to the
/// template and not to the answer.
///
/// # Errors
/// What the template refuses, a turn that can't be found.
pub(crate) fn render_chat(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
    special: &[String],
) -> Result<RenderedChat, String> {
    let marked = render(template, messages, tools, false)?;
    if template.marks_generation {
        return Ok(without_marks(&marked));
    }
    let text = marked;
    let mut turns = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if role(message).as_deref() != Some("assistant") {
            continue;
        }
        let turn = turn_by_prefix(template, messages, tools, index, &text)
            .or_else(|| turn_by_content(template, messages, tools, index, &text, special))
            .ok_or_else(|| {
                format!(
                    "where the answer in message {} stands in the text of the chat template can't be found",
                    index + 1
                )
            })?;
        turns.push(turn.start..end_of_turn(&text, &turn, special));
    }
    Ok(RenderedChat { text, turns })
}

/// A conversation with the header of the answer that it asks for.
///
/// # Errors
/// What the template refuses.
pub(crate) fn render_question(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
) -> Result<String, String> {
    Ok(without_marks(&render(template, messages, tools, true)?).text)
}

fn render(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
    add_generation_prompt: bool,
) -> Result<String, String> {
    template
        .render(messages, tools, add_generation_prompt)
        .map_err(|problem| format!("the chat template refuses it: {problem}"))
}

fn role(message: &Value) -> Option<String> {
    message.get_attr("role").ok()?.as_str().map(str::to_owned)
}

/// Takes the marks of generation blocks out of a rendered text.
fn without_marks(marked: &str) -> RenderedChat {
    let mut text = String::with_capacity(marked.len());
    let mut turns: Vec<Range<usize>> = Vec::new();
    for letter in marked.chars() {
        match letter {
            GENERATION_BEGINS => turns.push(text.len()..text.len()),
            GENERATION_ENDS => {
                if let Some(turn) = turns.last_mut() {
                    turn.end = text.len();
                }
            }
            letter => text.push(letter),
        }
    }
    RenderedChat { text, turns }
}

fn turn_by_prefix(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
    index: usize,
    text: &str,
) -> Option<Range<usize>> {
    let before = template.render(&messages[..index], tools, true).ok()?;
    let after = template.render(&messages[..=index], tools, false).ok()?;
    let fits = text.starts_with(&after) && after.starts_with(&before) && after.len() > before.len();
    fits.then_some(before.len()..after.len())
}

fn turn_by_content(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &Value,
    index: usize,
    text: &str,
    special: &[String],
) -> Option<Range<usize>> {
    let message = &messages[index];
    message.get_attr("content").ok()?.as_str()?;
    let replaced = Value::from_pairs(message.try_iter().ok()?.map(|key| {
        let value = match key.as_str() {
            Some("content") => Value::from(STAND_IN),
            _ => message.get_item(&key).unwrap_or_default(),
        };
        (key, value)
    }));
    let mut with_stand_in = messages.to_vec();
    with_stand_in[index] = replaced;
    let rendered = template.render(&with_stand_in, tools, false).ok()?;
    let (before, after) = rendered.split_once(STAND_IN)?;
    let fits = !after.contains(STAND_IN)
        && text.len() > before.len() + after.len()
        && text.starts_with(before)
        && text.ends_with(after);
    if !fits {
        return None;
    }
    let end = special
        .iter()
        .filter(|token| after.trim_start().starts_with(token.as_str()))
        .map(|token| after.len() - after.trim_start().len() + token.len())
        .max()
        .unwrap_or(0);
    Some(before.len()..text.len() - after.len() + end)
}

/// The end of the turn without whitespace behind the special token that ends it.
fn end_of_turn(text: &str, turn: &Range<usize>, special: &[String]) -> usize {
    let trimmed = text[turn.clone()].trim_end();
    if special
        .iter()
        .any(|token| trimmed.ends_with(token.as_str()))
    {
        turn.start + trimmed.len()
    } else {
        turn.end
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn turns(source: &str, messages: &str) -> Result<Vec<String>, String> {
        let template = ChatTemplate::new(
            source,
            &serde_json::json!({"eos_token": "</s>"}),
            chrono::NaiveDate::MIN,
        )?;
        let messages: Vec<Value> = serde_json::from_str(messages).unwrap();
        let special = ["</s>".to_owned(), "<end>".to_owned()];
        let chat = render_chat(&template, &messages, &Value::from(()), &special)?;
        Ok(chat
            .turns
            .into_iter()
            .map(|turn| chat.text[turn].to_owned())
            .collect())
    }

    const TALK: &str = r#"[{"role":"system","content":"be kind"},{"role":"user","content":"one?"},
        {"role":"assistant","content":"1"},{"role":"user","content":"two?"},{"role":"assistant","content":"<t>hm</t>2"}]"#;

    #[test]
    fn every_turn_of_the_assistant_is_found_with_its_end() {
        let plain = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}";
        assert_eq!(turns(plain, TALK).unwrap(), ["1<end>", "<t>hm</t>2<end>"]);
        // Without a generation prompt the header can't be told from the answer, but the content can be found.
        let no_prompt = "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}";
        assert_eq!(
            turns(no_prompt, TALK).unwrap(),
            [" 1 </s>", " <t>hm</t>2 </s>"]
        );
    }

    #[test]
    fn turns_that_the_template_rewrites_later_are_found_by_their_content() {
        // The end token comes only at the end of the whole, so no shorter conversation is a prefix.
        let ends_once = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last and not add_generation_prompt %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        assert_eq!(turns(ends_once, TALK).unwrap(), ["1", "<t>hm</t>2</s>"]);
        // An earlier turn loses its thoughts.
        let forgets = "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}{{ m.content.split('</t>')[-1] }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let swapped = r#"[{"role":"user","content":"?"},{"role":"assistant","content":"<t>hm</t>2"},{"role":"user","content":"!"},{"role":"assistant","content":"<t>so</t>3"}]"#;
        assert_eq!(
            turns(forgets, swapped).unwrap(),
            ["2<end>", "<t>so</t>3<end>"]
        );
    }

    #[test]
    fn generation_blocks_count_before_anything_else() {
        let marked = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}";
        assert_eq!(turns(marked, TALK).unwrap(), ["1<end>", "<t>hm</t>2<end>"]);
    }

    #[test]
    fn a_template_that_drops_an_answer_is_refused() {
        let drops = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
        assert!(turns(drops, TALK).unwrap_err().contains("message 3"));
    }

    #[derive(serde::Deserialize)]
    struct Conversation {
        messages: Vec<Value>,
        #[serde(default)]
        tools: Value,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        template: String,
        conversation: String,
        add_generation_prompt: bool,
        text: Option<String>,
        generated: Option<Vec<String>>,
    }

    /// What `tests/golden/make_chat.py` writes.
    #[derive(serde::Deserialize)]
    struct Golden {
        special_tokens: serde_json::Value,
        date: String,
        templates: BTreeMap<String, String>,
        conversations: BTreeMap<String, Conversation>,
        cases: Vec<Case>,
    }

    impl Golden {
        fn read(path: &str) -> Self {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        }

        fn template(&self, name: &str) -> Result<ChatTemplate, String> {
            let source = &self.templates[name];
            ChatTemplate::new(source, &self.special_tokens, self.date.parse().unwrap())
        }

        /// Cases where we are not transformers.
        fn differences(&self) -> Vec<String> {
            let mut wrong = Vec::new();
            for case in &self.cases {
                let conversation = &self.conversations[&case.conversation];
                let rendered = self.template(&case.template).and_then(|template| {
                    let messages = &conversation.messages;
                    template.render(messages, &conversation.tools, case.add_generation_prompt)
                });
                let ours = rendered.map(|marked| without_marks(&marked));
                let is_same = match (&ours, &case.text) {
                    (Ok(chat), Some(text)) => {
                        let turns = chat.turns.iter().map(|turn| &chat.text[turn.clone()]);
                        let expected = case.generated.as_ref();
                        chat.text == *text && expected.is_none_or(|of| turns.eq(of))
                    }
                    (Err(_), None) => true,
                    _ => false,
                };
                if !is_same {
                    let kind = match (&ours, &case.text) {
                        (Ok(_), None) => "given where transformers refuse",
                        (Err(_), Some(_)) => "refused where transformers give",
                        _ => "another text",
                    };
                    wrong.push(format!(
                        "{kind}: {} on {}, {}: {ours:?} instead of {:?}, {:?}",
                        case.template,
                        case.conversation,
                        case.add_generation_prompt,
                        case.text,
                        case.generated
                    ));
                }
            }
            wrong
        }
    }

    #[test]
    fn texts_and_marked_turns_are_those_of_transformers() {
        let golden = Golden::read(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/chat.json"
        ));
        assert!(golden.cases.len() >= 80);
        let wrong = golden.differences();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// Any templates at all, prepared by `make_chat.py --templates`. Where a template has a twin `*_training` that marks
    /// what is generated, the turns found without marks must be those.
    #[test]
    fn templates_of_others_give_the_same_too() {
        let Ok(path) = std::env::var("CASKD_CHAT_CASES") else {
            eprintln!("skipped: CASKD_CHAT_CASES is not set");
            return;
        };
        let golden = Golden::read(&path);
        let differences = golden.differences();
        // Where Python stumbles over a none, minijinja may go on; that is no other text.
        let (lenient, wrong): (Vec<_>, Vec<_>) = differences
            .into_iter()
            .partition(|difference| difference.starts_with("given where transformers refuse"));
        // Whatever stands between such brackets is a special token of some model.
        let special = |text: &str| -> Vec<String> {
            let mut tokens: Vec<String> = [("<|", "|>"), ("<｜", "｜>"), ("<", ">")]
                .iter()
                .flat_map(|&(open, close)| {
                    text.match_indices(open).filter_map(move |(start, _)| {
                        let length = text[start..].find(close)? + close.len();
                        Some(text[start..start + length].to_owned())
                    })
                })
                .filter(|token| token.len() < 30)
                .collect();
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let (mut compared, mut other) = (0, 0);
        for case in &golden.cases {
            let Some(name) = case.template.strip_suffix("_training.jinja") else {
                continue;
            };
            let plain = format!("{name}.jinja");
            let (Some(text), Some(expected), true) = (
                &case.text,
                &case.generated,
                !case.add_generation_prompt && golden.templates.contains_key(&plain),
            ) else {
                continue;
            };
            let conversation = &golden.conversations[&case.conversation];
            let template = golden.template(&plain).unwrap();
            let chat = render_chat(
                &template,
                &conversation.messages,
                &conversation.tools,
                &special(text),
            );
            compared += 1;
            let turns = chat.map(|chat| {
                let turns = chat.turns.iter();
                let turns: Vec<String> = turns
                    .map(|turn| chat.text[turn.clone()].to_owned())
                    .collect();
                (chat.text, turns)
            });
            // Some of the marks take in the line's end behind the last token.
            let trimmed = |turns: &[String]| -> Vec<String> {
                turns
                    .iter()
                    .map(|turn| turn.trim_end().to_owned())
                    .collect()
            };
            let turns = turns.map(|(text, turns)| (text, trimmed(&turns)));
            if turns != Ok((text.clone(), trimmed(expected))) {
                other += 1;
                eprintln!(
                    "{plain} on {}: {turns:?} instead of {expected:?}\n",
                    case.conversation
                );
            }
        }
        eprintln!(
            "{} of {} texts differ, {} more are given where transformers refuse; {other} of {compared} conversations have other turns",
            wrong.len(),
            golden.cases.len(),
            lenient.len()
        );
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
