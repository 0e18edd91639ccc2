//! Chat templates as Hugging Face transformers renders them: Jinja2 with its environment (blocks trimmed, loop
//! controls, `raise_exception`, `strftime_now`, its own `tojson`), on minijinja.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::NaiveDate;
use chrono::format::{Item, StrftimeItems};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, escape_formatter};

/// The places that the markers of a `{% generation %}` block leave in the rendered text. They are private-use
/// characters of the last plane, which no text has a reason to hold.
pub(crate) const GENERATION_BEGINS: char = '\u{10FFF0}';
pub(crate) const GENERATION_ENDS: char = '\u{10FFF1}';

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and so on, as the tokenizer's configuration names them.
    special_tokens: BTreeMap<String, Value>,
    asked_for_date: Arc<AtomicBool>,
    was_used: AtomicBool,
    /// Whether the template itself marks what the assistant generates.
    pub(crate) marks_generation: bool,
    /// blake3 of the source, hexadecimal.
    pub(crate) digest: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template. `config` is the tokenizer's configuration, `date` what `strftime_now` tells.
    pub(crate) fn new(
        source: &str,
        config: &serde_json::Value,
        date: NaiveDate,
    ) -> Result<Self, String> {
        let asked_for_date = Arc::new(AtomicBool::new(false));
        let (text, marks_generation) = with_generation_marks(source);
        let mut environment = environment(date, &asked_for_date)?;
        environment
            .add_template_owned(NAME, text)
            .map_err(|error| one_line(&error))?;
        Ok(Self {
            environment,
            special_tokens: special_tokens(config),
            asked_for_date,
            was_used: AtomicBool::new(false),
            marks_generation,
            digest: blake3::hash(source.as_bytes()).to_hex().to_string(),
        })
    }

    /// The text of a conversation, with the generation marks still in it.
    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        self.was_used.store(true, Ordering::Relaxed);
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), Value::from(messages.to_vec()));
        context.insert("tools".into(), tools.clone());
        context.insert("documents".into(), Value::from(()));
        context.insert(
            "add_generation_prompt".into(),
            Value::from(add_generation_prompt),
        );
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| one_line(&error))
    }

    /// Whether anything has been rendered.
    pub(crate) fn was_used(&self) -> bool {
        self.was_used.load(Ordering::Relaxed)
    }

    /// Whether a rendering has asked for today's date.
    pub(crate) fn asked_for_date(&self) -> bool {
        self.asked_for_date.load(Ordering::Relaxed)
    }
}

fn environment(
    date: NaiveDate,
    asked_for_date: &Arc<AtomicBool>,
) -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| one_line(&error))?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match as_float(value) {
        Some(number) => Ok(out.write_str(&float(number))?),
        None => escape_formatter(out, state, value),
    });
    environment.add_filter("string", |value: &Value| {
        as_float(value).map_or_else(|| value.to_string(), float)
    });
    // Nothing can be looped over that is none.
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && (value.kind() == ValueKind::String || value.try_iter().is_ok())
    });
    environment.add_filter("tojson", to_json);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    let asked = Arc::clone(asked_for_date);
    environment.add_function("strftime_now", move |format: String| {
        asked.store(true, Ordering::Relaxed);
        let items: Vec<Item<'_>> = StrftimeItems::new(&format).collect();
        if items.contains(&Item::Error) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("`{format}` is no date format"),
            ));
        }
        let midnight = date.and_time(chrono::NaiveTime::MIN);
        let mut text = String::new();
        write!(text, "{}", midnight.format_with_items(items.iter()))?;
        Ok(text)
    });
    Ok(environment)
}

/// The entries `*_token` of the tokenizer's configuration: a string, or an object with `content`.
fn special_tokens(config: &serde_json::Value) -> BTreeMap<String, Value> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), Value::from(text)))
        })
        .collect()
}

/// Replaces `{% generation %}` and `{% endgeneration %}` by blocks that print a mark, with the same trimming of
/// whitespace on both sides.
fn with_generation_marks(source: &str) -> (String, bool) {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}").map(|end| end + 2) else {
            break;
        };
        let tag = &rest[open..open + length];
        let inner = &tag[2..tag.len() - 2];
        let left = if inner.starts_with('-') { "-" } else { "" };
        let right = if inner.ends_with('-') { "-" } else { "" };
        text.push_str(&rest[..open]);
        let mark = match inner.trim_matches('-').trim() {
            "generation" => Some(("if true", GENERATION_BEGINS)),
            "endgeneration" => Some(("endif", GENERATION_ENDS)),
            _ => None,
        };
        match mark {
            Some((word, mark)) => {
                found = true;
                // The mark stands between two tags, so that the trimming of each side meets a tag as before.
                let _ = write!(text, "{{%{left} {word} %}}{mark}{{% {word} {right}%}}");
            }
            None => text.push_str(tag),
        }
        rest = &rest[open + length..];
    }
    text.push_str(rest);
    (text, found)
}

fn one_line(error: &Error) -> String {
    let mut text = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    if error.kind() != ErrorKind::InvalidOperation
        && let Some(line) = error.line()
    {
        let _ = write!(text, " (line {line} of the template)");
    }
    text
}

/// `json.dumps` as transformers calls it: nothing is escaped for HTML, and keys keep their order.
#[expect(
    clippy::needless_pass_by_value,
    reason = "what a filter's arguments are"
)]
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // Python drops the space after the comma where it breaks the line there.
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let style = Dumps {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item: &item,
        key: &key,
    };
    kwargs.assert_all_used()?;
    let mut text = String::new();
    style.write(&mut text, value, 0)?;
    Ok(text)
}

/// The arguments of `json.dumps`.
struct Dumps<'a> {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
}

impl Dumps<'_> {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool if value.is_true() => out.push_str("true"),
            ValueKind::Bool => out.push_str("false"),
            ValueKind::Number => match as_float(value) {
                Some(number) => out.push_str(&float(number)),
                None => write!(out, "{value}")?,
            },
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, ['[', ']'], &items, depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list(out, ['{', '}'], &keys, depth, |out, key| {
                    self.string(out, &key.to_string())?;
                    out.push_str(self.key);
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("the template writes a value of kind {kind} as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn list(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write_item: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(self.item);
            }
            line(out, depth + 1);
            write_item(out, item)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) -> Result<(), Error> {
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                letter if letter < ' ' || (self.ensure_ascii && !letter.is_ascii()) => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}")?;
                    }
                }
                letter => out.push(letter),
            }
        }
        out.push('"');
        Ok(())
    }
}

fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float
        .then(|| f64::try_from(value.clone()).ok())
        .flatten()
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if value < 0.0 { "-" } else { "" });
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &str) -> Result<String, String> {
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let date = NaiveDate::from_ymd_opt(2026, 11, 26).unwrap();
        let template = ChatTemplate::new(source, &config, date)?;
        let messages: Vec<Value> = serde_json::from_str(messages).unwrap();
        template.render(&messages, &Value::from(()), false)
    }

    fn check(source: &str, messages: &str, expected: &str) {
        assert_eq!(render(source, messages).unwrap(), expected, "{source}");
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = r#"[{"b":1,"a":[true,null,1.5,1e-5,"é\"'\n"]}]"#;
        check(
            "{{ messages[0] | tojson }}",
            value,
            r#"{"b": 1, "a": [true, null, 1.5, 1e-05, "é\"'\n"]}"#,
        );
        check(
            "{{ messages[0] | tojson(indent=2, ensure_ascii=true) }}",
            r#"[{"b":[],"a":["é"]}]"#,
            "{\n  \"b\": [],\n  \"a\": [\n    \"\\u00e9\"\n  ]\n}",
        );
        check(
            "{{ [true, none, 'it', 1.5] }}{{ none }}{{ undefined_name }}{{ messages[0] }}{{ 2.0 | string }}",
            "[1e-7]",
            "[True, None, 'it', 1.5]None1e-072.0",
        );
    }

    #[test]
    fn the_environment_is_that_of_transformers() {
        check(
            "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.strip().title() }};\n{% endfor %}\n",
            r#"["a"," b c ","d"]"#,
            "B C;\nD;\n",
        );
        check("{{ bos_token + eos_token }}", "[]", "<s></s>");
        check("{{ strftime_now('%d %b %Y') }}", "[]", "26 Nov 2026");
        let refused = render("{{ raise_exception('roles must alternate') }}", "[]").unwrap_err();
        assert_eq!(refused, "roles must alternate");
        assert!(render("{% if %}", "[]").unwrap_err().contains("line 1"));
        assert!(render("{{ strftime_now('%Q') }}", "[]").is_err());
    }

    #[test]
    fn generation_blocks_leave_marks_and_change_nothing_else() {
        let of = |begin: &str, end: &str| {
            format!(
                "{{% for m in messages %}}\n  x\n  {begin}\n  y{{{{ m }}}}\n  {end}\nz\n{{% endfor %}}\n"
            )
        };
        for (left, right) in [("", ""), ("-", ""), ("", "-"), ("-", "-")] {
            let marked = render(
                &of(
                    &format!("{{%{left} generation {right}%}}"),
                    &format!("{{%{left} endgeneration {right}%}}"),
                ),
                "[1,2]",
            )
            .unwrap();
            let plain = render(
                &of(
                    &format!("{{%{left} if true {right}%}}"),
                    &format!("{{%{left} endif {right}%}}"),
                ),
                "[1,2]",
            )
            .unwrap();
            let bare: String = marked
                .chars()
                .filter(|letter| ![GENERATION_BEGINS, GENERATION_ENDS].contains(letter))
                .collect();
            assert_eq!(bare, plain, "{left} {right}");
            assert_eq!(marked.matches(GENERATION_BEGINS).count(), 2);
        }
    }
}
