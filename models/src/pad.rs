//! Pruned networks in the sizes of their architecture, with zeros where weights are gone.

use tch::Tensor;

use crate::linear::Linear;
use crate::prune::Coupling;
use crate::{LoadedModel, Network};

/// Fills the blocks of a pruned network up to the dense sizes with zeros, attached adapters too. The added channels are
/// silu(0)·0 = 0 (or gelu(0)), the added heads meet columns of zeros: every number that the network gives stays as it
/// was, and programs that know one size for all layers can load it. Heads whose position biases go by their places come to
/// lie there again. Not for weights in 8 bits, which have a scale for each row.
pub fn pad_to_dense(model: &mut LoadedModel) {
    model.network.pad_to_dense();
}

impl Network {
    fn pad_to_dense(&mut self) {
        let dense = self.config().dense();
        let head_dim = self.config().head_dim();
        for (index, shape) in self.config().layers().to_vec().into_iter().enumerate() {
            let heads = Places {
                of_units: self.config().head_places(index),
                units: dense.kv_heads,
            };
            let channels = Places {
                of_units: (0..shape.intermediate_size).collect(),
                units: dense.intermediate_size,
            };
            let block = &mut self.blocks[index];
            let coupling = block.attention_coupling(shape, head_dim);
            heads.pad(&mut block.linears_mut(), &coupling);
            block.fill_heads(dense.heads);
            let coupling = block.ffn_coupling();
            channels.pad(&mut block.linears_mut(), &coupling);
        }
        self.set_layers(vec![dense; self.num_layers()]);
    }
}

/// Where the units that are left lie among all.
struct Places {
    of_units: Vec<usize>,
    units: usize,
}

impl Places {
    fn pad(&self, linears: &mut [(&'static str, &mut Linear)], coupling: &Coupling) {
        if self.of_units.len() == self.units {
            return;
        }
        for (path, linear) in linears {
            if let Some((_, width)) = coupling.rows.iter().find(|(name, _)| name == path) {
                linear.weight = self.spread(&linear.weight, 0, *width);
                let bias = linear.bias.take();
                linear.bias = bias.map(|bias| self.spread(&bias, 0, *width));
                if let Some(adapter) = &mut linear.adapter {
                    adapter.b = self.spread(&adapter.b, 0, *width);
                }
            }
            if coupling.columns.0 == *path {
                let width = coupling.columns.1;
                linear.weight = self.spread(&linear.weight, 1, width);
                if let Some(adapter) = &mut linear.adapter {
                    adapter.a = self.spread(&adapter.a, 1, width);
                }
            }
        }
    }

    /// `width` entries of a dimension for each unit, at its place; zeros between.
    fn spread(&self, tensor: &Tensor, dimension: i64, width: usize) -> Tensor {
        let tensor = tensor.detach();
        let places: Vec<i64> = self
            .of_units
            .iter()
            .flat_map(|&unit| unit * width..(unit + 1) * width)
            .map(|place| place as i64)
            .collect();
        let mut size = tensor.size();
        size[dimension as usize] = (self.units * width) as i64;
        let places = Tensor::from_slice(&places).to_device(tensor.device());
        Tensor::zeros(size, (tensor.kind(), tensor.device()))
            .index_copy(dimension, &places, &tensor)
    }
}
