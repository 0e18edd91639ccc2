//! Random functions over Table 2's space, to choose settings of the samplers on: another one for every run.

use super::Surface;
use super::response::{HARD, Levels, SOFT, splitmix64, znorm};

/// Levels of each parameter, in the order of Table 2.
const LEVELS: [usize; 7] = [4, 6, 20, 3, 3, 3, 2];
/// The first of them have an order.
const ORDERED: usize = 3;
/// Distance of the median from the least value: regrets of different draws can be compared.
const SPREAD: f64 = 5.0;

/// A sum of effects of single parameters, products of two of them, three wells, and perhaps a cliff.
pub struct Drawn {
    values: Vec<f64>,
    least: f64,
    sigma: f64,
}

impl Surface for Drawn {
    fn clean(&self, c: Levels) -> f64 {
        self.values[c.index() as usize]
    }

    fn observe(&self, c: Levels, seed: u64) -> f64 {
        self.clean(c) + self.sigma * znorm(seed, 7, c.index())
    }

    fn least(&self) -> f64 {
        self.least
    }
}

impl Drawn {
    pub fn new(run: u64) -> Self {
        let mut draw = Draw(run * 1_000_003);
        let single: Vec<(f64, Vec<f64>)> = (0..7)
            .map(|j| (0.8 * (0.7 * draw.normal()).exp(), draw.effect(j)))
            .collect();
        let pairs: Vec<_> = (0..4)
            .map(|_| {
                let a = draw.below(7);
                let b = (a + 1 + draw.below(6)) % 7;
                (a, b, 0.5 * draw.normal(), draw.effect(a), draw.effect(b))
            })
            .collect();
        let wells: Vec<_> = (0..3)
            .map(|_| {
                let depth = 1.0 + 3.0 * draw.uniform();
                let at: Vec<f64> = (0..ORDERED).map(|_| draw.uniform()).collect();
                let names: Vec<usize> = (ORDERED..7).map(|j| draw.below(LEVELS[j])).collect();
                (depth, at, names, 0.15 + 0.2 * draw.uniform())
            })
            .collect();
        let cliff = draw.uniform() < 0.3;
        let slope: Vec<f64> = (0..ORDERED).map(|_| draw.normal()).collect();
        let edge = 0.2 + 0.5 * draw.uniform();
        let value = |c: Levels| {
            let hidden_norm = if c.layers > 0 { c.hidden_norm } else { 0 };
            let levels = [
                c.hard,
                c.soft,
                c.scaling,
                c.logits_norm,
                hidden_norm,
                c.layers,
                c.kd_type,
            ];
            let mut y: f64 = single
                .iter()
                .zip(levels)
                .map(|((size, effect), level)| size * effect[level])
                .sum();
            for (a, b, size, first, second) in &pairs {
                y += size * first[levels[*a]] * second[levels[*b]];
            }
            for (depth, at, names, width) in &wells {
                let z: f64 = (0..ORDERED)
                    .map(|j| ((place(j, levels[j]) - at[j]) / width).powi(2))
                    .sum();
                let others = names.iter().zip(&levels[ORDERED..]).filter(|(a, b)| a != b);
                y -= depth * 0.5f64.powi(others.count() as i32) * (-0.5 * z).exp();
            }
            let beyond = (0..ORDERED)
                .map(|j| slope[j] * (place(j, levels[j]) - 0.5))
                .sum::<f64>()
                - edge;
            if cliff && beyond > 0.0 {
                y += 10.0 + 60.0 * beyond;
            }
            y
        };
        let sigma = SPREAD * (0.02 + 0.1 * draw.uniform());
        Self::scaled(value, sigma)
    }

    /// A wide basin, a narrow one that is deeper where the names fit, and small effects of single parameters.
    pub fn basins(run: u64) -> Self {
        let mut draw = Draw(run * 1_000_003 + 500_000);
        let single: Vec<Vec<f64>> = (0..7).map(|j| draw.effect(j)).collect();
        let mut basin = |depth: f64, width: f64, others: f64| {
            let at: Vec<f64> = (0..ORDERED).map(|_| draw.uniform()).collect();
            let ignored = draw.below(2);
            let fits: Vec<Vec<f64>> = (ORDERED..7)
                .map(|j| {
                    let best = draw.below(LEVELS[j]);
                    (0..LEVELS[j])
                        .map(|l| {
                            if l == best {
                                1.0
                            } else {
                                others + (1.0 - others) * 0.8 * draw.uniform()
                            }
                        })
                        .collect()
                })
                .collect();
            (depth, width, at, ignored, fits)
        };
        let basins = [basin(1.0, 0.35, 0.7), basin(1.6, 0.16, 0.4)];
        let value = |c: Levels| {
            let hidden_norm = if c.layers > 0 { c.hidden_norm } else { 0 };
            let levels = [
                c.hard,
                c.soft,
                c.scaling,
                c.logits_norm,
                hidden_norm,
                c.layers,
                c.kd_type,
            ];
            let mut y: f64 = single.iter().zip(levels).map(|(e, l)| 0.06 * e[l]).sum();
            for (depth, width, at, ignored, fits) in &basins {
                let z: f64 = (0..ORDERED)
                    .filter(|j| j != ignored)
                    .map(|j| ((place(j, levels[j]) - at[j]) / width).powi(2))
                    .sum();
                let fit: f64 = fits
                    .iter()
                    .zip(&levels[ORDERED..])
                    .map(|(f, l)| f[*l])
                    .product();
                y -= depth * fit * (-0.5 * z).exp();
            }
            y
        };
        let sigma = SPREAD * (0.02 + 0.06 * draw.uniform());
        Self::scaled(value, sigma)
    }

    /// The function on every point, stretched to the common spread.
    fn scaled(value: impl Fn(Levels) -> f64, sigma: f64) -> Self {
        let mut values: Vec<f64> = (0..25_920)
            .map(|index| value(Levels::from_index(index)))
            .collect();
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let scale = SPREAD / (sorted[sorted.len() / 2] - sorted[0]);
        for value in &mut values {
            *value *= scale;
        }
        Self {
            values,
            least: sorted[0] * scale,
            sigma,
        }
    }
}

/// Where a level of an ordered parameter lies, in [0, 1].
fn place(j: usize, level: usize) -> f64 {
    let between = |levels: &[f64]| {
        let log = |level: usize| levels[level].log10();
        (log(level) - log(0)) / (log(levels.len() - 1) - log(0))
    };
    match j {
        0 => between(&HARD),
        1 => between(&SOFT),
        _ => level as f64 / (LEVELS[2] - 1) as f64,
    }
}

/// A stream of random numbers.
struct Draw(u64);

impl Draw {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        (splitmix64(splitmix64(self.0)) >> 11) as f64 / 2f64.powi(53)
    }

    fn normal(&mut self) -> f64 {
        let (a, b) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// Of a parameter's levels: a bowl, a step or a wave where they have an order; mean 0 and deviation 1.
    fn effect(&mut self, j: usize) -> Vec<f64> {
        let (sign, centre, width) = (
            self.normal().signum(),
            self.uniform(),
            0.05 + 0.2 * self.uniform(),
        );
        let (kind, waves, phase) = (
            self.uniform(),
            2.0 + 4.0 * self.uniform(),
            std::f64::consts::TAU * self.uniform(),
        );
        let raw: Vec<f64> = (0..LEVELS[j])
            .map(|level| {
                let x = if j < ORDERED { place(j, level) } else { 0.0 };
                match kind {
                    _ if j >= ORDERED => self.normal(),
                    kind if kind < 0.4 => (x - centre).powi(2),
                    kind if kind < 0.65 => sign / (1.0 + (-(x - centre) / width).exp()),
                    _ => (waves * x + phase).sin(),
                }
            })
            .collect();
        let n = raw.len() as f64;
        let mean = raw.iter().sum::<f64>() / n;
        let deviation = (raw.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / n).sqrt();
        raw.iter()
            .map(|r| (r - mean) / deviation.max(1e-9))
            .collect()
    }
}
