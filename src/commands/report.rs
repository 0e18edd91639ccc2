//! `caskd report`: one self-contained page about studies and runs.

use std::path::{Path, PathBuf};

use caskd_search::{StudyView, TrialState, read_study};
use caskd_trainer::is_run;
use plotters::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::{print_json, write_file};
use crate::cli::ReportArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::objective::setting_text;
use crate::terminal::{duration, say};

const PAGE: &str = include_str!("../report/page.html");

#[derive(Serialize)]
struct Written<'a> {
    out: &'a Path,
    studies: usize,
    runs: usize,
}

pub(crate) fn run(args: &ReportArgs) -> Outcome {
    let (mut studies, mut runs) = (Vec::new(), Vec::new());
    for input in &args.inputs {
        let path = Path::new(input);
        if is_run(path) {
            runs.push(run_section(path)?);
        } else if caskd_search::Location::parse(input)?.may_exist() {
            studies.push(study_section(path, &read_study(path)?)?);
        } else {
            return Err(Failure::user(
                format!("`{}` is neither a study nor a run", input),
                "give folders that `caskd search` or `caskd train` wrote",
            ));
        }
    }
    let written = Written {
        out: &args.out,
        studies: studies.len(),
        runs: runs.len(),
    };
    let page = render(&studies, &runs)?;
    write_file(&args.out, |sink| sink.write_all(page.as_bytes()))?;
    say(format!(
        "report `{}`: {} studies, {} runs",
        args.out.display(),
        written.studies,
        written.runs
    ));
    if args.json {
        print_json(&written)?;
    }
    Ok(Exit::Done)
}

fn render(studies: &[StudySection], runs: &[RunSection]) -> Result<String, Failure> {
    let page = Page {
        studies,
        runs,
        version: env!("CARGO_PKG_VERSION"),
    };
    let mut environment = minijinja::Environment::new();
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::Html);
    let rendered = environment.add_template("page", PAGE).and_then(|()| {
        environment
            .get_template("page")?
            .render(minijinja::Value::from(minijinja::value::Serde(&page)))
    });
    rendered.map_err(|error| Failure::ours(format!("can't render the report: {error:#}")))
}

#[derive(Serialize)]
struct Page<'a> {
    studies: &'a [StudySection],
    runs: &'a [RunSection],
    version: &'static str,
}

/// What the page says of a study.
#[derive(Serialize)]
struct StudySection {
    path: PathBuf,
    sampler: String,
    seed: u64,
    fraction: f64,
    counts: Vec<(&'static str, usize)>,
    best: Option<Best>,
    curve: String,
    names: Vec<String>,
    trials: Vec<TrialRow>,
}

#[derive(Serialize)]
struct Best {
    trial: u64,
    value: String,
    settings: Vec<(String, String)>,
    command: String,
}

#[derive(Serialize)]
struct TrialRow {
    number: u64,
    state: &'static str,
    value: String,
    settings: Vec<String>,
    by: String,
    expected_improvement: String,
    discrepancy: String,
    score: String,
    seconds: String,
    error: String,
}

fn study_section(path: &Path, view: &StudyView) -> Result<StudySection, Failure> {
    let complete: Vec<(f64, f64)> = view
        .trials
        .iter()
        .filter_map(|trial| trial.value.map(|value| (trial.number as f64 + 1.0, value)))
        .collect();
    let mut best_so_far = f64::INFINITY;
    let envelope: Vec<(f64, f64)> = complete
        .iter()
        .map(|&(number, value)| {
            best_so_far = best_so_far.min(value);
            (number, best_so_far)
        })
        .collect();
    let curve = chart(
        "trial",
        "validation perplexity",
        &[
            Series {
                name: "best so far",
                points: envelope,
                dots: false,
            },
            Series {
                name: "trial",
                points: complete,
                dots: true,
            },
        ],
    )?;
    let names: Vec<String> = view
        .trials
        .first()
        .map(|trial| {
            trial
                .params
                .iter()
                .map(|(name, _)| name.to_string())
                .collect()
        })
        .unwrap_or_default();
    let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.4}"));
    let trials = view
        .trials
        .iter()
        .map(|trial| TrialRow {
            number: trial.number + 1,
            state: trial.state.name(),
            value: number(trial.value),
            settings: trial
                .params
                .iter()
                .map(|(_, value)| setting_text(value))
                .collect(),
            by: trial.why.by.clone(),
            expected_improvement: number(trial.why.expected_improvement),
            discrepancy: number(trial.why.discrepancy),
            score: number(trial.why.score),
            seconds: trial.seconds.map_or(String::new(), duration),
            error: trial.error.clone().unwrap_or_default(),
        })
        .collect();
    Ok(StudySection {
        path: path.into(),
        sampler: view.config.sampler.to_string(),
        seed: view.config.seed,
        fraction: view.config.fraction,
        counts: [
            TrialState::Complete,
            TrialState::Failed,
            TrialState::Running,
            TrialState::Stopped,
        ]
        .map(|state| (state.name(), view.count(state)))
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect(),
        best: view.best().map(|best| Best {
            trial: best.number + 1,
            value: number(best.value),
            settings: best
                .params
                .iter()
                .map(|(name, value)| (name.to_string(), setting_text(value)))
                .collect(),
            command: format!(
                "caskd train --cache CACHE --student STUDENT --config {} --out RUN",
                path.join("best.toml").display()
            ),
        }),
        curve,
        names,
        trials,
    })
}

/// What the page says of a run.
#[derive(Serialize)]
struct RunSection {
    path: PathBuf,
    summary: Vec<(String, String)>,
    config: String,
    curve: String,
}

fn run_section(path: &Path) -> Result<RunSection, Failure> {
    let read = |name: &str| {
        let file = path.join(name);
        std::fs::read_to_string(&file).map_err(|error| Failure::file("read", &file, &error))
    };
    let mut total = Vec::new();
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
            total.push((step, loss));
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
            .map(|(name, value)| {
                (
                    name.clone(),
                    value.as_f64().map_or_else(
                        || value.to_string(),
                        |number| {
                            format!("{number:.4}")
                                .trim_end_matches('0')
                                .trim_end_matches('.')
                                .to_string()
                        },
                    ),
                )
            })
            .collect(),
        _ => vec![("state".into(), "not finished".into())],
    };
    Ok(RunSection {
        path: path.into(),
        summary,
        config: read("config.toml")?,
        curve: chart(
            "step",
            "loss",
            &[Series {
                name: "loss",
                points: total,
                dots: false,
            }],
        )?,
    })
}

struct Series {
    name: &'static str,
    points: Vec<(f64, f64)>,
    dots: bool,
}

/// Legible on a light and on a dark page.
const INK: RGBColor = RGBColor(128, 128, 128);
const COLORS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(224, 122, 32)];

/// An inline SVG of lines and dots.
fn chart(x_label: &str, y_label: &str, series: &[Series]) -> Result<String, Failure> {
    let points: Vec<(f64, f64)> = series
        .iter()
        .flat_map(|one| one.points.iter().copied())
        .filter(|point| point.1.is_finite())
        .collect();
    if points.is_empty() {
        return Ok(String::new());
    }
    let span = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let margin = ((high - low) * 0.05).max(high.abs() * 1e-3).max(1e-9);
        low - margin..high + margin
    };
    let x_range = span(&mut points.iter().map(|point| point.0));
    let y_range = span(&mut points.iter().map(|point| point.1));
    let mut svg = String::new();
    let drawn = (|| -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(&mut svg, (720, 320)).into_drawing_area();
        let font = ("sans-serif", 13).into_font().color(&INK);
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(x_range, y_range)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.25))
            .axis_style(INK)
            .label_style(font.clone())
            .axis_desc_style(font.clone())
            .x_desc(x_label)
            .y_desc(y_label)
            .draw()?;
        for (one, color) in series.iter().zip(COLORS) {
            let finite = one
                .points
                .iter()
                .copied()
                .filter(|point| point.1.is_finite());
            if one.dots {
                chart
                    .draw_series(finite.map(|point| Circle::new(point, 4, color.filled())))?
                    .label(one.name)
                    .legend(move |(x, y)| Circle::new((x + 10, y), 4, color.filled()));
            } else {
                chart
                    .draw_series(LineSeries::new(finite, color.stroke_width(2)))?
                    .label(one.name)
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
                    });
            }
        }
        if series.len() > 1 {
            chart
                .configure_series_labels()
                .label_font(font)
                .border_style(INK.mix(0.4))
                .position(SeriesLabelPosition::UpperRight)
                .draw()?;
        }
        area.present()?;
        Ok(())
    })();
    drawn.map_err(|error| Failure::ours(format!("can't draw the chart: {error}")))?;
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_user_is_escaped_and_charts_are_not() {
        let svg = chart(
            "step",
            "loss",
            &[Series {
                name: "loss",
                points: vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)],
                dots: false,
            }],
        )
        .unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("<polyline"));
        let section = RunSection {
            path: "a<b".into(),
            summary: vec![],
            config: "x = \"<script>\"".into(),
            curve: svg,
        };
        let page = render(&[], &[section]).unwrap();
        assert!(
            page.contains("a&lt;b") && !page.contains("<script>") && page.contains("<polyline")
        );
        assert!(
            !page.contains("http://")
                || page.matches("http://").count()
                    == page.matches("http://www.w3.org/2000/svg").count()
        );
    }

    #[test]
    fn a_chart_of_nothing_is_empty_and_of_one_point_drawn() {
        assert_eq!(chart("x", "y", &[]).unwrap(), "");
        assert!(
            chart(
                "x",
                "y",
                &[Series {
                    name: "n",
                    points: vec![(1.0, 5.0)],
                    dots: true
                }]
            )
            .unwrap()
            .contains("<circle")
        );
    }
}
