//! Products of bf16 matrices with sums in f32, on AVX-512 with bf16 (Intel since Cooper Lake, AMD
//! since Zen 4): what libtorch does not give.
#![expect(
    unsafe_code,
    reason = "the kernel is called only where the processor has its instructions"
)]

use tch::{Device, Kind, Tensor};

/// Rows of a panel: two vectors of 16 sums.
const PANEL: usize = 32;
/// Hidden states multiplied at one time: with two vectors of sums each, 24 of 32 registers.
const TILE: usize = 12;

/// A matrix [rows, columns] in panels of 32 rows: for each pair of columns the pairs of the 32
/// rows side by side. Rows and columns are filled up with zeros.
#[derive(Debug)]
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    /// [rows/32, pairs, 32], a pair of bf16 in each word.
    panels: Vec<u32>,
}

impl Matrix {
    /// `None` where the matrix is no bf16 on a CPU, or the processor has not the instructions.
    pub(crate) fn new(matrix: &Tensor) -> Option<Matrix> {
        let suits = matrix.kind() == Kind::BFloat16 && matrix.device() == Device::Cpu;
        if !(suits && processor_can()) {
            return None;
        }
        let (rows, columns) = (matrix.size()[0] as usize, matrix.size()[1] as usize);
        let words = pairs(matrix);
        let width = columns.div_ceil(2);
        let mut panels = vec![0u32; rows.div_ceil(PANEL) * PANEL * width];
        for (panel, rows) in panels
            .chunks_exact_mut(PANEL * width)
            .zip(words.chunks(PANEL * width))
        {
            for (lane, row) in rows.chunks_exact(width).enumerate() {
                for (pair, &word) in row.iter().enumerate() {
                    panel[pair * PANEL + lane] = word;
                }
            }
        }
        Some(Matrix {
            rows,
            columns,
            panels,
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn bytes(&self) -> usize {
        self.panels.len() * 4
    }

    /// `out` [N·rows] = hidden [N, columns] · matrixᵀ. Every sum is over the columns in the same
    /// order, whatever N and the number of threads.
    pub(crate) fn multiply(&self, hidden: &Tensor, out: &mut [f32]) {
        assert_eq!(
            hidden.size()[1] as usize,
            self.columns,
            "widths of hidden state and head"
        );
        let states = pairs(&hidden.to_kind(Kind::BFloat16));
        let count = hidden.size()[0] as usize;
        assert_eq!(out.len(), count * self.rows, "room for the logits");
        let width = self.columns.div_ceil(2);
        let panels = self.rows.div_ceil(PANEL);
        let threads = (tch::get_num_threads().max(1) as usize).min(panels.max(1));
        let share = panels.div_ceil(threads.max(1)).max(1);
        let target = Target {
            start: out.as_mut_ptr(),
            row: self.rows,
        };
        std::thread::scope(|scope| {
            for first in (0..panels).step_by(share) {
                let (states, target) = (&states, &target);
                scope.spawn(move || {
                    for panel in first..panels.min(first + share) {
                        let words = &self.panels[panel * PANEL * width..][..PANEL * width];
                        for tile in (0..count).step_by(TILE) {
                            let rows = TILE.min(count - tile);
                            let states = &states[tile * width..(tile + rows) * width];
                            let mut sums = [[0.0f32; PANEL]; TILE];
                            // SAFETY: a matrix exists only where the processor can; the kernel
                            // stays inside its slices.
                            unsafe { multiply_tile(states, words, width, rows, &mut sums) };
                            for (row, sums) in sums[..rows].iter().enumerate() {
                                let column = panel * PANEL;
                                let valid = PANEL.min(self.rows - column);
                                // SAFETY: `out` has room for every row and column (asserted above), and
                                // each thread has panels of its own.
                                unsafe { target.write(tile + row, column, &sums[..valid]) };
                            }
                        }
                    }
                });
            }
        });
    }
}

/// The logits, of which every thread writes its own columns.
struct Target {
    start: *mut f32,
    row: usize,
}

// SAFETY: the threads of `multiply` write to distinct panels of columns and none reads.
unsafe impl Sync for Target {}

impl Target {
    /// # Safety
    /// Row and columns must be inside the logits, and no other thread may write to these columns.
    unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: by this function's contract.
        unsafe {
            let place = self.start.add(row * self.row + column);
            std::ptr::copy_nonoverlapping(values.as_ptr(), place, values.len());
        }
    }
}

/// The pairs of neighbouring columns of a bf16 matrix [rows, columns], row by row; an odd last
/// column is paired with zero.
fn pairs(matrix: &Tensor) -> Vec<u32> {
    let columns = matrix.size()[1];
    let even = if columns % 2 == 1 {
        matrix.constant_pad_nd([0, 1])
    } else {
        matrix.shallow_clone()
    };
    let even = even.to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0u8; even.numel() * 2];
    even.copy_data_u8(&mut bytes, even.numel());
    let word = |four: &[u8]| u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    bytes.chunks_exact(4).map(word).collect()
}

#[cfg(target_arch = "x86_64")]
fn processor_can() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor_can() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn multiply_tile(_: &[u32], _: &[u32], _: usize, _: usize, _: &mut [[f32; PANEL]; TILE]) {
    unreachable!("no such matrix is made here")
}

/// `sums` [rows][32] = states [rows, width] · panel [width, 32], both of pairs.
///
/// # Safety
/// The processor must have AVX-512F and AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_tile(
    states: &[u32],
    panel: &[u32],
    width: usize,
    rows: usize,
    sums: &mut [[f32; PANEL]; TILE],
) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    assert!(states.len() == rows * width && panel.len() == PANEL * width && rows <= TILE);
    // A tile that is not full multiplies its first row again.
    let row_of: [usize; TILE] = std::array::from_fn(|row| if row < rows { row * width } else { 0 });
    let mut all = [[_mm512_setzero_ps(); 2]; TILE];
    for pair in 0..width {
        // SAFETY: the two vectors lie inside row `pair` of the panel; every index into
        // `states` is below rows · width (asserted above).
        unsafe {
            let start = panel.as_ptr().add(pair * PANEL);
            let weights: [__m512bh; 2] = std::array::from_fn(|vector| {
                let words = _mm512_loadu_si512(start.add(16 * vector).cast());
                std::mem::transmute::<__m512i, __m512bh>(words)
            });
            for (sums, first) in all.iter_mut().zip(row_of) {
                let word = *states.get_unchecked(first + pair);
                let state =
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(word.cast_signed()));
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbf16_ps(*sum, state, weights);
                }
            }
        }
    }
    for (sums, all) in sums.iter_mut().zip(all) {
        for (vector, sum) in all.into_iter().enumerate() {
            // SAFETY: 16 of the 32 sums of a row.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(16 * vector), sum) };
        }
    }
}
