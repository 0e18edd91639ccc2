//! The norms between blocks.

use tch::{Kind, Tensor};

use crate::weights::WeightSource;
use crate::{LoadOptions, Result, row_kernels};

/// A norm over the last dimension, reduced in f32.
#[derive(Debug)]
pub struct Norm {
    /// [D].
    pub(crate) weight: Tensor,
    /// [D]; a layer norm has one, a root-mean-square norm has none.
    pub(crate) bias: Option<Tensor>,
    pub(crate) eps: f64,
}

impl Norm {
    /// x / √(mean(x²) + ε) · w (Zhang and Sennrich 2019).
    pub(crate) fn rms(
        name: &str,
        width: usize,
        eps: f64,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Norm> {
        Ok(Norm {
            weight: source.tensor(&format!("{name}.weight"), &[width as i64], options)?,
            bias: None,
            eps,
        })
    }

    /// (x − mean(x)) / √(var(x) + ε) · w + b (Ba et al. 2016).
    pub(crate) fn layer(
        name: &str,
        width: usize,
        eps: f64,
        source: &dyn WeightSource,
        options: &LoadOptions,
    ) -> Result<Norm> {
        let bias = source.tensor(&format!("{name}.bias"), &[width as i64], options)?;
        Ok(Norm {
            bias: Some(bias),
            ..Norm::rms(name, width, eps, source, options)?
        })
    }

    pub(crate) fn for_each_tensor(&mut self, change: &mut dyn FnMut(&mut Tensor)) {
        change(&mut self.weight);
        if let Some(bias) = &mut self.bias {
            change(bias);
        }
    }

    /// [.., D] → [.., D].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if let Some(bias) = &self.bias {
            let width = self.weight.size();
            let (weight, bias) = (self.weight.to_kind(x.kind()), bias.to_kind(x.kind()));
            return x.layer_norm(width, Some(&weight), Some(&bias), self.eps, false);
        }
        if let Some(normed) = row_kernels::rms_norm(x, &self.weight, self.eps) {
            return normed;
        }
        // Type promotion makes the products f32 without a wide copy of x.
        let norm = x.linalg_norm(2.0, [-1i64].as_slice(), true, Kind::Float);
        let inverse = (norm.square() / self.weight.numel() as f64 + self.eps).rsqrt();
        (x * inverse).to_kind(x.kind()).g_mul_(&self.weight)
    }

    pub(crate) fn share(&self) -> Norm {
        Norm {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            eps: self.eps,
        }
    }

    /// Its tensors with their names below `name`.
    pub(crate) fn parameters(&self, name: &str) -> Vec<(String, &Tensor)> {
        let weight = (format!("{name}.weight"), &self.weight);
        let bias = self
            .bias
            .as_ref()
            .map(|bias| (format!("{name}.bias"), bias));
        std::iter::once(weight).chain(bias).collect()
    }
}
