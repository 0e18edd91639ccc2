//! Data files: JSONL records in Alpaca's or in token-id form, and running text.

use std::io::BufRead;
use std::path::Path;

use caskd_formats::DataFile;
use serde_json::Value;

use crate::{Error, Result};

/// One record as it stands in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// File name and 1-based line: `train.jsonl:17`.
    pub source: String,
    /// The 1-based line, for messages.
    pub line: usize,
    /// What it holds.
    pub body: RecordBody,
}

/// The forms a record can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordBody {
    /// Alpaca's three fields.
    Instruction {
        /// The task.
        instruction: String,
        /// Its input; may be empty.
        input: String,
        /// The response to learn.
        output: String,
    },
    /// Tokens made elsewhere.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// For each token whether it is a target; all of them where the record has none.
        loss_mask: Vec<bool>,
    },
    /// A whole text file, to be cut into windows.
    Text(String),
}

const FORMS: &str = "a record is one JSON object a line with Alpaca's fields (instruction, input, output), or with input_ids and an optional loss_mask";

/// Reads one data file whole: its records and its identity (name, size, digest).
pub fn read_records(path: &Path) -> Result<(Vec<Record>, DataFile)> {
    let bytes = std::fs::read(path).map_err(|source| Error::DataFile {
        path: path.into(),
        source,
    })?;
    let name = path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    );
    let file = DataFile {
        name: name.clone(),
        bytes: bytes.len() as u64,
        digest: blake3::hash(&bytes).to_hex().to_string(),
    };
    let records = match path.extension().and_then(|ending| ending.to_str()) {
        Some("jsonl") => read_jsonl(path, &name, &bytes)?,
        Some("txt") => {
            let text = String::from_utf8(bytes).map_err(|error| Error::DataFile {
                path: path.into(),
                source: std::io::Error::new(std::io::ErrorKind::InvalidData, error.utf8_error()),
            })?;
            vec![Record {
                source: name,
                line: 1,
                body: RecordBody::Text(text),
            }]
        }
        _ => return Err(Error::DataKind { path: path.into() }),
    };
    Ok((records, file))
}

fn read_jsonl(path: &Path, name: &str, bytes: &[u8]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (index, line) in bytes.lines().enumerate() {
        let number = index + 1;
        let refuse = |problem: String, hint: &str| Error::Record {
            path: path.into(),
            line: number,
            problem,
            hint: hint.into(),
        };
        let line = line.map_err(|_| refuse("not UTF-8 text".into(), "save the file as UTF-8"))?;
        if line.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&line)
            .map_err(|error| refuse(format!("not JSON ({error})"), FORMS))?;
        let Value::Object(fields) = value else {
            return Err(refuse("not a JSON object".into(), FORMS));
        };
        let body = if fields.contains_key("input_ids") {
            parse_tokens(&fields).map_err(|problem| refuse(problem, FORMS))?
        } else {
            parse_instruction(&fields).map_err(|problem| refuse(problem, FORMS))?
        };
        let mark = response_mark(&fields).map_err(|problem| refuse(problem, FORMS))?;
        records.push(Record {
            source: format!("{name}:{number}{mark}"),
            line: number,
            body,
        });
    }
    Ok(records)
}

type Fields = serde_json::Map<String, Value>;

fn parse_instruction(fields: &Fields) -> std::result::Result<RecordBody, String> {
    let text = |name: &str, required: bool| match fields.get(name) {
        Some(Value::String(text)) if required && text.trim().is_empty() => {
            Err(format!("the field `{name}` is empty"))
        }
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) if !required => Ok(String::new()),
        None | Some(Value::Null) => Err(format!("the record has no `{name}`")),
        Some(_) => Err(format!("the field `{name}` is not a string")),
    };
    Ok(RecordBody::Instruction {
        instruction: text("instruction", true)?,
        input: text("input", false)?,
        output: text("output", true)?,
    })
}

/// What a record's `response_by` adds to its source: a cache tells the student's own responses, which `distillm-2`
/// treats apart, by the `#student` at the end of theirs.
fn response_mark(fields: &Fields) -> std::result::Result<&'static str, String> {
    match fields.get("response_by") {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(by)) if by == "teacher" => Ok(""),
        Some(Value::String(by)) if by == "student" => Ok("#student"),
        Some(other) => Err(format!(
            "`response_by` is {other}, neither \"teacher\" nor \"student\""
        )),
    }
}

fn parse_tokens(fields: &Fields) -> std::result::Result<RecordBody, String> {
    let Some(Value::Array(ids)) = fields.get("input_ids") else {
        return Err("`input_ids` is not a list".into());
    };
    let input_ids: Vec<u32> = ids
        .iter()
        .map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| format!("`input_ids` holds {id}, which is no token id"))
        })
        .collect::<std::result::Result<_, _>>()?;
    if input_ids.is_empty() {
        return Err("`input_ids` is empty".into());
    }
    let loss_mask = match fields.get("loss_mask") {
        None | Some(Value::Null) => vec![true; input_ids.len()],
        Some(Value::Array(mask)) => mask
            .iter()
            .map(|flag| match flag {
                Value::Bool(flag) => Ok(*flag),
                Value::Number(number) if number.as_u64() == Some(0) => Ok(false),
                Value::Number(number) if number.as_u64() == Some(1) => Ok(true),
                other => Err(format!(
                    "`loss_mask` holds {other}, which is neither 0 nor 1"
                )),
            })
            .collect::<std::result::Result<Vec<_>, _>>()?,
        Some(_) => return Err("`loss_mask` is not a list".into()),
    };
    if loss_mask.len() != input_ids.len() {
        return Err(format!(
            "`loss_mask` has {} entries for {} token ids",
            loss_mask.len(),
            input_ids.len()
        ));
    }
    Ok(RecordBody::Tokens {
        input_ids,
        loss_mask,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Record>> {
        read_jsonl(Path::new("data.jsonl"), "data.jsonl", text.as_bytes())
    }

    #[test]
    fn both_forms_are_read_and_blank_lines_skipped() {
        let records = read("{\"instruction\":\"a\",\"output\":\"b\",\"extra\":1}\n\n{\"input_ids\":[1,2],\"loss_mask\":[0,true]}\n").unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(
            records[0].body,
            RecordBody::Instruction {
                instruction: "a".into(),
                input: String::new(),
                output: "b".into()
            }
        );
        assert_eq!(records[1].source, "data.jsonl:3");
        assert_eq!(
            records[1].body,
            RecordBody::Tokens {
                input_ids: vec![1, 2],
                loss_mask: vec![false, true]
            }
        );
        let marked = read("{\"input_ids\":[1,2],\"response_by\":\"student\"}\n").unwrap();
        assert_eq!(marked[0].source, "data.jsonl:1#student");
    }

    fn refused(text: &str, expected: &str) {
        let error = read(text).unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error} lacks {expected}"
        );
        assert!(error.is_user() && error.hint().is_some());
    }

    #[test]
    fn bad_records_are_refused_by_line() {
        refused(
            "{\"instruction\":\"a\",\"output\":\"b\"}\n{\"instruction\":\"a\"}",
            "line 2: the record has no `output`",
        );
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
        refused("{\"input_ids\":[]}", "`input_ids` is empty");
        refused("{\"input_ids\":[-1]}", "no token id");
        refused("{\"input_ids\":[4294967296]}", "no token id");
        refused(
            "{\"input_ids\":[1,2],\"loss_mask\":[1]}",
            "1 entries for 2 token ids",
        );
        refused("{\"input_ids\":[1],\"loss_mask\":[2]}", "neither 0 nor 1");
        refused(
            "{\"input_ids\":[1,2],\"response_by\":\"me\"}",
            "neither \"teacher\" nor",
        );
    }
}
