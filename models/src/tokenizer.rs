//! Tokenizers of Hugging Face folders, and the fingerprint that tells tokenizers apart.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::gguf::GgufFile;
use crate::{Error, Result, hub, is_gguf};

/// Where folders keep chat templates beside the default one.
pub(crate) const TEMPLATE_FOLDER: &str = "additional_chat_templates";
/// Where folders keep how transformers samples.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

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
    let mut config = read_json(&config_path)?.unwrap_or_else(|| json!({}));
    if let Some(templates) = chat_templates(folder)? {
        config["chat_template"] = templates;
    }
    LoadedTokenizer::from_json(&path, &bytes, config)
}

/// The chat templates that newer folders keep beside the configuration, where they count before those inside: a text, or
/// a list of `name` and `template` where there are others than the default.
fn chat_templates(folder: &Path) -> Result<Option<Value>> {
    let read = |path: &Path| std::fs::read_to_string(path).map_err(Error::io("read", path));
    let mut named = Vec::new();
    let default = folder.join("chat_template.jinja");
    if default.is_file() {
        named.push(("default".to_owned(), read(&default)?));
    }
    let others = folder.join(TEMPLATE_FOLDER);
    if others.is_dir() {
        for entry in std::fs::read_dir(&others).map_err(Error::io("read", &others))? {
            let path = entry.map_err(Error::io("read", &others))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if let Some(name) = name.and_then(|name| name.strip_suffix(".jinja")) {
                // A second `default` counts before the first, as in transformers.
                named.retain(|(known, _)| known != name);
                named.push((name.to_owned(), read(&path)?));
            }
        }
    }
    named.sort_unstable();
    Ok(match named.as_slice() {
        [] => None,
        [(name, text)] if name == "default" => Some(json!(text)),
        several => Some(named_templates(several)),
    })
}

/// A list of templates as older configurations have it.
pub(crate) fn named_templates(templates: &[(String, String)]) -> Value {
    templates
        .iter()
        .map(|(name, template)| json!({ "name": name, "template": template }))
        .collect()
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
