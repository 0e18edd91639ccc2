//! `caskd train`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use caskd_formats::Cache;
use caskd_models::LoadOptions;
use caskd_trainer::{
    CacheMix, Control, StepReport, TrainConfig, TrainSummary, check_fidelity, load_base, train,
};

use super::{open_cache, parse_device, print_json, print_text};
use crate::cli::{ShardArgs, TrainArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, bytes, duration, say, shown};

pub(crate) fn run(args: &TrainArgs) -> Outcome {
    let mut config = read_config(args.config.as_deref(), &args.settings)?;
    config.allow_low_fidelity |= args.allow_low_fidelity;
    if let Some(fraction) = args.fraction {
        config.fraction = fraction;
    }
    if let Some(io) = &args.io {
        config.set("io", io)?;
    }
    add_shards(&mut config, &args.elsewhere)?;
    if let Some(folder) = &args.tensorboard {
        config.tensorboard = Some(folder.clone());
    }
    if args.print_config {
        print_text(config.to_commented_toml()?);
        return Ok(Exit::Done);
    }
    let (Some(student), Some(out)) = (&args.student, &args.out) else {
        return Err(Failure::user(
            "--cache, --student and --out are needed",
            "see: caskd train --help",
        ));
    };
    let caches: Vec<(PathBuf, f64)> = args.cache.iter().map(|cache| weighted(cache)).collect();
    let summary = train_with_progress(&config, student, &caches, out, args.resume, "training")?;
    if args.json {
        print_json(&summary)?;
    }
    Ok(if summary.completed {
        Exit::Done
    } else {
        Exit::Stopped
    })
}

/// `CACHE=WEIGHT`, unless a folder has that very name.
fn weighted(argument: &Path) -> (PathBuf, f64) {
    let split = argument.to_str().and_then(|text| text.rsplit_once('='));
    match split.map(|(path, weight)| (path, weight.parse::<f64>())) {
        Some((path, Ok(weight))) if !argument.exists() => (path.into(), weight),
        _ => (argument.to_owned(), 1.0),
    }
}

/// Puts --shards to the folders of the configuration, whose paths then hold wherever they are read again.
pub(crate) fn add_shards(config: &mut TrainConfig, args: &ShardArgs) -> Result<(), Failure> {
    config.shards.extend_from_slice(&args.shards);
    for folder in &mut config.shards {
        *folder = std::path::absolute(&folder)
            .map_err(|error| Failure::file("look for shards in", folder, &error))?;
    }
    Ok(())
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

/// Loads student and caches, trains, shows how far it is, and says what came out.
pub(crate) fn train_with_progress(
    config: &TrainConfig,
    student: &Path,
    caches: &[(PathBuf, f64)],
    out: &Path,
    resume: bool,
    label: &str,
) -> Result<TrainSummary, Failure> {
    config.validate()?;
    let open = |(path, weight): &(PathBuf, f64)| -> Result<(Arc<Cache>, f64), Failure> {
        let cache = open_cache(path, &config.shards, config.io())?;
        Ok((Arc::new(cache), *weight))
    };
    let caches: Vec<(Arc<Cache>, f64)> = caches.iter().map(open).collect::<Result<_, _>>()?;
    let options = LoadOptions {
        device: parse_device(&config.device)?,
        kind: config.kind(),
    };
    for (cache, _) in &caches {
        for warning in check_fidelity(config, cache)? {
            say(format!("warning: {warning}"));
        }
    }
    let caches = CacheMix::new(caches)?;
    let student_model = load_base(student, &options, config.quantize)?;
    let mut bar = Progress::new(label);
    let mut control = Control {
        resume,
        stop: &terminal::STOP,
        progress: &mut |report| {
            bar.update(report.step, report.total_steps, &live(report));
        },
    };
    let summary = train(config, student_model, student, caches, out, &mut control)?;
    bar.finish();
    for note in &summary.notes {
        say(format!("note: {note}"));
    }
    if summary.completed {
        say(format!(
            "run `{}`: {} steps, {} tokens in {} ({:.0} tokens/s, {:.1}% of it waiting for data), final loss {}",
            out.display(),
            summary.steps,
            summary.tokens,
            duration(summary.seconds),
            summary.tokens_per_second,
            100.0 * summary.data_wait_seconds / summary.seconds.max(1e-9),
            shown(summary.final_loss),
        ));
    } else {
        say(format!(
            "stopped at step {}; go on with the same command and --resume",
            summary.steps
        ));
    }
    Ok(summary)
}

/// What the progress line says of a step.
fn live(report: &StepReport) -> String {
    let mut parts = vec![format!("step {}", report.step)];
    let terms: Vec<String> = report
        .terms
        .iter()
        .map(|(name, value)| format!("{name} {}", shown(*value)))
        .collect();
    parts.push(if terms.len() > 1 {
        format!("loss {} ({})", shown(report.loss), terms.join(", "))
    } else {
        format!("loss {}", shown(report.loss))
    });
    parts.push(format!("|g| {:.3}", report.grad_norm));
    parts.push(format!("{:.0} tokens/s", report.tokens_per_second));
    let wait = report.data_wait_seconds / report.seconds.max(1e-9);
    parts.push(format!("wait {:.1}%", 100.0 * wait));
    parts.extend(report.memory_bytes.map(bytes));
    parts.join("  ")
}
