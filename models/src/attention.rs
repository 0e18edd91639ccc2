//! Softmax attention for every architecture: which keys a position sees, and by which of
//! libtorch's ways the product is taken.

use tch::{Device, Kind, Tensor};

/// Positions up to which bf16 on the CPU attends by whole products: their memory grows with T².
const PRODUCT_POSITIONS: i64 = 1024;

/// Which keys each position sees, and what is added to its scores.
#[derive(Debug)]
pub(crate) enum Attention {
    /// Each position and those before it, by the fused kernel.
    Causal,
    /// What a mask leaves, by the fused kernel: [T, T] or [H, T, T] added to the scores.
    Masked(Tensor),
    /// The same by whole products.
    Products(Tensor),
}

impl Attention {
    /// Causal attention, by the way that is the faster one: libtorch's fused kernel takes twice
    /// the time forward in bf16 on the CPU, and two to four times with its backward (measured at
    /// [8, 128] and [4, 512]); in f32 it wins.
    pub(crate) fn causal(positions: i64, kind: Kind, device: Device) -> Attention {
        if products_pay(positions, kind, device) {
            Attention::Products(causal_mask(positions, kind, device))
        } else {
            Attention::Causal
        }
    }

    /// Attention that is causal and sees no further back than `window` positions, itself included.
    pub(crate) fn windowed(positions: i64, window: i64, kind: Kind, device: Device) -> Attention {
        if positions <= window {
            return Attention::causal(positions, kind, device);
        }
        // Below the diagonal by `window` or more is too long ago.
        let too_old = Tensor::ones([positions, positions], (Kind::Bool, device)).tril(-window);
        let mask = causal_mask(positions, kind, device).masked_fill_(&too_old, f64::NEG_INFINITY);
        Attention::added(mask, positions, kind, device)
    }

    /// Attention with `mask` [T, T] or [H, T, T] added to the scores.
    pub(crate) fn added(mask: Tensor, positions: i64, kind: Kind, device: Device) -> Attention {
        if products_pay(positions, kind, device) {
            Attention::Products(mask)
        } else {
            Attention::Masked(mask)
        }
    }

    /// softmax(q kᵀ / √d + mask) v: q [B, T, H, d], k and v [B, T, G, d] → [B·T, H·d].
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (batch, positions) = (q.size()[0], q.size()[1]);
        let mixed = match self {
            Attention::Products(mask) => by_products(q, k, v, mask),
            Attention::Causal => by_kernel(q, k, v, None),
            Attention::Masked(mask) => by_kernel(q, k, v, Some(mask)),
        };
        mixed.transpose(1, 2).reshape([batch * positions, -1])
    }
}

fn products_pay(positions: i64, kind: Kind, device: Device) -> bool {
    kind == Kind::BFloat16 && device == Device::Cpu && positions <= PRODUCT_POSITIONS
}

/// 0 on and below the diagonal, −∞ above: [T, T].
pub(crate) fn causal_mask(positions: i64, kind: Kind, device: Device) -> Tensor {
    Tensor::full([positions, positions], f64::NEG_INFINITY, (kind, device)).triu(1)
}

/// [B, H, T, d].
fn by_kernel(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let [q, k, v] = [q, k, v].map(|heads| heads.transpose(1, 2));
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, mask.is_none(), None, grouped)
}

/// Two batched products, the H/G query heads of a group side by side as rows: [B, H, T, d].
/// Softmax reduces in f32.
fn by_products(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Tensor {
    let &[b, t, h, d] = q.size().as_slice() else {
        unreachable!("heads are split before")
    };
    let g = k.size()[2];
    let rows = (q * (d as f64).powf(-0.5))
        .view([b, t, g, h / g, d])
        .permute([0, 2, 3, 1, 4])
        .reshape([b * g, h / g * t, d]);
    let by_group = |heads: &Tensor| heads.transpose(1, 2).reshape([b * g, t, d]);
    let scores = rows
        .bmm(&by_group(k).transpose(1, 2))
        .view([b, h, t, t])
        .g_add_(mask);
    let weights = scores.softmax(-1, None::<Kind>).view([b * g, h / g * t, t]);
    weights.bmm(&by_group(v)).view([b, h, t, d])
}
