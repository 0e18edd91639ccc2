//! Tree-structured Parzen estimator (Bergstra et al. 2011): the ratio of the density of good configurations to that
//! of the others, with joint (multivariate) kernels.

use super::sobol::scrambled;
use super::{History, Sampler, Suggestion, Tried};
use crate::config::StudyConfig;
use crate::error::Result;
use crate::gp::kernel::{Columns, dot};
use crate::rng::{Rng, Stream};
use crate::space::{Domain, Point, Space};
use crate::view::Why;

/// At most this many configurations count as good.
const MAX_GOOD: usize = 25;
/// Candidates in a space that is not enumerated.
const CANDIDATES: u64 = 1024;

impl Sampler {
    pub(super) fn tpe(
        &self,
        config: &StudyConfig,
        number: u64,
        history: &History,
        tried: &Tried,
    ) -> Result<Suggestion> {
        let (better, worse) = densities(&self.space, history);
        let drawn;
        let drawn_columns;
        let (candidates, columns, tried) = if let Some(finite) = &self.finite {
            (&finite.points, &finite.columns, finite.tried(tried))
        } else {
            drawn = self.tpe_candidates(config, number, &better);
            drawn_columns = Columns::new(&self.space, &drawn);
            let flags = drawn
                .iter()
                .map(|point| tried.contains(point) || self.space.is_forbidden(point))
                .collect();
            (&drawn, &drawn_columns, flags)
        };
        let better = better.log_densities(columns);
        let worse = worse.log_densities(columns);
        let chosen = (0..candidates.len())
            .filter(|&i| !tried[i])
            .map(|i| (better[i] - worse[i], &candidates[i]))
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        let Some((score, point)) = chosen else {
            return self.random(config, number, &history.tried());
        };
        Ok(Suggestion {
            point: point.clone(),
            why: Why {
                by: "tpe".to_owned(),
                score: Some(score),
                ..Why::default()
            },
        })
    }

    /// Half from the density of good configurations, half quasi-random.
    fn tpe_candidates(&self, config: &StudyConfig, number: u64, better: &Parzen<'_>) -> Vec<Point> {
        let mut rng = Rng::new(config.seed, Stream::Candidates, number);
        let dimensions = self.space.parameters().len();
        (0..CANDIDATES)
            .map(|index| {
                if index % 2 == 0 {
                    better.draw(&mut rng)
                } else {
                    let unit = scrambled(
                        index,
                        dimensions,
                        config.seed,
                        Stream::Candidates,
                        number + 1,
                    );
                    self.space.point_at(&unit)
                }
            })
            .collect()
    }
}

/// ln(l/g) at some points: by how much configurations like the good ones are denser there than the others.
pub(super) fn log_ratio(space: &Space, history: &History, points: &Columns) -> Vec<f64> {
    let (better, worse) = densities(space, history);
    let worse = worse.log_densities(points);
    better
        .log_densities(points)
        .into_iter()
        .zip(worse)
        .map(|(b, w)| b - w)
        .collect()
}

/// The density l of the good configurations and g of the others, pending ones included.
fn densities<'a>(space: &'a Space, history: &'a History) -> (Parzen<'a>, Parzen<'a>) {
    let mut order: Vec<(f64, &Point)> = history
        .observations
        .iter()
        .map(|o| (o.value.unwrap_or(f64::INFINITY), &o.point))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let good = order.len().div_ceil(7).clamp(2, MAX_GOOD);
    let points: Vec<&Point> = order.iter().map(|(_, point)| *point).collect();
    let (better, worse) = points.split_at(good.min(points.len()));
    let mut worse = worse.to_vec();
    worse.extend(&history.pending);
    (Parzen::new(space, better), Parzen::new(space, &worse))
}

/// A mixture with one kernel per configuration and a uniform one as prior.
struct Parzen<'a> {
    space: &'a Space,
    centres: Vec<&'a Point>,
    /// Width of the kernels over places in `[0, 1]`.
    width: f64,
    /// Weight that a nominal kernel leaves to the other levels.
    leak: f64,
}

impl<'a> Parzen<'a> {
    fn new(space: &'a Space, centres: &[&'a Point]) -> Self {
        let n = centres.len() as f64;
        let d = space.parameters().len() as f64;
        // Scott's rule for points spread over the unit interval.
        let width = (0.3 * (n + 1.0).powf(-1.0 / (d + 4.0))).max(0.05);
        Self {
            space,
            centres: centres.to_vec(),
            width,
            leak: 1.0 / (1.0 + n.sqrt()),
        }
    }

    /// Logarithm of the density, relative to the uniform one, at points given by the places of each parameter.
    fn log_densities(&self, candidates: &Columns) -> Vec<f64> {
        let n = self.centres.len();
        // For every parameter and candidate place: its factor of each kernel (n contiguous numbers).
        let factors: Vec<Vec<f64>> = self
            .space
            .parameters()
            .iter()
            .zip(&candidates.places)
            .enumerate()
            .map(|(j, (parameter, places))| {
                let domain = parameter.domain();
                places
                    .iter()
                    .flat_map(|place| {
                        self.centres
                            .iter()
                            .map(move |c| (domain.place(c[j]), *place))
                    })
                    .map(|(centre, place)| self.factor(domain, centre, place))
                    .collect()
            })
            .collect();
        let d = factors.len();
        // The kernels' products over the first j parameters, for every j; only what changed is computed again.
        let mut kernels = vec![vec![1.0; n]; d];
        (0..candidates.len)
            .map(|i| {
                let of = |j: usize| &factors[j][candidates.index[j][i] as usize * n..][..n];
                for j in candidates.shared(i)..d - 1 {
                    let (done, open) = kernels.split_at_mut(j + 1);
                    for ((next, product), factor) in open[0].iter_mut().zip(&done[j]).zip(of(j)) {
                        *next = product * factor;
                    }
                }
                ((dot(&kernels[d - 1], of(d - 1)) + 1.0) / (n as f64 + 1.0)).ln()
            })
            .collect()
    }

    /// One parameter's factor of a kernel, relative to the uniform density.
    fn factor(&self, domain: &Domain, centre: f64, place: f64) -> f64 {
        match domain {
            Domain::Categorical { values } if values.len() < 2 => 1.0,
            Domain::Categorical { values } if centre == place => {
                (1.0 - self.leak) * values.len() as f64 + self.leak
            }
            Domain::Categorical { .. } => self.leak,
            _ => {
                let z = (centre - place) / self.width;
                (-0.5 * z * z).exp() / (self.width * std::f64::consts::TAU.sqrt())
            }
        }
    }

    /// A configuration from the mixture.
    fn draw(&self, rng: &mut Rng) -> Point {
        let centre = rng.below(self.centres.len() + 1);
        let unit: Vec<f64> = self
            .space
            .parameters()
            .iter()
            .enumerate()
            .map(|(j, parameter)| {
                let Some(centre) = self.centres.get(centre) else {
                    return rng.uniform();
                };
                let domain = parameter.domain();
                let levels = domain.levels().unwrap_or(0) as f64;
                if domain.is_nominal() {
                    if rng.uniform() < self.leak {
                        rng.uniform()
                    } else {
                        (centre[j] + 0.5) / levels
                    }
                } else {
                    let at = if levels > 0.0 {
                        (centre[j] + 0.5) / levels
                    } else {
                        centre[j]
                    };
                    (at + self.width * rng.normal()).clamp(0.0, 1.0)
                }
            })
            .collect();
        self.space.point_at(&unit)
    }
}
