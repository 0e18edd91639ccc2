//! What the row kernels need and the compiler cannot check: the memory of tensors as slices, and code compiled for
//! vectors that only some processors have.
#![expect(unsafe_code)]

use tch::{Device, Kind, Tensor};

/// A number that a tensor of some kind holds.
pub(crate) trait Element: Copy {
    /// That kind.
    const KIND: Kind;

    fn wide(self) -> f32;

    /// Rounded to the nearest, ties to even.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;

    #[inline]
    fn wide(self) -> f32 {
        self
    }

    #[inline]
    fn narrow(value: f32) -> f32 {
        value
    }
}

/// The pattern of a bfloat16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Element for Bf16 {
    const KIND: Kind = Kind::BFloat16;

    #[inline]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline]
    fn narrow(value: f32) -> Bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding would carry some NaNs into infinity.
        let quiet = (bits >> 16) | 0x40;
        Bf16(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

/// The numbers of a tensor, for reading; `None` where they do not lie on the CPU in one piece, or are of another kind.
/// Nobody writes to the tensor meanwhile.
pub(crate) fn read<T: Element>(tensor: &Tensor) -> Option<&[T]> {
    if !is_slice_of::<T>(tensor) {
        return None;
    }
    if tensor.numel() == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous CPU tensor holds `numel` numbers of its kind at `data_ptr`, aligned by libtorch's
    // allocator, for as long as the tensor is borrowed.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), tensor.numel()) })
}

/// The same for writing.
///
/// The caller has just made the tensor by an operation that gives fresh memory, and lets no other tensor see its
/// storage while the slice lives.
pub(crate) fn write<T: Element>(tensor: &mut Tensor) -> Option<&mut [T]> {
    if !is_slice_of::<T>(tensor) {
        return None;
    }
    if tensor.numel() == 0 {
        return Some(&mut []);
    }
    // SAFETY: as above; the exclusive borrow and the contract keep the memory to this slice.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) })
}

fn is_slice_of<T: Element>(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == T::KIND && tensor.is_contiguous()
}

/// Runs `work`, whatever of it is inlined here compiled for the widest vectors that the processor has.
pub(crate) fn in_widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: both were detected just above.
            return unsafe { in_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was detected just above.
            return unsafe { in_avx2(work) };
        }
    }
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn in_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn in_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}
