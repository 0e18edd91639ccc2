//! `caskd report`: one self-contained page about studies, comparisons and runs.

mod charts;
mod run;
mod study;
mod svg;

use std::path::Path;

use caskd_search::{Location, read_study};
use caskd_trainer::is_run;
use serde::Serialize;

use super::search::{COMPARISON_FILE, Comparison, Test};
use super::{print_json, write_file};
use crate::cli::ReportArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::say;
use run::RunSection;
use study::StudySection;

const PAGE: &str = include_str!("report/page.html");

#[derive(Serialize)]
struct Written<'a> {
    out: &'a Path,
    studies: usize,
    comparisons: usize,
    runs: usize,
}

#[derive(Serialize, Default)]
struct Page {
    studies: Vec<StudySection>,
    comparisons: Vec<ComparisonSection>,
    runs: Vec<RunSection>,
    version: &'static str,
}

/// What the page says of a comparison.
#[derive(Serialize)]
struct ComparisonSection {
    path: String,
    comparison: Comparison,
    curve: String,
    verdicts: Vec<&'static str>,
}

pub(crate) fn run(args: &ReportArgs) -> Outcome {
    let mut page = Page {
        version: env!("CARGO_PKG_VERSION"),
        ..Page::default()
    };
    for input in &args.inputs {
        let path = Path::new(input);
        if is_run(path) {
            page.runs.push(RunSection::of(path)?);
        } else if path.join(COMPARISON_FILE).is_file() {
            page.comparisons.push(ComparisonSection::of(path)?);
        } else {
            let location = Location::parse(input)?;
            if !location.may_exist() {
                return Err(Failure::user(
                    format!("`{input}` is neither a study nor a run"),
                    "give what `caskd search`, `caskd ask` or `caskd train` wrote",
                ));
            }
            let view = read_study(&location)?;
            page.studies.push(StudySection::of(&location, &view)?);
        }
    }
    let text = render(&page)?;
    write_file(&args.out, |sink| sink.write_all(text.as_bytes()))?;
    let written = Written {
        out: &args.out,
        studies: page.studies.len(),
        comparisons: page.comparisons.len(),
        runs: page.runs.len(),
    };
    say(format!(
        "report `{}`: studies: {}, comparisons: {}, runs: {}",
        args.out.display(),
        written.studies,
        written.comparisons,
        written.runs
    ));
    if args.json {
        print_json(&written)?;
    }
    Ok(Exit::Done)
}

fn render(page: &Page) -> Result<String, Failure> {
    let mut environment = minijinja::Environment::new();
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::Html);
    let rendered = environment.add_template("page", PAGE).and_then(|()| {
        environment
            .get_template("page")?
            .render(minijinja::Value::from(minijinja::value::Serde(page)))
    });
    rendered.map_err(|error| Failure::ours(format!("can't render the report: {error:#}")))
}

impl ComparisonSection {
    fn of(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join(COMPARISON_FILE);
        let text =
            std::fs::read_to_string(&path).map_err(|error| Failure::file("read", &path, &error))?;
        let comparison: Comparison = serde_json::from_str(&text).map_err(|error| {
            Failure::user(
                format!("`{}` is no comparison: {error}", path.display()),
                "run the comparison again with --resume",
            )
        })?;
        Ok(Self {
            path: folder.display().to_string(),
            curve: charts::regret(&comparison),
            verdicts: comparison.tests.iter().map(Test::verdict).collect(),
            comparison,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_user_is_escaped_and_drawings_are_not() {
        let page = Page {
            runs: vec![RunSection {
                path: "a<b".into(),
                summary: vec![],
                config: "x = \"<script>\"".into(),
                curve: "<svg></svg>".into(),
            }],
            ..Page::default()
        };
        let page = render(&page).unwrap();
        assert!(page.contains("a&lt;b") && !page.contains("<script>") && page.contains("<svg>"));
        // Offline: nothing is fetched from anywhere.
        assert!(!page.contains("http://") && !page.contains("https://"));
    }
}
