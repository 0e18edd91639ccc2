//! The arguments that say how data become sequences.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataArgs {
    /// Records (.jsonl, .json, .parquet) or running text (.txt, .md), also as .gz or .zst; may be repeated
    #[arg(long, value_name = "FILE", required_unless_present_any = ["worker", "commit"])]
    pub(crate) data: Vec<PathBuf>,
    /// Another name for a field of the record forms, for instance text=body; may be repeated
    #[arg(long, value_name = "FIELD=NAME")]
    pub(crate) column: Vec<String>,
    /// Take only the first N sequences of the data, for a quick try [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Longest sequence in tokens; longer records are cut, and counted
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub(crate) max_len: usize,
    /// Which tokens the losses ask for: the response (outputs, completions, the assistant's turns), or all of them
    #[arg(long, value_enum, default_value = "response")]
    pub(crate) loss_on: LossOnArg,
    /// How instruction records become prompts: in Alpaca's words, or by the teacher's chat template
    #[arg(long, value_enum, default_value = "alpaca")]
    pub(crate) prompt: PromptArg,
    /// One of the tokenizer's chat templates by name, or a file with another one [default: `default`, and `tool_use` for
    /// conversations with tools where the tokenizer has it]
    #[arg(long, value_name = "NAME|FILE.jinja")]
    pub(crate) chat_template: Option<PathBuf>,
    /// The date that is told to chat templates which ask for today's, so that tomorrow's cache is the same
    /// [default: 2024-07-26]
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub(crate) chat_date: Option<chrono::NaiveDate>,
    /// Put several short records into one sequence of up to --max-len tokens: less padding. Later records in it see the
    /// earlier ones
    #[arg(long)]
    pub(crate) pack: bool,
    /// What to do with a sequence whose tokens have come before: the teacher would only repeat itself
    #[arg(long, value_enum, default_value = "drop")]
    pub(crate) duplicates: DuplicatesArg,
    /// Share of the sequences that is kept apart: no training sees them, search and eval judge on them. Chosen by a hash
    /// of the tokens, so it is the same for everyone
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    pub(crate) validation: f64,
    /// What a bad record does: stop the build, or be named, counted and skipped
    #[arg(long, value_enum, default_value = "stop")]
    pub(crate) on_error: OnErrorArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LossOnArg {
    Response,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PromptArg {
    Alpaca,
    Chat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DuplicatesArg {
    Drop,
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnErrorArg {
    Stop,
    Skip,
}
