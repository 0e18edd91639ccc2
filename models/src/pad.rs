//! Pruned networks in the sizes of their architecture, with zeros where weights are gone.

use tch::Tensor;

use crate::linear::Linear;
use crate::prune::Coupling;
use crate::{LoadedModel, Network};

/// Fills the blocks of a pruned network up to the dense sizes with zeros, attached adapters too. The added channels are
/// silu(0)·0 = 0 (or gelu(0)), the added heads meet columns of zeros: every number that the network gives stays as it
/// was, and programs that know one size for all layers can load it. Not for weights in 8 bits, which have a scale for each row.
pub fn pad_to_dense(model: &mut LoadedModel) {
    model.network.pad_to_dense();
}

impl Network {
    fn pad_to_dense(&mut self) {
        let dense = self.config().dense();
        let head_dim = self.config().head_dim();
        for (index, shape) in self.config().layers().to_vec().into_iter().enumerate() {
            let block = &mut self.blocks[index];
            if let Some(coupling) = block.attention_coupling(shape, head_dim) {
                pad(&mut block.linears_mut(), &coupling, dense.kv_heads);
            }
            let coupling = block.ffn_coupling();
            pad(&mut block.linears_mut(), &coupling, dense.intermediate_size);
        }
        self.set_layers(vec![dense; self.num_layers()]);
    }
}

fn pad(linears: &mut [(&'static str, &mut Linear)], coupling: &Coupling, units: usize) {
    for (path, linear) in linears {
        if let Some((_, width)) = coupling.rows.iter().find(|(name, _)| name == path) {
            linear.pad_rows((units * width) as i64);
        }
        if coupling.columns.0 == *path {
            linear.pad_columns((units * coupling.columns.1) as i64);
        }
    }
}

impl Linear {
    fn pad_rows(&mut self, rows: i64) {
        self.weight = padded(&self.weight, 0, rows);
        self.bias = self.bias.as_ref().map(|bias| padded(bias, 0, rows));
        if let Some(adapter) = &mut self.adapter {
            adapter.b = padded(&adapter.b, 0, rows);
        }
    }

    fn pad_columns(&mut self, columns: i64) {
        self.weight = padded(&self.weight, 1, columns);
        if let Some(adapter) = &mut self.adapter {
            adapter.a = padded(&adapter.a, 1, columns);
        }
    }
}

/// Zeros after the last entry of a dimension.
fn padded(tensor: &Tensor, dimension: i64, to: i64) -> Tensor {
    let tensor = tensor.detach();
    let mut size = tensor.size();
    let missing = to - size[dimension as usize];
    if missing <= 0 {
        return tensor;
    }
    size[dimension as usize] = missing;
    let zeros = Tensor::zeros(size, (tensor.kind(), tensor.device()));
    Tensor::cat(&[tensor, zeros], dimension)
}
