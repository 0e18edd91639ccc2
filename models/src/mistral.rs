//! The Mistral architecture (Jiang et al. 2023, arXiv 2310.06825): Llama's blocks, all of them with
//! a sliding window where `config.json` sets one.

use std::path::Path;

use serde_json::{Value, json};

use crate::llama::{LlamaConfig, SlidingWindow};
use crate::{Error, Result};

/// What transformers takes where `config.json` says nothing; `null` means no window.
const DEFAULT_WINDOW: usize = 4096;

/// The sliding window of a `config.json` for a network of so many layers.
pub(crate) fn sliding_window(
    path: &Path,
    config: &Value,
    layers: usize,
) -> Result<Option<SlidingWindow>> {
    Ok(window_size(path, config)?.map(|positions| SlidingWindow {
        positions,
        layers: vec![true; layers],
    }))
}

/// `sliding_window` in positions.
pub(crate) fn window_size(path: &Path, config: &Value) -> Result<Option<usize>> {
    let Some(value) = config.get("sliding_window") else {
        return Ok(Some(DEFAULT_WINDOW));
    };
    if value.is_null() {
        return Ok(None);
    }
    match value.as_u64() {
        Some(positions @ 1..) => Ok(Some(positions as usize)),
        _ => Err(Error::unsupported(path, "sliding_window", value)),
    }
}

pub(crate) fn write_sliding_window(config: &LlamaConfig, json: &mut Value) {
    let window = config.sliding_window.as_ref();
    json["sliding_window"] = json!(window.map(|window| window.positions));
}
