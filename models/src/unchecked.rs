//! What row kernels need and the compiler cannot check: the memory of tensors as slices, and code compiled for
//! vectors that only some processors have. For the kernels here and in the crates above, and no part of the interface.
#![expect(unsafe_code)]

use tch::{Device, Kind, Tensor};

/// What a tensor of some kind holds.
pub trait Stored: Copy {
    /// That kind.
    const KIND: Kind;
}

impl Stored for f32 {
    const KIND: Kind = Kind::Float;
}

impl Stored for i64 {
    const KIND: Kind = Kind::Int64;
}

/// The pattern of a bfloat16.
impl Stored for u16 {
    const KIND: Kind = Kind::BFloat16;
}

/// A number that kernels compute with, in f32.
pub trait Element: Stored {
    /// Its value.
    fn wide(self) -> f32;

    /// The nearest one, ties to even.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline]
    fn wide(self) -> f32 {
        self
    }

    #[inline]
    fn narrow(value: f32) -> f32 {
        value
    }
}

impl Element for u16 {
    #[inline]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline]
    fn narrow(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding would carry some NaNs into infinity.
        let quiet = (bits >> 16) | 0x40;
        if value.is_nan() {
            quiet as u16
        } else {
            rounded as u16
        }
    }
}

/// The numbers of a tensor, for reading; `None` where they do not lie on the CPU in one piece, or are of another kind.
/// Nobody writes to the tensor meanwhile.
pub fn read<T: Stored>(tensor: &Tensor) -> Option<&[T]> {
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
pub fn write<T: Stored>(tensor: &mut Tensor) -> Option<&mut [T]> {
    if !is_slice_of::<T>(tensor) {
        return None;
    }
    if tensor.numel() == 0 {
        return Some(&mut []);
    }
    // SAFETY: as above; the exclusive borrow and the contract keep the memory to this slice.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) })
}

fn is_slice_of<T: Stored>(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == T::KIND && tensor.is_contiguous()
}

/// Work on rows of numbers that wants the widest vectors of the processor. `run` and what it calls are to be
/// `inline(always)`: only then they take on the instruction set that was found, which closures do not.
pub trait RowWork {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run(self) -> Self::Output;
}

/// Does the work with the widest vectors that the processor has.
pub fn in_widest<W: RowWork>(work: W) -> W::Output {
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
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn in_avx512<W: RowWork>(work: W) -> W::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn in_avx2<W: RowWork>(work: W) -> W::Output {
    work.run()
}
