//! Search spaces: parameters with levels or ranges, conditions between them, forbidden combinations.
//!
//! Inside the crate a configuration is a [`Point`]: one code per parameter. A parameter with levels (ordinal,
//! categorical, integer) is coded by the index of its level, a real one by its position in `[0, 1]` along its
//! (possibly logarithmic) range. An inactive parameter always carries its canonical code, so that two
//! configurations that do the same have the same point.

mod narrow;
mod spec;

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::params::{Params, Value};
use crate::rng::{Rng, Stream};
pub use narrow::Impossible;
use spec::SpaceSpec;

/// Real parameters are coded on this many steps, so that a value read back from a study has the code it had.
const STEPS: f64 = (1u64 << 30) as f64;

/// One code per parameter, in the space's order.
pub(crate) type Point = Vec<f64>;

/// Spaces with at most this many combinations of levels are enumerated, and every point is scored.
pub(crate) const MAX_ENUMERATED: usize = 1 << 18;

/// Draws before a space with forbidden combinations counts as empty.
const MAX_DRAWS: usize = 100_000;

/// A validated search space.
#[derive(Debug, Clone)]
pub struct Space {
    spec: SpaceSpec,
    parameters: Vec<Parameter>,
    forbidden: Vec<Vec<Condition>>,
}

/// One parameter of a [`Space`].
#[derive(Debug, Clone)]
pub struct Parameter {
    name: String,
    domain: Domain,
    when: Vec<Condition>,
    canonical: f64,
}

/// What values a parameter takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Domain {
    /// Any real number of a range.
    Float {
        /// Smallest value.
        low: f64,
        /// Largest value.
        high: f64,
        /// Searched on a logarithmic scale.
        log: bool,
    },
    /// Any whole number of a range.
    Int {
        /// Smallest value.
        low: i64,
        /// Largest value.
        high: i64,
        /// Searched on a logarithmic scale.
        log: bool,
    },
    /// Numbers in ascending order, with their places in `[0, 1]` (logarithmic where the numbers span decades).
    Ordinal {
        /// The levels.
        values: Vec<Value>,
        /// Where each level lies.
        places: Vec<f64>,
    },
    /// Names without order.
    Categorical {
        /// The levels.
        values: Vec<Value>,
    },
}

/// Holds where parameter `parameter` has one of the values.
#[derive(Debug, Clone)]
pub(crate) struct Condition {
    parameter: usize,
    values: Vec<Value>,
}

impl Space {
    /// The search space of BayesKD, Table 2: 25,920 combinations, of which 20,160 are distinct because
    /// `hidden_norm` has no effect (and is `none`) where `layers` is `none`.
    pub fn table2() -> Self {
        match Self::from_toml(include_str!("space/table2.toml")) {
            Ok(space) => space,
            Err(error) => unreachable!("the built-in space is valid: {error}"),
        }
    }

    /// Reads a space from TOML.
    ///
    /// ```
    /// let space = caskd_search::Space::from_toml(r#"
    ///     [[param]]
    ///     name = "learning_rate"
    ///     kind = "float"
    ///     low = 1e-5
    ///     high = 1e-2
    ///     log = true
    ///
    ///     [[param]]
    ///     name = "layers"
    ///     kind = "categorical"
    ///     values = ["none", "last", "last-middle"]
    ///
    ///     [[param]]
    ///     name = "hidden_norm"
    ///     kind = "categorical"
    ///     values = ["none", "max-min"]
    ///     when = { layers = ["last", "last-middle"] }
    ///
    ///     [[forbid]]
    ///     layers = "last"
    ///     hidden_norm = "none"
    /// "#)?;
    /// assert_eq!(space.names().count(), 3);
    /// # Ok::<(), caskd_search::Error>(())
    /// ```
    pub fn from_toml(text: &str) -> Result<Self> {
        let spec = toml::from_str(text).map_err(|error| Error::SpaceSyntax {
            message: error.to_string().trim_end().to_owned(),
        })?;
        Self::from_spec(spec).map_err(|error| with_line(error, text))
    }

    /// Reads a space from the JSON form that [`Space::to_json`] writes.
    pub fn from_json(text: &str) -> Result<Self> {
        let spec = serde_json::from_str(text).map_err(|error| Error::SpaceSyntax {
            message: error.to_string(),
        })?;
        Self::from_spec(spec)
    }

    /// The space as JSON, in one fixed form: equal texts mean equal spaces.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.spec).unwrap_or_default()
    }

    /// The parameters in order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The parameters' names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of combinations of levels, before conditions and forbidden combinations; `None` where a parameter is real.
    pub fn combinations(&self) -> Option<u64> {
        self.parameters.iter().try_fold(1u64, |product, p| {
            product.checked_mul(p.domain.levels()? as u64)
        })
    }

    /// Number of distinct allowed configurations, where the space is small enough to be enumerated.
    pub fn distinct(&self) -> Option<usize> {
        self.enumerate().map(|points| points.len())
    }

    /// Checks that `params` is an allowed configuration and returns it in canonical form: the space's order, the
    /// space's kinds of numbers, inactive parameters at their canonical value.
    pub fn canonical(&self, params: &Params) -> Result<Params> {
        Ok(self.params(&self.point(params)?))
    }

    /// The first difference to another space: what it is, here, there.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        self.spec.difference(&other.spec)
    }

    fn from_spec(spec: SpaceSpec) -> Result<Self> {
        let (parameters, forbidden) = spec::compile(&spec)?;
        let space = Self {
            spec,
            parameters,
            forbidden,
        };
        let message = match space.enumerate() {
            Some(points) => points
                .is_empty()
                .then_some("every combination is forbidden"),
            None => space
                .draws(&mut Rng::new(0, Stream::Random, 0))
                .next()
                .is_none()
                .then_some("no combination was found that is not forbidden"),
        };
        match message {
            Some(message) => Err(Error::SpaceEmpty {
                message: message.to_owned(),
            }),
            None => Ok(space),
        }
    }

    /// All distinct allowed points, in the order of their codes (last parameter fastest), or `None` where there
    /// are too many to list.
    pub(crate) fn enumerate(&self) -> Option<Vec<Point>> {
        let total = usize::try_from(self.combinations()?).ok()?;
        if total > MAX_ENUMERATED {
            return None;
        }
        let levels: Vec<usize> = self
            .parameters
            .iter()
            .filter_map(|p| p.domain.levels())
            .collect();
        let mut points = Vec::new();
        let mut point = vec![0.0; levels.len()];
        for index in 0..total {
            let mut rest = index;
            for (code, n) in point.iter_mut().zip(&levels).rev() {
                *code = (rest % n) as f64;
                rest /= n;
            }
            if self.is_canonical(&point) && !self.is_forbidden(&point) {
                points.push(point.clone());
            }
        }
        Some(points)
    }

    /// Sets every inactive parameter to its canonical code.
    pub(crate) fn canonicalise(&self, point: &mut [f64]) {
        for j in 0..self.parameters.len() {
            if !self.is_active(j, point) {
                point[j] = self.parameters[j].canonical;
            }
        }
    }

    pub(crate) fn is_forbidden(&self, point: &[f64]) -> bool {
        self.forbidden
            .iter()
            .any(|all| all.iter().all(|condition| self.holds(condition, point)))
    }

    /// The point at the given positions of the unit cube: equal slices for levels, the range for real parameters.
    pub(crate) fn point_at(&self, unit: &[f64]) -> Point {
        let mut point: Point = self
            .parameters
            .iter()
            .zip(unit)
            .map(|(p, u)| p.domain.code_at(*u))
            .collect();
        self.canonicalise(&mut point);
        point
    }

    /// The allowed ones of [`MAX_DRAWS`] points drawn at random.
    pub(crate) fn draws<'a>(&'a self, rng: &'a mut Rng) -> impl Iterator<Item = Point> + 'a {
        (0..MAX_DRAWS)
            .map(|_| {
                let unit: Vec<f64> = self.parameters.iter().map(|_| rng.uniform()).collect();
                self.point_at(&unit)
            })
            .filter(|point| !self.is_forbidden(point))
    }

    /// Allowed configurations in which parameter `j` is active and has `value`, the others at random.
    pub fn surroundings(&self, j: usize, value: &Value) -> Vec<Params> {
        const TRIES: u64 = 64;
        let Some(code) = self.parameters[j].domain.code(value) else {
            return Vec::new();
        };
        (0..TRIES)
            .filter_map(|number| {
                let mut random = Rng::new(0, Stream::Random, number);
                let unit: Vec<f64> = self.parameters.iter().map(|_| random.uniform()).collect();
                let mut point = self.point_at(&unit);
                point[j] = code;
                self.canonicalise(&mut point);
                (self.is_active(j, &point) && !self.is_forbidden(&point))
                    .then(|| self.params(&point))
            })
            .collect()
    }

    /// The named values of a point.
    pub(crate) fn params(&self, point: &[f64]) -> Params {
        Params::new(
            self.parameters
                .iter()
                .zip(point)
                .map(|(p, code)| (p.name.clone(), p.domain.value(*code)))
                .collect(),
        )
    }

    /// The point of named values; every parameter must be there, and no other.
    pub(crate) fn point(&self, params: &Params) -> Result<Point> {
        if let Some((name, _)) = params
            .iter()
            .find(|(name, _)| self.names().all(|known| known != *name))
        {
            return Err(Error::Params {
                message: format!("there is no parameter `{name}`"),
            });
        }
        let mut point = Vec::with_capacity(self.parameters.len());
        for p in &self.parameters {
            let value = params.get(&p.name).ok_or_else(|| Error::Params {
                message: format!("`{}` is missing", p.name),
            })?;
            let code = p.domain.code(value).ok_or_else(|| Error::Params {
                message: format!("`{}` cannot be {value}", p.name),
            })?;
            point.push(code);
        }
        self.canonicalise(&mut point);
        if self.is_forbidden(&point) {
            return Err(Error::Params {
                message: format!("the combination {params} is forbidden"),
            });
        }
        Ok(point)
    }

    fn is_canonical(&self, point: &[f64]) -> bool {
        (0..self.parameters.len())
            .all(|j| self.is_active(j, point) || point[j] == self.parameters[j].canonical)
    }

    /// A parameter is active when all its conditions hold, on parameters that are active themselves.
    pub(crate) fn is_active(&self, j: usize, point: &[f64]) -> bool {
        self.parameters[j].when.iter().all(|condition| {
            self.is_active(condition.parameter, point) && self.holds(condition, point)
        })
    }

    fn holds(&self, condition: &Condition, point: &[f64]) -> bool {
        let value = self.parameters[condition.parameter]
            .domain
            .value(point[condition.parameter]);
        condition.values.iter().any(|wanted| wanted.same_as(&value))
    }
}

impl PartialEq for Space {
    fn eq(&self, other: &Self) -> bool {
        self.to_json() == other.to_json()
    }
}

impl Parameter {
    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values it takes.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Its value where it is inactive.
    pub fn inactive_value(&self) -> Value {
        self.domain.value(self.canonical)
    }

    /// True where it depends on other parameters whether it has an effect.
    pub fn is_conditional(&self) -> bool {
        !self.when.is_empty()
    }
}

impl Domain {
    /// Number of levels; `None` for a real parameter.
    pub fn levels(&self) -> Option<usize> {
        match self {
            Self::Float { .. } => None,
            Self::Int { low, high, .. } => {
                usize::try_from(high.abs_diff(*low)).ok()?.checked_add(1)
            }
            Self::Ordinal { values, .. } | Self::Categorical { values } => Some(values.len()),
        }
    }

    /// True where the levels have no order.
    pub fn is_nominal(&self) -> bool {
        matches!(self, Self::Categorical { .. })
    }

    /// Where a code lies in `[0, 1]`; for a nominal parameter, only equality of places means anything.
    pub(crate) fn place(&self, code: f64) -> f64 {
        match self {
            Self::Float { .. } | Self::Categorical { .. } => code,
            Self::Int { low, high, log } => {
                let value = *low as f64 + code;
                position(value, *low as f64, *high as f64, *log)
            }
            Self::Ordinal { places, .. } => places[(code as usize).min(places.len() - 1)],
        }
    }

    /// The code at position `unit` of `[0, 1]`.
    pub(crate) fn code_at(&self, unit: f64) -> f64 {
        let unit = unit.clamp(0.0, 1.0);
        match self {
            Self::Float { .. } => snap(unit),
            Self::Int {
                low,
                high,
                log: true,
            } => {
                // Equal slices of the logarithmic range from `low - 1/2` to `high + 1/2`.
                let (a, b) = ((*low as f64 - 0.5).ln(), (*high as f64 + 0.5).ln());
                let value = (a + unit * (b - a)).exp().round() - *low as f64;
                value.clamp(0.0, high.abs_diff(*low) as f64)
            }
            _ => {
                let levels = self.levels().unwrap_or(1) as f64;
                (unit * levels).floor().min(levels - 1.0)
            }
        }
    }

    /// The value of a code.
    pub(crate) fn value(&self, code: f64) -> Value {
        match self {
            Self::Float { low, high, log } => Value::Number(if *log {
                (low.ln() + code * (high.ln() - low.ln()))
                    .exp()
                    .clamp(*low, *high)
            } else {
                (low + code * (high - low)).clamp(*low, *high)
            }),
            Self::Int { low, .. } => Value::Integer(low.saturating_add(code as i64)),
            Self::Ordinal { values, .. } | Self::Categorical { values } => {
                values[(code as usize).min(values.len() - 1)].clone()
            }
        }
    }

    /// The code of a value, where the value belongs to the domain.
    pub(crate) fn code(&self, value: &Value) -> Option<f64> {
        match self {
            Self::Float { low, high, log } => {
                let number = value.as_f64()?;
                (*low <= number && number <= *high)
                    .then(|| snap(position(number, *low, *high, *log)))
            }
            Self::Int { low, high, .. } => {
                let integer = value.as_i64()?;
                (*low <= integer && integer <= *high).then(|| integer.abs_diff(*low) as f64)
            }
            Self::Ordinal { values, .. } | Self::Categorical { values } => values
                .iter()
                .position(|level| level.same_as(value))
                .map(|index| index as f64),
        }
    }
}

/// Says where in the file the parameter or the forbidden combination is that an error speaks of.
fn with_line(error: Error, text: &str) -> Error {
    let Error::SpaceParameter { parameter, message } = error else {
        return error;
    };
    let lines = || text.lines().map(str::trim).zip(1..);
    let table = |header: &str, number: usize| {
        lines()
            .filter(|(line, _)| line.starts_with(header))
            .nth(number.wrapping_sub(1))
    };
    let last_word = || parameter.rsplit(' ').next()?.parse().ok();
    let found = if parameter.starts_with("forbid number ") {
        last_word().and_then(|number| table("[[forbid]]", number))
    } else if parameter.starts_with("number ") {
        last_word().and_then(|number| table("[[param]]", number))
    } else {
        // The last of that name: where a name is used twice, the second use is the wrong one.
        lines()
            .filter(|(line, _)| {
                line.strip_prefix("name")
                    .and_then(|rest| rest.trim_start().strip_prefix('='))
                    .map(|value| value.split('#').next().unwrap_or_default().trim())
                    .is_some_and(|value| value.trim_matches(['"', '\'']) == parameter)
            })
            .last()
    };
    Error::SpaceParameter {
        message: match found {
            Some((_, line)) => format!("{message} (line {line})"),
            None => message,
        },
        parameter,
    }
}

/// Position of `value` in the range, in `[0, 1]`.
fn position(value: f64, low: f64, high: f64, log: bool) -> f64 {
    if low == high {
        return 0.0;
    }
    let unit = if log {
        (value.ln() - low.ln()) / (high.ln() - low.ln())
    } else {
        (value - low) / (high - low)
    };
    unit.clamp(0.0, 1.0)
}

/// The nearest code of a real parameter.
pub(crate) fn snap(unit: f64) -> f64 {
    (unit.clamp(0.0, 1.0) * STEPS).round() / STEPS
}

/// The identity of a point, for sets of what was tried.
pub(crate) fn key(point: &[f64]) -> Vec<u64> {
    point.iter().map(|code| (code + 0.0).to_bits()).collect()
}

/// Names of parameters by position, for messages.
pub(crate) type Names = BTreeMap<String, usize>;

#[cfg(test)]
mod tests;
