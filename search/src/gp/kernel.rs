//! The covariance function, its hyper-parameters, and tables of its one-dimensional factors.

use crate::space::{Point, Space};

/// c²: variance of the unknown mean, on targets of unit variance.
pub(crate) const CONSTANT: f64 = 1.0;

/// Whether a parameter has an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Ordered,
    Nominal,
}

/// Logarithms of the hyper-parameters, for d parameters: d scales (length scale ℓ_j where ordered, weight w_j where
/// nominal), s², d additive variances a_j², noise variance.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hyper {
    pub(crate) theta: Vec<f64>,
}

impl Hyper {
    pub(crate) fn scale(&self, j: usize) -> f64 {
        self.theta[j].exp()
    }
    pub(crate) fn product(&self) -> f64 {
        self.theta[self.dimensions()].exp()
    }
    pub(crate) fn additive(&self, j: usize) -> f64 {
        self.theta[self.dimensions() + 1 + j].exp()
    }
    pub(crate) fn noise(&self) -> f64 {
        self.theta[2 * self.dimensions() + 1].exp()
    }
    pub(crate) fn dimensions(&self) -> usize {
        self.theta.len() / 2 - 1
    }
    /// Prior variance of the latent function at any point.
    pub(crate) fn variance(&self) -> f64 {
        let additive: f64 = (0..self.dimensions()).map(|j| self.additive(j)).sum();
        CONSTANT + self.product() + additive
    }
}

/// The order of each parameter of a space.
pub(crate) fn orders(space: &Space) -> Vec<Order> {
    space
        .parameters()
        .iter()
        .map(|p| {
            if p.domain().is_nominal() {
                Order::Nominal
            } else {
                Order::Ordered
            }
        })
        .collect()
}

/// Points by parameter: the distinct places of each parameter, and the index of every point's place.
#[derive(Debug, Clone)]
pub(crate) struct Columns {
    pub(crate) places: Vec<Vec<f64>>,
    /// `index[j][i]`: which of `places[j]` point i has.
    pub(crate) index: Vec<Vec<u32>>,
    pub(crate) len: usize,
}

impl Columns {
    pub(crate) fn new(space: &Space, points: &[Point]) -> Self {
        let mut places = Vec::new();
        let mut index = Vec::new();
        for (j, parameter) in space.parameters().iter().enumerate() {
            let column: Vec<f64> = points
                .iter()
                .map(|p| parameter.domain().place(p[j]))
                .collect();
            let mut distinct = column.clone();
            distinct.sort_by(f64::total_cmp);
            distinct.dedup();
            index.push(
                column
                    .iter()
                    .map(|place| distinct.partition_point(|known| known < place) as u32)
                    .collect(),
            );
            places.push(distinct);
        }
        Self {
            places,
            index,
            len: points.len(),
        }
    }

    /// How many leading places point `i` shares with the one before. Points that are listed in order share most.
    pub(crate) fn shared(&self, i: usize) -> usize {
        if i == 0 {
            return 0;
        }
        let same = |index: &&Vec<u32>| index[i] == index[i - 1];
        self.index.iter().take_while(same).count()
    }
}

/// Σ aᵢbᵢ in eight running sums, so that the additions need not wait for each other.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_blocks.remainder().iter().zip(b_blocks.remainder());
    let rest: f64 = rest.map(|(x, y)| x * y).sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// k_j between the places of two sets, and its derivative by the logarithm of its scale; row-major.
pub(crate) struct FactorTable {
    pub(crate) width: usize,
    pub(crate) value: Vec<f64>,
    pub(crate) slope: Vec<f64>,
}

impl FactorTable {
    pub(crate) fn new(order: Order, scale: f64, rows: &[f64], columns: &[f64]) -> Self {
        let mut value = Vec::with_capacity(rows.len() * columns.len());
        let mut slope = Vec::with_capacity(rows.len() * columns.len());
        for a in rows {
            for b in columns {
                let (k, dk) = factor(order, scale, *a, *b);
                value.push(k);
                slope.push(dk);
            }
        }
        Self {
            width: columns.len(),
            value,
            slope,
        }
    }
}

/// k_j and ∂k_j/∂ln(scale).
pub(crate) fn factor(order: Order, scale: f64, a: f64, b: f64) -> (f64, f64) {
    match order {
        Order::Ordered => {
            let r = 5f64.sqrt() * (a - b).abs() / scale;
            let decay = (-r).exp();
            (
                (1.0 + r + r * r / 3.0) * decay,
                r * r / 3.0 * (1.0 + r) * decay,
            )
        }
        Order::Nominal if a == b => (1.0, 0.0),
        Order::Nominal => {
            let k = (-scale).exp();
            (k, -scale * k)
        }
    }
}
