//! The only calls of this crate that the compiler cannot check.
#![expect(unsafe_code)]

use std::fs::File;

use memmap2::Mmap;

/// Maps a whole file for reading. The caller has compared its length with the manifest's.
///
/// The contract, documented for users of a cache: published files are never changed or cut short while a process
/// reads them (`Io::Read` is for disks where others might).
pub(crate) fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and caskd never writes to a published file: it is replaced by rename or not at
    // all, and the mapping keeps the old inode alive. A foreign program that truncates it is outside the contract.
    unsafe { Mmap::map(file) }
}

/// out \[m·n\] = a \[m·k\] · bᵀ with b \[n·k\], all row-major f32; `out_stride` elements lie between rows of `out`.
pub(crate) fn multiply_transposed(
    out: &mut [f32],
    out_stride: usize,
    a: &[f32],
    b: &[f32],
    (m, n, k): (usize, usize, usize),
) {
    assert!(
        a.len() == m * k && b.len() == n * k,
        "operands have the shapes that were given"
    );
    assert!(
        m == 0 || (out_stride >= n && out.len() >= (m - 1) * out_stride + n),
        "the product fits"
    );
    // SAFETY: the assertions above bound every element that the given shapes and strides can reach, and `out` is
    // borrowed exclusively, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// Appends the f32 of two byte planes of f16 patterns, by the processor's own conversion; false where it has none.
#[cfg(target_arch = "x86_64")]
pub(crate) fn widen_planes(low: &[u8], high: &[u8], out: &mut Vec<f32>) -> bool {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")) {
        return false;
    }
    let count = low.len().min(high.len());
    out.reserve(count);
    let spare = &mut out.spare_capacity_mut()[..count];
    // SAFETY: the processor has what the function is compiled for.
    unsafe { widen_planes_avx2(&low[..count], &high[..count], spare) };
    // SAFETY: the function has written all `count` values behind the end, within the reserved capacity.
    unsafe { out.set_len(out.len() + count) };
    true
}

/// Elsewhere the library converts.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn widen_planes(_low: &[u8], _high: &[u8], _out: &mut Vec<f32>) -> bool {
    false
}

/// Writes every value of `out`, which is as long as the planes. Only a processor without these instructions must not
/// come here.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn widen_planes_avx2(low: &[u8], high: &[u8], out: &mut [std::mem::MaybeUninit<f32>]) {
    use std::arch::x86_64::{
        __m128i, __m256, _mm_unpackhi_epi8, _mm_unpacklo_epi8, _mm256_cvtph_ps,
    };
    use std::mem::MaybeUninit;
    let (lows, low_rest) = low.as_chunks::<16>();
    let (highs, high_rest) = high.as_chunks::<16>();
    let (outs, out_rest) = out.as_chunks_mut::<16>();
    for ((low, high), out) in lows.iter().zip(highs).zip(outs) {
        let (low, high): (__m128i, __m128i) = (bytemuck::cast(*low), bytemuck::cast(*high));
        let halves: [__m256; 2] = [
            _mm256_cvtph_ps(_mm_unpacklo_epi8(low, high)),
            _mm256_cvtph_ps(_mm_unpackhi_epi8(low, high)),
        ];
        *out = bytemuck::cast::<_, [f32; 16]>(halves).map(MaybeUninit::new);
    }
    for ((low, high), out) in low_rest.iter().zip(high_rest).zip(out_rest) {
        out.write(half::f16::from_le_bytes([*low, *high]).to_f32());
    }
}

/// Counts what tests allocate.
#[cfg(test)]
pub(crate) mod counting {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static LIVE: Cell<isize> = const { Cell::new(0) };
        static PEAK: Cell<isize> = const { Cell::new(0) };
    }

    struct Counting;

    #[global_allocator]
    static COUNTING: Counting = Counting;

    // SAFETY: every call goes to the system's allocator as it came; the counters are plain numbers without destructor,
    // so that touching them allocates nothing.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(layout.size() as isize);
            // SAFETY: the caller keeps the contract of `alloc`.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            count(-(layout.size() as isize));
            // SAFETY: the pointer came from `System` by the functions above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    fn count(bytes: isize) {
        LIVE.set(LIVE.get() + bytes);
        PEAK.set(PEAK.get().max(LIVE.get()));
    }

    /// The most bytes that `work` had allocated at one time on this thread.
    pub(crate) fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
        let before = LIVE.get();
        PEAK.set(before);
        let result = work();
        (result, (PEAK.get() - before).max(0) as usize)
    }
}
