//! The written form of a space, and its translation into parameters, conditions and forbidden combinations.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Condition, Domain, Names, Parameter, snap};
use crate::error::{Error, Result};
use crate::params::Value;

/// Ordinal levels that span at least this ratio are placed on a logarithmic scale unless the space says otherwise.
const LOG_RATIO: f64 = 50.0;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SpaceSpec {
    param: Vec<ParamSpec>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) forbid: Vec<BTreeMap<String, OneOrMany>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ParamSpec {
    name: String,
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    low: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inactive: Option<Value>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    when: BTreeMap<String, OneOrMany>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Float,
    Int,
    Ordinal,
    Categorical,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(Value),
    Many(Vec<Value>),
}

impl SpaceSpec {
    /// The first difference to another space: what it is, here, there.
    pub(super) fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let json = |p: Option<&ParamSpec>| {
            p.and_then(|p| serde_json::to_string(p).ok())
                .unwrap_or_else(|| "no such parameter".to_owned())
        };
        let longest = self.param.len().max(other.param.len());
        for j in 0..longest {
            let (a, b) = (self.param.get(j), other.param.get(j));
            let (here, there) = (json(a), json(b));
            if here != there {
                let name = a.or(b).map_or("", |p| p.name.as_str());
                return Some((format!("search space (parameter `{name}`)"), here, there));
            }
        }
        let forbid = |spec: &Self| serde_json::to_string(&spec.forbid).unwrap_or_default();
        let (here, there) = (forbid(self), forbid(other));
        (here != there).then(|| ("search space (forbid)".to_owned(), here, there))
    }
}

impl OneOrMany {
    fn values(&self) -> Vec<Value> {
        match self {
            Self::One(value) => vec![value.clone()],
            Self::Many(values) => values.clone(),
        }
    }
}

pub(super) fn compile(spec: &SpaceSpec) -> Result<(Vec<Parameter>, Vec<Vec<Condition>>)> {
    if spec.param.is_empty() {
        return Err(Error::SpaceEmpty {
            message: "there is no [[param]]".to_owned(),
        });
    }
    let mut names = Names::new();
    for (j, p) in spec.param.iter().enumerate() {
        if p.name.trim().is_empty() {
            return Err(wrong(&format!("number {}", j + 1), "its name is empty"));
        }
        if names.insert(p.name.clone(), j).is_some() {
            return Err(wrong(&p.name, "the name is used twice"));
        }
    }
    let domains = spec
        .param
        .iter()
        .map(domain)
        .collect::<Result<Vec<Domain>>>()?;
    let mut parameters = Vec::with_capacity(domains.len());
    for (p, domain) in spec.param.iter().zip(&domains) {
        let canonical = match &p.inactive {
            None => 0.0,
            Some(_) if p.when.is_empty() => {
                return Err(wrong(&p.name, "`inactive` needs a `when`"));
            }
            Some(value) => domain.code(value).ok_or_else(|| {
                wrong(
                    &p.name,
                    &format!("`inactive` cannot be {value}: it is no value of the parameter"),
                )
            })?,
        };
        parameters.push(Parameter {
            name: p.name.clone(),
            domain: domain.clone(),
            when: conditions(&p.name, &p.when, &names, &domains)?,
            canonical,
        });
    }
    refuse_cycles(&parameters)?;
    let forbidden = spec
        .forbid
        .iter()
        .enumerate()
        .map(|(i, all)| {
            let label = format!("forbid number {}", i + 1);
            if all.is_empty() {
                return Err(wrong(&label, "it is empty and would forbid everything"));
            }
            conditions(&label, all, &names, &domains)
        })
        .collect::<Result<_>>()?;
    Ok((parameters, forbidden))
}

fn domain(p: &ParamSpec) -> Result<Domain> {
    let unwanted = |key: &str| {
        wrong(
            &p.name,
            &format!("`{key}` does not go with kind = {}", kind_name(p.kind)),
        )
    };
    match p.kind {
        Kind::Float | Kind::Int if p.values.is_some() => Err(unwanted("values")),
        Kind::Ordinal | Kind::Categorical if p.low.is_some() => Err(unwanted("low")),
        Kind::Ordinal | Kind::Categorical if p.high.is_some() => Err(unwanted("high")),
        Kind::Categorical if p.log.is_some() => Err(unwanted("log")),
        Kind::Float => {
            let (low, high) = (
                number(p, "low", p.low.as_ref())?,
                number(p, "high", p.high.as_ref())?,
            );
            let log = p.log.unwrap_or(false);
            check_range(p, low, high, log)?;
            let domain = Domain::Float { low, high, log };
            // A value that reads back as another point would be proposed again and again.
            let faithful = |i| {
                let code = snap(f64::from(i) / 64.0 + 1.0 / 300.0);
                domain.code(&domain.value(code)) == Some(code)
            };
            if !(0..64).all(faithful) {
                let message = "the range is too narrow for the precision of its numbers";
                return Err(wrong(&p.name, message));
            }
            Ok(domain)
        }
        Kind::Int => {
            let (low, high) = (
                integer(p, "low", p.low.as_ref())?,
                integer(p, "high", p.high.as_ref())?,
            );
            let log = p.log.unwrap_or(false);
            check_range(p, low as f64, high as f64, log)?;
            Ok(Domain::Int { low, high, log })
        }
        Kind::Ordinal => {
            let values = levels(p)?;
            let numbers = values
                .iter()
                .map(|value| number(p, "values", Some(value)))
                .collect::<Result<Vec<f64>>>()?;
            if numbers.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(wrong(&p.name, "ordinal values must ascend"));
            }
            let (low, high) = (numbers[0], numbers[numbers.len() - 1]);
            let log = p.log.unwrap_or(low > 0.0 && high / low >= LOG_RATIO);
            if log && low <= 0.0 {
                return Err(wrong(&p.name, "a logarithmic scale needs positive values"));
            }
            let places = numbers
                .iter()
                .map(|n| super::position(*n, low, high, log))
                .collect();
            // One kind of number for all levels, so that a level reads the same however it was written.
            let values = if values.iter().all(|v| matches!(v, Value::Integer(_))) {
                values
            } else {
                numbers.into_iter().map(Value::Number).collect()
            };
            Ok(Domain::Ordinal { values, places })
        }
        Kind::Categorical => {
            let values = levels(p)?;
            for (i, value) in values.iter().enumerate() {
                if values[..i].iter().any(|earlier| earlier.same_as(value)) {
                    return Err(wrong(&p.name, &format!("{value} is listed twice")));
                }
                if let Value::Number(n) = value
                    && !n.is_finite()
                {
                    return Err(wrong(&p.name, "values must be finite"));
                }
            }
            Ok(Domain::Categorical { values })
        }
    }
}

fn levels(p: &ParamSpec) -> Result<Vec<Value>> {
    match &p.values {
        Some(values) if !values.is_empty() => Ok(values.clone()),
        _ => Err(wrong(&p.name, "`values` must list at least one value")),
    }
}

fn check_range(p: &ParamSpec, low: f64, high: f64, log: bool) -> Result<()> {
    if low > high {
        return Err(wrong(
            &p.name,
            &format!("low = {low} is above high = {high}"),
        ));
    }
    if log && low <= 0.0 {
        return Err(wrong(&p.name, "a logarithmic range needs low > 0"));
    }
    if p.kind == Kind::Float && (low == high || !(high - low).is_finite()) {
        return Err(wrong(&p.name, "a range needs low < high, both finite"));
    }
    if p.kind == Kind::Int && high - low > 2f64.powi(53) {
        return Err(wrong(&p.name, "the range is too wide"));
    }
    if p.kind == Kind::Int && low.abs().max(high.abs()) > 2f64.powi(53) {
        return Err(wrong(
            &p.name,
            "whole numbers beyond ±2^53 cannot be told apart",
        ));
    }
    Ok(())
}

fn number(p: &ParamSpec, key: &str, value: Option<&Value>) -> Result<f64> {
    match value {
        None => Err(wrong(&p.name, &format!("`{key}` is missing"))),
        Some(value) => value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| {
            wrong(
                &p.name,
                &format!("`{key}` must be a finite number, not {value}"),
            )
        }),
    }
}

fn integer(p: &ParamSpec, key: &str, value: Option<&Value>) -> Result<i64> {
    let number = number(p, key, value)?;
    value.and_then(Value::as_i64).ok_or_else(|| {
        wrong(
            &p.name,
            &format!("`{key}` must be a whole number, not {number}"),
        )
    })
}

fn conditions(
    owner: &str,
    all: &BTreeMap<String, OneOrMany>,
    names: &Names,
    domains: &[Domain],
) -> Result<Vec<Condition>> {
    all.iter()
        .map(|(name, wanted)| {
            let parameter = *names.get(name).ok_or_else(|| {
                wrong(
                    owner,
                    &format!("it speaks of `{name}`, which is no parameter"),
                )
            })?;
            let values = wanted.values();
            if values.is_empty() {
                return Err(wrong(owner, &format!("the list for `{name}` is empty")));
            }
            let domain = &domains[parameter];
            if domain.levels().is_none() {
                return Err(wrong(
                    owner,
                    &format!("`{name}` is a float: a condition needs a parameter with levels"),
                ));
            }
            if let Some(value) = values.iter().find(|v| domain.code(v).is_none()) {
                return Err(wrong(owner, &format!("`{name}` is never {value}")));
            }
            Ok(Condition { parameter, values })
        })
        .collect()
}

fn refuse_cycles(parameters: &[Parameter]) -> Result<()> {
    for start in 0..parameters.len() {
        let mut reached = vec![false; parameters.len()];
        let mut front = vec![start];
        while let Some(j) = front.pop() {
            for condition in &parameters[j].when {
                if condition.parameter == start {
                    return Err(wrong(
                        &parameters[start].name,
                        "its `when` depends on itself, directly or through others",
                    ));
                }
                if !reached[condition.parameter] {
                    reached[condition.parameter] = true;
                    front.push(condition.parameter);
                }
            }
        }
    }
    Ok(())
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float",
        Kind::Int => "int",
        Kind::Ordinal => "ordinal",
        Kind::Categorical => "categorical",
    }
}

fn wrong(parameter: &str, message: &str) -> Error {
    Error::SpaceParameter {
        parameter: parameter.to_owned(),
        message: message.to_owned(),
    }
}
