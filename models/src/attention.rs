//! Softmax attention for every architecture: which keys a position sees, and by which of
//! libtorch's ways the product is taken.

use tch::{Device, Kind, Tensor};

use crate::row_kernels;

/// Positions up to which bf16 on the CPU attends by whole products: their memory grows with T².
const PRODUCT_POSITIONS: i64 = 1024;

/// Queries that a causal product takes at one time: the keys after the last of them are left out,
/// 3/8 of all pairs at T = 512.
const QUERY_BLOCK: i64 = 128;

/// Which keys each position sees, and what is added to its scores.
#[derive(Debug)]
pub(crate) enum Attention {
    /// Each position and those before it, by the fused kernel.
    Causal,
    /// What a mask leaves, by the fused kernel: [T, T] or [H, T, T] added to the scores.
    Masked(Tensor),
    /// The same by whole products, where no position sees a later one.
    CausalProducts(Tensor),
    /// The same for groups of positions that lie side by side in one sequence and see nothing of each other: the mask
    /// [M, T] or [H, M, T], and how many queries and how many keys each has.
    Groups(Tensor, Vec<(i64, i64)>),
}

/// N tokens that are not one sequence but many, side by side, on the CPU.
pub(crate) struct Packed<'a> {
    /// Their positions, each in its own sequence: [N] f32.
    pub(crate) places: &'a Tensor,
    /// [N, N] bool: which attends to which.
    pub(crate) visible: &'a Tensor,
    /// [M] i64, ascending: those that attend; all where `None`.
    pub(crate) queries: Option<&'a Tensor>,
    /// Of tokens that see nothing of others: how many of them attend, and how many they are.
    pub(crate) groups: Vec<(i64, i64)>,
}

impl Packed<'_> {
    /// The rows [M, ..] of those that attend, of [N, ..].
    pub(crate) fn of_queries(&self, all: &Tensor) -> Tensor {
        match self.queries {
            Some(queries) => all.index_select(0, queries),
            None => all.shallow_clone(),
        }
    }

    /// Attention with `bias`, [M, N] or [H, M, N] in f32, to what is `visible` [M, N].
    pub(crate) fn attention(
        &self,
        bias: &Tensor,
        visible: &Tensor,
        kind: Kind,
        device: Device,
    ) -> Attention {
        let mask = bias.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
        Attention::Groups(mask.to_kind(kind).to_device(device), self.groups.clone())
    }
}

impl Attention {
    /// Causal attention, by the way that is the faster one: libtorch's fused kernel takes twice
    /// the time forward in bf16 on the CPU, and two to four times with its backward (measured at
    /// [8, 128] and [4, 512]); in f32 it wins.
    pub(crate) fn causal(positions: i64, kind: Kind, device: Device) -> Attention {
        if products_pay(positions, kind, device) {
            Attention::CausalProducts(causal_mask(positions, kind, device))
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

    /// Attention with `mask` [T, T] or [H, T, T] added to the scores; it hides all later positions.
    pub(crate) fn added(mask: Tensor, positions: i64, kind: Kind, device: Device) -> Attention {
        if products_pay(positions, kind, device) {
            Attention::CausalProducts(mask)
        } else {
            Attention::Masked(mask)
        }
    }

    /// The same for some of the heads, where the mask is of each: `heads` [H'] i64.
    pub(crate) fn of_heads(&self, heads: &Tensor) -> Attention {
        let of = |mask: &Tensor| match mask.dim() {
            3 => mask.index_select(0, heads),
            _ => mask.shallow_clone(),
        };
        match self {
            Attention::Causal => Attention::Causal,
            Attention::Masked(mask) => Attention::Masked(of(mask)),
            Attention::CausalProducts(mask) => Attention::CausalProducts(of(mask)),
            Attention::Groups(mask, groups) => Attention::Groups(of(mask), groups.clone()),
        }
    }

    /// softmax(q kᵀ / √d + mask) v: q [B, M, H, d], k and v [B, T, G, d] → [B·M, H·d], with M = T but for groups.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (batch, positions) = (q.size()[0], q.size()[1]);
        if let Attention::Groups(mask, groups) = self
            && let Some(mixed) = row_kernels::attend([q, k, v, mask], groups)
        {
            return mixed;
        }
        let mixed = match self {
            Attention::CausalProducts(mask) => by_products(q, k, v, mask, QUERY_BLOCK),
            Attention::Groups(mask, groups) => by_groups(q, k, v, mask, groups),
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

/// Each group by itself: pairs of positions of different groups are not even looked at.
fn by_groups(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, groups: &[(i64, i64)]) -> Tensor {
    let (mut query, mut key) = (0, 0);
    let mut mixed = Vec::new();
    for &(queries, keys) in groups {
        if queries > 0 {
            let of = |heads: &Tensor| heads.narrow(1, key, keys);
            let q = q.narrow(1, query, queries);
            let mask = mask.narrow(-2, query, queries).narrow(-1, key, keys);
            mixed.push(by_products(&q, &of(k), &of(v), &mask, queries));
        }
        query += queries;
        key += keys;
    }
    Tensor::cat(&mixed, 2)
}

/// Lengths of the smallest groups of neighbours among N tokens that see nothing of each other; row i of `visible` \[N·N\]
/// says what token i sees.
pub(crate) fn groups(visible: &[bool], tokens: usize) -> Vec<i64> {
    // How far to the right what stands left of a border is seen from, or sees.
    let mut reach = vec![0; tokens];
    for (i, row) in visible.chunks_exact(tokens.max(1)).enumerate() {
        for (j, _) in row.iter().enumerate().filter(|(_, sees)| **sees) {
            let (left, right) = (i.min(j), i.max(j));
            reach[left] = reach[left].max(right);
        }
    }
    let (mut lengths, mut first, mut last) = (Vec::new(), 0, 0);
    for (i, reach) in reach.into_iter().enumerate() {
        last = last.max(reach).max(i);
        if last == i {
            lengths.push((i + 1 - first) as i64);
            first = i + 1;
        }
    }
    lengths
}

/// Two batched products for each `block` of queries, the H/G query heads of a group side by side as
/// rows: [B, H, T, d]. Keys after a block are left out where there is more than one. Softmax reduces in f32.
fn by_products(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, block: i64) -> Tensor {
    let &[b, t, h, d] = q.size().as_slice() else {
        unreachable!("heads are split before")
    };
    let (n, g) = (k.size()[1], k.size()[2]);
    let queries = (q * (d as f64).powf(-0.5))
        .view([b, t, g, h / g, d])
        .permute([0, 2, 3, 1, 4]);
    let by_group = |heads: &Tensor| heads.transpose(1, 2).reshape([b * g, n, d]);
    let (keys, values) = (by_group(k), by_group(v));
    let blocks: Vec<Tensor> = (0..t)
        .step_by(block as usize)
        .map(|first| {
            let count = block.min(t - first);
            let seen = if count == t { n } else { first + count };
            let rows = queries
                .narrow(3, first, count)
                .reshape([b * g, h / g * count, d]);
            let scores = rows
                .bmm(&keys.narrow(1, 0, seen).transpose(1, 2))
                .view([b, h, count, seen])
                .g_add_(&mask.narrow(-2, first, count).narrow(-1, 0, seen));
            let weights = scores
                .softmax(-1, None::<Kind>)
                .view([b * g, h / g * count, seen]);
            weights
                .bmm(&values.narrow(1, 0, seen))
                .view([b, h, count, d])
        })
        .collect();
    match blocks.as_slice() {
        [whole] => whole.shallow_clone(),
        blocks => Tensor::cat(blocks, 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_end_where_nobody_sees_further() {
        let n = 7;
        let mut visible = vec![false; n * n];
        for (i, j) in [(0, 0), (1, 0), (1, 1), (2, 2), (5, 3), (4, 4), (3, 6)] {
            visible[i * n + j] = true;
        }
        assert_eq!(groups(&visible, n), [2, 1, 4]);
        assert!(groups(&[], 0).is_empty());
    }

    /// Blocks of queries, whole products and the kernel agree, gradients too, with and without a
    /// window, for grouped heads and a last block that is not full.
    #[test]
    fn every_way_gives_the_same() {
        tch::set_num_threads(1);
        let (b, t, h, g, d) = (2, 13, 4, 2, 6);
        let values = |heads: i64, seed: f64| {
            let count = b * t * heads * d;
            let values = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * seed).sin();
            values.view([b, t, heads, d]).set_requires_grad(true)
        };
        for window in [t, 5] {
            let run = |attend: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
                let (q, k, v) = (values(h, 0.7), values(g, 1.3), values(g, 2.1));
                let out = attend(&q, &k, &v);
                out.square().sum(Kind::Float).backward();
                [out, q.grad(), k.grad(), v.grad()].map(|tensor| tensor.detach().copy())
            };
            let attention = Attention::windowed(t, window, Kind::Float, Device::Cpu);
            let expected = run(&|q, k, v| attention.attend(q, k, v));
            let hidden = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(-window);
            let mask =
                causal_mask(t, Kind::Float, Device::Cpu).masked_fill_(&hidden, f64::NEG_INFINITY);
            for block in [t, 4, 1] {
                let found = run(&|q, k, v| {
                    by_products(q, k, v, &mask, block)
                        .transpose(1, 2)
                        .reshape([b * t, -1])
                });
                for (expected, found) in expected.iter().zip(&found) {
                    let difference = (expected - found).abs().max().double_value(&[]);
                    assert!(
                        difference < 1e-4,
                        "window {window}, block {block}: {difference}"
                    );
                }
            }
        }
    }
}
