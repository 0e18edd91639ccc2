//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): configuration and files in PEFT's form.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Llama, Result};

/// The seven linear projections of a Llama block, in the order of the forward pass.
pub const LORA_TARGETS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Which projections get adapters, and how large they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// r: rows of A.
    pub rank: i64,
    /// The update is scaled by alpha / rank.
    pub alpha: f64,
    /// Probability that an input element of the adapter is dropped while training.
    pub dropout: f64,
    /// Projections that get an adapter.
    pub targets: Vec<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: LORA_TARGETS.iter().map(|&name| name.to_owned()).collect(),
        }
    }
}

/// Writes the adapters in PEFT's form into the folder `out` (made if needed):
/// `adapter_config.json` and `adapter_model.safetensors`, each complete before it gets its name.
pub fn save_adapters(network: &Llama, out: &Path) -> Result<()> {
    let _ = (network, out);
    unimplemented!("under construction")
}

/// Reads adapters that [`save_adapters`] or PEFT wrote; attaches them first where the network has
/// none yet.
pub fn load_adapters(network: &mut Llama, from: &Path) -> Result<()> {
    let _ = (network, from);
    unimplemented!("under construction")
}
