//! The head's two matrix products, through oneDNN where [`linear`] would go there too.

use caskd_models::{linear, through_onednn};
use tch::{Kind, Tensor};

/// x · wᵀ: [N, R], [V, R] → [N, V], in the kind of w, in memory of its own. No graph.
pub(crate) fn times_transposed(x: &Tensor, w: &Tensor) -> Tensor {
    tch::no_grad(|| linear(&x.to_kind(w.kind()), w, None))
}

/// g · w: [N, V], [V, D] → [N, D], in the kind of w. No graph.
pub(crate) fn times(g: &Tensor, w: &Tensor) -> Tensor {
    tch::no_grad(|| {
        let g = g.to_kind(w.kind());
        if through_onednn(w) {
            let shape = [g.size()[0], w.size()[1]];
            let g = g.contiguous().to_mkldnn();
            Tensor::mkldnn_linear_backward_input(shape, &g, w).to_dense(Kind::Float, false)
        } else {
            g.matmul(w)
        }
    })
}
