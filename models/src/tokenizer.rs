//! Tokenizers.
use std::path::Path;

use tokenizers::Tokenizer;

use crate::Result;

/// A tokenizer without its network.
#[derive(Debug)]
pub struct LoadedTokenizer {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// See [`fingerprint`].
    pub fingerprint: String,
    /// Token that starts a sequence.
    pub bos: Option<u32>,
    /// Token that ends a sequence.
    pub eos: Option<u32>,
    /// `tokenizer_config.json`, as read or made from the GGUF's metadata.
    pub tokenizer_config: serde_json::Value,
}

/// Reads only the tokenizer of a Hugging Face folder or GGUF file.
pub fn load_tokenizer(path: &Path) -> Result<LoadedTokenizer> {
    let _ = path;
    unimplemented!("under construction")
}

/// blake3 (hex) over the id-ordered `(id, token)` pairs, added tokens included.
pub fn fingerprint(tokenizer: &Tokenizer) -> String {
    let _ = tokenizer;
    unimplemented!("under construction")
}
