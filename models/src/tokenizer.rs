//! Tokenizers of Hugging Face folders, and the fingerprint that tells tokenizers apart.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::gguf::GgufFile;
use crate::{Error, Result, hub, is_gguf};

/// A tokenizer without its network.
#[derive(Debug)]
pub struct LoadedTokenizer {
    /// The tokenizer, with truncation and padding off.
    pub tokenizer: Tokenizer,
    /// See [`fingerprint`].
    pub fingerprint: String,
    /// Token that starts a sequence.
    pub bos: Option<u32>,
    /// Token that ends a sequence.
    pub eos: Option<u32>,
    /// `tokenizer_config.json`, as read, or made from the GGUF's metadata.
    pub tokenizer_config: Value,
}

/// Reads only the tokenizer of a Hugging Face folder, GGUF file or model of the hub.
///
/// # Errors
/// No or a damaged `tokenizer.json`; a kind of GGUF tokenizer that is not supported, named.
pub fn load_tokenizer(path: &Path) -> Result<LoadedTokenizer> {
    let path = &*hub::locate(path)?;
    if is_gguf(path)? {
        GgufFile::open(path)?.tokenizer()
    } else {
        load_folder(path)
    }
}

/// blake3 (hex) over the id-ordered tokens, added tokens included: for each its id (u32), its
/// length in bytes (u64), both little endian, and its bytes.
pub fn fingerprint(tokenizer: &Tokenizer) -> String {
    let mut tokens: Vec<(u32, String)> = tokenizer
        .get_vocab(true)
        .into_iter()
        .map(|(token, id)| (id, token))
        .collect();
    tokens.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for (id, token) in tokens {
        hasher.update(&id.to_le_bytes());
        hasher.update(&(token.len() as u64).to_le_bytes());
        hasher.update(token.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn load_folder(folder: &Path) -> Result<LoadedTokenizer> {
    let path = folder.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let config_path = folder.join("tokenizer_config.json");
    let mut config = read_json(&config_path)?.unwrap_or_else(|| serde_json::json!({}));
    // Newer folders keep the chat template beside the configuration; it counts before one inside.
    let template = folder.join("chat_template.jinja");
    if template.is_file() {
        let text = std::fs::read_to_string(&template).map_err(Error::io("read", &template))?;
        config["chat_template"] = Value::String(text);
    }
    LoadedTokenizer::from_json(&path, &bytes, config)
}

impl LoadedTokenizer {
    /// Parses `tokenizer.json` and finds the special tokens that the configuration names.
    pub(crate) fn from_json(path: &Path, json: &[u8], config: Value) -> Result<LoadedTokenizer> {
        let unusable = |e: tokenizers::Error| Error::Tokenizer {
            path: path.to_owned(),
            message: e.to_string(),
        };
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(unusable)?;
        // A file may carry the settings of its last use; ids must not depend on them.
        tokenizer.with_truncation(None).map_err(unusable)?;
        tokenizer.with_padding(None);
        let id_of = |key: &str| tokenizer.token_to_id(special_token(&config, key)?);
        let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
        Ok(LoadedTokenizer {
            fingerprint: fingerprint(&tokenizer),
            tokenizer,
            bos,
            eos,
            tokenizer_config: config,
        })
    }
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
fn special_token<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A JSON object from a file; `None` when there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let object: serde_json::Map<String, Value> =
        serde_json::from_slice(&text).map_err(Error::json(path))?;
    Ok(Some(Value::Object(object)))
}
