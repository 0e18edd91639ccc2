//! The LM head as a cache stores it.

use caskd_formats::{CacheWriter, HeadDtype, HeadWeights};
use caskd_models::LoadedModel;

use crate::Result;
use crate::prepare::head_shape;
use crate::teacher_pass::to_f32_vec;

/// Stores the LM head in the narrowest type that holds it exactly, or else in f16 (whose rounding,
/// 2⁻¹² of a weight, is far below that of the 8-bit hidden states), or f32 where f16 overflows.
pub(crate) fn write_head(writer: &mut CacheWriter, teacher: &LoadedModel) -> Result<()> {
    let (vocab_size, width) = head_shape(teacher);
    let weights = to_f32_vec(&teacher.network.head().detach());
    let exact_bf16 = weights
        .iter()
        .all(|weight| half::bf16::from_f32(*weight).to_f32() == *weight);
    let fits_f16 = weights.iter().all(|weight| weight.abs() <= 65_504.0);
    let (dtype, bytes): (HeadDtype, Vec<u8>) = if exact_bf16 {
        (
            HeadDtype::Bf16,
            weights
                .iter()
                .flat_map(|weight| half::bf16::from_f32(*weight).to_le_bytes())
                .collect(),
        )
    } else if fits_f16 {
        (
            HeadDtype::F16,
            weights
                .iter()
                .flat_map(|weight| half::f16::from_f32(*weight).to_le_bytes())
                .collect(),
        )
    } else {
        (
            HeadDtype::F32,
            weights
                .iter()
                .flat_map(|weight| weight.to_le_bytes())
                .collect(),
        )
    };
    Ok(writer.write_head(&HeadWeights {
        vocab_size,
        width,
        dtype,
        bytes: &bytes,
    })?)
}
