//! Norms of what enters the projections.
use crate::{Llama, Result};

/// Root mean squares over calibration positions, per layer and input channel.
#[derive(Debug, Clone, Default)]
pub struct ActivationNorms {
    /// Inputs of `o_proj`: [L][H·d].
    pub attention: Vec<Vec<f32>>,
    /// Inputs of `down_proj`: [L][F].
    pub ffn: Vec<Vec<f32>>,
}

/// Measures the norms on token sequences (each run alone, no padding).
pub fn activation_norms(network: &Llama, sequences: &[Vec<u32>]) -> Result<ActivationNorms> {
    let _ = (network, sequences);
    unimplemented!("under construction")
}
