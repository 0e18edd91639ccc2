//! The command line as the user types it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Print a cache's card: who made it from what, tier, bytes by column, losses it serves
    Inspect(InspectArgs),
    /// Check every file, blob and row of a cache
    Verify(VerifyArgs),
    /// Measure how near a cache's logits are to its teacher's
    Fidelity(FidelityArgs),
    /// Remove attention groups and FFN channels from a dense model
    Prune(PruneArgs),
    /// Train a student from a cache (LoRA)
    Train(TrainArgs),
    /// Perplexity on text, KL to the teacher on a cache
    Eval(EvalArgs),
    /// Evaluate any loss and its gradient on given logits
    Loss(LossArgs),
    /// Decode a cache to safetensors or JSONL
    Export(ExportArgs),
    /// Search distillation settings with many cheap trials
    Search(SearchArgs),
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
pub(crate) enum ExportFormat {
    Safetensors,
    Jsonl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SamplerArg {
    Sabo,
    Gp,
    Random,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd build --teacher SmolLM2.gguf --data train.jsonl --out cache --tier exact
  caskd build --teacher SmolLM2.gguf --data book.txt --out cache --tier compact --rate 130
  caskd build --teacher llama-70b/ --data book.txt --out cache --tier sparse --layers none --dtype bf16

A JSONL record has Alpaca's fields (instruction, input, output), or input_ids and an optional loss_mask.")]
pub(crate) struct BuildArgs {
    /// The teacher: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: PathBuf,
    /// Records (.jsonl) or running text (.txt); may be repeated
    #[arg(long, required = true, value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
    /// The cache's folder; it must not exist, or hold an interrupted build
    #[arg(long, value_name = "CACHE")]
    pub(crate) out: PathBuf,
    /// sparse: top-k and statistics, for losses at temperature 1. compact: a transform code of the last hidden state, for
    /// any loss at a chosen rate. exact: the last hidden state in 8 bits, for any loss
    #[arg(long, value_enum, default_value = "exact")]
    pub(crate) tier: TierArg,
    /// Kept entries of the sorted logits at each position [default: 64; compact: what serves the rate best]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// compact: bytes a position that a logit loss may read [default: 130]
    #[arg(long, value_name = "BYTES", conflicts_with = "distortion")]
    pub(crate) rate: Option<u32>,
    /// compact: instead of a rate, the KL to the teacher at temperature 1 in nats a position, for instance 0.05
    #[arg(long, value_name = "KL")]
    pub(crate) distortion: Option<f64>,
    /// Do not compare the cache with the teacher when it is written
    #[arg(long)]
    pub(crate) no_fidelity: bool,
    /// Hidden states to keep: last, middle, layer numbers (0 is the embedding), or none [default: last,middle; compact: none]
    #[arg(long, value_name = "LIST")]
    pub(crate) layers: Option<String>,
    /// How hidden states are stored
    #[arg(long, value_enum, default_value = "int8")]
    pub(crate) hidden: HiddenArg,
    /// Longest sequence in tokens; longer records are cut, and counted
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub(crate) max_len: usize,
    /// The type the teacher computes in
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: DtypeArg,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Go on with an interrupted build
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  caskd inspect cache")]
pub(crate) struct InspectArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    /// Print the card as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  caskd verify cache --deep\n  caskd verify cache --teacher SmolLM2.gguf --sample 16\n\nExit code 0: every byte is as it was written, and the teacher agrees. Exit code 2: what is damaged is named."
)]
pub(crate) struct VerifyArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    /// Decode every row again and check that its numbers agree with each other
    #[arg(long)]
    pub(crate) deep: bool,
    /// Run the teacher again on a sample of the sequences and compare
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: Option<PathBuf>,
    /// Sequences that the teacher reads again
    #[arg(long, default_value_t = 8, value_name = "N", requires = "teacher")]
    pub(crate) sample: usize,
    /// cpu or cuda:N, for the teacher
    #[arg(long, default_value = "cpu", requires = "teacher")]
    pub(crate) device: String,
    /// Print the findings as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd fidelity cache
  caskd fidelity cache --teacher SmolLM2.gguf --positions 4096 --json

Without --teacher the report that the build left in the cache is shown. KL(teacher || rebuilt) is in nats a position; the \
gradient error is that of a batch's gradient at the student's LM head.")]
pub(crate) struct FidelityArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    /// The cache's teacher, to measure again
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: Option<PathBuf>,
    /// Whose gradient [default: the teacher without a quarter of its FFN channels]
    #[arg(long, value_name = "DIR|FILE.gguf", requires = "teacher")]
    pub(crate) student: Option<PathBuf>,
    /// Positions to measure on
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub(crate) positions: usize,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd prune --model SmolLM2.gguf --ratio 0.25 --out student
  caskd prune --model SmolLM2.gguf --ratio 0.25 --calibration train.jsonl --out student")]
pub(crate) struct PruneArgs {
    /// The dense model: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) model: PathBuf,
    /// Share of each layer's attention groups and FFN channels to remove, between 0 and 1
    #[arg(long, default_value_t = 0.25)]
    pub(crate) ratio: f64,
    /// The student's folder; it must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Layers to prune, first to last, counted from 0 [default: 4 to L-3, as LLM-Pruner does]
    #[arg(long, value_name = "FIRST-LAST")]
    pub(crate) scope: Option<String>,
    /// Weigh the weights by their inputs' size on these data (as Wanda does); far better than their magnitude alone
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: Option<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd train --cache cache --student student --out run --set kd_type=dual-scaling --set scaling_value=4
  caskd train --cache cache --student student --out run --set soft_weight=0      (plain LoRA fine-tuning)
  caskd train --cache cache --student student --out run --config study/best.toml

The keys of the configuration and their defaults: caskd train --print-config")]
pub(crate) struct TrainArgs {
    /// The teacher's cache
    #[arg(long, value_name = "CACHE", required_unless_present = "print_config")]
    pub(crate) cache: Option<PathBuf>,
    /// The student: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "DIR", required_unless_present = "print_config")]
    pub(crate) student: Option<PathBuf>,
    /// The run's folder: adapters, checkpoints, log
    #[arg(long, value_name = "RUN", required_unless_present = "print_config")]
    pub(crate) out: Option<PathBuf>,
    /// Settings as TOML
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// One setting; may be repeated, and wins over --config
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Go on with an interrupted run
    #[arg(long)]
    pub(crate) resume: bool,
    /// Train even where the cache's gradient of a loss is off by more than 10%
    #[arg(long)]
    pub(crate) allow_low_fidelity: bool,
    /// Print the default configuration and exit
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Print the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd eval --model SmolLM2.gguf --text heldout.txt
  caskd eval --model run --text heldout.txt --cache heldout-cache --json
  caskd eval --model run --task arc_easy=arc_easy.jsonl --task boolq=boolq.jsonl --per-item items.jsonl

Tasks: openbookqa, hellaswag, winogrande, piqa, arc_easy, arc_challenge, boolq, qnli, qqp, sst2, lambada. A line of a \
task's file has the fields of its dataset as lm-evaluation-harness loads it, or is prepared: query, choices, gold; \
or contexts, continuation, gold; or context, continuation. Scores are the harness's.")]
pub(crate) struct EvalArgs {
    /// A Hugging Face folder, a GGUF file, or a run of `caskd train`
    #[arg(long, value_name = "DIR|FILE.gguf|RUN")]
    pub(crate) model: PathBuf,
    /// Text for perplexity; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Vec<PathBuf>,
    /// A teacher's cache for KL to the teacher and perplexity on its targets [default for a run without --text: its own cache]
    #[arg(long, value_name = "CACHE")]
    pub(crate) cache: Vec<PathBuf>,
    /// A task and its items; may be repeated. NAME= may be left out where the file is called NAME.jsonl
    #[arg(long, value_name = "NAME=FILE.jsonl")]
    pub(crate) task: Vec<String>,
    /// Write one line for each task item: log-likelihoods of its choices, gold, prediction
    #[arg(long, value_name = "OUT.jsonl")]
    pub(crate) per_item: Option<PathBuf>,
    /// Only the first N items of each task
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Window of the text in tokens
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub(crate) max_len: usize,
    /// Tokens that each further window scores; fewer give each token more context [default: the window]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) stride: Option<usize>,
    /// The type the model computes in
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: DtypeArg,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Print the scores as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd loss --list
  caskd loss --kind kl --set temperature=4 --in logits.safetensors --out kl.safetensors
  caskd loss --kind bild --set k=8 --set tau=3 --set logits_norm=standardize --in logits.safetensors --out bild.safetensors

Input tensors: teacher and student [B,T,V] or [N,V]; labels [B,T] (integers, negative where there is none) for losses on \
labels; teacher_hidden and student_hidden [B,T,D] for losses on hidden states; mask [B,T] on demand. Output tensors: \
value [B,T] and grad, the derivative of the mean of value with respect to the student, in f64 when an input is f64.")]
pub(crate) struct LossArgs {
    /// Which loss, by its name in [[loss]] entries
    #[arg(long, value_name = "KIND", required_unless_present = "list")]
    pub(crate) kind: Option<String>,
    /// One setting of the loss; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// The tensors to evaluate it on
    #[arg(
        long = "in",
        value_name = "FILE.safetensors",
        required_unless_present = "list"
    )]
    pub(crate) input: Option<PathBuf>,
    /// The file to write; an earlier result there is replaced
    #[arg(
        long,
        value_name = "FILE.safetensors",
        required_unless_present = "list"
    )]
    pub(crate) out: Option<PathBuf>,
    /// Print every kind with its keys and defaults
    #[arg(long)]
    pub(crate) list: bool,
    /// Print the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd export cache --to safetensors --out cache.safetensors --logits --limit 8
  caskd export cache --to jsonl --out cache.jsonl

Tensors: input_ids, loss_mask [B,T], lengths [B], statistics.* [B,T], top_k.ids and top_k.logits [B,T,K], \
hidden.N [B,T,D], and with --logits the rebuilt logits [B,T,V] in f32. Shorter sequences are padded with 0.")]
pub(crate) struct ExportArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    /// The form of the output
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) to: ExportFormat,
    /// The file to write; it must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Rebuild and write the logits of the whole vocabulary (4·V bytes a position)
    #[arg(long)]
    pub(crate) logits: bool,
    /// Only the first N sequences
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Print what was written as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd search --cache cache --student student --out study --trials 30
  caskd search --cache cache --student student --out study --sampler random --trials 30 --fraction 0.1
  caskd search --cache cache --student student --out study --space space.toml --resume

Without --space the space is BayesKD's Table 2 (25,920 points). A trial trains the student on the given fraction of \
the cache and is judged by its perplexity on validation sequences that no trial trains on.")]
pub(crate) struct SearchArgs {
    /// The teacher's cache
    #[arg(long, value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    /// The student: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "DIR")]
    pub(crate) student: PathBuf,
    /// The study's folder
    #[arg(long, value_name = "STUDY")]
    pub(crate) out: PathBuf,
    /// sabo: Bayesian search with LAEI. gp: expected improvement alone. random: uniform
    #[arg(long, value_enum, default_value = "sabo")]
    pub(crate) sampler: SamplerArg,
    /// Trials in all
    #[arg(long, default_value_t = 30, value_name = "N")]
    pub(crate) trials: u64,
    /// Share of the cache that a trial trains on; the same sequences for everyone
    #[arg(long, default_value_t = 0.05)]
    pub(crate) fraction: f64,
    /// Share of the cache that judges the trials; no trial trains on it
    #[arg(long, default_value_t = 0.1)]
    pub(crate) validation: f64,
    /// The space to search, as TOML [default: BayesKD's Table 2]
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) space: Option<PathBuf>,
    /// Settings of every trial, as TOML
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// One setting of every trial; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Seed of the study
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on with an interrupted study, or add trials to a finished one
    #[arg(long)]
    pub(crate) resume: bool,
    /// Train even where the cache's gradient of a loss is off by more than 10%
    #[arg(long)]
    pub(crate) allow_low_fidelity: bool,
    /// Print the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  caskd report study run-kd run-bayeskd --out report.html")]
pub(crate) struct ReportArgs {
    /// Studies of `caskd search` and runs of `caskd train`
    #[arg(required = true, value_name = "STUDY|RUN")]
    pub(crate) inputs: Vec<PathBuf>,
    /// The page to write: one file, no network needed
    #[arg(long, value_name = "FILE.html")]
    pub(crate) out: PathBuf,
    /// Print what was written as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  caskd demo --out demo-out

`make demo` fetches the teacher first. A demo that was stopped goes on with --resume.")]
pub(crate) struct DemoArgs {
    /// The teacher as GGUF [default: the one that `make demo` fetched]
    #[arg(long, env = "CASKD_TEACHER", value_name = "FILE.gguf")]
    pub(crate) teacher: Option<PathBuf>,
    /// Where everything is written; an earlier demo there is replaced
    #[arg(long, default_value = "demo-out", value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Seed of everything
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on with an interrupted demo
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the table as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
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
