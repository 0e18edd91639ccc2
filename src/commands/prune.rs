//! `caskd prune`

use std::ops::Range;
use std::path::PathBuf;

use caskd_cache_builder::{DataOptions, tokenize};
use caskd_models::{
    LoadOptions, PruneOptions, PruneReport, activation_norms, load, prune, save_model,
};
use serde::Serialize;

use super::{print_json, refuse_existing};
use crate::cli::PruneArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{STOP, say};

/// Tokens that are enough to see how large each channel's inputs are.
const CALIBRATION_TOKENS: usize = 8192;

#[derive(Serialize)]
struct Pruned<'a> {
    out: &'a std::path::Path,
    ratio: f64,
    final_ratio: f64,
    #[serde(flatten)]
    report: &'a PruneReport,
}

pub(crate) fn run(args: &PruneArgs) -> Outcome {
    refuse_existing(&args.out)?;
    let scope = args.scope.as_deref().map(parse_scope).transpose()?;
    let report = prune_to(
        &args.model,
        args.ratio,
        scope,
        args.calibration.as_ref(),
        &args.out,
    )?;
    if args.json {
        let final_ratio = report.parameters_after as f64 / report.parameters_before as f64;
        print_json(&Pruned {
            out: &args.out,
            ratio: args.ratio,
            final_ratio,
            report: &report,
        })?;
    }
    Ok(Exit::Done)
}

/// Prunes `model` into the new folder `out`.
pub(crate) fn prune_to(
    model: &std::path::Path,
    ratio: f64,
    scope: Option<Range<usize>>,
    calibration: Option<&PathBuf>,
    out: &std::path::Path,
) -> Result<PruneReport, Failure> {
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(Failure::user(
            format!("--ratio {ratio} is not between 0 and 1"),
            "0.25 removes a quarter of each pruned layer",
        ));
    }
    let mut model = load(model, &LoadOptions::default())?;
    let activation = match calibration {
        None => {
            say(
                "warning: pruning by the weights' magnitude alone, which can ruin a model; --calibration FILE does far better",
            );
            None
        }
        Some(file) => {
            let data = tokenize(
                &model,
                std::slice::from_ref(file),
                512,
                &DataOptions::default(),
                &STOP,
                &mut |_| {},
            )?
            .ok_or_else(|| {
                Failure::user(
                    "stopped while the calibration data were read",
                    "nothing was written; run the command again",
                )
            })?;
            let mut sequences = Vec::new();
            let mut tokens = 0;
            for sequence in data.sequences {
                tokens += sequence.token_ids.len();
                sequences.push(sequence.token_ids);
                if tokens >= CALIBRATION_TOKENS {
                    break;
                }
            }
            say(format!(
                "calibrating on {tokens} tokens of `{}`",
                file.display()
            ));
            Some(activation_norms(&model.network, &sequences)?)
        }
    };
    let report = prune(
        &mut model,
        &PruneOptions {
            ratio,
            scope,
            activation,
        },
    )?;
    save_model(&model, out)?;
    for note in &report.notes {
        say(format!("note: {note}"));
    }
    say(format!(
        "student `{}`: {:.1} M of {:.1} M parameters ({:.1}%)",
        out.display(),
        report.parameters_after as f64 / 1e6,
        report.parameters_before as f64 / 1e6,
        100.0 * report.parameters_after as f64 / report.parameters_before as f64,
    ));
    Ok(report)
}

/// `4-27` → layers 4 to 27, both included.
fn parse_scope(text: &str) -> Result<Range<usize>, Failure> {
    let parsed = text
        .split_once('-')
        .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)));
    match parsed {
        Some((first, last)) if first <= last => Ok(first..last + 1),
        _ => Err(Failure::user(
            format!("`{text}` is no range of layers"),
            "give the first and the last layer to prune: --scope 4-27",
        )),
    }
}
