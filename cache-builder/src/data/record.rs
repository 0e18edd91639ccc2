//! One record: a JSON object in one of the known forms.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::options::DataOptions;

/// The forms a record can have.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RecordBody {
    /// Alpaca's three fields.
    Instruction {
        /// The task.
        instruction: String,
        /// Its input; may be empty.
        input: String,
        /// The response to learn.
        output: String,
    },
    /// A prompt that is used as it stands, and what follows it.
    Completion {
        /// The prompt; no target.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// A conversation, as the chat template takes it.
    Chat {
        /// Maps with at least `role`, and whatever else the template reads.
        messages: Vec<Value>,
        /// Tool descriptions, or none.
        tools: Value,
    },
    /// Running text.
    Text(String),
    /// Tokens made elsewhere.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// For each token whether it is a target; absent: all of them.
        loss_mask: Option<Vec<bool>>,
    },
}

impl RecordBody {
    /// Whether the assistant has spoken last.
    pub(crate) fn ends_with_answer(&self) -> bool {
        match self {
            Self::Chat { messages, .. } => messages
                .last()
                .and_then(|message| message.get_attr("role").ok())
                .is_some_and(|role| role.as_str() == Some("assistant")),
            _ => false,
        }
    }
}

/// Every field that a form has; `--column` may give any of them another name.
pub(crate) const FIELDS: [&str; 12] = [
    "text",
    "messages",
    "conversations",
    "tools",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "input_ids",
    "loss_mask",
    "response_by",
];

/// What every refusal of a record says.
pub(crate) const FORMS: &str = "a record is a JSON object (or a row) of one of these forms: \
    instruction, input, output (Alpaca); \
    messages: [{role, content}, ...], or conversations: [{from, value}, ...] (chat); \
    prompt, completion; \
    text; \
    input_ids, loss_mask (tokens). \
    Other names: --column FIELD=NAME";

/// Why a record can't be used, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) message: String,
    pub(crate) hint: String,
}

impl Problem {
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// The same at a place within the record.
    pub(crate) fn at(self, place: impl std::fmt::Display) -> Self {
        Self::new(format!("{place}: {}", self.message), self.hint)
    }
}

/// Reads the JSON of a record.
pub(crate) fn parse_json(json: &str) -> Result<Value, Problem> {
    // Some editors begin a file with a byte-order mark. A line's end would be taken for a control character in a text that
    // is cut off there.
    let json = json.trim_start_matches('\u{feff}').trim_end();
    serde_json::from_str(json).map_err(|error| not_json(&error))
}

/// What is wrong with a record of one line: the parser's own line number would be taken for the file's.
pub(crate) fn not_json(error: &serde_json::Error) -> Problem {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    let place = match (error.is_eof(), error.column()) {
        (true, _) => " at the line's end".to_owned(),
        (false, column) => format!(" at column {column}"),
    };
    Problem::new(
        format!("not JSON: {what}{place}"),
        "a record is one JSON object a line; NaN and Infinity are no values",
    )
}

/// Reads a record.
pub(crate) fn parse_record(record: &Value, options: &DataOptions) -> Result<RecordBody, Problem> {
    if record.kind() != ValueKind::Map {
        return Err(Problem::new("not a JSON object", FORMS));
    }
    let record = Fields { record, options };
    let parse: fn(&Fields<'_>) -> Result<RecordBody, String> = match record.form() {
        Some("input_ids") => parse_tokens,
        Some("messages") => parse_messages,
        Some("conversations") => parse_conversations,
        Some("instruction") => parse_instruction,
        Some("prompt") => parse_completion,
        Some(_) => |record| record.text("text", Need::Filled).map(RecordBody::Text),
        None => {
            return Err(Problem::new(
                format!("a record of unknown form ({})", record.names()),
                FORMS,
            ));
        }
    };
    parse(&record).map_err(|message| Problem::new(message, FORMS))
}

/// The conversation in a record whose other fields are not looked at; `None` where it holds none.
pub(crate) fn message_fields(
    record: &serde_json::Map<String, serde_json::Value>,
) -> Result<Option<RecordBody>, Problem> {
    let fields: serde_json::Map<String, serde_json::Value> = ["messages", "conversations", "tools"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), record.get(*name)?.clone())))
        .collect();
    let is_set = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    if !is_set("messages") && !is_set("conversations") {
        return Ok(None);
    }
    let fields: Value = serde_json::from_value(fields.into())
        .map_err(|error| Problem::new(format!("not a conversation ({error})"), FORMS))?;
    parse_record(&fields, &DataOptions::default()).map(Some)
}

/// What a record's `response_by` adds to its source: a cache tells the student's own responses, which `distillm-2`
/// treats apart, by the `#student` at the end of theirs.
pub(crate) fn response_mark(
    record: &Value,
    options: &DataOptions,
) -> Result<&'static str, Problem> {
    match (Fields { record, options }).get("response_by") {
        None => Ok(""),
        Some(by) => match by.as_str() {
            Some("teacher") => Ok(""),
            Some("student") => Ok("#student"),
            _ => Err(Problem::new(
                format!("`response_by` is {by}, neither \"teacher\" nor \"student\""),
                FORMS,
            )),
        },
    }
}

/// The fields by which a form is known; of several the first counts, those named by `--column` before the others.
const FORM_FIELDS: [&str; 6] = [
    "input_ids",
    "messages",
    "conversations",
    "instruction",
    "prompt",
    "text",
];

/// Whether a text may be absent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Filled,
    Optional,
}

struct Fields<'a> {
    record: &'a Value,
    options: &'a DataOptions,
}

impl Fields<'_> {
    /// The value of a field; null counts as absent.
    fn get(&self, field: &str) -> Option<Value> {
        let value = self.record.get_attr(self.options.key(field)).ok()?;
        (!value.is_undefined() && !value.is_none()).then_some(value)
    }

    fn form(&self) -> Option<&'static str> {
        let named = |field: &&str| self.options.columns.contains_key(*field);
        let of = |choose: &dyn Fn(&&str) -> bool| {
            FORM_FIELDS
                .into_iter()
                .filter(|field| choose(field))
                .find(|field| self.get(field).is_some())
        };
        of(&named).or_else(|| of(&|field| !named(field)))
    }

    /// The field as the user knows it.
    fn name<'f>(&'f self, field: &'f str) -> &'f str {
        self.options.key(field)
    }

    fn names(&self) -> String {
        let names: Vec<String> = self
            .record
            .try_iter()
            .into_iter()
            .flatten()
            .take(12)
            .map(|name| name.to_string())
            .collect();
        if names.is_empty() {
            return "it has no field".to_owned();
        }
        format!("its fields: {}", names.join(", "))
    }

    fn text(&self, field: &str, need: Need) -> Result<String, String> {
        let name = self.name(field);
        let Some(value) = self.get(field) else {
            return match need {
                Need::Optional => Ok(String::new()),
                Need::Filled => Err(format!("the record has no `{name}`")),
            };
        };
        let text = value
            .as_str()
            .ok_or_else(|| format!("the field `{name}` is not a string"))?;
        if need == Need::Filled && text.trim().is_empty() {
            return Err(format!("the field `{name}` is empty"));
        }
        Ok(text.to_owned())
    }

    fn list(&self, field: &str) -> Result<Vec<Value>, String> {
        let name = self.name(field);
        let value = self.get(field).unwrap_or_default();
        if value.kind() != ValueKind::Seq {
            return Err(format!("`{name}` is not a list"));
        }
        Ok(value.try_iter().into_iter().flatten().collect())
    }

    fn filled_list(&self, field: &str) -> Result<Vec<Value>, String> {
        let list = self.list(field)?;
        if list.is_empty() {
            return Err(format!("`{}` is empty", self.name(field)));
        }
        Ok(list)
    }

    /// What the template gets as `tools`: none where there are none.
    fn tools(&self) -> Value {
        self.get("tools").unwrap_or_else(|| Value::from(()))
    }
}

fn parse_instruction(record: &Fields<'_>) -> Result<RecordBody, String> {
    Ok(RecordBody::Instruction {
        instruction: record.text("instruction", Need::Filled)?,
        input: record.text("input", Need::Optional)?,
        output: record.text("output", Need::Filled)?,
    })
}

fn parse_completion(record: &Fields<'_>) -> Result<RecordBody, String> {
    Ok(RecordBody::Completion {
        prompt: record.text("prompt", Need::Filled)?,
        completion: record.text("completion", Need::Filled)?,
    })
}

fn parse_messages(record: &Fields<'_>) -> Result<RecordBody, String> {
    let messages = record.filled_list("messages")?;
    for (index, message) in messages.iter().enumerate() {
        let of = || format!("message {} of `{}`", index + 1, record.name("messages"));
        let has = |key: &str| {
            message
                .get_attr(key)
                .is_ok_and(|value| !value.is_undefined() && !value.is_none())
        };
        if !has("role") {
            return Err(format!("{} has no `role`", of()));
        }
        if !has("content") && !has("tool_calls") {
            return Err(format!("{} has no `content`", of()));
        }
    }
    Ok(RecordBody::Chat {
        messages,
        tools: record.tools(),
    })
}

/// ShareGPT's names of the speakers.
fn parse_conversations(record: &Fields<'_>) -> Result<RecordBody, String> {
    let turns = record.filled_list("conversations")?;
    let mut messages = Vec::with_capacity(turns.len());
    for (index, turn) in turns.iter().enumerate() {
        let of = || format!("turn {} of `{}`", index + 1, record.name("conversations"));
        let text = |key: &str| {
            let value = turn.get_attr(key).ok();
            value.and_then(|value| value.as_str().map(str::to_owned))
        };
        // Some files of this form use the names of the chat form inside.
        let from = text("from").or_else(|| text("role"));
        let from = from.ok_or_else(|| format!("{} has no `from`", of()))?;
        let content = text("value").or_else(|| text("content"));
        let content = content.ok_or_else(|| format!("{} has no `value`", of()))?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "model" | "bing" | "bard" => "assistant",
            "system" => "system",
            "tool" | "function" | "observation" | "function_response" => "tool",
            other => return Err(format!("{} is from an unknown speaker `{other}`", of())),
        };
        messages.push(message(role, content));
    }
    Ok(RecordBody::Chat {
        messages,
        tools: record.tools(),
    })
}

/// A message as a template takes it.
pub(crate) fn message(role: &str, content: String) -> Value {
    Value::from_pairs([
        ("role", Value::from(role)),
        ("content", Value::from(content)),
    ])
}

fn parse_tokens(record: &Fields<'_>) -> Result<RecordBody, String> {
    let (ids_name, mask_name) = (record.name("input_ids"), record.name("loss_mask"));
    let input_ids: Vec<u32> = record
        .filled_list("input_ids")?
        .iter()
        .map(|id| {
            id.as_i64()
                .filter(|_| id.is_integer())
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| format!("`{ids_name}` holds {id}, which is no token id"))
        })
        .collect::<Result<_, _>>()?;
    if record.get("loss_mask").is_none() {
        return Ok(RecordBody::Tokens {
            input_ids,
            loss_mask: None,
        });
    }
    let loss_mask: Vec<bool> = record
        .list("loss_mask")?
        .iter()
        .map(|flag| match (flag.kind(), flag.as_i64()) {
            (ValueKind::Bool, _) => Ok(flag.is_true()),
            (ValueKind::Number, Some(0)) => Ok(false),
            (ValueKind::Number, Some(1)) => Ok(true),
            _ => Err(format!(
                "`{mask_name}` holds {flag}, which is neither 0 nor 1"
            )),
        })
        .collect::<Result<_, _>>()?;
    if loss_mask.len() != input_ids.len() {
        return Err(format!(
            "`{mask_name}` has {} entries for {} token ids",
            loss_mask.len(),
            input_ids.len()
        ));
    }
    Ok(RecordBody::Tokens {
        input_ids,
        loss_mask: Some(loss_mask),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, options: &DataOptions) -> Result<RecordBody, Problem> {
        parse_record(&parse_json(json)?, options)
    }

    fn parse(json: &str) -> RecordBody {
        read(json, &DataOptions::default()).unwrap()
    }

    fn refused(json: &str, expected: &str) {
        let problem = read(json, &DataOptions::default()).unwrap_err();
        assert!(
            problem.message.contains(expected),
            "{} lacks {expected}",
            problem.message
        );
        if !problem.message.starts_with("not JSON") {
            assert_eq!(problem.hint, FORMS);
        }
    }

    #[test]
    fn a_line_that_is_cut_off_in_a_text_ends_too_early() {
        refused(
            "{\"text\": \"abc\r\n",
            "EOF while parsing a string at the line's end",
        );
    }

    #[test]
    fn every_form_is_known_by_its_fields() {
        assert_eq!(
            parse("{\"instruction\":\"a\",\"output\":\"b\",\"extra\":1,\"text\":\"whole prompt\"}"),
            RecordBody::Instruction {
                instruction: "a".into(),
                input: String::new(),
                output: "b".into()
            }
        );
        assert_eq!(
            parse("{\"prompt\":\"a\",\"completion\":\" b\"}"),
            RecordBody::Completion {
                prompt: "a".into(),
                completion: " b".into()
            }
        );
        assert_eq!(
            parse("{\"input_ids\":[1,2],\"loss_mask\":[0,true]}"),
            RecordBody::Tokens {
                input_ids: vec![1, 2],
                loss_mask: Some(vec![false, true])
            }
        );
        assert_eq!(parse("{\"text\":\"x\"}"), RecordBody::Text("x".into()));
        let chat = RecordBody::Chat {
            messages: vec![
                message("user", "hi".into()),
                message("assistant", "hello".into()),
            ],
            tools: Value::from(()),
        };
        assert_eq!(
            parse(
                "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":\"hello\"}],\"tools\":null}"
            ),
            chat
        );
        assert_eq!(
            parse(
                "{\"conversations\":[{\"from\":\"human\",\"value\":\"hi\"},{\"from\":\"gpt\",\"value\":\"hello\"}]}"
            ),
            chat
        );
    }

    #[test]
    fn the_students_own_responses_are_marked() {
        let mark = |json: &str| response_mark(&parse_json(json).unwrap(), &DataOptions::default());
        assert_eq!(mark("{\"input_ids\":[1,2]}"), Ok(""));
        assert_eq!(mark("{\"response_by\":\"teacher\"}"), Ok(""));
        assert_eq!(mark("{\"response_by\":\"student\"}"), Ok("#student"));
        let problem = mark("{\"response_by\":\"me\"}").unwrap_err();
        assert!(problem.message.contains("neither \"teacher\" nor"));
    }

    #[test]
    fn columns_may_have_other_names() {
        let mut options = DataOptions::default();
        options
            .set_columns(&["text=body".into(), "output=answer".into()])
            .unwrap();
        let parse = |json| read(json, &options).unwrap();
        // A named column decides the form even where another form is there too.
        assert_eq!(
            parse("{\"body\":\"x\",\"instruction\":\"y\",\"answer\":\"z\"}"),
            RecordBody::Text("x".into())
        );
        assert_eq!(
            parse("{\"instruction\":\"y\",\"answer\":\"z\"}"),
            RecordBody::Instruction {
                instruction: "y".into(),
                input: String::new(),
                output: "z".into()
            }
        );
        for wrong in ["text", "text=", "words=x", "output=again"] {
            let error = options.set_columns(&[wrong.into()]).unwrap_err();
            assert!(error.hint().unwrap().contains("--column"), "{error}");
        }
    }

    #[test]
    fn bad_records_are_refused() {
        refused("{\"instruction\":\"a\"}", "the record has no `output`");
        refused(
            "{\"instruction\":\"a\",\"output\":\" \"}",
            "`output` is empty",
        );
        refused(
            "{\"instruction\":\"a\",\"output\":7}",
            "`output` is not a string",
        );
        refused("[1]", "not a JSON object");
        refused("{oops", "not JSON");
        refused("{}", "no field");
        refused("{\"a\":1,\"b\":2}", "unknown form (its fields: a, b)");
        refused("{\"input_ids\":[]}", "`input_ids` is empty");
        refused("{\"input_ids\":[-1]}", "no token id");
        refused("{\"input_ids\":[4294967296]}", "no token id");
        refused(
            "{\"input_ids\":[1,2],\"loss_mask\":[1]}",
            "1 entries for 2 token ids",
        );
        refused("{\"input_ids\":[1],\"loss_mask\":[2]}", "neither 0 nor 1");
        refused("{\"messages\":\"hi\"}", "`messages` is not a list");
        refused("{\"messages\":[]}", "`messages` is empty");
        refused(
            "{\"messages\":[{\"content\":\"x\"}]}",
            "message 1 of `messages` has no `role`",
        );
        refused(
            "{\"messages\":[{\"role\":\"user\",\"content\":null}]}",
            "no `content`",
        );
        refused(
            "{\"conversations\":[{\"from\":\"cat\",\"value\":\"x\"}]}",
            "unknown speaker `cat`",
        );
    }
}
