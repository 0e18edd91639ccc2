//! Maximum-a-posteriori hyper-parameters by L-BFGS on the analytic gradient of the log marginal likelihood.

use std::collections::VecDeque;

use faer::Mat;

use super::kernel::{CONSTANT, Columns, FactorTable, Hyper, Order, dot};
use super::posterior::Cholesky;

/// Log-normal priors on the hyper-parameters: mean and standard deviation of the logarithm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Priors {
    pub(crate) length: (f64, f64),
    pub(crate) weight: (f64, f64),
    pub(crate) product: (f64, f64),
    pub(crate) additive: (f64, f64),
    pub(crate) noise: (f64, f64),
}

impl Default for Priors {
    fn default() -> Self {
        Self {
            length: (-0.7, 0.8),
            weight: (-0.3, 1.0),
            product: (-1.0, 1.0),
            additive: (-2.5, 1.5),
            noise: (-4.5, 1.5),
        }
    }
}

impl Priors {
    fn of(&self, orders: &[Order]) -> Vec<(f64, f64)> {
        let scales = orders.iter().map(|order| match order {
            Order::Ordered => self.length,
            Order::Nominal => self.weight,
        });
        scales
            .chain([self.product])
            .chain(orders.iter().map(|_| self.additive))
            .chain([self.noise])
            .collect()
    }
}

/// Observations prepared for many evaluations of the likelihood.
pub(crate) struct Problem<'a> {
    orders: &'a [Order],
    columns: &'a Columns,
    targets: &'a [f64],
    priors: Vec<(f64, f64)>,
    /// For parameter j and the pair p = (i, l), l < i: index into the factor table.
    pairs: Vec<Vec<u32>>,
}

impl<'a> Problem<'a> {
    /// `targets` have about zero mean and unit variance.
    pub(crate) fn new(
        orders: &'a [Order],
        columns: &'a Columns,
        targets: &'a [f64],
        priors: &Priors,
    ) -> Self {
        let pairs = columns
            .index
            .iter()
            .zip(&columns.places)
            .map(|(index, places)| {
                let mut pairs = Vec::with_capacity(columns.len * columns.len.saturating_sub(1) / 2);
                for i in 0..columns.len {
                    for l in 0..i {
                        pairs.push(index[i] * places.len() as u32 + index[l]);
                    }
                }
                pairs
            })
            .collect();
        Self {
            orders,
            columns,
            targets,
            priors: priors.of(orders),
            pairs,
        }
    }

    /// The prior's mode, at which the search for hyper-parameters starts.
    pub(crate) fn prior_mode(&self) -> Hyper {
        Hyper {
            theta: self.priors.iter().map(|prior| prior.0).collect(),
        }
    }

    /// Fits the hyper-parameters; at most `evaluations` evaluations of the likelihood.
    pub(crate) fn fit(&self, start: &Hyper, evaluations: usize) -> Hyper {
        lbfgs(&start.theta, evaluations, |theta| self.loss(theta))
    }

    /// Negative log posterior density of the hyper-parameters (up to a constant) and its gradient:
    ///
    /// −ln p = ½yᵀK⁻¹y + ½ln|K| + ½Σ((θ−m)/s)², ∂/∂θ = −½tr((ααᵀ − K⁻¹)∂K/∂θ) + (θ−m)/s², with α = K⁻¹y
    /// (Rasmussen and Williams 2006, Eqs. 5.8 and 5.9). Infinite where K is not positive definite.
    pub(crate) fn loss(&self, theta: &[f64]) -> (f64, Vec<f64>) {
        let n = self.columns.len;
        let d = self.orders.len();
        let hyper = Hyper {
            theta: theta.to_vec(),
        };
        let tables: Vec<FactorTable> = (0..d)
            .map(|j| {
                let places = &self.columns.places[j];
                FactorTable::new(self.orders[j], hyper.scale(j), places, places)
            })
            .collect();
        let (product, noise) = (hyper.product(), hyper.noise());
        let additive: Vec<f64> = (0..d).map(|j| hyper.additive(j)).collect();

        let count = n * n.saturating_sub(1) / 2;
        let mut products = vec![product; count];
        let mut covariance = vec![CONSTANT; count];
        let mut values = vec![vec![0.0; count]; d];
        for j in 0..d {
            let gather = values[j].iter_mut().zip(&self.pairs[j]);
            let sums = products.iter_mut().zip(&mut covariance);
            for ((k, pair), (p, c)) in gather.zip(sums) {
                *k = tables[j].value[*pair as usize];
                *p *= *k;
                *c += additive[j] * *k;
            }
        }
        let diagonal = hyper.variance() + noise;
        let mut matrix = Mat::zeros(n, n);
        let mut pair = 0;
        for i in 0..n {
            for l in 0..i {
                matrix[(i, l)] = covariance[pair] + products[pair];
                pair += 1;
            }
            matrix[(i, i)] = diagonal;
        }
        let Some(cholesky) = Cholesky::of(&matrix) else {
            return (f64::INFINITY, vec![0.0; theta.len()]);
        };
        let alpha = cholesky.solve(self.targets);
        let inverse = cholesky.inverse();
        let fit: f64 = alpha.iter().zip(self.targets).map(|(a, y)| a * y).sum();
        let mut loss = 0.5 * fit + 0.5 * cholesky.log_determinant();

        // ∂(−ln p)/∂K, twice the off-diagonal entries because each pair stands for two.
        let mut weights = Vec::with_capacity(count);
        let mut trace = 0.0;
        for i in 0..n {
            for l in 0..i {
                weights.push(inverse[(i, l)] - alpha[i] * alpha[l]);
            }
            trace += 0.5 * (inverse[(i, i)] - alpha[i] * alpha[i]);
        }
        let mut gradient = vec![0.0; theta.len()];
        for j in 0..d {
            let (mut of_scale, mut of_additive) = (0.0, 0.0);
            let table = &tables[j];
            for (((weight, k), p), pair) in weights
                .iter()
                .zip(&values[j])
                .zip(&products)
                .zip(&self.pairs[j])
            {
                let slope = table.slope[*pair as usize];
                // The product holds the factor k itself; Matérn and Hamming factors are never 0 in practice.
                let rest = if *k > 0.0 { p / k } else { 0.0 };
                of_scale += weight * slope * (rest + additive[j]);
                of_additive += weight * k;
            }
            gradient[j] = of_scale;
            gradient[d + 1 + j] = additive[j] * (of_additive + trace);
        }
        gradient[d] = weights
            .iter()
            .zip(&products)
            .map(|(w, p)| w * p)
            .sum::<f64>()
            + product * trace;
        gradient[2 * d + 1] = noise * trace;
        for ((g, t), (mean, deviation)) in gradient.iter_mut().zip(theta).zip(&self.priors) {
            let z = (t - mean) / deviation;
            loss += 0.5 * z * z;
            *g += z / deviation;
        }
        (loss, gradient)
    }
}

/// Hyper-parameters fitted to observations, from the prior's mode.
pub(crate) fn map_estimate(problem: &Problem<'_>, evaluations: usize) -> Hyper {
    problem.fit(&problem.prior_mode(), evaluations)
}

/// Limited-memory BFGS with a backtracking line search (Nocedal and Wright 2006, Algorithm 7.5).
fn lbfgs(
    start: &[f64],
    evaluations: usize,
    mut loss: impl FnMut(&[f64]) -> (f64, Vec<f64>),
) -> Hyper {
    const MEMORY: usize = 8;
    /// No component moves further than this in one step: logarithms change by a factor of e².
    const MAX_MOVE: f64 = 2.0;
    let mut x = start.to_vec();
    let (mut value, mut gradient) = loss(&x);
    let mut used = 1;
    let mut memory: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    while used < evaluations && norm(&gradient) > 1e-3 {
        let mut direction = gradient.clone();
        let mut coefficients = Vec::with_capacity(memory.len());
        for (s, y, inverse) in memory.iter().rev() {
            let a = inverse * dot(s, &direction);
            coefficients.push(a);
            add(&mut direction, -a, y);
        }
        let gain = memory
            .back()
            .map_or(1.0 / norm(&gradient).max(1.0), |(s, y, _)| {
                dot(s, y) / dot(y, y)
            });
        for d in &mut direction {
            *d *= gain;
        }
        for ((s, y, inverse), a) in memory.iter().zip(coefficients.iter().rev()) {
            let b = inverse * dot(y, &direction);
            add(&mut direction, a - b, s);
        }
        for d in &mut direction {
            *d = -*d;
        }
        let largest = direction.iter().fold(0.0f64, |m, d| m.max(d.abs()));
        if largest > MAX_MOVE {
            for d in &mut direction {
                *d *= MAX_MOVE / largest;
            }
        }
        let slope = dot(&direction, &gradient);
        if slope >= 0.0 || slope.is_nan() {
            if memory.is_empty() {
                break;
            }
            memory.clear();
            continue;
        }
        let mut step = 1.0;
        let mut moved = None;
        while used < evaluations && step > 1e-4 {
            let mut next = x.clone();
            add(&mut next, step, &direction);
            let (next_value, next_gradient) = loss(&next);
            used += 1;
            if next_value <= value + 1e-4 * step * slope {
                moved = Some((next, next_value, next_gradient));
                break;
            }
            // The minimiser of the parabola through both values and the slope, kept within reason.
            let parabola = -slope * step * step / (2.0 * (next_value - value - slope * step));
            step = if parabola.is_finite() {
                parabola.clamp(0.1 * step, 0.5 * step)
            } else {
                0.25 * step
            };
        }
        let Some((next, next_value, next_gradient)) = moved else {
            break;
        };
        let s: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = next_gradient
            .iter()
            .zip(&gradient)
            .map(|(a, b)| a - b)
            .collect();
        let curvature = dot(&s, &y);
        if curvature > 1e-10 {
            if memory.len() == MEMORY {
                memory.pop_front();
            }
            memory.push_back((s, y, 1.0 / curvature));
        }
        let gained = value - next_value;
        (x, value, gradient) = (next, next_value, next_gradient);
        if gained < 1e-4 {
            break;
        }
    }
    Hyper { theta: x }
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn add(a: &mut [f64], factor: f64, b: &[f64]) {
    for (x, y) in a.iter_mut().zip(b) {
        *x += factor * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gp::kernel::orders;
    use crate::rng::{Rng, Stream};
    use crate::space::{Point, Space};

    /// Random points of Table 2 (repeated ones included) and a noisy function of them.
    fn data(n: usize) -> (Vec<Point>, Vec<f64>) {
        let space = Space::table2();
        let mut rng = Rng::new(4, Stream::Random, 0);
        let points: Vec<Point> = (0..n)
            .map(|_| {
                let unit: Vec<f64> = space.parameters().iter().map(|_| rng.uniform()).collect();
                space.point_at(&unit)
            })
            .collect();
        let targets = points
            .iter()
            .map(|p| {
                (p[0] - 1.5) * 0.4 + (p[2] / 10.0 - 1.0) * p[6] + p[3] * 0.3 + 0.2 * rng.normal()
            })
            .collect();
        (points, targets)
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let space = Space::table2();
        let orders = orders(&space);
        let (points, targets) = data(30);
        let columns = Columns::new(&space, &points);
        let problem = Problem::new(&orders, &columns, &targets, &Priors::default());
        let mut rng = Rng::new(8, Stream::Random, 1);
        for _ in 0..5 {
            let mode = problem.prior_mode().theta;
            let theta: Vec<f64> = mode.iter().map(|t| t + 0.7 * rng.normal()).collect();
            let (_, gradient) = problem.loss(&theta);
            for (i, analytic) in gradient.iter().enumerate() {
                let at = |step: f64| {
                    let mut moved = theta.clone();
                    moved[i] += step;
                    problem.loss(&moved).0
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (analytic - numeric).abs() < 1e-5 * (1.0 + numeric.abs()),
                    "component {i}: {analytic} against {numeric}"
                );
            }
        }
    }

    #[test]
    fn fitting_finds_the_noise_and_lowers_the_loss() {
        let space = Space::table2();
        let orders = orders(&space);
        let (points, targets) = data(120);
        let columns = Columns::new(&space, &points);
        let problem = Problem::new(&orders, &columns, &targets, &Priors::default());
        let start = problem.prior_mode();
        let fitted = map_estimate(&problem, 100);
        let (before, after) = (problem.loss(&start.theta).0, problem.loss(&fitted.theta));
        assert!(after.0 < before - 5.0);
        assert!(norm(&after.1) < 0.1, "{:?}", after.1);
        assert!(
            (fitted.noise().sqrt() - 0.2).abs() < 0.08,
            "{}",
            fitted.noise().sqrt()
        );
    }
}
