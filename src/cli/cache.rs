//! The arguments of the commands that read a cache: inspect, verify, fidelity, export.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::ExportFormat;

/// Where a cache's shards are, of every command that reads one.
#[derive(Debug, Args)]
pub(crate) struct ShardArgs {
    /// A folder of shards that do not lie beside their cache's manifest; may be repeated, and serves every cache
    #[arg(long, value_name = "DIR")]
    pub(crate) shards: Vec<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  caskd inspect cache")]
pub(crate) struct InspectArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
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
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// Decode every row again and check that its numbers agree with each other
    #[arg(long)]
    pub(crate) deep: bool,
    /// Run the teacher again on a sample of the sequences and compare
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: Option<PathBuf>,
    /// Sequences that the teacher reads again
    #[arg(long, default_value = "8", value_name = "N", requires = "teacher")]
    pub(crate) sample: NonZeroUsize,
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
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// The cache's teacher, to measure again
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: Option<PathBuf>,
    /// Whose gradient [default: the teacher without a quarter of its FFN channels]
    #[arg(long, value_name = "DIR|FILE.gguf", requires = "teacher")]
    pub(crate) student: Option<PathBuf>,
    /// Positions to measure on
    #[arg(long, default_value = "2048", value_name = "N")]
    pub(crate) positions: NonZeroUsize,
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
  caskd export cache --to safetensors --out cache.safetensors --logits --limit 8
  caskd export cache --to jsonl --training-only --out train.jsonl

JSONL: one sequence a line, as Axolotl's KD plugin trains from (input_ids, attention_mask, labels, target_token_ids, \
target_logprobs, target_mask; row t is about token t + 1), with everything else that the cache holds unless --training-only.

Tensors: input_ids, loss_mask [B,T], lengths [B], statistics.* [B,T], top_k.ids and top_k.logits [B,T,K], \
hidden.N [B,T,D], and with --logits the rebuilt logits [B,T,V] in f32. Shorter sequences are padded with 0.")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
pub(crate) struct ExportArgs {
    /// The cache's folder
    #[arg(value_name = "CACHE")]
    pub(crate) cache: PathBuf,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// The form of the output
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) to: ExportFormat,
    /// The file to write; it must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Rebuild and write the logits of the whole vocabulary (4·V bytes a position)
    #[arg(long)]
    pub(crate) logits: bool,
    /// JSONL: only what other trainers read, without statistics, top-k logits and hidden states
    #[arg(long)]
    pub(crate) training_only: bool,
    /// JSONL: target_logprobs normalised over the kept tokens
    #[arg(long)]
    pub(crate) renormalize: bool,
    /// JSONL: target_logprobs at temperature T, normalised over the kept tokens (Axolotl's kd_temperature)
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f64>,
    /// Only the first N sequences
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Print what was written as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
