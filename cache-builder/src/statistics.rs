//! One fused pass over each row of logits: mean, standard deviation, extremes, log-sum-exp, top-k.
//!
//! A row of V logits stays in the second-level cache between its two sweeps, where four separate
//! library calls would read it from memory each time. Sums run in sixteen fixed lanes, in the same
//! order on every processor, so the instruction set does not change a bit of the result.

use caskd_formats::{Statistics, TOP_K_STEPS, TopK, exp_nonpositive};
use caskd_models::unchecked::{RowWork, in_widest};

/// The statistics of one row of logits, over the whole vocabulary at temperature 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowStatistics {
    /// Mean.
    pub mean: f32,
    /// Population standard deviation.
    pub std: f32,
    /// Smallest logit.
    pub min: f32,
    /// Largest logit.
    pub max: f32,
    /// log Σ exp(logit).
    pub log_sum_exp: f32,
}

/// Appends the summary of `logits` `[N·V]` to `statistics` `[.. + N]` and `top_k` `[(.. + N)·K]`.
///
/// # Errors
/// The first row that holds a NaN or an infinity, as its index.
pub fn summarize_logits(
    logits: &[f32],
    vocab_size: usize,
    statistics: &mut Statistics,
    top_k: &mut TopK,
) -> Result<(), usize> {
    let k = top_k.k;
    assert!(
        k <= vocab_size && logits.len().is_multiple_of(vocab_size),
        "rows of V logits, k ≤ V"
    );
    let rows = logits.len() / vocab_size;
    let mut row_statistics = vec![None; rows];
    let mut entries = vec![(0.0f32, 0u32); rows * k];
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .clamp(1, rows.max(1));
    let share = rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for ((logits, statistics), entries) in logits
            .chunks(share * vocab_size)
            .zip(row_statistics.chunks_mut(share))
            .zip(entries.chunks_mut((share * k).max(1)))
        {
            scope.spawn(move || {
                let mut selection = Selection::new(k);
                for ((row, statistics), entries) in logits
                    .chunks_exact(vocab_size)
                    .zip(statistics)
                    .zip(entries.chunks_exact_mut(k))
                {
                    *statistics = in_widest(Summary {
                        row,
                        selection: &mut selection,
                    });
                    entries.copy_from_slice(selection.finish());
                }
            });
        }
    });
    for (row, summary) in row_statistics.iter().enumerate() {
        let Some(summary) = summary else {
            return Err(row);
        };
        statistics.mean.push(summary.mean);
        statistics.std.push(summary.std);
        statistics.min.push(summary.min);
        statistics.max.push(summary.max);
        statistics.log_sum_exp.push(summary.log_sum_exp);
    }
    top_k.ids.extend(entries.iter().map(|entry| entry.1));
    top_k.logits.extend(entries.iter().map(|entry| entry.0));
    Ok(())
}

/// Rounds statistics to what the compact tier keeps of them: `max` and `log_sum_exp` to 2⁻⁹, `mean` and `std` to 2⁻⁶,
/// `min` down to 2⁻⁴. `log_sum_exp` is off by less than 10⁻³, and no order among them is turned round.
pub(crate) fn round_statistics(statistics: &mut Statistics) {
    let round = |values: &mut Vec<f32>, steps: f32| {
        for value in values {
            *value = (*value * steps).round() / steps;
        }
    };
    round(&mut statistics.max, 512.0);
    round(&mut statistics.log_sum_exp, 512.0);
    round(&mut statistics.mean, 64.0);
    round(&mut statistics.std, 64.0);
    for value in &mut statistics.min {
        *value = (*value * 16.0).floor() / 16.0;
    }
    for ((mean, min), max) in statistics
        .mean
        .iter_mut()
        .zip(&statistics.min)
        .zip(&statistics.max)
    {
        *mean = mean.min(*max).max(*min);
    }
}

/// Moves top-k logits to the grid of 1/32 below the rounded maximum `max` \[N\], where the compact tier keeps them.
pub(crate) fn snap_top_k(top_k: &mut TopK, max: &[f32]) {
    for (row, max) in top_k.logits.chunks_exact_mut(top_k.k).zip(max) {
        for (rank, logit) in row.iter_mut().enumerate() {
            let steps = ((max - *logit) * TOP_K_STEPS).round().max(0.0);
            *logit = if rank == 0 {
                *max
            } else {
                max - steps / TOP_K_STEPS
            };
        }
    }
}

/// The K largest entries seen so far, kept in a buffer that is cut back to K when it is full.
struct Selection {
    k: usize,
    threshold: f32,
    buffer: Vec<(f32, u32)>,
}

/// Larger logits first, ties by ascending token id.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that sorting asks for"
)]
fn by_rank(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Selection {
    fn new(k: usize) -> Self {
        Self {
            k,
            threshold: f32::NEG_INFINITY,
            buffer: Vec::with_capacity(2 * k + LANES),
        }
    }

    fn clear(&mut self) {
        self.buffer.clear();
        self.threshold = f32::NEG_INFINITY;
    }

    /// A later entry equal to the threshold has a larger id than the k kept ones and loses.
    fn offer(&mut self, logit: f32, id: u32) {
        if logit > self.threshold {
            self.buffer.push((logit, id));
            if self.buffer.len() >= 2 * self.k + LANES {
                self.buffer.select_nth_unstable_by(self.k - 1, by_rank);
                self.buffer.truncate(self.k);
                self.threshold = self.buffer[self.k - 1].0;
            }
        }
    }

    fn finish(&mut self) -> &[(f32, u32)] {
        self.buffer.sort_unstable_by(by_rank);
        // A row that was refused for a NaN may have offered fewer than k entries.
        self.buffer.resize(self.k, (f32::NAN, 0));
        &self.buffer
    }
}

pub(crate) const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Elements after which the lanes are added up in f64, so that f32 sums stay short.
pub(crate) const BLOCK: usize = 64 * LANES;

/// The summary of one row; `selection` holds its top k afterwards.
struct Summary<'a> {
    row: &'a [f32],
    selection: &'a mut Selection,
}

impl RowWork for Summary<'_> {
    type Output = Option<RowStatistics>;

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) -> Option<RowStatistics> {
        sweep_portable(self.row, self.selection)
    }
}

/// Both sweeps over one row; `None` when it holds a NaN or an infinity.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn sweep_portable(row: &[f32], selection: &mut Selection) -> Option<RowStatistics> {
    selection.clear();
    let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut sum = 0.0f64;
    for (block_index, block) in row.chunks(BLOCK).enumerate() {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for (index, values) in whole.iter().enumerate() {
            let mut above = false;
            for lane in 0..LANES {
                lanes[lane] += values[lane];
                min[lane] = if values[lane] < min[lane] {
                    values[lane]
                } else {
                    min[lane]
                };
                max[lane] = if values[lane] > max[lane] {
                    values[lane]
                } else {
                    max[lane]
                };
                above |= values[lane] > selection.threshold;
            }
            if above {
                let first = block_index * BLOCK + index * LANES;
                offer_all(selection, values, first);
            }
        }
        sum += add_up(&lanes);
        for (index, &value) in rest.iter().enumerate() {
            sum += f64::from(value);
            min[0] = min[0].min(value);
            max[0] = max[0].max(value);
            selection.offer(
                value,
                (block_index * BLOCK + whole.len() * LANES + index) as u32,
            );
        }
    }
    let min = min.iter().copied().fold(f32::INFINITY, f32::min);
    let max = max.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !(sum.is_finite() && min.is_finite() && max.is_finite()) {
        return None;
    }
    let mean = (sum / row.len() as f64) as f32;

    let (mut squares, mut exponentials) = (0.0f64, 0.0f64);
    for block in row.chunks(BLOCK) {
        let (mut square_lanes, mut exp_lanes) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (whole, rest) = block.as_chunks::<LANES>();
        for values in whole {
            for lane in 0..LANES {
                let deviation = values[lane] - mean;
                square_lanes[lane] += deviation * deviation;
                exp_lanes[lane] += exp_nonpositive(values[lane] - max);
            }
        }
        squares += add_up(&square_lanes);
        exponentials += add_up(&exp_lanes);
        for &value in rest {
            squares += f64::from(value - mean).powi(2);
            exponentials += f64::from(exp_nonpositive(value - max));
        }
    }
    Some(RowStatistics {
        mean,
        std: (squares / row.len() as f64).sqrt() as f32,
        min,
        max,
        log_sum_exp: (f64::from(max) + exponentials.ln()) as f32,
    })
}

#[cold]
#[inline(never)]
fn offer_all(selection: &mut Selection, values: &Lanes, first: usize) {
    for (lane, &value) in values.iter().enumerate() {
        selection.offer(value, (first + lane) as u32);
    }
}

fn add_up(lanes: &Lanes) -> f64 {
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(logits: &[f32], vocab_size: usize, k: usize) -> Result<(Statistics, TopK), usize> {
        let mut statistics = Statistics::default();
        let mut top_k = TopK {
            k,
            ids: Vec::new(),
            logits: Vec::new(),
        };
        summarize_logits(logits, vocab_size, &mut statistics, &mut top_k)
            .map(|()| (statistics, top_k))
    }

    /// A deterministic row that looks like logits: a bulk with a few large values.
    fn row(vocab_size: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..vocab_size)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 40) as f32 / (1u64 << 24) as f32;
                -2.0 - 3.0 * (-(uniform.max(1e-7)).ln()).ln()
            })
            .collect()
    }

    /// The same by the definitions, in f64.
    fn check(logits: &[f32], k: usize) {
        let (statistics, top_k) = summary(logits, logits.len(), k).unwrap();
        let values: Vec<f64> = logits.iter().map(|&value| f64::from(value)).collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let std = (values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>()
            / count)
            .sqrt();
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum_exp = max
            + values
                .iter()
                .map(|value| (value - max).exp())
                .sum::<f64>()
                .ln();
        let close = |got: f32, want: f64| {
            assert!(
                (f64::from(got) - want).abs() <= 2e-6 * want.abs().max(1.0),
                "{got} for {want}"
            );
        };
        close(statistics.mean[0], mean);
        close(statistics.std[0], std);
        close(statistics.max[0], max);
        close(statistics.log_sum_exp[0], log_sum_exp);
        let mut ranked: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        ranked.sort_by(by_rank);
        assert_eq!(
            top_k.ids,
            ranked[..k].iter().map(|entry| entry.1).collect::<Vec<_>>()
        );
        assert_eq!(
            top_k.logits,
            ranked[..k].iter().map(|entry| entry.0).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_summary_follows_the_definitions() {
        for (vocab_size, k) in [
            (1, 1),
            (2, 1),
            (15, 15),
            (16, 4),
            (1000, 64),
            (1025, 64),
            (49_152, 64),
            (131_073, 8),
        ] {
            check(&row(vocab_size, vocab_size as u64), k);
        }
    }

    #[test]
    fn ties_flat_and_one_hot_rows() {
        check(&[3.0; 300], 20);
        check(
            &(0..300).map(|index| (index % 7) as f32).collect::<Vec<_>>(),
            64,
        );
        let mut one_hot = vec![-1e4; 500];
        one_hot[123] = 50.0;
        check(&one_hot, 3);
        check(
            &(0..4096)
                .rev()
                .map(|index| index as f32 / 100.0)
                .collect::<Vec<_>>(),
            64,
        );
        check(
            &(0..4096)
                .map(|index| index as f32 / 100.0)
                .collect::<Vec<_>>(),
            64,
        );
    }

    #[test]
    fn rows_are_kept_apart() {
        let both: Vec<f32> = row(777, 1).into_iter().chain(row(777, 2)).collect();
        let (statistics, top_k) = summary(&both, 777, 5).unwrap();
        let (second, second_top) = summary(&row(777, 2), 777, 5).unwrap();
        assert_eq!(statistics.log_sum_exp[1], second.log_sum_exp[0]);
        assert_eq!(top_k.ids[5..], second_top.ids);
    }

    #[test]
    fn a_value_that_is_not_finite_is_found() {
        for (bad, at) in [
            (f32::NAN, 0),
            (f32::NAN, 999),
            (f32::INFINITY, 500),
            (f32::NEG_INFINITY, 31),
        ] {
            let mut rows: Vec<f32> = row(1000, 1)
                .into_iter()
                .chain(row(1000, 2))
                .chain(row(1000, 3))
                .collect();
            rows[1000 + at] = bad;
            assert_eq!(summary(&rows, 1000, 10).unwrap_err(), 1);
        }
    }

    #[test]
    fn the_exponential_is_exact_to_two_ulp_or_so() {
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let want = f64::from(x).exp();
            assert!(
                (f64::from(exp_nonpositive(x)) - want).abs() <= 2e-7 * want,
                "at {x}"
            );
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-1e30), 0.0);
    }
}
