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
