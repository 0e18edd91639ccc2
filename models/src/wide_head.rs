//! Logits in f32 from hidden states and head in bf16.
//!
//! Statistics of logits that were rounded to bf16 are off by up to 2⁻⁹ of a logit, so the head's
//! product has to come out in f32. libtorch gives that only for operands in f32. The processor can
//! multiply bf16 and add in f32 at twice that speed: exact products, f32 sums. On processors that
//! cannot, the operands are widened.

use tch::{Device, Kind, Tensor};

use crate::bf16_product::Matrix;
use crate::linear::linear;

/// An LM head [V, D] made ready for [`WideHead::logits_into`].
#[derive(Debug)]
pub struct WideHead {
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// f32, wherever the head is.
    Wide(Tensor),
    /// bf16 on a CPU that multiplies it.
    Packed(Matrix),
}

impl WideHead {
    /// Keeps the head in bf16 where it is in bf16 on a CPU that can multiply that, else in f32.
    pub fn new(head: &Tensor) -> WideHead {
        WideHead::packed(head).unwrap_or_else(|| WideHead {
            form: Form::Wide(head.detach().to_kind(Kind::Float).contiguous()),
        })
    }

    /// Only where the head stays in bf16, in as many bytes as it has.
    pub fn packed(head: &Tensor) -> Option<WideHead> {
        Matrix::new(&head.detach()).map(|matrix| WideHead {
            form: Form::Packed(matrix),
        })
    }

    /// V.
    pub fn vocab_size(&self) -> usize {
        match &self.form {
            Form::Wide(head) => head.size()[0] as usize,
            Form::Packed(matrix) => matrix.rows(),
        }
    }

    /// Bytes that the head takes.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Wide(head) => head.numel() * 4,
            Form::Packed(matrix) => matrix.bytes(),
        }
    }

    /// Logits [N·V] of hidden states [N, D] after the final norm.
    ///
    /// # Panics
    /// When the widths differ.
    pub fn logits_into(&self, hidden: &Tensor, logits: &mut Vec<f32>) {
        let length = hidden.size()[0] as usize * self.vocab_size();
        logits.resize(length, 0.0);
        match &self.form {
            Form::Packed(matrix) => matrix.multiply(hidden, logits),
            Form::Wide(head) => {
                linear(&hidden.to_kind(Kind::Float), head, None)
                    .to_device(Device::Cpu)
                    .contiguous()
                    .copy_data(logits, length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against products in f64, for sizes that fill no panel, no tile and no pair.
    #[test]
    fn logits_are_those_of_a_wide_product() {
        tch::set_num_threads(2);
        let mut rng = crate::SeededRng::new(7);
        let mut random = |rows: i64, columns: i64| {
            let values: Vec<f32> = (0..rows * columns).map(|_| rng.normal() as f32).collect();
            Tensor::from_slice(&values).view([rows, columns])
        };
        for (count, rows, columns) in [(1, 1, 1), (5, 64, 8), (13, 150, 33), (32, 1000, 96)] {
            for kind in [Kind::BFloat16, Kind::Float] {
                let hidden = random(count, columns).to_kind(kind);
                let head = random(rows, columns).to_kind(kind);
                let wide = WideHead::new(&head);
                let mut logits = vec![9.0; 3];
                wide.logits_into(&hidden, &mut logits);
                let found = Tensor::from_slice(&logits).view([count, rows]);
                let exact = hidden
                    .to_kind(Kind::Double)
                    .matmul(&head.to_kind(Kind::Double).tr());
                let difference = (found.to_kind(Kind::Double) - exact).abs().max();
                let difference = difference.double_value(&[]);
                assert!(
                    difference < 1e-4,
                    "[{count}, {rows}, {columns}]: {difference}"
                );
                assert_eq!(wide.vocab_size(), rows as usize);
            }
        }
    }
}
