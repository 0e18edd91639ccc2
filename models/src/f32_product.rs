//! Products of f32 matrices on one thread with AVX-512: x · wᵀ for a w that lies row by row, x · w for one whose rows are
//! short. libtorch's ways to oneDNN and MKL bring each w into another order as a whole, in memory of its own, and leave a tenth
//! of what one core can do; here 32 rows at a time stay in the second-level cache while all of x meets them.
#![expect(
    unsafe_code,
    reason = "the kernel is called only where the processor has its instructions"
)]

/// Columns of the result that are computed together: two vectors of 16 sums.
const PANEL: usize = 32;
/// Rows of the result that are computed together: with two vectors of sums each, 24 of 32 registers.
const TILE: usize = 12;
/// Numbers of w that wait in the second-level cache, where one panel is not more.
const PACKED: usize = 64 << 10;

/// Rows inside a slice, `row` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    values: &'a [f32],
    row: usize,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(values: &'a [f32], row: usize) -> Rows<'a> {
        Rows { values, row }
    }

    /// Those from row `first` on.
    fn from(self, first: usize) -> Rows<'a> {
        Rows::new(&self.values[first * self.row..], self.row)
    }

    /// Holds `rows` rows of `width`, and they do not overlap.
    fn hold(values: usize, row: usize, rows: usize, width: usize) -> bool {
        rows == 0 || (row >= width && (rows - 1) * row + width <= values)
    }
}

/// Whether the processor has what [`times_transposed`] and [`times`] need.
pub(crate) fn processor_can() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// `out` [m, n] = x [m, k] · wᵀ, w [n, k]; rows of `out` are `out_row` apart, what lies between them stays as it is.
///
/// # Panics
/// When a matrix does not fit in its slice, or the processor cannot.
pub(crate) fn times_transposed(
    [m, k, n]: [usize; 3],
    x: Rows<'_>,
    w: Rows<'_>,
    out: &mut [f32],
    out_row: usize,
) {
    assert!(Rows::hold(w.values.len(), w.row, n, k) && Rows::hold(out.len(), out_row, m, n));
    if m == 0 {
        return;
    }
    let mut packed = Vec::new();
    let together = (PACKED / (PANEL * k).max(1)).max(1) * PANEL;
    for first in (0..n).step_by(together) {
        let columns = together.min(n - first);
        let w = w.from(first);
        pack(w, [columns, k], &mut packed);
        times_packed([m, k, columns], x, &packed, &mut out[first..], out_row);
    }
}

/// The panels of w [n, k] for [`times_packed`]: [n/32, k, 32], rows that are not there filled up with zeros.
///
/// # Panics
/// As [`times_transposed`].
pub(crate) fn pack(w: Rows<'_>, [n, k]: [usize; 2], packed: &mut Vec<f32>) {
    assert!(processor_can());
    packed.resize(n.div_ceil(PANEL) * PANEL * k, 0.0);
    for (panel, packed) in packed.chunks_exact_mut((PANEL * k).max(1)).enumerate() {
        let w = w.from(panel * PANEL);
        pack_panel(w, PANEL.min(n - panel * PANEL), k, packed);
    }
}

/// [`times_transposed`] with the first n rows of a w that went through [`pack`].
///
/// # Panics
/// As [`times_transposed`].
pub(crate) fn times_packed(
    [m, k, n]: [usize; 3],
    x: Rows<'_>,
    packed: &[f32],
    out: &mut [f32],
    out_row: usize,
) {
    assert!(processor_can());
    for tile in (0..m).step_by(TILE) {
        let x = x.from(tile);
        for panel in (0..n).step_by(PANEL) {
            let w = Rows::new(&packed[panel * k..], PANEL);
            let size = [TILE.min(m - tile), k, PANEL.min(n - panel)];
            multiply_tile(size, x, w, &mut out[tile * out_row + panel..], out_row);
        }
    }
}

/// `out` [m, n] = x [m, k] · w [k, n], as [`times_transposed`]. Every column of w is read once for 12 rows of x, from
/// wherever it is.
///
/// # Panics
/// As [`times_transposed`].
pub(crate) fn times(
    [m, k, n]: [usize; 3],
    x: Rows<'_>,
    w: Rows<'_>,
    out: &mut [f32],
    out_row: usize,
) {
    assert!(processor_can());
    for tile in (0..m).step_by(TILE) {
        for panel in (0..n).step_by(PANEL) {
            let x = x.from(tile);
            let w = Rows::new(&w.values[panel..], w.row);
            let size = [TILE.min(m - tile), k, PANEL.min(n - panel)];
            multiply_tile(size, x, w, &mut out[tile * out_row + panel..], out_row);
        }
    }
}

/// One tile of the result: at most [`TILE`] rows and [`PANEL`] columns.
fn multiply_tile(
    [rows, depth, columns]: [usize; 3],
    x: Rows<'_>,
    w: Rows<'_>,
    out: &mut [f32],
    out_row: usize,
) {
    assert!(rows <= TILE && columns <= PANEL && rows > 0 && columns > 0);
    assert!(Rows::hold(x.values.len(), x.row, rows, depth));
    assert!(Rows::hold(w.values.len(), w.row, depth, columns));
    assert!(Rows::hold(out.len(), out_row, rows, columns));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the callers have asserted that the processor can; the kernel stays inside its slices (asserted above).
    unsafe {
        if columns == PANEL {
            vectors::multiply_tile::<true>([rows, depth, columns], x, w, out, out_row);
        } else {
            vectors::multiply_tile::<false>([rows, depth, columns], x, w, out, out_row);
        }
    }
}

/// 32 rows of w side by side: `packed` [k, 32].
fn pack_panel(w: Rows<'_>, rows: usize, k: usize, packed: &mut [f32]) {
    assert!(Rows::hold(w.values.len(), w.row, rows, k) && packed.len() == PANEL * k);
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if rows == PANEL {
        done = k / 16 * 16;
        // SAFETY: the caller has asserted that the processor can; 32 rows of `done` numbers are in w and
        // `done` rows of 32 in `packed` (asserted above).
        unsafe { vectors::pack(w, done, packed) };
    }
    for (column, packed) in packed.chunks_exact_mut(PANEL).enumerate().skip(done) {
        for (lane, packed) in packed.iter_mut().enumerate() {
            *packed = if lane < rows {
                w.values[lane * w.row + column]
            } else {
                0.0
            };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::{
        __m512, _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
        _mm512_maskz_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_shuffle_ps, _mm512_storeu_ps, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    };

    use super::{PANEL, Rows, TILE};

    /// # Safety
    /// The processor must have AVX-512F, the slices must hold what `multiply_tile` of the parent asserts, and `FULL` goes
    /// with 32 columns alone. (Loads under a mask take the multipliers' time.)
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply_tile<const FULL: bool>(
        [rows, depth, columns]: [usize; 3],
        x: Rows<'_>,
        w: Rows<'_>,
        out: &mut [f32],
        out_row: usize,
    ) {
        let valid: [u16; 2] =
            [columns.min(16), columns.saturating_sub(16)].map(|lanes| ((1u32 << lanes) - 1) as u16);
        // A tile that is not full multiplies its first row again.
        let row_of: [usize; TILE] =
            std::array::from_fn(|row| if row < rows { row * x.row } else { 0 });
        for row in 0..rows {
            let line = out.as_ptr().wrapping_add(row * out_row).cast();
            _mm_prefetch::<_MM_HINT_T0>(line);
            _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(64));
        }
        let mut all = [[_mm512_setzero_ps(); 2]; TILE];
        for step in 0..depth {
            // SAFETY: the lanes of `valid`, all 32 where `FULL`, are inside row `step` of w, and `row_of` + `step` inside x.
            unsafe {
                let start = w.values.as_ptr().add(step * w.row);
                let weights = if FULL {
                    [_mm512_loadu_ps(start), _mm512_loadu_ps(start.add(16))]
                } else {
                    [
                        _mm512_maskz_loadu_ps(valid[0], start),
                        _mm512_maskz_loadu_ps(valid[1], start.wrapping_add(16)),
                    ]
                };
                for (sums, first) in all.iter_mut().zip(row_of) {
                    let x = _mm512_set1_ps(*x.values.get_unchecked(first + step));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = _mm512_fmadd_ps(x, weights, *sum);
                    }
                }
            }
        }
        for (row, sums) in all.into_iter().take(rows).enumerate() {
            // SAFETY: the lanes of `valid` are inside row `row` of `out`.
            unsafe {
                let start = out.as_mut_ptr().add(row * out_row);
                _mm512_mask_storeu_ps(start, valid[0], sums[0]);
                _mm512_mask_storeu_ps(start.wrapping_add(16), valid[1], sums[1]);
            }
        }
    }

    /// The first `columns` columns, a multiple of 16, of 32 rows: squares of 16 are turned round in registers.
    ///
    /// # Safety
    /// The processor must have AVX-512F; w must hold 32 rows of `columns` numbers, `packed` `columns` rows of 32.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn pack(w: Rows<'_>, columns: usize, packed: &mut [f32]) {
        for column in (0..columns).step_by(16) {
            for lane in (0..PANEL).step_by(16) {
                // SAFETY: by this function's contract.
                unsafe {
                    let from = w.values.as_ptr().add(lane * w.row + column);
                    let square = std::array::from_fn(|row| _mm512_loadu_ps(from.add(row * w.row)));
                    let to = packed.as_mut_ptr().add(column * PANEL + lane);
                    for (row, vector) in transposed(square).into_iter().enumerate() {
                        _mm512_storeu_ps(to.add(row * PANEL), vector);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn transposed(mut r: [__m512; 16]) -> [__m512; 16] {
        let mut t = r;
        // Pairs, then fours of neighbouring rows.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in (0..16).step_by(4) {
            r[i] = _mm512_shuffle_ps::<0x44>(t[i], t[i + 2]);
            r[i + 1] = _mm512_shuffle_ps::<0xee>(t[i], t[i + 2]);
            r[i + 2] = _mm512_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_shuffle_ps::<0xee>(t[i + 1], t[i + 3]);
        }
        // Fours of numbers change places: first between rows 4 apart, then between rows 8 apart.
        for i in 0..4 {
            for half in [0, 8] {
                t[half + i] = _mm512_shuffle_f32x4::<0x88>(r[half + i], r[half + 4 + i]);
                t[half + 4 + i] = _mm512_shuffle_f32x4::<0xdd>(r[half + i], r[half + 4 + i]);
            }
        }
        for i in 0..8 {
            r[i] = _mm512_shuffle_f32x4::<0x88>(t[i], t[8 + i]);
            r[8 + i] = _mm512_shuffle_f32x4::<0xdd>(t[i], t[8 + i]);
        }
        r
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SeededRng;

    /// Against sums in f64, for sizes that fill no tile, no panel and no square, with numbers between the rows.
    #[test]
    fn products_are_those_of_plain_sums() {
        if !processor_can() {
            eprintln!("skipped: needs AVX-512");
            return;
        }
        let mut rng = SeededRng::new(5);
        for [m, k, n] in [
            [1, 1, 1],
            [13, 48, 64],
            [5, 33, 150],
            [30, 2100, 37],
            [3, 0, 2],
        ] {
            let mut random = |rows: usize, row: usize| -> Vec<f32> {
                (0..rows * row).map(|_| rng.normal() as f32).collect()
            };
            let (x_row, w_row, t_row, out_row) = (k + 3, k + 1, n + 2, n + 5);
            let (x, w) = (random(m, x_row), random(n, w_row));
            let mut turned = vec![0.0; k * t_row];
            for i in 0..n {
                for j in 0..k {
                    turned[j * t_row + i] = w[i * w_row + j];
                }
            }
            let (mut found, mut again) = (vec![9.0; m * out_row], vec![9.0; m * out_row]);
            times_transposed(
                [m, k, n],
                Rows::new(&x, x_row),
                Rows::new(&w, w_row),
                &mut found,
                out_row,
            );
            times(
                [m, k, n],
                Rows::new(&x, x_row),
                Rows::new(&turned, t_row),
                &mut again,
                out_row,
            );
            for i in 0..m {
                for j in 0..out_row {
                    let product =
                        |p: usize| f64::from(x[i * x_row + p]) * f64::from(w[j * w_row + p]);
                    let expected = if j < n {
                        (0..k).map(product).sum()
                    } else {
                        9.0
                    };
                    for found in [&found, &again] {
                        let difference = (f64::from(found[i * out_row + j]) - expected).abs();
                        assert!(
                            difference < 1e-3,
                            "[{m}, {k}, {n}] at {i}, {j}: {difference}"
                        );
                    }
                }
            }
        }
    }
}
