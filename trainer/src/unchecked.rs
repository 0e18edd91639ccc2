//! The only calls of this crate that the compiler cannot check, apart from the row kernel's choice of
//! instructions: the memory of tensors as slices.
#![expect(unsafe_code)]

use tch::{Device, Kind, Tensor};

use crate::row_kernel::Values;

/// The values of a tensor that nobody else uses, f32 or bfloat16; `None` where they do not lie on the
/// CPU in one piece, or are of another kind.
///
/// The caller has just made the tensor by an operation that gives fresh memory (a matrix product),
/// holds its only handle, and lets no other tensor see its storage while the slice lives.
pub(crate) fn values_of(tensor: &mut Tensor) -> Option<Values<'_>> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() || tensor.requires_grad() {
        return None;
    }
    let length = tensor.numel();
    let data = tensor.data_ptr();
    match tensor.kind() {
        // SAFETY: a contiguous CPU tensor holds `length` values of its kind at `data_ptr`, aligned by
        // libtorch's allocator; the exclusive borrow keeps the tensor, and the contract above its
        // memory, to this slice.
        Kind::Float => Some(Values::F32(unsafe {
            slice_mut(data.cast::<f32>(), length)
        })),
        // SAFETY: as above; bfloat16 patterns are u16.
        Kind::BFloat16 => Some(Values::Bf16(unsafe {
            slice_mut(data.cast::<u16>(), length)
        })),
        _ => None,
    }
}

/// The values of a tensor of the kind that goes with `T`, for reading; `None` where they do not lie
/// on the CPU in one piece, or are of another kind. Nobody writes to the tensor meanwhile.
pub(crate) fn read<T: Element>(tensor: &Tensor) -> Option<&[T]> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() || tensor.kind() != T::KIND {
        return None;
    }
    let length = tensor.numel();
    if length == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous CPU tensor holds `length` values of its kind at `data_ptr`, aligned by
    // libtorch's allocator, for as long as the tensor is borrowed.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), length) })
}

/// A type whose values a tensor of some kind holds.
pub(crate) trait Element: Copy {
    /// That kind.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}

/// # Safety
/// As `std::slice::from_raw_parts_mut`, except that a null `data` is allowed where `length` is 0.
unsafe fn slice_mut<'a, T>(data: *mut T, length: usize) -> &'a mut [T] {
    if length == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(data, length) }
}
