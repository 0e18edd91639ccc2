//! `caskd train`

use std::path::Path;
use std::sync::Arc;

use caskd_formats::Cache;
use caskd_models::{LoadOptions, load};
use caskd_trainer::{Control, TrainConfig, TrainSummary, check_fidelity, train};

use super::{parse_device, print_json, print_text};
use crate::cli::TrainArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, duration, say};

pub(crate) fn run(args: &TrainArgs) -> Outcome {
    let mut config = read_config(args.config.as_deref(), &args.settings)?;
    config.allow_low_fidelity |= args.allow_low_fidelity;
    if args.print_config {
        print_text(config.to_toml()?);
        return Ok(Exit::Done);
    }
    let (Some(cache), Some(student), Some(out)) = (&args.cache, &args.student, &args.out) else {
        return Err(Failure::user(
            "--cache, --student and --out are needed",
            "see: caskd train --help",
        ));
    };
    let summary = train_with_progress(&config, student, cache, out, args.resume, "training")?;
    if args.json {
        print_json(&summary)?;
    }
    Ok(if summary.completed {
        Exit::Done
    } else {
        Exit::Stopped
    })
}

/// The defaults, then the file, then the single settings.
pub(crate) fn read_config(
    file: Option<&Path>,
    settings: &[String],
) -> Result<TrainConfig, Failure> {
    let mut config = match file {
        None => TrainConfig::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|error| Failure::file("read", path, &error))?;
            TrainConfig::from_toml(&text)?
        }
    };
    for setting in settings {
        let (key, value) = setting.split_once('=').ok_or_else(|| {
            Failure::user(
                format!("`{setting}` is not KEY=VALUE"),
                "for instance: --set learning_rate=0.0005",
            )
        })?;
        config.set(key.trim(), value.trim())?;
    }
    Ok(config)
}

/// Loads student and cache, trains, shows how far it is, and says what came out.
pub(crate) fn train_with_progress(
    config: &TrainConfig,
    student: &Path,
    cache: &Path,
    out: &Path,
    resume: bool,
    label: &str,
) -> Result<TrainSummary, Failure> {
    let cache = Arc::new(Cache::open(cache, config.io())?);
    let options = LoadOptions {
        device: parse_device(&config.device)?,
        kind: config.kind(),
    };
    for warning in check_fidelity(config, &cache)? {
        say(format!("warning: {warning}"));
    }
    let student_model = load(student, &options)?;
    let mut bar = Progress::new(label);
    let mut control = Control {
        resume,
        stop: &terminal::STOP,
        progress: &mut |report| {
            bar.update(
                report.step,
                report.total_steps,
                &format!(
                    "loss {:.4}  {:.0} tokens/s",
                    report.loss, report.tokens_per_second
                ),
            );
        },
    };
    let summary = train(config, student_model, student, cache, out, &mut control)?;
    bar.finish();
    for note in &summary.notes {
        say(format!("note: {note}"));
    }
    if summary.completed {
        say(format!(
            "run `{}`: {} steps, {} tokens in {} ({:.0} tokens/s, {:.1}% of it waiting for data), final loss {:.4}",
            out.display(),
            summary.steps,
            summary.tokens,
            duration(summary.seconds),
            summary.tokens_per_second,
            100.0 * summary.data_wait_seconds / summary.seconds.max(1e-9),
            summary.final_loss,
        ));
    } else {
        say(format!(
            "stopped at step {}; go on with the same command and --resume",
            summary.steps
        ));
    }
    Ok(summary)
}
