//! What the loss on calibration text would lose with each weight, to first order.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::activation::check_calibration;
use crate::linear::Pass;
use crate::{Error, Network, Result};

/// |w · ∂L/∂w| of the projections of some layers, L the mean cross-entropy of calibration text.
#[derive(Debug, Default)]
pub struct Saliencies {
    /// (layer, path inside the block, [out, in] f32 on the CPU).
    tensors: Vec<(usize, &'static str, Tensor)>,
}

impl Saliencies {
    pub(crate) fn of(&self, layer: usize, path: &str) -> Option<&Tensor> {
        let found = self
            .tensors
            .iter()
            .find(|(of, name, _)| *of == layer && *name == path);
        found.map(|(_, _, tensor)| tensor)
    }
}

/// Measures the saliencies of the layers in `scope` on token sequences (each run alone, so there is no padding to leave
/// out). `progress` hears (sequences done, all sequences). Memory: a gradient beside every weight of the scope, and the
/// activations of one sequence.
///
/// # Errors
/// No sequence of two tokens at least, a token outside the vocabulary.
pub fn saliencies(
    network: &mut Network,
    sequences: &[Vec<u32>],
    scope: Range<usize>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Saliencies> {
    check_calibration(network, sequences)?;
    let targets: usize = sequences
        .iter()
        .map(|tokens| tokens.len().saturating_sub(1))
        .sum();
    if targets == 0 {
        return Err(Error::Prune {
            message: "no calibration sequence has two tokens".to_owned(),
        });
    }
    let device = network.device();
    let layers = scope.clone();
    for index in layers.clone() {
        for (_, linear) in network.blocks[index].linears_mut() {
            // A leaf on the same memory: nothing is copied, and nothing changes.
            linear.weight = linear.weight.detach().set_requires_grad(true);
        }
    }
    for (done, sequence) in sequences.iter().enumerate() {
        if sequence.len() < 2 {
            continue;
        }
        let ids: Vec<i64> = sequence.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).to_device(device);
        let inputs = ids.narrow(0, 0, ids.size()[0] - 1).unsqueeze(0);
        let labels = ids.narrow(0, 1, ids.size()[0] - 1);
        let hidden = network
            .forward_observed(&inputs, &[], Pass::Inference, &mut |_, _, _| {})
            .last_hidden;
        let logits = network.logits(&hidden.squeeze_dim(0)).to_kind(Kind::Float);
        let loss =
            logits.cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
        (loss / targets as f64).backward();
        progress(done as u64 + 1, sequences.len() as u64);
    }
    let mut tensors = Vec::new();
    for index in layers {
        for (path, linear) in network.blocks[index].linears_mut() {
            let saliency = tch::no_grad(|| {
                (linear.weight.to_kind(Kind::Float) * linear.weight.grad().to_kind(Kind::Float))
                    .abs()
                    .to_device(Device::Cpu)
            });
            linear.weight = linear.weight.detach();
            tensors.push((index, path, saliency));
        }
    }
    Ok(Saliencies { tensors })
}
