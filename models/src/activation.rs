//! How strongly the channels of a network fire on given text: the calibration of
//! activation-weighted pruning.

use tch::{Kind, Tensor};

use crate::block::Site;
use crate::linear::Pass;
use crate::{Error, Network, Result};

/// Root mean squares over calibration positions, per layer and input channel.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ActivationNorms {
    /// Inputs of `o_proj`: per layer, H·d values.
    pub attention: Vec<Vec<f32>>,
    /// Inputs of `down_proj`: per layer, F values.
    pub ffn: Vec<Vec<f32>>,
}

/// Measures the norms on token sequences (each run alone, so there is no padding to leave out).
///
/// # Errors
/// No tokens at all, or a token outside the vocabulary.
pub fn activation_norms(network: &Network, sequences: &[Vec<u32>]) -> Result<ActivationNorms> {
    let vocab_size = network.vocab_size();
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    if tokens == 0 {
        return Err(Error::Prune {
            message: "no tokens to calibrate on".to_owned(),
        });
    }
    if let Some(id) = sequences
        .iter()
        .flatten()
        .find(|&&id| id as usize >= vocab_size)
    {
        return Err(Error::Prune {
            message: format!("calibration token {id} is outside the vocabulary of {vocab_size}"),
        });
    }

    let device = network.device();
    let zeros = |width: i64| Tensor::zeros([width], (Kind::Float, device));
    let config = network.config();
    let mut attention: Vec<Tensor> = config
        .layers()
        .iter()
        .map(|layer| zeros((layer.heads * config.head_dim()) as i64))
        .collect();
    let mut ffn: Vec<Tensor> = config
        .layers()
        .iter()
        .map(|layer| zeros(layer.intermediate_size as i64))
        .collect();
    tch::no_grad(|| {
        for sequence in sequences.iter().filter(|sequence| !sequence.is_empty()) {
            let ids: Vec<i64> = sequence.iter().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(device);
            network.forward_observed(&ids, &[], Pass::Inference, &mut |layer, site, input| {
                let sums = match site {
                    Site::AttentionOutput => &mut attention[layer],
                    Site::FfnOutput => &mut ffn[layer],
                };
                let squares = input.to_kind(Kind::Float).square();
                let _ =
                    sums.g_add_(&squares.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
            });
        }
    });
    let root_mean = |sums: &Tensor| -> Result<Vec<f32>> {
        Vec::<f32>::try_from(&(sums / tokens as f64).sqrt())
            .map_err(Error::torch("read activation norms"))
    };
    Ok(ActivationNorms {
        attention: attention.iter().map(root_mean).collect::<Result<_>>()?,
        ffn: ffn.iter().map(root_mean).collect::<Result<_>>()?,
    })
}
