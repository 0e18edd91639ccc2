//! Which format a file has.

use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::jsonl::first_record;
use super::llama_cpp::MAGIC;
use crate::data::{BYTE_ORDER_MARK, Stream};
use crate::{Error, Result};

/// The formats that can be imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// JSONL of server responses: vLLM, SGLang, OpenAI's completions.
    Vllm,
    /// JSONL as Axolotl's KD plugin trains from.
    Axolotl,
    /// llama.cpp's `--save-all-logits`.
    LlamaCpp,
    /// DistillKit's Parquet.
    Distillkit,
    /// NumPy's .npy and .npz.
    Numpy,
    /// Safetensors.
    Safetensors,
}

impl Format {
    /// As in `--from` and in the manifest.
    pub fn name(self) -> &'static str {
        match self {
            Format::Vllm => "vllm",
            Format::Axolotl => "axolotl",
            Format::LlamaCpp => "llama-cpp",
            Format::Distillkit => "distillkit",
            Format::Numpy => "numpy",
            Format::Safetensors => "safetensors",
        }
    }
}

/// Tells a file's format by its first bytes, or by its first record.
///
/// # Errors
/// A file that can't be read, or is of none of them.
pub(crate) fn detect(path: &Path) -> Result<Format> {
    let failed = |source| Error::DataFile {
        path: path.to_owned(),
        source,
    };
    let mut start = Vec::new();
    Stream::open(path)?
        .take(16)
        .read_to_end(&mut start)
        .map_err(failed)?;
    let has_ending = |ending: &str| {
        path.extension()
            .is_some_and(|own| own.eq_ignore_ascii_case(ending))
    };
    // A safetensors file begins with the length of its header, which is JSON.
    let is_tensors = start.get(8) == Some(&b'{') && start.get(6..8) == Some(&[0, 0]);
    Ok(match start.as_slice() {
        start if start.starts_with(MAGIC) => Format::LlamaCpp,
        start if start.starts_with(b"\x93NUMPY") => Format::Numpy,
        start if start.starts_with(b"PAR1") => Format::Distillkit,
        start if start.starts_with(b"PK") && has_ending("npz") => Format::Numpy,
        _ if is_tensors || has_ending("safetensors") => Format::Safetensors,
        start if matches!(text(start).first(), Some(b'{' | b'[')) => of_records(path)?,
        _ => return Err(unknown(path, "it is no format that can be imported")),
    })
}

/// Without what may stand before the first record.
fn text(start: &[u8]) -> &[u8] {
    let start = start.strip_prefix(BYTE_ORDER_MARK).unwrap_or(start);
    start.trim_ascii_start()
}

fn of_records(path: &Path) -> Result<Format> {
    let record = first_record(path)?;
    let Some(fields) = record.as_ref().and_then(|record| match record {
        serde_json::Value::Array(list) => list.first().and_then(|first| first.as_object()),
        record => record.as_object(),
    }) else {
        return Err(unknown(path, "its first line is no record"));
    };
    let has = |name: &str| fields.contains_key(name);
    let is_answer = has("logprobs") && has("prompt_token_ids");
    if has("prompt_logprobs") || has("choices") || has("meta_info") || has("outputs") || is_answer {
        Ok(Format::Vllm)
    } else if has("target_logprobs") || has("logprobs") {
        Ok(Format::Axolotl)
    } else {
        Err(unknown(path, "its first record holds no log-probabilities"))
    }
}

fn unknown(path: &Path, problem: &str) -> Error {
    Error::Foreign {
        path: path.to_owned(),
        place: String::new(),
        problem: problem.to_owned(),
        hint: "name the format with --from vllm, axolotl, llama-cpp, distillkit, numpy or safetensors; docs/IMPORT.md shows them".to_owned(),
    }
}
