//! Conditioning on observations and predicting, with faer's dense factorisations on one thread.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::{Mat, MatMut, Par};

use super::kernel::{CONSTANT, Columns, FactorTable, Hyper, Order, dot};
use crate::space::{Point, Space};

/// Candidates that are predicted together: a block of columns of the cross covariance stays in the cache.
const BLOCK: usize = 512;

/// Diagonal additions that are tried, in this order, where rounding makes a matrix indefinite.
const JITTERS: [f64; 4] = [0.0, 1e-8, 1e-6, 1e-4];

/// A lower Cholesky factor.
pub(crate) struct Cholesky {
    lower: Mat<f64>,
}

impl Cholesky {
    /// Factorises a symmetric matrix given by its lower triangle; `None` where it is not positive definite even
    /// with a little added to the diagonal.
    pub(crate) fn of(matrix: &Mat<f64>) -> Option<Self> {
        let n = matrix.nrows();
        let scale = (0..n).fold(0.0f64, |m, i| m.max(matrix[(i, i)]));
        if !scale.is_finite() {
            return None;
        }
        let mut memory = MemBuffer::new(llt::factor::cholesky_in_place_scratch::<f64>(
            n,
            Par::Seq,
            faer::Spec::default(),
        ));
        for jitter in JITTERS {
            let mut lower = matrix.clone();
            for i in 0..n {
                lower[(i, i)] += jitter * scale;
            }
            let done = llt::factor::cholesky_in_place(
                lower.as_mut(),
                llt::factor::LltRegularization::default(),
                Par::Seq,
                MemStack::new(&mut memory),
                faer::Spec::default(),
            );
            if done.is_ok() {
                return Some(Self { lower });
            }
        }
        None
    }

    /// K⁻¹y.
    pub(crate) fn solve(&self, y: &[f64]) -> Vec<f64> {
        let mut x = self.whiten(y);
        let n = x.len();
        solve_upper_triangular_in_place(
            self.lower.transpose(),
            MatMut::from_column_major_slice_mut(&mut x, n, 1),
            Par::Seq,
        );
        x
    }

    /// L⁻¹y.
    pub(crate) fn whiten(&self, y: &[f64]) -> Vec<f64> {
        let mut x = y.to_vec();
        let n = x.len();
        solve_lower_triangular_in_place(
            self.lower.as_ref(),
            MatMut::from_column_major_slice_mut(&mut x, n, 1),
            Par::Seq,
        );
        x
    }

    /// K⁻¹ (its lower triangle).
    pub(crate) fn inverse(&self) -> Mat<f64> {
        let n = self.lower.nrows();
        let mut inverse = Mat::zeros(n, n);
        let mut memory = MemBuffer::new(llt::inverse::inverse_scratch::<f64>(n, Par::Seq));
        llt::inverse::inverse(
            inverse.as_mut(),
            self.lower.as_ref(),
            Par::Seq,
            MemStack::new(&mut memory),
        );
        inverse
    }

    /// ln|K|.
    pub(crate) fn log_determinant(&self) -> f64 {
        (0..self.lower.nrows())
            .map(|i| 2.0 * self.lower[(i, i)].ln())
            .sum()
    }
}

/// Factorises the covariance of the observations, noise included.
fn factorise(orders: &[Order], columns: &Columns, hyper: &Hyper) -> Option<Cholesky> {
    let n = columns.len;
    let tables: Vec<FactorTable> = (0..orders.len())
        .map(|j| {
            let places = &columns.places[j];
            FactorTable::new(orders[j], hyper.scale(j), places, places)
        })
        .collect();
    let additive: Vec<f64> = (0..orders.len()).map(|j| hyper.additive(j)).collect();
    let mut matrix = Mat::zeros(n, n);
    for i in 0..n {
        for l in 0..i {
            let (mut product, mut sum) = (hyper.product(), CONSTANT);
            for (j, table) in tables.iter().enumerate() {
                let index = &columns.index[j];
                let k = table.value[index[i] as usize * table.width + index[l] as usize];
                product *= k;
                sum += additive[j] * k;
            }
            matrix[(i, l)] = product + sum;
        }
        matrix[(i, i)] = hyper.variance() + hyper.noise();
    }
    Cholesky::of(&matrix)
}

/// A conditioned process.
pub(crate) struct Posterior<'a> {
    orders: &'a [Order],
    columns: &'a Columns,
    hyper: &'a Hyper,
    cholesky: Cholesky,
    /// L⁻¹y.
    whitened: Vec<f64>,
}

/// Mean and variance of the latent function (without the noise) at some points.
#[derive(Debug, Clone, Default)]
pub(crate) struct Prediction {
    pub(crate) mean: Vec<f64>,
    pub(crate) variance: Vec<f64>,
}

impl<'a> Posterior<'a> {
    /// Conditions on `targets` at `columns`; `None` where the covariance is not positive definite.
    pub(crate) fn new(
        orders: &'a [Order],
        columns: &'a Columns,
        hyper: &'a Hyper,
        targets: &[f64],
    ) -> Option<Self> {
        let cholesky = factorise(orders, columns, hyper)?;
        let whitened = cholesky.whiten(targets);
        Some(Self {
            orders,
            columns,
            hyper,
            cholesky,
            whitened,
        })
    }

    /// Predicts at points given by the places of each parameter.
    pub(crate) fn predict(&self, candidates: &Columns) -> Prediction {
        let n = self.columns.len;
        let d = self.orders.len();
        // Rows: the candidates' places, so that the factors of one observation lie together.
        let tables: Vec<FactorTable> = (0..d)
            .map(|j| {
                FactorTable::new(
                    self.orders[j],
                    self.hyper.scale(j),
                    &candidates.places[j],
                    &self.columns.places[j],
                )
            })
            .collect();
        let additive: Vec<f64> = (0..d).map(|j| self.hyper.additive(j)).collect();
        // For every parameter and candidate place: the factor with each observation (n contiguous numbers).
        let rows: Vec<Vec<f64>> = (0..d)
            .map(|j| {
                let table = &tables[j];
                let mut row = Vec::with_capacity(candidates.places[j].len() * n);
                for place in 0..candidates.places[j].len() {
                    let values = &table.value[place * table.width..(place + 1) * table.width];
                    row.extend(
                        self.columns.index[j]
                            .iter()
                            .map(|index| values[*index as usize]),
                    );
                }
                row
            })
            .collect();
        let variance = self.hyper.variance();
        let mut prediction = Prediction {
            mean: Vec::with_capacity(candidates.len),
            variance: Vec::with_capacity(candidates.len),
        };
        let mut block = vec![0.0; n * BLOCK];
        // Listed points share their leading places with the one before: products and sums over the first j
        // parameters are kept for every j, and only what changed is computed again.
        let mut products = vec![vec![self.hyper.product(); n]; d + 1];
        let mut sums = vec![vec![CONSTANT; n]; d + 1];
        for start in (0..candidates.len).step_by(BLOCK) {
            let count = BLOCK.min(candidates.len - start);
            for (offset, column) in block[..n * count].chunks_exact_mut(n).enumerate() {
                let candidate = start + offset;
                for j in candidates.shared(candidate)..d {
                    let place = candidates.index[j][candidate] as usize;
                    let factors = &rows[j][place * n..(place + 1) * n];
                    let weight = additive[j];
                    let (done, open) = products.split_at_mut(j + 1);
                    for ((next, product), k) in open[0].iter_mut().zip(&done[j]).zip(factors) {
                        *next = product * k;
                    }
                    let (done, open) = sums.split_at_mut(j + 1);
                    for ((next, sum), k) in open[0].iter_mut().zip(&done[j]).zip(factors) {
                        *next = sum + weight * k;
                    }
                }
                for ((k, product), sum) in column.iter_mut().zip(&products[d]).zip(&sums[d]) {
                    *k = product + sum;
                }
            }
            solve_lower_triangular_in_place(
                self.cholesky.lower.as_ref(),
                MatMut::from_column_major_slice_mut(&mut block[..n * count], n, count),
                Par::Seq,
            );
            for column in block[..n * count].chunks_exact(n) {
                prediction.mean.push(dot(column, &self.whitened));
                let explained = dot(column, column);
                prediction.variance.push((variance - explained).max(1e-12));
            }
        }
        prediction
    }

    /// Predicts at points of a space.
    pub(crate) fn predict_points(&self, space: &Space, points: &[Point]) -> Prediction {
        self.predict(&Columns::new(space, points))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gp::kernel::{factor, orders};
    use crate::rng::{Rng, Stream};

    /// The textbook formula with a plain Gauss-Jordan inverse.
    #[test]
    fn predictions_agree_with_the_slow_formula() {
        let space = Space::table2();
        let orders = orders(&space);
        let mut rng = Rng::new(2, Stream::Random, 0);
        let mut draw = |n: usize| -> Vec<Point> {
            (0..n)
                .map(|_| {
                    let unit: Vec<f64> = space.parameters().iter().map(|_| rng.uniform()).collect();
                    space.point_at(&unit)
                })
                .collect()
        };
        let (points, candidates) = (draw(12), draw(700));
        let targets: Vec<f64> = points
            .iter()
            .map(|p| p.iter().sum::<f64>() / 10.0 - 1.0)
            .collect();
        let hyper = Hyper {
            theta: (0..16).map(|i| -0.2 * f64::from(i)).collect(),
        };
        let columns = Columns::new(&space, &points);
        let posterior = Posterior::new(&orders, &columns, &hyper, &targets).unwrap();
        let fast = posterior.predict_points(&space, &candidates);

        let k = |a: &Point, b: &Point| {
            let (mut product, mut sum) = (hyper.product(), CONSTANT);
            for (j, p) in space.parameters().iter().enumerate() {
                let place = |x: &Point| p.domain().place(x[j]);
                let f = factor(orders[j], hyper.scale(j), place(a), place(b)).0;
                product *= f;
                sum += hyper.additive(j) * f;
            }
            product + sum
        };
        let n = points.len();
        let mut augmented: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                let noisy =
                    |l: usize| k(&points[i], &points[l]) + if i == l { hyper.noise() } else { 0.0 };
                let unit = (0..n).map(|l| f64::from(u8::from(i == l)));
                (0..n).map(noisy).chain(unit).collect()
            })
            .collect();
        for i in 0..n {
            let pivot = augmented[i][i];
            augmented[i].iter_mut().for_each(|x| *x /= pivot);
            for l in (0..n).filter(|&l| l != i) {
                let factor = augmented[l][i];
                let row = augmented[i].clone();
                augmented[l]
                    .iter_mut()
                    .zip(row)
                    .for_each(|(x, y)| *x -= factor * y);
            }
        }
        for (c, candidate) in candidates.iter().enumerate() {
            let cross: Vec<f64> = points.iter().map(|p| k(candidate, p)).collect();
            let (mut mean, mut variance) = (0.0, k(candidate, candidate));
            for i in 0..n {
                for l in 0..n {
                    let inverse = augmented[i][n + l];
                    mean += cross[i] * inverse * targets[l];
                    variance -= cross[i] * inverse * cross[l];
                }
            }
            assert!((mean - fast.mean[c]).abs() < 1e-8);
            assert!((variance - fast.variance[c]).abs() < 1e-8);
        }
    }

    #[test]
    fn singular_matrices_get_jitter_and_hopeless_ones_are_refused() {
        let ones = Mat::from_fn(3, 3, |_, _| 1.0);
        assert!(Cholesky::of(&ones).is_some());
        assert!(Cholesky::of(&Mat::from_fn(2, 2, |i, l| if i == l { 1.0 } else { 2.0 })).is_none());
        assert!(Cholesky::of(&Mat::from_fn(1, 1, |_, _| f64::NAN)).is_none());
    }
}
