//! What the tests share: where the goldens lie, the real teacher, comparing tensors.
#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::path::{Path, PathBuf};

use caskd_models::{LayerShape, LlamaConfig, LoadOptions, LoadedModel, Network, load};
use tch::{Device, Kind, Tensor};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// One thread: on tiny networks the barriers between threads cost more than the work.
pub(crate) fn f32_on_cpu() -> LoadOptions {
    tch::set_num_threads(1);
    LoadOptions {
        device: Device::Cpu,
        kind: Kind::Float,
    }
}

pub(crate) fn tiny(name: &str) -> LoadedModel {
    load(&golden(name), &f32_on_cpu()).unwrap()
}

/// Tensors of a safetensors file by name.
pub(crate) fn numbers(path: &Path) -> Vec<(String, Tensor)> {
    Tensor::read_safetensors(path).unwrap()
}

pub(crate) fn pick(numbers: &[(String, Tensor)], name: &str) -> Tensor {
    let found = numbers.iter().find(|(known, _)| known == name);
    found
        .unwrap_or_else(|| panic!("no {name} in the golden"))
        .1
        .shallow_clone()
}

pub(crate) fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

/// The real teacher's GGUF: `CASKD_TEACHER`, or what `scripts/fetch.sh teacher` keeps in the user's
/// cache folder. `None`, said loudly, when it has not been fetched.
pub(crate) fn teacher() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CASKD_TEACHER") {
        return Some(PathBuf::from(path));
    }
    let folder = |key: &str| std::env::var_os(key).map(PathBuf::from);
    let cache = folder("CASKD_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|base| base.join("caskd")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/caskd")))?;
    let path = cache.join("smollm2-135m-instruct-q4_1/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        eprintln!(
            "SKIPPED: {} is not there; run scripts/fetch.sh teacher",
            path.display()
        );
        return None;
    }
    Some(path)
}

/// A small configuration with random weights.
pub(crate) fn small_config(layers: usize, heads: usize, kv_heads: usize) -> LlamaConfig {
    let dense = LayerShape {
        heads,
        kv_heads,
        intermediate_size: 20,
    };
    LlamaConfig {
        vocab_size: 50,
        hidden_size: 16,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        dense,
        layers: vec![dense; layers],
        ..LlamaConfig::default()
    }
}

pub(crate) fn random(config: &LlamaConfig, seed: u64) -> Network {
    Network::random(config, seed, &f32_on_cpu()).unwrap()
}

/// Ids [rows, columns] below `vocabulary`, the same at every call.
pub(crate) fn ids(rows: i64, columns: i64, vocabulary: i64) -> Tensor {
    let values: Vec<i64> = (0..rows * columns)
        .map(|i| (i * 7919 + 13) % vocabulary)
        .collect();
    Tensor::from_slice(&values).view([rows, columns])
}
