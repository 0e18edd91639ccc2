//! A linear projection: its weight in the compute type, in 8 bits, masked or training, and an optional low-rank
//! adapter.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::rng::SeededRng;
use crate::row_kernels;

/// How a forward pass treats adapters' dropout.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pass {
    /// No dropout.
    Inference,
    /// Dropout masks are a pure function of the seed and the projection's name.
    Training { dropout_seed: u64 },
}

/// y = x Wᵀ (+ b) + scale · (dropout(x) Aᵀ) Bᵀ.
#[derive(Debug)]
pub(crate) struct Linear {
    /// [out, in]: in the compute type, in f32 where it trains, i8 where it is quantised.
    pub(crate) weight: Tensor,
    /// [out].
    pub(crate) bias: Option<Tensor>,
    /// [out, 1] f32: what an i8 weight is multiplied with.
    pub(crate) scale: Option<Tensor>,
    /// [out, in] bool: false where the weight is zero and stays so.
    pub(crate) mask: Option<Tensor>,
    pub(crate) adapter: Option<Adapter>,
}

/// The low-rank update (Hu et al. 2021, Section 4.1): ΔW = scale · B A.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// Path of the projection, e.g. `model.layers.0.self_attn.q_proj`; names its random streams.
    pub(crate) name: String,
    /// A [r, in], f32 leaf.
    pub(crate) a: Tensor,
    /// B [out, r], f32 leaf.
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
}

/// What several projections read [N, in]. Its form for oneDNN is made once for all of them, which a
/// graph would otherwise keep once for each.
pub(crate) struct Input<'a> {
    x: &'a Tensor,
    onednn: OnceCell<Tensor>,
}

impl<'a> Input<'a> {
    pub(crate) fn new(x: &'a Tensor) -> Input<'a> {
        Input {
            x,
            onednn: OnceCell::new(),
        }
    }

    /// Whether libtorch would hand a convolution of x to oneDNN.
    fn convolves(&self) -> bool {
        let threads = tch::get_num_threads() > 1 || row_kernels::is_alone();
        threads && self.x.numel() > CONVOLVED && through_onednn(self.x)
    }

    /// x Wᵀ (+ b), as [`linear`].
    fn times(&self, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        if through_onednn(weight)
            && let Some(y) = row_kernels::linear(self.x, weight, bias)
        {
            return y;
        }
        let small_and_frozen = weight.numel() <= REORDERED && !weight.requires_grad();
        if small_and_frozen && self.convolves() && through_onednn(weight) {
            // [1, in, N, 1] without a copy: oneDNN calls that order channels last.
            let (columns, rows) = (weight.size()[1], self.x.numel() as i64 / weight.size()[1]);
            let image = self.x.reshape([1, rows, 1, columns]).permute([0, 3, 1, 2]);
            let filters = weight.view([-1, columns, 1, 1]);
            let y = image.conv2d(&filters, bias, [1, 1], [0, 0], [1, 1], 1);
            let mut shape = self.x.size();
            *shape.last_mut().unwrap_or(&mut 0) = weight.size()[0];
            y.permute([0, 2, 3, 1]).reshape(shape)
        } else if through_onednn(weight) {
            self.onednn
                .get_or_init(|| self.x.contiguous().to_mkldnn())
                .mkldnn_linear(weight, bias)
                .to_dense(Kind::Float, false)
        } else {
            self.x.linear(weight, bias)
        }
    }
}

/// Numbers of a matrix that oneDNN may reorder for every product: 16 MiB, about what stays in the caches. Larger ones
/// lose more by that than the copies of input and output cost.
const REORDERED: usize = 4 << 20;

/// Numbers of an input from which libtorch hands a convolution to oneDNN.
const CONVOLVED: usize = 20_480;

/// x Wᵀ (+ b): [N, in], [out, in] → [N, out], in the kind of W, with its graph.
///
/// For f32 on a CPU the product goes to oneDNN: libtorch's default, MKL, takes a slower path on
/// processors that are not Intel's (measured on an AVX-512 EPYC: 120–160 against 75–95 GFLOP/s on
/// one core). A frozen W that fits in the caches goes there as a 1 × 1 convolution: as fast or faster, without copies of
/// input and output in a form of oneDNN's own, of which a graph would keep the first. A pass that has one thread to itself
/// multiplies by faer, in `row_kernels`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    Input::new(x).times(weight, bias)
}

/// Whether products with this matrix go to oneDNN.
pub fn through_onednn(weight: &Tensor) -> bool {
    weight.device() == Device::Cpu
        && weight.kind() == Kind::Float
        && weight.is_contiguous()
        && tch::utils::has_mkldnn()
}

impl Linear {
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear {
            weight,
            bias,
            scale: None,
            mask: None,
            adapter: None,
        }
    }

    /// The same weights without the adapter.
    pub(crate) fn share(&self) -> Linear {
        Linear {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            scale: self.scale.as_ref().map(Tensor::shallow_clone),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
            adapter: None,
        }
    }

    /// [N, in] → [N, out].
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass) -> Tensor {
        self.forward_of(&Input::new(x), pass)
    }

    /// The same of an input that other projections read too.
    pub(crate) fn forward_of(&self, input: &Input<'_>, pass: Pass) -> Tensor {
        let kind = input.x.kind();
        let weight = self.weight_in(kind);
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
        match (&self.adapter, &self.mask) {
            (None, None) => input.times(&weight, bias.as_ref()),
            (None, Some(_)) if !weight.requires_grad() => input.times(&weight, bias.as_ref()),
            (None, Some(mask)) => input.times(&(weight * mask), bias.as_ref()),
            (Some(adapter), None) => {
                adapter.add_to(input.times(&weight, bias.as_ref()), input, pass)
            }
            (Some(adapter), Some(mask)) => {
                let weight = weight + (adapter.delta() * mask).to_kind(kind);
                input.times(&weight, bias.as_ref())
            }
        }
    }

    /// The weight in the type that x computes in; the same tensor where it is in that type.
    fn weight_in(&self, kind: Kind) -> Tensor {
        match &self.scale {
            Some(scale) => (self.weight.to_kind(Kind::Float) * scale).to_kind(kind),
            None => self.weight.to_kind(kind),
        }
    }

    /// Puts the weight into 8 bits with a scale for each output.
    pub(crate) fn quantize(&mut self) {
        let weight = self.weight.to_kind(Kind::Float);
        let scale = weight.abs().amax([1], true).clamp_min(1e-30) / 127.0;
        self.weight = (weight / &scale).round().to_kind(Kind::Int8);
        self.scale = Some(scale);
    }

    /// Undoes [`Linear::quantize`] but for the rounding.
    pub(crate) fn unpack(&mut self, kind: Kind) {
        self.weight = self.weight_in(kind);
        self.scale = None;
    }

    /// W += ΔW, in f32, and the adapter is gone.
    pub(crate) fn merge(&mut self) {
        let Some(adapter) = self.adapter.take() else {
            return;
        };
        tch::no_grad(|| {
            let delta = match &self.mask {
                Some(mask) => adapter.delta() * mask,
                None => adapter.delta(),
            };
            let merged = self.weight_in(Kind::Float) + delta;
            // A base in 8 bits is merged in f32: rounded to 8 bits again it would lose the adapter.
            self.weight = match self.scale.take() {
                Some(_) => merged,
                None => merged.to_kind(self.weight.kind()),
            };
        });
    }

    /// Keeps only these output rows.
    pub(crate) fn keep_rows(&mut self, rows: &Tensor) {
        self.weight = self.weight.index_select(0, rows);
        self.bias = self.bias.as_ref().map(|bias| bias.index_select(0, rows));
    }

    /// Keeps only these input columns.
    pub(crate) fn keep_columns(&mut self, columns: &Tensor) {
        self.weight = self.weight.index_select(1, columns);
    }
}

impl Adapter {
    /// scale · BA [out, in] f32, with its graph.
    fn delta(&self) -> Tensor {
        self.b.matmul(&self.a) * self.scale
    }

    /// The same adapter, its tensors shared.
    pub(crate) fn share(&self) -> Adapter {
        Adapter {
            name: self.name.clone(),
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            ..*self
        }
    }

    /// A kaiming-uniform with a = √5, that is uniform in ±1/√in, from the named stream of `seed`;
    /// B zero, so that the network starts unchanged.
    pub(crate) fn new(
        name: &str,
        (rows, columns): (i64, i64),
        rank: i64,
        scale: f64,
        dropout: f64,
        seed: u64,
        device: Device,
    ) -> Adapter {
        let mut rng = SeededRng::named(seed, name);
        let bound = 1.0 / (columns as f64).sqrt();
        let values: Vec<f32> = (0..rank * columns)
            .map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32)
            .collect();
        let a = Tensor::from_slice(&values)
            .view([rank, columns])
            .to_device(device);
        let b = Tensor::zeros([rows, rank], (Kind::Float, device));
        Adapter {
            name: name.to_owned(),
            a: a.set_requires_grad(true),
            b: b.set_requires_grad(true),
            scale,
            dropout,
        }
    }

    /// y + scale · (dropout(x) Aᵀ) Bᵀ, in place on y: the frozen product needs its output for no
    /// gradient. The products run in y's type; gradients reach the f32 leaves through the casts.
    fn add_to(&self, mut y: Tensor, input: &Input<'_>, pass: Pass) -> Tensor {
        let kind = y.kind();
        let a = self.a.to_kind(kind);
        let b = (&self.b * self.scale).to_kind(kind);
        let low = match pass {
            Pass::Training { dropout_seed } if self.dropout > 0.0 => {
                (input.x * self.dropout_mask(input.x, dropout_seed)).matmul(&a.tr())
            }
            // By the same way as W, so that the graph keeps the input once.
            _ if input.convolves() => input.x.matmul(&a.tr()),
            _ => input.times(&a, None),
        };
        y.addmm_(&low, &b.tr())
    }

    /// 0 with probability `dropout`, else 1 / (1 − dropout); the probability is a multiple of
    /// 2⁻¹⁶, so that one 64-bit word serves four elements.
    fn dropout_mask(&self, x: &Tensor, seed: u64) -> Tensor {
        let mut rng = SeededRng::named(seed, &self.name);
        let threshold = (self.dropout * 65536.0).round() as u64;
        let kept = (65536.0 / (65536.0 - threshold as f64)) as f32;
        let mut mask = vec![0f32; x.numel()];
        for four in mask.chunks_mut(4) {
            let word = rng.next_u64();
            for (lane, value) in four.iter_mut().enumerate() {
                let draw = (word >> (16 * lane)) & 0xffff;
                *value = if draw < threshold { 0.0 } else { kept };
            }
        }
        Tensor::from_slice(&mask)
            .view_as(x)
            .to_device(x.device())
            .to_kind(x.kind())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The mean over many masks is the output without dropout, and masks differ between
    /// projections and seeds.
    #[test]
    fn dropout_keeps_the_mean() {
        tch::set_num_threads(1);
        let values = |count: i64| Tensor::arange(count, (Kind::Float, Device::Cpu)).sin();
        let mut linear = Linear::new(values(12).view([3, 4]), None);
        let mut adapter = Adapter::new("q", (3, 4), 2, 2.0, 0.25, 1, Device::Cpu);
        adapter.b = values(6).view([3, 2]);
        linear.adapter = Some(adapter);
        let x = values(20).view([5, 4]);
        tch::no_grad(|| {
            let run = |seed: u64| linear.forward(&x, Pass::Training { dropout_seed: seed });
            assert_eq!(run(3), run(3));
            assert_ne!(run(3), run(4));
            let sum = (0..4000).map(run).reduce(|sum, next| sum + next).unwrap();
            let difference = (sum / 4000.0 - linear.forward(&x, Pass::Inference))
                .abs()
                .max();
            assert!(difference.double_value(&[]) < 0.03, "{difference}");
        });
    }
}
