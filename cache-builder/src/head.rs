//! The LM head as a cache stores it.

use caskd_formats::{CacheWriter, HeadDtype, HeadWeights};

use crate::Result;
use crate::teacher::Teacher;
use crate::teacher_pass::to_f32_vec;

/// Rows that are converted at one time.
const CHUNK_ROWS: usize = 4096;

/// Stores the LM head in the narrowest type that holds it exactly, or else in f16 (whose rounding,
/// 2⁻¹² of a weight, is far below that of the 8-bit hidden states), or f32 where f16 overflows.
pub(crate) fn write_head(writer: &mut CacheWriter, teacher: &Teacher) -> Result<()> {
    let head = teacher.head()?;
    let (vocab_size, width) = (head.size()[0] as usize, head.size()[1] as usize);
    // Rows at a time: in f32 the head of a large vocabulary takes gigabytes.
    let chunks = || {
        (0..vocab_size).step_by(CHUNK_ROWS).map(|first| {
            let rows = CHUNK_ROWS.min(vocab_size - first);
            to_f32_vec(&head.narrow(0, first as i64, rows as i64))
        })
    };
    let (mut exact_bf16, mut fits_f16) = (true, true);
    for weight in chunks().flatten() {
        exact_bf16 &= half::bf16::from_f32(weight).to_f32() == weight;
        fits_f16 &= weight.abs() <= 65_504.0;
    }
    let dtype = match (exact_bf16, fits_f16) {
        (true, _) => HeadDtype::Bf16,
        (false, true) => HeadDtype::F16,
        (false, false) => HeadDtype::F32,
    };
    let mut bytes = Vec::with_capacity(vocab_size * width * dtype.bytes());
    for weights in chunks() {
        match dtype {
            HeadDtype::Bf16 => bytes.extend(
                weights
                    .iter()
                    .flat_map(|weight| half::bf16::from_f32(*weight).to_le_bytes()),
            ),
            HeadDtype::F16 => bytes.extend(
                weights
                    .iter()
                    .flat_map(|weight| half::f16::from_f32(*weight).to_le_bytes()),
            ),
            HeadDtype::F32 => {
                bytes.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
            }
        }
    }
    Ok(writer.write_head(&HeadWeights {
        vocab_size,
        width,
        dtype,
        bytes: &bytes,
    })?)
}
