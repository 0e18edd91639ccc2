//! The head's two matrix products.
//!
//! For f32 on a CPU they go to oneDNN: libtorch's default, MKL, takes a slower path on processors
//! that are not Intel's (measured on an AVX-512 EPYC: 120–160 against 75–95 GFLOP/s on one core).

use tch::{Device, Kind, Tensor};

/// x · wᵀ: [N, R], [V, R] → [N, V], in the kind of w. No graph.
pub(crate) fn times_transposed(x: &Tensor, w: &Tensor) -> Tensor {
    tch::no_grad(|| {
        let x = x.to_kind(w.kind());
        if through_onednn(w) {
            x.contiguous()
                .to_mkldnn()
                .mkldnn_linear(w, None::<Tensor>)
                .to_dense(Kind::Float, false)
        } else {
            x.matmul(&w.tr())
        }
    })
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

fn through_onednn(w: &Tensor) -> bool {
    w.device() == Device::Cpu
        && w.kind() == Kind::Float
        && w.is_contiguous()
        && tch::utils::has_mkldnn()
}
