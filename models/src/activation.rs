//! How strongly the inputs of a network's projections fire on given text: the calibration of
//! activation-weighted pruning.

use tch::{Kind, Tensor};

use crate::block::{Site, site_of};
use crate::linear::Pass;
use crate::{Error, Network, Result};

/// Root mean squares over calibration positions, per layer and input channel.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ActivationNorms {
    /// Inputs of the attention's first projections: per layer, D values.
    pub attention_input: Vec<Vec<f32>>,
    /// Inputs of its output projection: per layer, H·d values.
    pub attention: Vec<Vec<f32>>,
    /// Inputs of the FFN's first projections: per layer, D values.
    pub ffn_input: Vec<Vec<f32>>,
    /// Inputs of its output projection: per layer, F values.
    pub ffn: Vec<Vec<f32>>,
}

impl ActivationNorms {
    /// Norms of the inputs of one projection, by its path inside the block.
    pub(crate) fn of(&self, layer: usize, path: &str) -> Option<&[f32]> {
        let site = match site_of(path) {
            Site::AttentionInput => &self.attention_input,
            Site::AttentionOutput => &self.attention,
            Site::FfnInput => &self.ffn_input,
            Site::FfnOutput => &self.ffn,
        };
        site.get(layer).map(Vec::as_slice)
    }
}

/// Refuses calibration data that the network cannot run.
///
/// # Errors
/// No tokens at all, or a token outside the vocabulary.
pub(crate) fn check_calibration(network: &Network, sequences: &[Vec<u32>]) -> Result<()> {
    let vocab_size = network.vocab_size();
    if sequences.iter().all(Vec::is_empty) {
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
    Ok(())
}

/// Measures the norms on token sequences (each run alone, so there is no padding to leave out).
///
/// # Errors
/// No tokens at all, or a token outside the vocabulary.
pub fn activation_norms(network: &Network, sequences: &[Vec<u32>]) -> Result<ActivationNorms> {
    check_calibration(network, sequences)?;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let device = network.device();
    // Σ x² by site, layer and channel; a site has its width once something has entered it.
    let mut sums: [Vec<Option<Tensor>>; 4] =
        std::array::from_fn(|_| (0..network.num_layers()).map(|_| None).collect());
    tch::no_grad(|| {
        for sequence in sequences.iter().filter(|sequence| !sequence.is_empty()) {
            let ids: Vec<i64> = sequence.iter().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(device);
            network.forward_observed(&ids, &[], Pass::Inference, &mut |layer, site, input| {
                let squares = input
                    .to_kind(Kind::Float)
                    .square()
                    .sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
                    .to_device(tch::Device::Cpu);
                let sum = &mut sums[site as usize][layer];
                *sum = Some(match sum.take() {
                    Some(sum) => sum + squares,
                    None => squares,
                });
            });
        }
    });
    let root_means = |sums: &[Option<Tensor>]| -> Result<Vec<Vec<f32>>> {
        sums.iter()
            .flatten()
            .map(|sums| {
                Vec::<f32>::try_from(&(sums / tokens as f64).sqrt())
                    .map_err(Error::torch("read activation norms"))
            })
            .collect()
    };
    Ok(ActivationNorms {
        attention_input: root_means(&sums[Site::AttentionInput as usize])?,
        attention: root_means(&sums[Site::AttentionOutput as usize])?,
        ffn_input: root_means(&sums[Site::FfnInput as usize])?,
        ffn: root_means(&sums[Site::FfnOutput as usize])?,
    })
}
