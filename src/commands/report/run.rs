//! What the page says of a run of `caskd train`.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::svg::{Plot, Svg};
use crate::exit::Failure;

#[derive(Serialize)]
pub(super) struct RunSection {
    pub(super) path: String,
    pub(super) summary: Vec<(String, String)>,
    pub(super) config: String,
    pub(super) curve: String,
}

impl RunSection {
    pub(super) fn of(path: &Path) -> Result<Self, Failure> {
        let read = |name: &str| {
            let file = path.join(name);
            std::fs::read_to_string(&file).map_err(|error| Failure::file("read", &file, &error))
        };
        let mut losses = Vec::new();
        for (index, line) in read("log.jsonl")?.lines().enumerate() {
            let step: Value = serde_json::from_str(line).map_err(|error| {
                Failure::user(
                    format!(
                        "`{}` line {}: {error}",
                        path.join("log.jsonl").display(),
                        index + 1
                    ),
                    "the run's log is damaged; train again",
                )
            })?;
            if let (Some(step), Some(loss)) = (step["step"].as_f64(), step["loss"].as_f64()) {
                losses.push((step, loss));
            }
        }
        let run: Value = read("run.json")
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let summary = match run.get("summary") {
            Some(Value::Object(fields)) => fields
                .iter()
                .filter(|(_, value)| !value.is_object() && !value.is_array() && !value.is_null())
                .map(|(name, value)| (name.clone(), plain(value)))
                .collect(),
            _ => vec![("state".into(), "not finished".into())],
        };
        Ok(Self {
            path: path.display().to_string(),
            summary,
            config: read("config.toml")?,
            curve: loss_curve(&losses),
        })
    }
}

fn plain(value: &Value) -> String {
    value.as_f64().map_or_else(
        || value.to_string(),
        |number| {
            format!("{number:.4}")
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_string()
        },
    )
}

fn loss_curve(losses: &[(f64, f64)]) -> String {
    let finite: Vec<(f64, f64)> = losses
        .iter()
        .copied()
        .filter(|point| point.1.is_finite())
        .collect();
    if finite.is_empty() {
        return String::new();
    }
    let mut svg = Svg::new(760.0, 320.0, "loss by step");
    let plot = Plot::around(&svg, &finite);
    plot.axes(&mut svg, "step", "loss");
    let points: Vec<(f64, f64)> = finite.into_iter().map(|point| plot.at(point)).collect();
    svg.path("curve c0", &points, "loss");
    svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_of_nothing_is_empty_and_gaps_are_left_out() {
        assert_eq!(loss_curve(&[]), "");
        let drawn = loss_curve(&[(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)]);
        assert!(drawn.starts_with("<svg") && drawn.contains("<polyline"));
        assert!(!drawn.contains("NaN"));
    }
}
