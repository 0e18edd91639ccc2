//! Lines of JSON, one or more sequences each.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Reader;
use super::chat::Texts;
use super::foreign::{Foreign, NOTHING, Place, Row, Values};
use crate::data::{BYTE_ORDER_MARK, Problem, READ_BYTES, Stream, file_name, not_json};
use crate::{Error, Result};

/// A JSON object's members.
pub(crate) type Fields = Map<String, Value>;

/// A sequence as a record describes it.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) loss_mask: Vec<bool>,
    /// Row t is about token t + 1; shorter than the tokens where the end is unknown.
    pub(crate) rows: Vec<Option<Row>>,
}

/// What a format makes of one record.
pub(crate) type Interpret = fn(&Value, &Texts<'_>) -> std::result::Result<Vec<Parsed>, Problem>;

/// Reads the lines of files one after the other.
pub(crate) struct JsonlReader<'a> {
    interpret: Interpret,
    texts: &'a Texts<'a>,
    lines: Lines,
    waiting: VecDeque<Foreign>,
    teacher: Option<String>,
}

/// The lines of files that are not empty.
struct Lines {
    files: VecDeque<PathBuf>,
    current: Option<(PathBuf, BufReader<Stream>)>,
    number: usize,
    /// Of the files that are done.
    bytes: u64,
}

impl Lines {
    fn new(files: &[PathBuf]) -> Self {
        Self {
            files: files.iter().cloned().collect(),
            current: None,
            number: 0,
            bytes: 0,
        }
    }

    /// The next line, and where it is.
    fn next(&mut self) -> Result<Option<(Place, Vec<u8>)>> {
        loop {
            if self.current.is_none() {
                let Some(path) = self.files.pop_front() else {
                    return Ok(None);
                };
                let stream = BufReader::with_capacity(READ_BYTES, Stream::open(&path)?);
                self.current = Some((path, stream));
                self.number = 0;
            }
            let Some((path, file)) = &mut self.current else {
                return Ok(None);
            };
            let mut line = Vec::new();
            let read = file
                .read_until(b'\n', &mut line)
                .map_err(|source| Error::DataFile {
                    path: path.clone(),
                    source,
                })?;
            if read == 0 {
                self.bytes += file.get_ref().bytes_done();
                self.current = None;
                continue;
            }
            self.number += 1;
            if !line.trim_ascii().is_empty() {
                let place = Place {
                    path: path.clone(),
                    place: format!("line {}", self.number),
                };
                return Ok(Some((place, line)));
            }
        }
    }
}

impl<'a> JsonlReader<'a> {
    pub(crate) fn new(files: &[PathBuf], interpret: Interpret, texts: &'a Texts<'a>) -> Self {
        Self {
            interpret,
            texts,
            lines: Lines::new(files),
            waiting: VecDeque::new(),
            teacher: None,
        }
    }
}

impl Reader for JsonlReader<'_> {
    fn next(&mut self, _values: bool) -> Result<Option<Foreign>> {
        loop {
            if let Some(sequence) = self.waiting.pop_front() {
                return Ok(Some(sequence));
            }
            let Some((place, line)) = self.lines.next()? else {
                return Ok(None);
            };
            let number = self.lines.number;
            let record = parse(&line).map_err(|problem| place.error(problem))?;
            if self.teacher.is_none() {
                self.teacher = record
                    .get("model")
                    .and_then(Value::as_str)
                    .map(str::to_owned);
            }
            let parsed =
                (self.interpret)(&record, self.texts).map_err(|problem| place.error(problem))?;
            let name = file_name(&place.path);
            let several = parsed.len() > 1;
            for (index, parsed) in parsed.into_iter().enumerate() {
                let source = if several {
                    format!("{name}:{number}.{}", index + 1)
                } else {
                    format!("{name}:{number}")
                };
                self.waiting.push_back(Foreign {
                    source,
                    place: place.clone(),
                    token_ids: parsed.token_ids,
                    loss_mask: parsed.loss_mask,
                    values: Values::Kept(parsed.rows),
                });
            }
        }
    }

    fn bytes_read(&self) -> u64 {
        let current = self.lines.current.as_ref();
        self.lines.bytes + current.map_or(0, |(_, file)| file.get_ref().bytes_done())
    }

    fn teacher(&self) -> Option<String> {
        self.teacher.clone()
    }
}

/// The first record of a file, to tell its format by; `None` where the file is empty.
pub(crate) fn first_record(path: &Path) -> Result<Option<Value>> {
    let Some((place, line)) = Lines::new(&[path.to_owned()]).next()? else {
        return Ok(None);
    };
    parse(&line)
        .map(Some)
        .map_err(|problem| place.error(problem))
}

/// Python's JSON writes −inf as `-Infinity`, which is no JSON; it stands for "no probability", as null does.
fn parse(line: &[u8]) -> std::result::Result<Value, Problem> {
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
    let line = line.trim_ascii_end();
    match serde_json::from_slice(line) {
        Ok(value) => Ok(value),
        Err(error) => {
            let without = replace_infinities(line);
            serde_json::from_slice(&without).map_err(|_| not_json(&error))
        }
    }
}

fn replace_infinities(line: &[u8]) -> Vec<u8> {
    const INFINITY: &[u8] = b"-Infinity";
    let mut out = Vec::with_capacity(line.len());
    let (mut in_string, mut at) = (false, 0);
    while at < line.len() {
        if !in_string && line[at..].starts_with(INFINITY) {
            out.extend_from_slice(b"null");
            at += INFINITY.len();
            continue;
        }
        let byte = line[at];
        out.push(byte);
        at += 1;
        if in_string && byte == b'\\' && at < line.len() {
            out.push(line[at]);
            at += 1;
        } else if byte == b'"' {
            in_string = !in_string;
        }
    }
    out
}

/// A list of token ids.
pub(crate) fn ids(value: &Value, name: &str) -> std::result::Result<Vec<u32>, Problem> {
    ids_as(value, name, Keys::Ids)
}

/// A list of token ids, or of strings that stand for them.
pub(crate) fn ids_as(
    value: &Value,
    name: &str,
    keys: Keys,
) -> std::result::Result<Vec<u32>, Problem> {
    let wrong = |what: String| Problem::new(what, "token ids are a list of whole numbers");
    let list = value
        .as_array()
        .ok_or_else(|| wrong(format!("`{name}` is not a list")))?;
    list.iter()
        .map(|id| {
            token_id(id, keys)
                .ok_or_else(|| wrong(format!("`{name}` holds {id}, which is no token id")))
        })
        .collect()
}

/// What strings that stand for tokens are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// Ids: `5`, or `token_id:5`.
    Ids,
    /// Texts, where `5` is a digit; only `token_id:5` is an id.
    Names,
}

/// A number, or a string that stands for an id.
pub(crate) fn token_id(value: &Value, keys: Keys) -> Option<u32> {
    match value {
        Value::Number(number) => number.as_u64().and_then(|id| u32::try_from(id).ok()),
        Value::String(text) => match text.strip_prefix("token_id:") {
            Some(id) => id.parse().ok(),
            None if keys == Keys::Ids => text.parse().ok(),
            None => None,
        },
        _ => None,
    }
}

/// `loss_mask` or `labels` of a record, for T tokens; `None` where it has neither.
pub(crate) fn targets(
    fields: &Fields,
    tokens: usize,
) -> std::result::Result<Option<Vec<bool>>, Problem> {
    for (name, is_labels) in [("loss_mask", false), ("labels", true)] {
        let Some(list) = fields.get(name).filter(|value| !value.is_null()) else {
            continue;
        };
        let hint = if is_labels {
            "`labels` holds a token id for each token, or -100 where it is no target"
        } else {
            "`loss_mask` holds 1 for each token that is a target, else 0"
        };
        let list = list
            .as_array()
            .ok_or_else(|| Problem::new(format!("`{name}` is not a list"), hint))?;
        if list.len() != tokens {
            return Err(Problem::new(
                format!("`{name}` has {} entries for {tokens} token ids", list.len()),
                hint,
            ));
        }
        let flags = list.iter().map(|flag| match (flag, is_labels) {
            (Value::Bool(flag), false) => Ok(*flag),
            (Value::Number(number), false) if matches!(number.as_u64(), Some(0 | 1)) => {
                Ok(number.as_u64() == Some(1))
            }
            (Value::Number(number), true) if number.is_i64() || number.is_u64() => {
                Ok(number.as_i64() != Some(-100))
            }
            (other, _) => Err(Problem::new(format!("`{name}` holds {other}"), hint)),
        });
        return flags.collect::<std::result::Result<_, _>>().map(Some);
    }
    Ok(None)
}

/// The entries of one position in any of the forms that servers write: `{"5": {"logprob": …, "rank": …}}`,
/// `{"token_id:5": …}`, `[[logprob, 5, text], …]`, `[{"token": "token_id:5", "logprob": …}, …]`; `keys` are those of
/// objects. `None` for null and for a position without any probability.
pub(crate) fn entries(value: &Value, keys: Keys) -> std::result::Result<Option<Row>, Problem> {
    let entries: Vec<(u32, Option<f32>, Option<u64>)> = match value {
        Value::Null => return Ok(None),
        Value::Object(fields) => fields
            .iter()
            .map(|(id, value)| {
                let id = token_id(&Value::String(id.clone()), keys).ok_or_else(|| no_id(id))?;
                match value {
                    Value::Object(entry) => Ok((
                        id,
                        number(entry.get("logprob"))?,
                        entry.get("rank").and_then(Value::as_u64),
                    )),
                    value => Ok((id, number(Some(value))?, None)),
                }
            })
            .collect::<std::result::Result<_, Problem>>()?,
        Value::Array(list) => list
            .iter()
            .map(|entry| match entry {
                Value::Array(parts) if parts.len() >= 2 => {
                    let id = token_id(&parts[1], Keys::Ids).ok_or_else(|| no_id(&parts[1].to_string()))?;
                    Ok((id, number(parts.first())?, None))
                }
                Value::Object(fields) => {
                    let id = ["token_id", "id", "token"].iter().find_map(|name| fields.get(*name));
                    let id = id.and_then(|id| token_id(id, Keys::Names));
                    let id = id.ok_or_else(|| no_id(&entry.to_string()))?;
                    Ok((id, number(fields.get("logprob"))?, fields.get("rank").and_then(Value::as_u64)))
                }
                other => Err(Problem::new(
                    format!("an entry is {other}"),
                    "entries are {token id: log-probability}, [log-probability, token id] or {token, logprob}",
                )),
            })
            .collect::<std::result::Result<_, _>>()?,
        other => {
            return Err(Problem::new(
                format!("the values of a position are {other}"),
                "a position is a list or an object of entries, or null",
            ));
        }
    };
    // The token of the prompt comes with the largest ones, whatever its rank.
    let count = entries.len() as u64;
    let row: Row = entries
        .into_iter()
        .filter(|(_, _, rank)| rank.is_none_or(|rank| rank <= count))
        .filter_map(|(id, value, _)| Some((id, value.filter(|value| *value > NOTHING)?)))
        .collect();
    Ok((!row.is_empty()).then_some(row))
}

fn no_id(text: &str) -> Problem {
    Problem::new(
        format!("`{text}` is no token id"),
        "have the server return ids: vLLM with --return-tokens-as-token-ids, SGLang always does",
    )
}

/// A number; `None` for null, which stands for −inf.
pub(crate) fn number(value: Option<&Value>) -> std::result::Result<Option<f32>, Problem> {
    match value {
        Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => Ok(number.as_f64().map(|number| number as f32)),
        Some(other) => Err(Problem::new(
            format!("a log-probability is {other}"),
            "log-probabilities are numbers",
        )),
        None => Err(Problem::new(
            "an entry has no `logprob`",
            "every entry needs one",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn minus_infinity_is_no_probability() {
        let value = parse(br#"{"a": [-Infinity, 1], "b": "-Infinity \" -Infinity"}"#).unwrap();
        assert_eq!(
            value,
            json!({"a": [null, 1], "b": "-Infinity \" -Infinity"})
        );
        assert!(
            parse(br#"{"a": NaN}"#)
                .unwrap_err()
                .message
                .starts_with("not JSON")
        );
        assert!(parse(br#"{"a": Infinity}"#).is_err());
    }

    #[test]
    fn every_form_of_entries_is_read() {
        let expected = Some(vec![(5, -0.5), (7, -2.0)]);
        for form in [
            json!({"5": -0.5, "7": -2.0}),
            json!({"5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}, "7": {"logprob": -2.0, "rank": 2}}),
            json!({"token_id:5": -0.5, "token_id:7": -2.0}),
            json!([[-0.5, 5, "a"], [-2.0, 7, null]]),
            json!([{"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:7", "logprob": -2.0}]),
            json!([{"token_id": 5, "logprob": -0.5}, {"token_id": 7, "logprob": -2.0}]),
        ] {
            assert_eq!(entries(&form, Keys::Ids).unwrap(), expected, "{form}");
        }
        assert_eq!(entries(&json!(null), Keys::Ids).unwrap(), None);
        assert_eq!(entries(&json!({}), Keys::Ids).unwrap(), None);
        assert_eq!(entries(&json!([[null, 5, "a"]]), Keys::Ids).unwrap(), None);
        for wrong in [
            json!(3),
            json!({"the": -1.0}),
            json!([[-1.0]]),
            json!({"5": "x"}),
            json!([{"token": "the", "logprob": -1.0}]),
        ] {
            assert!(entries(&wrong, Keys::Ids).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_token_of_digits_is_no_id() {
        let named = json!([{"token": "5", "logprob": -0.5}]);
        assert!(entries(&named, Keys::Ids).is_err());
        assert!(entries(&json!({"5": -0.5}), Keys::Names).is_err());
        let by_id = json!({"token_id:5": -0.5});
        assert_eq!(entries(&by_id, Keys::Names).unwrap(), Some(vec![(5, -0.5)]));
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert_eq!(
            parse(b"\xEF\xBB\xBF{\"a\": 1}\r\n").unwrap(),
            json!({"a": 1})
        );
    }

    #[test]
    fn a_prompt_token_of_low_rank_is_not_one_of_the_largest() {
        let form = json!({"5": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -2.0, "rank": 2}, "9": {"logprob": -8.0, "rank": 412}});
        assert_eq!(
            entries(&form, Keys::Ids).unwrap(),
            Some(vec![(5, -0.5), (7, -2.0)])
        );
        let third = json!({"5": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -2.0, "rank": 2}, "9": {"logprob": -2.5, "rank": 3}});
        assert_eq!(
            entries(&third, Keys::Ids).unwrap().map(|row| row.len()),
            Some(3)
        );
    }

    #[test]
    fn labels_and_masks_are_read() {
        let fields = |value: Value| value.as_object().cloned().unwrap();
        assert_eq!(
            targets(&fields(json!({"labels": [-100, 4, -100]})), 3).unwrap(),
            Some(vec![false, true, false])
        );
        assert_eq!(
            targets(&fields(json!({"loss_mask": [0, true, 1]})), 3).unwrap(),
            Some(vec![false, true, true])
        );
        assert_eq!(targets(&fields(json!({"labels": null})), 3).unwrap(), None);
        for wrong in [
            json!({"labels": [1]}),
            json!({"loss_mask": [0, 2, 1]}),
            json!({"labels": "no"}),
        ] {
            assert!(targets(&fields(wrong.clone()), 3).is_err(), "{wrong}");
        }
    }
}
