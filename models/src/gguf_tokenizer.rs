//! The tokenizer inside a GGUF file, rebuilt in the form of Hugging Face's `tokenizer.json`.
//!
//! Byte-level BPE (`tokenizer.ggml.model` "gpt2") and SentencePiece's BPE ("llama": Llama 1 and 2,
//! `TinyLlama`, Vicuna, Mistral). `tokenizer.ggml.pre` names how text is cut before byte-level BPE;
//! the cuts below are those of the published `tokenizer.json` files of the model families that
//! llama.cpp gave these names to.

use std::collections::{BTreeSet, HashMap};

use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::{Map, Value, json};

use crate::gguf::GgufFile;
use crate::tokenizer::{LoadedTokenizer, named_templates};
use crate::{Error, Result};

/// `tokenizer.ggml.token_type`: what llama.cpp calls unknown, control, user-defined and unused
/// tokens.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// SentencePiece's mark of a word's beginning.
const SPACE: &str = "\u{2581}";

/// Llama 3's cut of text, as its `tokenizer.json` states it.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen2's: digits alone.
const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// BLOOM's.
const BLOOM_PATTERN: &str = r" ?[^(\s|[.,!?…。，、।۔،])]+";

/// The parts of `tokenizer.json` in which the kinds of tokenizer differ.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    /// Fields of `model` beside the vocabulary.
    model: Value,
}

impl GgufFile {
    /// Rebuilds the tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<LoadedTokenizer> {
        let unusable = |message: String| Error::Tokenizer {
            path: self.path().to_owned(),
            message,
        };
        let tokens = self.strings("tokenizer.ggml.tokens")?;
        let types = self.token_types(tokens.len())?;

        let mut vocabulary = Map::new();
        let mut added = Vec::new();
        for (id, (&token, &kind)) in tokens.iter().zip(&types).enumerate() {
            if kind == UNUSED {
                continue;
            }
            if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) {
                added.push(json!({
                    "id": id, "content": token, "special": kind != USER_DEFINED, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }));
            }
            if vocabulary.insert(token.to_owned(), json!(id)).is_some() {
                return Err(unusable(format!("token `{token}` occurs twice")));
            }
        }
        let mut parts = match self.text("tokenizer.ggml.model")? {
            "gpt2" => self.byte_level_bpe()?,
            "llama" => self.sentence_piece_bpe(&tokens, &types)?,
            other => {
                return Err(Error::unsupported(
                    self.path(),
                    "tokenizer.ggml.model",
                    other,
                ));
            }
        };
        parts.model["vocab"] = Value::Object(vocabulary);
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": parts.normalizer,
            "pre_tokenizer": parts.pre_tokenizer,
            "post_processor": self.post_processor(&tokens)?,
            "decoder": parts.decoder,
            "model": parts.model,
        });
        let config = self.tokenizer_config(&tokens, &added)?;
        LoadedTokenizer::from_json(self.path(), json.to_string().as_bytes(), config)
    }

    /// BPE on bytes, each written as one character.
    fn byte_level_bpe(&self) -> Result<Parts> {
        let mut merges = Vec::new();
        for merge in self.strings("tokenizer.ggml.merges")? {
            let pair = merge.split_once(' ').ok_or_else(|| Error::Tokenizer {
                path: self.path().to_owned(),
                message: format!("merge `{merge}` is no pair"),
            })?;
            merges.push(json!([pair.0, pair.1]));
        }
        let (pre_tokenizer, ignore_merges) = self.pre_tokenizer()?;
        let normalizer = match self.text("tokenizer.ggml.pre")? {
            "qwen2" => json!({ "type": "NFC" }),
            _ => Value::Null,
        };
        Ok(Parts {
            normalizer,
            pre_tokenizer,
            decoder: byte_level(true, true),
            model: json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": ignore_merges, "merges": merges,
            }),
        })
    }

    /// SentencePiece's BPE: pieces with scores, and bytes for what has no piece.
    fn sentence_piece_bpe(&self, tokens: &[&str], types: &[i32]) -> Result<Parts> {
        let key = "tokenizer.ggml.scores";
        let scores = self
            .array(key)?
            .iter()
            .map(Metadata::to_f32)
            .collect::<candle_core::Result<Vec<_>>>()
            .map_err(|_| self.wrong_type(key))?;
        if scores.len() != tokens.len() || scores.iter().any(|score| score.is_nan()) {
            return Err(self.wrong_type(key));
        }
        let unknown = types.iter().position(|&kind| kind == UNKNOWN);
        let mut normalizers = Vec::new();
        if self
            .flag("tokenizer.ggml.add_space_prefix")?
            .unwrap_or(true)
        {
            normalizers.push(json!({ "type": "Prepend", "prepend": SPACE }));
        }
        normalizers
            .push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE }));
        let merges: Vec<Value> = merges_by_score(tokens, &scores)
            .into_iter()
            .map(|(left, right)| json!([left, right]))
            .collect();
        Ok(Parts {
            normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
            pre_tokenizer: Value::Null,
            decoder: json!({ "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": SPACE }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ] }),
            model: json!({
                "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| tokens[id]),
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false, "merges": merges,
            }),
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let value = self.value(key).map(Metadata::to_bool).transpose();
        value.map_err(|_| self.wrong_type(key))
    }

    /// How text is cut before BPE, and whether whole tokens skip the merges.
    fn pre_tokenizer(&self) -> Result<(Value, bool)> {
        let name = self.text("tokenizer.ggml.pre")?;
        let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
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
            "llama-bpe" | "llama3" | "llama-v3" => Ok((
                sequence(json!([split(LLAMA3_PATTERN), byte_level(false, false)])),
                true,
            )),
            "qwen2" => Ok((
                sequence(json!([split(QWEN2_PATTERN), byte_level(false, false)])),
                false,
            )),
            "bloom" => Ok((
                sequence(json!([split(BLOOM_PATTERN), byte_level(false, false)])),
                false,
            )),
            other => Err(Error::unsupported(self.path(), "tokenizer.ggml.pre", other)),
        }
    }

    /// Puts the first token before every sequence where the file asks for that.
    fn post_processor(&self, tokens: &[&str]) -> Result<Value> {
        // llama.cpp's defaults where the file does not say.
        let usual = match self.text("tokenizer.ggml.model")? {
            "llama" => true,
            _ => matches!(
                self.text("tokenizer.ggml.pre")?,
                "llama-bpe" | "llama3" | "llama-v3"
            ),
        };
        let add_bos = self.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(usual);
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
        if let Some(templates) = self.chat_templates()? {
            config.insert("chat_template".to_owned(), templates);
        }
        let context_length = format!("{}.context_length", self.text("general.architecture")?);
        if let Some(length) = self.optional_number(&context_length)? {
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

    /// A text, or a list where there are others beside the default one.
    fn chat_templates(&self) -> Result<Option<Value>> {
        let key = "tokenizer.chat_template";
        let default = match self.value(key) {
            Some(_) => Some(self.text(key)?),
            None => None,
        };
        if self.value("tokenizer.chat_templates").is_none() {
            return Ok(default.map(|text| json!(text)));
        }
        let mut named: Vec<(String, String)> = Vec::new();
        for name in self.strings("tokenizer.chat_templates")? {
            let text = self.text(&format!("{key}.{name}"))?;
            named.push((name.to_owned(), text.to_owned()));
        }
        if let Some(text) = default {
            named.retain(|(name, _)| name != "default");
            named.push(("default".to_owned(), text.to_owned()));
        }
        Ok(Some(named_templates(&named)))
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

/// The merges behind SentencePiece's scores: a piece comes of every two pieces that it can be cut
/// into, and the piece of the highest score is made first.
fn merges_by_score<'a>(tokens: &[&'a str], scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, &t)| (t, id)).collect();
    let mut merges = Vec::new();
    for (&token, &score) in tokens.iter().zip(scores) {
        let mut cuts: Vec<_> = token
            .char_indices()
            .skip(1)
            .map(|(at, _)| token.split_at(at))
            .filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right)))
            .collect();
        cuts.sort_unstable();
        merges.extend(
            cuts.into_iter()
                .map(|(_, _, left, right)| (score, left, right)),
        );
    }
    // Of equal scores the longer first half goes first, as transformers orders them.
    merges.sort_by(|a, b| {
        let length = |text: &str| text.chars().count();
        b.0.total_cmp(&a.0)
            .then_with(|| length(b.1).cmp(&length(a.1)))
            .then_with(|| length(b.2).cmp(&length(a.2)))
    });
    merges
        .into_iter()
        .map(|(_, left, right)| (left, right))
        .collect()
}
