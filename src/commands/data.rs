//! The data options of a build, and what is said about its data.

use std::path::Path;

use caskd_cache_builder::{BuildReport, DataOptions, OnError, PromptForm};
use caskd_formats::LossOn;

use crate::cli::{DataArgs, DuplicatesArg, LossOnArg, OnErrorArg, PromptArg};
use crate::exit::Failure;
use crate::terminal::{Progress, say};

/// What the arguments ask for.
pub(crate) fn data_options(args: &DataArgs) -> Result<DataOptions, Failure> {
    if !(0.0..1.0).contains(&args.validation) {
        return Err(Failure::user(
            format!("--validation {} is not a share", args.validation),
            "0.05 keeps a twentieth of the sequences apart",
        ));
    }
    if args.limit == Some(0) {
        return Err(Failure::user(
            "--limit 0 leaves no sequence",
            "give at least 1",
        ));
    }
    let mut options = DataOptions {
        loss_on: match args.loss_on {
            LossOnArg::Response => LossOn::Response,
            LossOnArg::All => LossOn::All,
        },
        prompt: match args.prompt {
            PromptArg::Alpaca => PromptForm::Alpaca,
            PromptArg::Chat => PromptForm::Chat,
        },
        chat_template: args.chat_template.clone(),
        chat_date: args.chat_date,
        pack: args.pack,
        keep_duplicates: args.duplicates == DuplicatesArg::Keep,
        validation_millionths: (args.validation * 1e6).round() as u32,
        on_error: on_error(args.on_error),
        limit: args.limit,
        ..DataOptions::default()
    };
    options.set_columns(&args.column)?;
    Ok(options)
}

pub(crate) fn on_error(argument: OnErrorArg) -> OnError {
    match argument {
        OnErrorArg::Stop => OnError::Stop,
        OnErrorArg::Skip => OnError::Skip,
    }
}

/// Bad records that are shown one by one.
const NAMED_ON_TERMINAL: u64 = 20;

/// Names bad records above a bar, the first of them.
#[derive(Default)]
pub(crate) struct BadRecordTalk {
    named: u64,
}

impl BadRecordTalk {
    pub(crate) fn say(&mut self, bar: &Progress, file: &Path, place: &str, problem: &str) {
        self.named += 1;
        if self.named <= NAMED_ON_TERMINAL {
            bar.say(&format!("skipped `{}` {place}: {problem}", file.display()));
        } else if self.named == NAMED_ON_TERMINAL + 1 {
            bar.say("further bad records are counted only");
        }
    }
}

/// Says what became of the records.
pub(crate) fn say_data(report: &BuildReport, max_len: usize) {
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    if report.validation_sequences > 0 {
        say(format!(
            "validation: {} of {} sequences ({:.1}%) are kept apart",
            report.validation_sequences,
            report.sequences,
            share(report.validation_sequences, report.sequences)
        ));
    }
    if report.bad_records > 0 {
        say(format!(
            "warning: {} of {} records ({:.2}%) were bad and were skipped",
            report.bad_records,
            report.records,
            share(report.bad_records, report.records)
        ));
    }
    if report.duplicates > 0 {
        say(format!(
            "note: {} sequences repeated the tokens of an earlier one and were dropped (--duplicates keep keeps them)",
            report.duplicates
        ));
    }
    if report.truncated > 0 {
        say(format!(
            "warning: {} of {} records ({:.1}%) were longer than --max-len {max_len} and lost {} tokens ({:.1}% of all)",
            report.truncated,
            report.records,
            share(report.truncated, report.records),
            report.truncated_tokens,
            share(
                report.truncated_tokens,
                report.positions + report.truncated_tokens
            ),
        ));
    }
    if report.skipped > 0 {
        say(format!(
            "warning: {} records or windows were dropped: nothing to learn within --max-len {max_len}",
            report.skipped
        ));
    }
    if let Some(date) = &report.chat_date {
        say(format!(
            "note: the chat template writes a date into the prompts: {date} (--chat-date changes it)"
        ));
    }
}
