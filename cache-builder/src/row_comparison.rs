//! Rows of a teacher's, a student's and rebuilt logits against each other: what `fidelity` adds up for one temperature,
//! in two sweeps over rows that stay in the caches, where library calls would carry a dozen [N, V] tensors through memory.

use caskd_formats::exp_nonpositive;
use caskd_models::unchecked::{RowWork, in_widest};

use crate::statistics::{BLOCK, LANES};

/// Logits of N positions, each [N·V].
#[derive(Clone, Copy)]
pub(crate) struct Logits<'a> {
    pub(crate) teacher: &'a [f32],
    pub(crate) student: &'a [f32],
    pub(crate) rebuilt: &'a [f32],
}

/// What a row's logits are multiplied with before the softmax: 1/T, or 1/(b·σ).
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    pub(crate) teacher: f32,
    pub(crate) student: f32,
    pub(crate) rebuilt: f32,
}

/// With p, q, r the softmax of the teacher's, the student's and the rebuilt logits: writes q − p to `gradient` [N·V] and
/// p − r to `error` [N·V], and returns Σ KL(p ‖ r) over the N rows, of which `scales` \[N\] are given.
pub(crate) fn compare(
    logits: Logits<'_>,
    scales: &[Scales],
    gradient: &mut [f32],
    error: &mut [f32],
) -> f64 {
    let rows = scales.len().max(1);
    let vocab = logits.teacher.len() / rows;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads);
    let mut divergences = vec![0.0; scales.len()];
    std::thread::scope(|scope| {
        let outputs = gradient
            .chunks_mut(share * vocab)
            .zip(error.chunks_mut(share * vocab))
            .zip(divergences.chunks_mut(share));
        for (index, ((gradient, error), divergences)) in outputs.enumerate() {
            let first = index * share;
            scope.spawn(move || {
                let mut exponentials = vec![0.0; vocab];
                for (at, divergence) in divergences.iter_mut().enumerate() {
                    let of_all = (first + at) * vocab..(first + at + 1) * vocab;
                    let own = at * vocab..(at + 1) * vocab;
                    *divergence = in_widest(Row {
                        teacher: &logits.teacher[of_all.clone()],
                        student: &logits.student[of_all.clone()],
                        rebuilt: &logits.rebuilt[of_all],
                        scales: scales[first + at],
                        exponentials: &mut exponentials,
                        gradient: &mut gradient[own.clone()],
                        error: &mut error[own],
                    });
                }
            });
        }
    });
    // In the order of the rows: the number of threads changes nothing.
    divergences.iter().sum()
}

struct Row<'a> {
    teacher: &'a [f32],
    student: &'a [f32],
    rebuilt: &'a [f32],
    scales: Scales,
    /// The teacher's, before their sum is known.
    exponentials: &'a mut [f32],
    gradient: &'a mut [f32],
    error: &'a mut [f32],
}

impl RowWork for Row<'_> {
    type Output = f64;

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) -> f64 {
        let Row {
            teacher,
            student,
            rebuilt,
            scales,
            exponentials,
            gradient,
            error,
        } = self;
        let (a, b, c) = (scales.teacher, scales.student, scales.rebuilt);
        let (t_max, s_max, r_max) = (
            a * maximum(teacher),
            b * maximum(student),
            c * maximum(rebuilt),
        );
        let (mut of_teacher, mut of_student, mut of_rebuilt, mut cross) = (0.0, 0.0, 0.0, 0.0);
        let inputs = teacher
            .chunks(BLOCK)
            .zip(student.chunks(BLOCK))
            .zip(rebuilt.chunks(BLOCK));
        let outputs = exponentials
            .chunks_mut(BLOCK)
            .zip(gradient.chunks_mut(BLOCK))
            .zip(error.chunks_mut(BLOCK));
        for (((t, s), r), ((e, g), d)) in inputs.zip(outputs) {
            for index in 0..t.len() {
                e[index] = exp_nonpositive(a * t[index] - t_max);
                g[index] = exp_nonpositive(b * s[index] - s_max);
                d[index] = exp_nonpositive(c * r[index] - r_max);
            }
            of_teacher += sum(e.len(), |index| e[index]);
            of_student += sum(g.len(), |index| g[index]);
            of_rebuilt += sum(d.len(), |index| d[index]);
            cross += sum(t.len(), |index| {
                e[index] * ((a * t[index] - t_max) - (c * r[index] - r_max))
            });
        }
        let (p, q, w) = (
            (1.0 / of_teacher) as f32,
            (1.0 / of_student) as f32,
            (1.0 / of_rebuilt) as f32,
        );
        for ((e, g), d) in exponentials.iter().zip(gradient).zip(error) {
            let of_teacher = e * p;
            *g = *g * q - of_teacher;
            *d = of_teacher - *d * w;
        }
        // Σ p (log p − log r), where log p = a·t − t_max − log Σ e.
        cross / of_teacher + of_rebuilt.ln() - of_teacher.ln()
    }
}

/// Σ of the terms of a block, in fixed lanes of f64: at high temperatures KL is what sums of almost the same size leave.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn sum(length: usize, term: impl Fn(usize) -> f32) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let whole = length / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f64::from(term(first + lane));
        }
    }
    let rest: f64 = (whole..length).map(|index| f64::from(term(index))).sum();
    lanes.iter().sum::<f64>() + rest
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for values in whole {
        for (most, value) in lanes.iter_mut().zip(values) {
            *most = if *value > *most { *value } else { *most };
        }
    }
    let most = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    rest.iter().copied().fold(most, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use caskd_models::SeededRng;

    /// Softmax in f64.
    fn softmax(row: &[f32], scale: f32) -> Vec<f64> {
        let scaled: Vec<f64> = row
            .iter()
            .map(|x| f64::from(*x) * f64::from(scale))
            .collect();
        let most = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scaled.iter().map(|x| (x - most).exp()).sum();
        scaled.iter().map(|x| (x - most).exp() / sum).collect()
    }

    fn check(rows: usize, vocab: usize, noise: f32, temperature: f32) {
        let mut rng = SeededRng::new(vocab as u64);
        let mut random = |scale: f32| -> Vec<f32> {
            (0..rows * vocab)
                .map(|_| rng.normal() as f32 * scale)
                .collect()
        };
        let (teacher, student) = (random(4.0), random(4.0));
        let rebuilt: Vec<f32> = teacher
            .iter()
            .zip(random(noise))
            .map(|(t, n)| t + n + 3.0)
            .collect();
        let scales: Vec<Scales> = (0..rows)
            .map(|row| Scales {
                teacher: 1.0 / temperature,
                student: 1.0 / temperature / (1.0 + row as f32),
                rebuilt: 1.0 / temperature,
            })
            .collect();
        let (mut gradient, mut error) = (vec![9.0; rows * vocab], vec![9.0; rows * vocab]);
        let logits = Logits {
            teacher: &teacher,
            student: &student,
            rebuilt: &rebuilt,
        };
        let found = compare(logits, &scales, &mut gradient, &mut error);
        let mut expected = 0.0;
        for (row, scales) in scales.iter().enumerate() {
            let own = row * vocab..(row + 1) * vocab;
            let p = softmax(&teacher[own.clone()], scales.teacher);
            let q = softmax(&student[own.clone()], scales.student);
            let r = softmax(&rebuilt[own.clone()], scales.rebuilt);
            expected += p.iter().zip(&r).map(|(p, r)| p * (p / r).ln()).sum::<f64>();
            for v in 0..vocab {
                let at = row * vocab + v;
                let of = |found: f32, exact: f64| (f64::from(found) - exact).abs();
                assert!(of(gradient[at], q[v] - p[v]) < 1e-6 * (p[v] + q[v]) + 1e-12);
                assert!(of(error[at], p[v] - r[v]) < 1e-6 * (p[v] + r[v]) + 1e-12);
            }
        }
        assert!(
            (found - expected).abs() < 1e-5 * expected + 1e-8 * rows as f64,
            "{rows} × {vocab}, noise {noise}, T {temperature}: {found} for {expected}"
        );
    }

    #[test]
    fn rows_are_compared_as_the_definitions_say() {
        for vocab in [1, 15, 16, 1000, 1025, 49_152] {
            for (noise, temperature) in [(0.5, 1.0), (0.02, 1.0), (0.1, 16.0), (0.04, 20.0)] {
                check(3, vocab, noise, temperature);
            }
        }
        check(1, 300, 0.3, 2.0);
        check(64, 300, 0.3, 2.0);
        check(128, 49_152, 0.04, 20.0);
    }
}
