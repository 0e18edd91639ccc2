//! `caskd import`

use caskd_cache_builder::{
    Error, Format, GivenValues, ImportOptions, ImportReport, ImportStage, WindowStart, import,
};
use caskd_formats::{Statistic, ValueKind};
use serde::Serialize;

use super::data::{BadRecordTalk, on_error};
use super::print_json;
use crate::cli::{ImportArgs, ImportFormat, ValuesArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, bytes, say};

/// What `--json` prints.
#[derive(Serialize)]
struct Imported<'a> {
    out: &'a std::path::Path,
    #[serde(flatten)]
    report: &'a ImportReport,
}

pub(crate) fn run(args: &ImportArgs) -> Outcome {
    let options = ImportOptions {
        files: args.files.clone(),
        format: args.from.map(|format| match format {
            ImportFormat::Vllm => Format::Vllm,
            ImportFormat::Axolotl => Format::Axolotl,
            ImportFormat::LlamaCpp => Format::LlamaCpp,
            ImportFormat::Distillkit => Format::Distillkit,
            ImportFormat::Numpy => Format::Numpy,
            ImportFormat::Safetensors => Format::Safetensors,
        }),
        tokenizer: args.tokenizer.clone(),
        tokens: args.tokens.clone(),
        compression: args.compression_config.clone(),
        teacher: args.teacher.clone(),
        vocab_size: args.vocab_size,
        top_k: args.top_k,
        max_len: args.max_len,
        limit: args.limit,
        temperature: args.temperature,
        values: match args.values {
            ValuesArg::Auto => GivenValues::Auto,
            ValuesArg::Logprobs => GivenValues::LogProbabilities,
            ValuesArg::Renormalized => GivenValues::Renormalised,
            ValuesArg::Logits => GivenValues::Logits,
        },
        shift: args.shift,
        window_start: window_start(args.window_start.as_deref())?,
        chat_template: args.chat_template.clone(),
        chat_date: args.chat_date,
        on_error: on_error(args.on_error),
        out: args.out.clone(),
        resume: args.resume,
    };
    let mut bars = [
        Some(Progress::new("reading")),
        Some(Progress::new("writing")),
    ];
    let mut talk = BadRecordTalk::default();
    let started = std::time::Instant::now();
    let report = import(&options, &terminal::STOP, &mut |progress| {
        let index = usize::from(progress.stage == ImportStage::Writing);
        if index == 1
            && let Some(bar) = bars[0].take()
        {
            bar.finish();
        }
        if let Some(bar) = &mut bars[index] {
            if let Some(bad) = progress.bad_record {
                talk.say(bar, &bad.file, &bad.place, &bad.problem);
            }
            let rate = progress.bytes_done as f64 / started.elapsed().as_secs_f64().max(1e-9);
            let note = format!("{} positions, {}/s", progress.positions, bytes(rate as u64));
            bar.update(progress.bytes_done, progress.bytes_total, &note);
        }
    });
    for bar in bars.into_iter().flatten() {
        bar.finish();
    }
    let report = match report {
        Err(Error::Stopped) => {
            say("stopped; nothing was written");
            return Ok(Exit::Stopped);
        }
        report => report?,
    };
    tell(&report, &options);
    if args.json {
        print_json(&Imported {
            out: &args.out,
            report: &report,
        })?;
    }
    Ok(if report.completed {
        Exit::Done
    } else {
        Exit::Stopped
    })
}

fn window_start(text: Option<&str>) -> Result<WindowStart, Failure> {
    match text {
        None => Ok(WindowStart::Auto),
        Some("recorded") => Ok(WindowStart::Recorded),
        Some(id) => id.parse().map(WindowStart::Token).map_err(|_| {
            Failure::user(
                format!("--window-start {id} is no token id"),
                "give a number, or `recorded` for the tokens of the file",
            )
        }),
    }
}

fn tell(report: &ImportReport, options: &ImportOptions) {
    for note in &report.notes {
        say(note);
    }
    if !report.completed {
        say(format!(
            "stopped; go on with: --resume (out `{}`)",
            options.out.display()
        ));
        return;
    }
    if report.bad_records > 0 {
        say(format!(
            "warning: {} records were bad and were skipped",
            report.bad_records
        ));
    }
    if report.truncated > 0 {
        say(format!(
            "warning: {} sequences were longer than --max-len and were cut",
            report.truncated
        ));
    }
    if report.skipped > 0 {
        say(format!(
            "warning: {} sequences were left out: no target has values before it",
            report.skipped
        ));
    }
    if let Some(alignment) = &report.alignment {
        say(format!(
            "labels: mean log-probability {:.3} nats over {} positions",
            alignment.mean_log_probability[0], alignment.positions
        ));
    }
    say(format!(
        "cache `{}`: {} sequences, {} positions ({} targets), top-{}, {}",
        options.out.display(),
        report.sequences,
        report.positions,
        report.targets,
        report.top_k,
        bytes(report.cache_bytes),
    ));
    say(format!("values: {}", describe_values(report)));
}

/// What the values are and what they are good for.
fn describe_values(report: &ImportReport) -> String {
    let kind = value_kind(report.origin.values);
    let mass = if report.origin.statistics.contains(&Statistic::LogSumExp) {
        "kl at temperature 1 with an explicit tail, top-k-kl and bild run on them"
    } else {
        "top-k-kl and bild run on them"
    };
    format!(
        "{kind}, given at temperature {}; {mass}",
        report.origin.temperature
    )
}

/// For people.
pub(crate) fn value_kind(values: ValueKind) -> &'static str {
    match values {
        ValueKind::LogProbabilities => "log-probabilities",
        ValueKind::RenormalisedLogProbabilities => {
            "log-probabilities renormalised over the kept tokens"
        }
        ValueKind::Logits => "logits up to a constant",
    }
}
