//! The tokenizer inside a GGUF file, rebuilt in the form of Hugging Face's `tokenizer.json`.
//!
//! Byte-level BPE only (`tokenizer.ggml.model` "gpt2"). `tokenizer.ggml.pre` names how text is cut
//! before BPE; the cuts below are those of the published `tokenizer.json` files of the model
//! families that llama.cpp gave these names to.

use std::collections::BTreeSet;

use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::{Map, Value, json};

use crate::gguf::GgufFile;
use crate::tokenizer::LoadedTokenizer;
use crate::{Error, Result};

/// `tokenizer.ggml.token_type`: what llama.cpp calls control, user-defined and unused tokens.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Llama 3's cut of text, as its `tokenizer.json` states it.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl GgufFile {
    /// Rebuilds the tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<LoadedTokenizer> {
        let unusable = |message: String| Error::Tokenizer {
            path: self.path().to_owned(),
            message,
        };
        let model = self.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(Error::unsupported(
                self.path(),
                "tokenizer.ggml.model",
                model,
            ));
        }
        let tokens = self.strings("tokenizer.ggml.tokens")?;
        let types = self.token_types(tokens.len())?;

        let mut vocabulary = Map::new();
        let mut added = Vec::new();
        for (id, (&token, &kind)) in tokens.iter().zip(&types).enumerate() {
            if kind == UNUSED {
                continue;
            }
            if kind == CONTROL || kind == USER_DEFINED {
                added.push(json!({
                    "id": id, "content": token, "special": kind == CONTROL, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }));
            }
            if vocabulary.insert(token.to_owned(), json!(id)).is_some() {
                return Err(unusable(format!("token `{token}` occurs twice")));
            }
        }
        let mut merges = Vec::new();
        for merge in self.strings("tokenizer.ggml.merges")? {
            let pair = merge
                .split_once(' ')
                .ok_or_else(|| unusable(format!("merge `{merge}` is no pair")))?;
            merges.push(json!([pair.0, pair.1]));
        }

        let (pre_tokenizer, ignore_merges) = self.pre_tokenizer()?;
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(&tokens)?,
            "decoder": byte_level(true, true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges,
            },
        });
        let config = self.tokenizer_config(&tokens, &added)?;
        LoadedTokenizer::from_json(self.path(), json.to_string().as_bytes(), config)
    }

    /// How text is cut before BPE, and whether whole tokens skip the merges.
    fn pre_tokenizer(&self) -> Result<(Value, bool)> {
        let name = self.text("tokenizer.ggml.pre")?;
        let sequence = |parts: Value| json!({ "type": "Sequence", "pretokenizers": parts });
        match name {
            "gpt-2" => Ok((byte_level(false, true), false)),
            // Every digit alone, then GPT-2's own pattern inside ByteLevel.
            "smollm" | "starcoder" | "refact" => Ok((
                sequence(
                    json!([{ "type": "Digits", "individual_digits": true }, byte_level(false, true)]),
                ),
                false,
            )),
            "llama-bpe" => {
                let split = json!({
                    "type": "Split", "pattern": { "Regex": LLAMA3_PATTERN }, "behavior": "Isolated", "invert": false,
                });
                Ok((sequence(json!([split, byte_level(false, false)])), true))
            }
            other => Err(Error::unsupported(self.path(), "tokenizer.ggml.pre", other)),
        }
    }

    /// Puts the first token before every sequence where the file asks for that.
    fn post_processor(&self, tokens: &[&str]) -> Result<Value> {
        let add_bos = match self.value("tokenizer.ggml.add_bos_token") {
            Some(value) => value
                .to_bool()
                .map_err(|_| self.wrong_type("tokenizer.ggml.add_bos_token"))?,
            // llama.cpp's default for this family of tokenizers.
            None => self.text("tokenizer.ggml.pre")? == "llama-bpe",
        };
        let bos = self.token("bos_token_id", tokens)?;
        let Some((id, token)) = bos.filter(|_| add_bos) else {
            return Ok(Value::Null);
        };
        let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let first = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let second = json!({ "Sequence": { "id": "B", "type_id": 1 } });
        let second_special = json!({ "SpecialToken": { "id": token, "type_id": 1 } });
        Ok(json!({
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, second_special, second],
            "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
        }))
    }

    /// `tokenizer_config.json` from the metadata.
    fn tokenizer_config(&self, tokens: &[&str], added: &[Value]) -> Result<Value> {
        let mut config = Map::new();
        let mut decoder = Map::new();
        for token in added {
            let mut entry = token.clone();
            let id = entry.as_object_mut().and_then(|object| object.remove("id"));
            decoder.insert(id.unwrap_or_default().to_string(), entry);
        }
        config.insert("added_tokens_decoder".to_owned(), Value::Object(decoder));
        for (key, name) in [
            ("bos_token_id", "bos_token"),
            ("eos_token_id", "eos_token"),
            ("unknown_token_id", "unk_token"),
            ("padding_token_id", "pad_token"),
        ] {
            if let Some((_, token)) = self.token(key, tokens)? {
                config.insert(name.to_owned(), json!(token));
            }
        }
        if self.value("tokenizer.chat_template").is_some() {
            config.insert(
                "chat_template".to_owned(),
                json!(self.text("tokenizer.chat_template")?),
            );
        }
        if let Some(length) = self.optional_number("llama.context_length")? {
            config.insert("model_max_length".to_owned(), json!(length));
        }
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        config.insert(
            "tokenizer_class".to_owned(),
            json!("PreTrainedTokenizerFast"),
        );
        Ok(Value::Object(config))
    }

    /// The token that a `tokenizer.ggml.*_token_id` key names.
    fn token<'a>(&self, key: &str, tokens: &[&'a str]) -> Result<Option<(usize, &'a str)>> {
        let key = format!("tokenizer.ggml.{key}");
        let Some(id) = self.optional_number(&key)? else {
            return Ok(None);
        };
        tokens
            .get(id)
            .map(|&token| Some((id, token)))
            .ok_or_else(|| self.wrong_type(&key))
    }

    fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let values = self.array(key)?.iter().map(Metadata::to_string);
        values
            .map(|value| value.map(String::as_str).map_err(|_| self.wrong_type(key)))
            .collect()
    }

    /// Token types; all normal when the file does not say.
    fn token_types(&self, count: usize) -> Result<Vec<i32>> {
        let key = "tokenizer.ggml.token_type";
        if self.value(key).is_none() {
            return Ok(vec![1; count]);
        }
        let types = self
            .array(key)?
            .iter()
            .map(Metadata::to_i32)
            .collect::<candle_core::Result<Vec<_>>>();
        let types = types.map_err(|_| self.wrong_type(key))?;
        let distinct: BTreeSet<i32> = types.iter().copied().collect();
        if types.len() != count || distinct.iter().any(|kind| !(0..=6).contains(kind)) {
            return Err(self.wrong_type(key));
        }
        Ok(types)
    }
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex })
}
