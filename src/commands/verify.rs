//! `caskd verify`

use std::sync::Arc;
use std::time::Instant;

use caskd_cache_builder::{Recheck, recheck};
use caskd_formats::{Alignment, Io, OFFSETS, Spread, VerifyReport};
use serde::Serialize;

use super::{open_cache, parse_device, print_json, print_text};
use crate::cli::VerifyArgs;
use crate::exit::{Exit, Outcome};
use crate::terminal::{Progress, bytes, say};

/// What `--json` prints.
#[derive(Serialize)]
struct Findings {
    #[serde(flatten)]
    files: VerifyReport,
    teacher: Option<Recheck>,
}

pub(crate) fn run(args: &VerifyArgs) -> Outcome {
    let shards = &args.elsewhere.shards;
    let storage = Arc::new(Spread::new(&args.cache, shards)?);
    let mut bar = Progress::new("verifying");
    let started = Instant::now();
    let files = caskd_formats::verify_in(storage, args.deep, &mut |done, total| {
        let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
        bar.update(done, total, &format!("{}/s", bytes(rate as u64)));
    })?;
    bar.finish();
    let teacher = match &args.teacher {
        // Damaged values would be compared for nothing.
        Some(teacher) if files.ok => {
            let cache = open_cache(&args.cache, shards, Io::Read)?;
            let device = parse_device(&args.device)?;
            Some(recheck(&cache, teacher, args.sample.get(), device)?)
        }
        _ => None,
    };
    let is_ok = files.ok && teacher.as_ref().is_none_or(|found| found.ok);
    if let Some(alignment) = &files.alignment {
        warn_of_offset(alignment);
    }
    if args.json {
        print_json(&Findings { files, teacher })?;
    } else {
        print_files(&files, args.deep);
        if let Some(found) = &teacher {
            print_teacher(found);
        }
    }
    Ok(if is_ok { Exit::Done } else { Exit::User })
}

fn print_files(report: &VerifyReport, deep: bool) {
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
    let how = if deep { ", every row decoded" } else { "" };
    print_text(format!(
        "{}: {} files, {} rows{how}, {} problems",
        if report.ok { "ok" } else { "not ok" },
        report.files,
        report.rows,
        report.problems.len()
    ));
    if let Some(alignment) = &report.alignment {
        print_text(format!(
            "labels: mean log-probability {:.3} nats over {} positions, {:.3} one token before, {:.3} one behind",
            alignment.mean_log_probability[0],
            alignment.positions,
            alignment.mean_log_probability[1],
            alignment.mean_log_probability[2],
        ));
    }
}

/// A teacher that has learned nothing may well repeat its input, so this is a warning.
fn warn_of_offset(alignment: &Alignment) {
    if alignment.best_offset != OFFSETS[0] {
        say(format!(
            "warning: the logits fit the tokens better with labels moved by {}: were they shifted when the cache was made?",
            alignment.best_offset
        ));
    }
}

fn print_teacher(found: &Recheck) {
    for deviation in &found.deviations {
        let verdict = if deviation.relative <= deviation.allowed {
            "as the teacher says"
        } else {
            "differs from the teacher"
        };
        print_text(format!(
            "{}: {verdict}, relative error {:.1e} (up to {:.1e} is rounding), largest {:.3e} at {} position {}",
            deviation.column,
            deviation.relative,
            deviation.allowed,
            deviation.largest,
            deviation.source,
            deviation.position
        ));
    }
    let agreement = found
        .top_k_agreement
        .map(|share| format!(", {:.2}% of the top-k entries found again", share * 100.0))
        .unwrap_or_default();
    print_text(format!(
        "{}: the teacher read {} sequences, {} positions again{agreement}",
        if found.ok { "ok" } else { "not ok" },
        found.sequences,
        found.positions
    ));
}
