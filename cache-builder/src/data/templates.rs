//! Which chat template writes a conversation: a tokenizer may have several, by name.

use std::collections::BTreeMap;
use std::path::Path;

use chrono::NaiveDate;
use minijinja::Value;

use super::jinja::ChatTemplate;
use super::record::Problem;
use crate::{Error, Result};

/// The template that is used where none is named.
const DEFAULT: &str = "default";

/// The one that is used instead where a conversation comes with tools.
const TOOL_USE: &str = "tool_use";

/// The chat templates of a tokenizer, or the one that the user chose.
pub(crate) struct Templates {
    by_name: BTreeMap<String, std::result::Result<ChatTemplate, Problem>>,
    /// Nothing else is looked at.
    chosen: Option<ChatTemplate>,
}

impl Templates {
    /// Compiles the templates of a tokenizer's configuration. `choice` is the name of one of them, or a file; `date` what
    /// `strftime_now` tells.
    ///
    /// # Errors
    /// A choice that is neither, or can't be read. The tokenizer's own matter only once a conversation needs them.
    pub(crate) fn new(
        config: &serde_json::Value,
        choice: Option<&Path>,
        date: NaiveDate,
    ) -> Result<Self> {
        let sources = sources(config);
        let compile = |source: &str| {
            ChatTemplate::new(source, config, date).map_err(|problem| {
                Problem::new(
                    format!("the chat template can't be read: {problem}"),
                    "give another one: --chat-template NAME|FILE.jinja",
                )
            })
        };
        let chosen = choice
            .map(|choice| {
                let source = match choice.to_str().and_then(|name| sources.get(name)) {
                    Some(source) => source.clone(),
                    None => of_file(choice, &sources)?,
                };
                compile(&source).map_err(|problem| Error::Option {
                    problem: problem.message,
                    hint: problem.hint,
                })
            })
            .transpose()?;
        Ok(Self {
            by_name: sources
                .iter()
                .map(|(name, source)| (name.clone(), compile(source)))
                .collect(),
            chosen,
        })
    }

    /// The template for a conversation with these `tools` (none where it has none), as transformers'
    /// `get_chat_template` chooses it.
    pub(crate) fn of(&self, tools: &Value) -> std::result::Result<&ChatTemplate, Problem> {
        if let Some(chosen) = &self.chosen {
            return Ok(chosen);
        }
        let for_tools = self.by_name.get(TOOL_USE).filter(|_| !tools.is_none());
        match for_tools.or_else(|| self.by_name.get(DEFAULT)) {
            Some(template) => template.as_ref().map_err(Clone::clone),
            None if self.by_name.is_empty() => Err(Problem::new(
                "the teacher's tokenizer has no chat template for this conversation",
                "give one: --chat-template FILE.jinja",
            )),
            None => Err(Problem::new(
                format!(
                    "the teacher's tokenizer has several chat templates and none is the default: {}",
                    names(self.by_name.keys())
                ),
                "choose one: --chat-template NAME",
            )),
        }
    }

    /// Digest of what has written a text, and whether it asked for the date. That of one template is that of its source,
    /// that of several the digest of theirs, one after the other.
    pub(crate) fn used(&self) -> (Option<String>, bool) {
        let own = self.by_name.values().filter_map(|one| one.as_ref().ok());
        let used: Vec<&ChatTemplate> = self
            .chosen
            .iter()
            .chain(own)
            .filter(|template| template.was_used())
            .collect();
        let digest = match used.as_slice() {
            [] => None,
            [one] => Some(one.digest.clone()),
            several => {
                let digests: Vec<&str> = several.iter().map(|one| one.digest.as_str()).collect();
                Some(
                    blake3::hash(digests.concat().as_bytes())
                        .to_hex()
                        .to_string(),
                )
            }
        };
        (
            digest,
            used.iter().any(|template| template.asked_for_date()),
        )
    }
}

/// The templates of a tokenizer's configuration by name: a text is the default, else there is a list of names and
/// templates, or an object of them.
fn sources(config: &serde_json::Value) -> BTreeMap<String, String> {
    let entry =
        |name: &str, text: &serde_json::Value| Some((name.to_owned(), text.as_str()?.to_owned()));
    match config.get("chat_template") {
        Some(serde_json::Value::String(text)) => BTreeMap::from([(DEFAULT.into(), text.clone())]),
        Some(serde_json::Value::Array(list)) => list
            .iter()
            .filter_map(|one| entry(one["name"].as_str()?, &one["template"]))
            .collect(),
        Some(serde_json::Value::Object(all)) => all
            .iter()
            .filter_map(|(name, text)| entry(name, text))
            .collect(),
        _ => BTreeMap::new(),
    }
}

fn of_file(path: &Path, sources: &BTreeMap<String, String>) -> Result<String> {
    let known = if sources.is_empty() {
        "it has none".to_owned()
    } else {
        format!("it has: {}", names(sources.keys()))
    };
    std::fs::read_to_string(path).map_err(|error| Error::Option {
        problem: format!(
            "--chat-template `{}` is neither one of the tokenizer's chat templates ({known}) nor a file that can be read: {error}",
            path.display()
        ),
        hint: "give one of these names, or the path of a Jinja template".into(),
    })
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(config: &serde_json::Value, choice: Option<&str>, tools: &Value) -> String {
        let date = NaiveDate::MIN;
        let rendered = Templates::new(config, choice.map(Path::new), date)
            .map_err(|error| error.to_string())
            .and_then(|templates| {
                let template = templates.of(tools).map_err(|problem| problem.message)?;
                template.render(&[], tools, false)
            });
        rendered.unwrap_or_else(|error| format!("error: {error}"))
    }

    #[test]
    fn tools_choose_their_template_and_names_choose_theirs() {
        let none = Value::from(());
        let some = Value::from(vec!["add"]);
        let empty = Value::from(Vec::<Value>::new());
        let list = json!({"chat_template": [
            {"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"},
            {"name": "broken", "template": "{% if %}"},
        ]});
        let object = json!({"chat_template": {"default": "d", "tool_use": "t"}});
        let one = json!({"chat_template": "o"});
        let nameless = json!({"chat_template": {"a": "a", "b": "b"}});
        for (config, choice, tools, expected) in [
            (&list, None, &none, "d"),
            (&list, None, &some, "t"),
            (&list, None, &empty, "t"),
            (&list, Some("rag"), &some, "r"),
            (&list, Some("default"), &some, "d"),
            (
                &list,
                Some("broken"),
                &none,
                "error: the chat template can't be read",
            ),
            (
                &list,
                Some("tool_us"),
                &none,
                "error: --chat-template `tool_us` is neither one of the tokenizer's chat templates (it has: broken, default, rag, tool_use) nor a file",
            ),
            (&object, None, &some, "t"),
            (&one, None, &some, "o"),
            (&one, Some("default"), &some, "o"),
            (
                &nameless,
                None,
                &none,
                "error: the teacher's tokenizer has several chat templates and none is the default: a, b",
            ),
            (&nameless, Some("b"), &none, "b"),
            (
                &json!({}),
                None,
                &none,
                "error: the teacher's tokenizer has no chat template",
            ),
        ] {
            let found = text(config, choice, tools);
            assert!(found.starts_with(expected), "{config} {choice:?}: {found}");
        }
    }

    #[test]
    fn a_file_counts_where_no_template_has_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.jinja");
        std::fs::write(&path, "mine").unwrap();
        let none = Value::from(());
        let config = json!({"chat_template": "o"});
        assert_eq!(text(&config, path.to_str(), &none), "mine");
        std::fs::write(&path, [0xff]).unwrap();
        assert!(text(&config, path.to_str(), &none).contains("UTF-8"));
    }
}
