//! The command line as the user types it.

mod build;
mod cache;
mod data;
mod demo;
mod import;
mod model;
mod search;
mod student;

use clap::{Parser, Subcommand, ValueEnum};

pub(crate) use build::BuildArgs;
pub(crate) use cache::{ExportArgs, FidelityArgs, InspectArgs, ShardArgs, VerifyArgs};
pub(crate) use data::{DataArgs, DuplicatesArg, LossOnArg, OnErrorArg, PromptArg};
pub(crate) use demo::DemoArgs;
pub(crate) use import::{ImportArgs, ImportFormat, ValuesArg};
pub(crate) use model::{ExportModelArgs, MethodArg, PartsArg, PruneArgs, PrunedArg};
pub(crate) use search::{
    AskArgs, LadderArgs, ReportArgs, SaboArgs, SearchArgs, StatusArgs, TellArgs,
};
pub(crate) use student::{EvalArgs, LossArgs, TrainArgs};

/// Run the teacher once, train hundreds of students from its cache.
#[derive(Debug, Parser)]
#[command(name = "caskd", version, about, long_about = LONG_ABOUT, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const LONG_ABOUT: &str = "Cached activations and statistics for knowledge distillation.

caskd runs a teacher language model once over your data, keeps what distillation losses ask of it in a compact, \
checked Parquet cache, and streams that cache through cheap student trials driven by Bayesian search.

Exit codes: 0 done, 2 an error that you can mend, 1 a fault of caskd, 75 stopped and resumable.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the teacher once and write its cache
    Build(BuildArgs),
    /// Make a cache from values that another program computed: vLLM, llama.cpp, DistillKit, NumPy …
    Import(Box<ImportArgs>),
    /// Print a cache's card: who made it from what, tier, bytes by column, losses it serves
    Inspect(InspectArgs),
    /// Check every file, blob and row of a cache
    Verify(VerifyArgs),
    /// Measure how near a cache's logits are to its teacher's
    Fidelity(FidelityArgs),
    /// Remove attention groups and FFN channels from a dense model, or mask single weights
    Prune(PruneArgs),
    /// Train a student from a cache
    Train(TrainArgs),
    /// Perplexity on text, accuracy on tasks, KL to the teacher on a cache
    Eval(EvalArgs),
    /// Evaluate any loss and its gradient on given logits
    Loss(LossArgs),
    /// Write a run or a model as a folder that transformers loads, or its adapters for PEFT
    ExportModel(ExportModelArgs),
    /// Decode a cache to safetensors or JSONL
    Export(ExportArgs),
    /// Search distillation settings with many cheap trials
    Search(Box<SearchArgs>),
    /// Ask a study for the next trial to evaluate, with whatever program you like
    Ask(AskArgs),
    /// Tell a study how a trial came out
    Tell(TellArgs),
    /// Show how a study stands
    Status(StatusArgs),
    /// Write an HTML report of studies and runs
    Report(ReportArgs),
    /// The main job end to end on a real teacher, with our own data
    Demo(DemoArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TierArg {
    Sparse,
    Compact,
    Exact,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HiddenArg {
    Int8,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SplitArg {
    Validation,
    Train,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    Safetensors,
    Jsonl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SamplerArg {
    Sabo,
    Gp,
    Tpe,
    Sobol,
    Random,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_holds_and_every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains(&format!("caskd {}", sub.get_name())),
                "{} has no example",
                sub.get_name()
            );
        }
    }
}
