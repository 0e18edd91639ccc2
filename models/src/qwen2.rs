//! The Qwen2 architecture (Yang et al. 2024, arXiv 2407.10671; also Qwen 2.5): Llama's blocks with
//! biases on q, k and v, and, where it is switched on, a sliding window from some layer on.

use std::path::Path;

use serde_json::{Value, json};

use crate::llama::{LlamaConfig, SlidingWindow};
use crate::mistral::window_size;
use crate::{Error, Result};

/// Layers from this one on have the window where `config.json` does not say.
const MAX_WINDOW_LAYERS: u64 = 28;

/// The sliding window of a `config.json` for a network of so many layers.
pub(crate) fn sliding_window(
    path: &Path,
    config: &Value,
    layers: usize,
) -> Result<Option<SlidingWindow>> {
    if config.get("use_sliding_window").and_then(Value::as_bool) != Some(true) {
        return Ok(None);
    }
    let Some(positions) = window_size(path, config)? else {
        return Ok(None);
    };
    let first = match config.get("max_window_layers") {
        None => MAX_WINDOW_LAYERS,
        Some(value) => value
            .as_u64()
            .ok_or_else(|| Error::unsupported(path, "max_window_layers", value))?,
    };
    let by_layer = match config.get("layer_types").filter(|types| !types.is_null()) {
        Some(types) => layer_types(path, types)?,
        None => (0..layers).map(|index| index as u64 >= first).collect(),
    };
    if by_layer.len() != layers {
        let found = format!("a list of {}", by_layer.len());
        return Err(Error::unsupported(path, "layer_types", found));
    }
    let windowed = by_layer.contains(&true);
    Ok(windowed.then_some(SlidingWindow {
        positions,
        layers: by_layer,
    }))
}

/// For every layer whether it has the window.
fn layer_types(path: &Path, types: &Value) -> Result<Vec<bool>> {
    let list = types.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .map(|name| match name.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(Error::unsupported(path, "layer_types", name)),
        })
        .collect()
}

pub(crate) fn write_sliding_window(config: &LlamaConfig, json: &mut Value) {
    let Some(window) = &config.sliding_window else {
        json["use_sliding_window"] = json!(false);
        return;
    };
    json["use_sliding_window"] = json!(true);
    json["sliding_window"] = json!(window.positions);
    // Older transformers know only where the windows begin.
    json["max_window_layers"] = json!(window.layers.iter().position(|&windowed| windowed));
    let name = |&windowed: &bool| {
        if windowed {
            "sliding_attention"
        } else {
            "full_attention"
        }
    };
    json["layer_types"] = json!(window.layers.iter().map(name).collect::<Vec<_>>());
}
