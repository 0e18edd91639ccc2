//! `caskd verify`

use super::{print_json, print_text};
use crate::cli::VerifyArgs;
use crate::exit::{Exit, Outcome};

pub(crate) fn run(args: &VerifyArgs) -> Outcome {
    let report = caskd_formats::verify(&args.cache, args.deep)?;
    if args.json {
        print_json(&report)?;
    } else {
        for problem in &report.problems {
            let column = problem
                .column
                .as_ref()
                .map(|column| format!(" column {column}"))
                .unwrap_or_default();
            let row = problem
                .row
                .map(|row| format!(" row {row}"))
                .unwrap_or_default();
            print_text(format!(
                "damaged: `{}`{column}{row}: {}",
                problem.file, problem.message
            ));
        }
        let how = if args.deep { ", every row decoded" } else { "" };
        print_text(format!(
            "{}: {} files, {} rows{how}, {} problems",
            if report.ok { "ok" } else { "not ok" },
            report.files,
            report.rows,
            report.problems.len()
        ));
    }
    Ok(if report.ok { Exit::Done } else { Exit::User })
}
