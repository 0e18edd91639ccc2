//! A block's work between its matrix products, and the products in f32, for a pass without a graph that has one thread to
//! itself ([`alone`]): one sweep over memory where libtorch makes several tensors.
//!
//! Every function gives `None` or false where it does not apply: another pass, another device or kind. The caller then asks
//! libtorch, which has threads of its own to share the work, and graphs.

use std::cell::Cell;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use tch::{Device, Kind, Tensor};

use crate::unchecked::{Element, RowWork, in_widest, read, write};

/// Queries that attend at one time: keys after the last that one of them sees are left out. Fewer leave out more, more make
/// faster products.
const QUERY_BLOCK: usize = 16;

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs a pass without a graph that has this thread to itself, of libtorch's too.
pub(crate) fn alone<R>(pass: impl FnOnce() -> R) -> R {
    let before = ALONE.replace(true);
    let result = tch::no_grad(pass);
    ALONE.set(before);
    result
}

/// The calling thread runs a pass in [`alone`].
pub(crate) fn is_alone() -> bool {
    ALONE.get()
}

fn applies(tensors: &[&Tensor]) -> bool {
    is_alone() && tensors.iter().all(|tensor| tensor.device() == Device::Cpu)
}

/// Calls a kernel for the kind of `$tensor`.
macro_rules! by_kind {
    ($tensor:expr, $kernel:ident($($argument:expr),*)) => {
        match $tensor.kind() {
            Kind::Float => $kernel::<f32>($($argument),*),
            Kind::BFloat16 => $kernel::<u16>($($argument),*),
            _ => None,
        }
    };
}

/// A matrix whose rows lie `stride` apart in `values`.
fn matrix(values: &[f32], [rows, columns]: [usize; 2], stride: usize) -> MatRef<'_, f32> {
    MatRef::from_column_major_slice_with_stride(values, columns, rows, stride).transpose()
}

/// a · b, on this thread, into the rows of `out`, `stride` apart.
fn multiply(a: MatRef<'_, f32>, b: MatRef<'_, f32>, out: &mut [f32], stride: usize) {
    let (rows, columns) = (a.nrows(), b.ncols());
    let out = MatMut::from_column_major_slice_with_stride_mut(out, columns, rows, stride);
    matmul(out.transpose_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
}

/// x Wᵀ (+ b) in f32: [N, in], [out, in] → [N, out]. libtorch's ways to oneDNN and MKL bring W as a whole into an order of
/// their own for every product, and leave a tenth of what one core can do.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Option<Tensor> {
    if !applies(&[x, weight]) {
        return None;
    }
    let x = x.contiguous();
    let (input, weights) = (read(&x)?, read(weight)?);
    let &[outputs, inputs] = weight.size().as_slice() else {
        return None;
    };
    let mut shape = x.size();
    *shape.last_mut()? = outputs;
    let (inputs, outputs) = (inputs as usize, outputs as usize);
    let rows = input.len() / inputs.max(1);
    let mut y = Tensor::empty(shape, (Kind::Float, Device::Cpu));
    multiply(
        matrix(input, [rows, inputs], inputs),
        matrix(weights, [outputs, inputs], inputs).transpose(),
        write(&mut y)?,
        outputs,
    );
    Some(match bias {
        Some(bias) => y.g_add_(bias),
        None => y,
    })
}

/// x / √(mean(x²) + ε) · w over rows: [.., D], [D] → [.., D].
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Option<Tensor> {
    if !applies(&[x, weight]) {
        return None;
    }
    by_kind!(
        x,
        rms_norm_of(&x.contiguous(), &weight.to_kind(x.kind()), eps)
    )
}

fn rms_norm_of<T: Element>(x: &Tensor, weight: &Tensor, eps: f64) -> Option<Tensor> {
    let mut y = x.empty_like();
    let weight = read::<T>(weight)?;
    in_widest(RmsNorm(read(x)?, write(&mut y)?, weight, eps as f32));
    Some(y)
}

/// Rows from, rows to, the weight, ε.
struct RmsNorm<'a, T>(&'a [T], &'a mut [T], &'a [T], f32);

impl<T: Element> RowWork for RmsNorm<'_, T> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) {
        let RmsNorm(from, to, weight, eps) = self;
        let width = weight.len().max(1);
        for (x, y) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
            let mean = sum(x, |x| x.wide() * x.wide()) / width as f32;
            let inverse = (mean + eps).sqrt().recip();
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = T::narrow(T::narrow(x.wide() * inverse).wide() * weight.wide());
            }
        }
    }
}

/// silu(gate) · up, in place on `gate`; false where `gate` is as it was.
pub(crate) fn silu_times(gate: &mut Tensor, up: &Tensor) -> bool {
    applies(&[gate, up]) && by_kind!(up, silu_times_of(gate, up)).is_some()
}

fn silu_times_of<T: Element>(gate: &mut Tensor, up: &Tensor) -> Option<()> {
    in_widest(SiluTimes::<T>(write(gate)?, read(up)?));
    Some(())
}

struct SiluTimes<'a, T>(&'a mut [T], &'a [T]);

impl<T: Element> RowWork for SiluTimes<'_, T> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) {
        let SiluTimes(gate, up) = self;
        for (gate, up) in gate.iter_mut().zip(up) {
            let x = gate.wide();
            let small = exp_nonpositive(-x.abs());
            let sigmoid = if x < 0.0 { small } else { 1.0 } / (1.0 + small);
            *gate = T::narrow(T::narrow(x * sigmoid).wide() * up.wide());
        }
    }
}

/// Rotates x [B, T, H, d] in place by cosines and sines [T, 1, d], the sines of the first half negated; false where x is
/// as it was.
pub(crate) fn rotate(x: &mut Tensor, cos: &Tensor, sin: &Tensor) -> bool {
    applies(&[x, cos, sin]) && by_kind!(cos, rotate_of(x, cos, sin)).is_some()
}

fn rotate_of<T: Element>(x: &mut Tensor, cos: &Tensor, sin: &Tensor) -> Option<()> {
    let &[_, _, heads, width] = x.size().as_slice() else {
        return None;
    };
    let sizes = [heads as usize, width as usize];
    in_widest(Rotate::<T>(write(x)?, read(cos)?, read(sin)?, sizes));
    Some(())
}

/// x, cosines, sines, how many heads and how wide.
struct Rotate<'a, T>(&'a mut [T], &'a [T], &'a [T], [usize; 2]);

impl<T: Element> RowWork for Rotate<'_, T> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) {
        let Rotate(x, cos, sin, [heads, width]) = self;
        let half = width / 2;
        let angles = cos.chunks_exact(width).zip(sin.chunks_exact(width)).cycle();
        for (row, (cos, sin)) in x.chunks_exact_mut(heads * width).zip(angles) {
            let ((cos, cos_2), (sin, sin_2)) = (cos.split_at(half), sin.split_at(half));
            for head in row.chunks_exact_mut(width) {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i].wide(), second[i].wide());
                    first[i] = T::narrow(a * cos[i].wide() + b * sin[i].wide());
                    second[i] = T::narrow(b * cos_2[i].wide() + a * sin_2[i].wide());
                }
            }
        }
    }
}

/// softmax(q kᵀ / √d + mask) v within groups of positions that lie side by side: q [1, M, H, d], k and v [1, N, G, d],
/// mask [M, N] or [H, M, N] → [M, H·d]. `groups` are the numbers of queries and keys of each.
pub(crate) fn attend([q, k, v, mask]: [&Tensor; 4], groups: &[(i64, i64)]) -> Option<Tensor> {
    if !applies(&[q, k, v, mask]) {
        return None;
    }
    let (&[_, rows, heads, width], &[_, _, kv_heads, _]) =
        (q.size().as_slice(), k.size().as_slice())
    else {
        return None;
    };
    let kind = q.kind();
    let [q, k, v, mask] = [q, k, v, mask].map(|tensor| tensor.to_kind(Kind::Float).contiguous());
    let mut mixed = Tensor::empty([rows, heads * width], (Kind::Float, Device::Cpu));
    let (queries, keys, values) = (read::<f32>(&q)?, read::<f32>(&k)?, read::<f32>(&v)?);
    let (out, mask) = (write::<f32>(&mut mixed)?, read::<f32>(&mask)?);

    let [rows, heads, kv_heads, width] = [rows, heads, kv_heads, width].map(|n| n as usize);
    let (out_row, kv_row) = (heads * width, kv_heads * width);
    let all_keys = keys.len() / kv_row.max(1);
    let masks = mask.len() / (rows * all_keys).max(1);
    let factor = (width as f32).sqrt().recip();
    let mut scores = Vec::new();
    let (mut first, mut first_key) = (0, 0);
    for &(count, key_count) in groups {
        let (end, key_count) = (first + count as usize, key_count as usize);
        let mask_row = |head: usize, row: usize| {
            let start = (head.min(masks - 1) * rows + row) * all_keys + first_key;
            &mask[start..start + key_count]
        };
        let sees = |row| {
            mask_row(0, row)
                .iter()
                .rposition(|&mask| mask != f32::NEG_INFINITY)
        };
        let blocks: Vec<(usize, usize, usize)> = (first..end)
            .step_by(QUERY_BLOCK)
            .map(|block| {
                let rows = QUERY_BLOCK.min(end - block);
                let last = (block..block + rows).filter_map(sees).max();
                (block, rows, last.map_or(key_count, |last| last + 1))
            })
            .collect();
        for kv_head in 0..kv_heads {
            let shared = first_key * kv_row + kv_head * width;
            for head in (0..heads).filter(|head| head / (heads / kv_heads) == kv_head) {
                for &(block, rows, seen) in &blocks {
                    let own = block * out_row + head * width;
                    let [keys, values] =
                        [keys, values].map(|all| matrix(&all[shared..], [seen, width], kv_row));
                    scores.resize(rows * seen, 0.0);
                    let queries = matrix(&queries[own..], [rows, width], out_row);
                    multiply(queries, keys.transpose(), &mut scores, seen);
                    for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                        let mask = &mask_row(head, block + row)[..seen];
                        in_widest(Softmax {
                            scores,
                            mask,
                            factor,
                        });
                    }
                    let weights = matrix(&scores, [rows, seen], seen);
                    multiply(weights, values, &mut out[own..], out_row);
                }
            }
        }
        first = end;
        first_key += key_count;
    }
    Some(mixed.to_kind(kind))
}

/// softmax(factor · scores + mask), in place.
struct Softmax<'a> {
    scores: &'a mut [f32],
    mask: &'a [f32],
    factor: f32,
}

impl RowWork for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) {
        let Softmax {
            scores,
            mask,
            factor,
        } = self;
        let mut largest = [f32::NEG_INFINITY; LANES];
        for (scores, mask) in scores.chunks_mut(LANES).zip(mask.chunks(LANES)) {
            for ((score, mask), largest) in scores.iter_mut().zip(mask).zip(&mut largest) {
                *score = *score * factor + mask;
                *largest = largest.max(*score);
            }
        }
        let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
        for score in scores.iter_mut() {
            *score = exp_nonpositive(*score - largest);
        }
        let inverse = sum(scores, |score| *score).recip();
        for score in scores {
            *score *= inverse;
        }
    }
}

/// Sums that run side by side, so that they fill a vector.
const LANES: usize = 32;

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn sum<T>(row: &[T], of: impl Fn(&T) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let lanes = row.chunks_exact(LANES);
    let rest: f32 = lanes.remainder().iter().map(&of).sum();
    for lanes in lanes {
        for (sum, value) in sums.iter_mut().zip(lanes) {
            *sum += of(value);
        }
    }
    sums.into_iter().sum::<f32>() + rest
}

/// exp(x) for x ≤ 0 with a relative error below 2e-7; 0 below −87, where f32 would be denormal. Range reduction by ln 2 in
/// two parts and a polynomial of degree 6 (Cephes' `expf`).
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    // 1.5·2²³: adding it leaves the rounded integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let polynomial = [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let p = polynomial
        .into_iter()
        .fold(1.987_569_1e-4, |p, c| p * r + c);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 {
        0.0
    } else {
        (p * r * r + r + 1.0) * scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SeededRng;

    fn random(rng: &mut SeededRng, shape: &[i64], kind: Kind) -> Tensor {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_: i64| 3.0 * rng.normal() as f32).collect();
        Tensor::from_slice(&values).view(shape).to_kind(kind)
    }

    /// Against libtorch's operations on the same numbers in f64.
    #[test]
    fn kernels_are_libtorchs_operations() {
        let mut rng = SeededRng::new(3);
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            let near = |found: &Tensor, expected: &Tensor| {
                assert_eq!(found.kind(), kind);
                let scale = expected.abs().max().double_value(&[]);
                let difference = (found.to_kind(Kind::Double) - expected).abs().max();
                let difference = difference.double_value(&[]) / scale;
                assert!(difference < tolerance, "{kind:?}: {difference}");
            };
            let mut next = |shape: &[i64]| random(&mut rng, shape, kind);
            let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);

            let (x, weight) = (next(&[5, 70]), next(&[70]));
            let mean = wide(&x)
                .square()
                .mean_dim([-1i64].as_slice(), true, Kind::Double);
            let expected = wide(&x) * (mean + 1e-5).rsqrt() * wide(&weight);
            near(&alone(|| rms_norm(&x, &weight, 1e-5)).unwrap(), &expected);

            if kind == Kind::Float {
                let (x, weight, bias) = (next(&[2, 5, 70]), next(&[33, 70]), next(&[33]));
                let expected = wide(&x).matmul(&wide(&weight).tr()) + wide(&bias);
                near(
                    &alone(|| linear(&x, &weight, Some(&bias))).unwrap(),
                    &expected,
                );
            }

            let (mut gate, up) = (next(&[5, 70]), next(&[5, 70]));
            let expected = wide(&gate).silu() * wide(&up);
            assert!(alone(|| silu_times(&mut gate, &up)));
            near(&gate, &expected);

            let (mut x, cos, sin) = (next(&[2, 3, 4, 6]), next(&[3, 1, 6]), next(&[3, 1, 6]));
            let halves = wide(&x).chunk(2, -1);
            let swapped = Tensor::cat(&[&halves[1], &halves[0]], -1);
            let expected = wide(&x) * wide(&cos) + swapped * wide(&sin);
            assert!(alone(|| rotate(&mut x, &cos, &sin)));
            near(&x, &expected);

            for rows in [5, 40] {
                let (x, weight, bias) = (next(&[2, rows, 70]), next(&[50, 70]), next(&[50]));
                let expected = wide(&x).linear(&wide(&weight), Some(&wide(&bias)));
                if let Some(y) = alone(|| linear(&x, &weight, Some(&bias))) {
                    near(&y, &expected);
                }
            }
        }
    }

    /// No pass has a thread to itself but where it says so, and what asks for it alone applies nowhere else.
    #[test]
    fn only_alone() {
        let x = random(&mut SeededRng::new(1), &[2, 4], Kind::Float);
        assert!(rms_norm(&x, &x.select(0, 0), 1e-5).is_none());
        assert!(linear(&x, &x, None).is_none());
        assert!(alone(|| linear(&x, &x, None)).is_some());
    }

    #[test]
    fn exponentials_are_near() {
        for step in 0..=90_000 {
            let x = -(step as f32) / 1000.0;
            let (found, expected) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            let near = (found / expected - 1.0).abs() < 2e-7;
            assert!(near || (x < -87.0 && found == 0.0), "exp({x}) = {found}");
        }
    }
}
