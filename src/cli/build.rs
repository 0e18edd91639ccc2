//! The arguments of `caskd build`.

use std::path::PathBuf;

use clap::Args;

use super::{DataArgs, DtypeArg, HiddenArg, TierArg};

/// What the plan has decided already.
const PLANNED: [&str; 20] = [
    "data",
    "column",
    "limit",
    "loss_on",
    "prompt",
    "chat_template",
    "chat_date",
    "pack",
    "duplicates",
    "validation",
    "on_error",
    "tier",
    "top_k",
    "rate",
    "distortion",
    "no_fidelity",
    "layers",
    "hidden",
    "max_len",
    "dtype",
];

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd build --teacher SmolLM2.gguf --data train.jsonl --out cache --tier exact
  caskd build --teacher SmolLM2.gguf --data book.txt --out cache --tier compact --rate 130
  caskd build --teacher llama-70b/ --data book.txt --out cache --tier sparse --dtype bf16
  caskd build --teacher SmolLM2.gguf --data chats.parquet --out cache --validation 0.05 --on-error skip
  caskd build --teacher SmolLM2.gguf --data pages.jsonl --column text=body --out cache --pack

What it will take, before it runs:
  caskd build --teacher SmolLM2.gguf --data train.jsonl --estimate
A teacher that is larger than memory:
  caskd build --teacher llama-70b/ --data book.txt --out cache --dtype bf16 --memory-budget 20GiB

On many machines that see one folder (deploy/ has scripts for Slurm and Kubernetes, docs/SCALE.md the arithmetic):
  caskd build --plan --teacher llama-70b/ --data book.txt --out cache
  caskd build --worker 0/4 --out cache        # to 3/4; or --worker alone, from the environment of Slurm arrays,
                                              # Kubernetes Indexed Jobs and torchrun, in this order
  caskd build --commit --out cache

A record (a line of .jsonl, an entry of a .json list, a row of .parquet) has one of these forms, known by its names:
  instruction, input, output          Alpaca's fields
  messages: [{role, content}, ...]    a conversation, written by the teacher's own chat template
  conversations: [{from, value}, ...] the same in ShareGPT's names
  prompt, completion                  as they stand
  text                                running text; long ones are cut into windows
  input_ids, loss_mask                tokens made elsewhere")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "flags as the user types them"
)]
pub(crate) struct BuildArgs {
    /// The teacher: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
    #[arg(long, value_name = "DIR|FILE.gguf", required_unless_present_any = ["worker", "commit"])]
    pub(crate) teacher: Option<PathBuf>,
    /// The cache's folder; it must not exist, or hold an interrupted build
    #[arg(long, value_name = "CACHE", required_unless_present = "estimate")]
    pub(crate) out: Option<PathBuf>,
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
    /// Hidden states to keep: last, middle, layer numbers (0 is the embedding), or none [default: last,middle; sparse and compact: none]
    #[arg(long, value_name = "LIST")]
    pub(crate) layers: Option<String>,
    /// How hidden states are stored
    #[arg(long, value_enum, default_value = "int8")]
    pub(crate) hidden: HiddenArg,
    /// The type the teacher computes in
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: DtypeArg,
    /// cpu, cuda:N, or several that the layers are spread over: cuda:0,cuda:1
    #[arg(long, default_value = "cpu", value_name = "LIST")]
    pub(crate) device: String,
    /// Memory that the build may take, for instance 4GiB. A teacher that does not fit is read layer by layer, and many
    /// positions go through each layer at a time; the bytes of the cache are the same. auto: what is free, on a CPU
    #[arg(long, default_value = "auto", value_name = "SIZE")]
    pub(crate) memory_budget: String,
    /// Layer by layer, keep activations in a file in this folder instead of in memory
    #[arg(long, value_name = "DIR")]
    pub(crate) spill: Option<PathBuf>,
    /// Go on with an interrupted build
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print expected bytes, memory and time, and build nothing
    #[arg(long, group = "mode")]
    pub(crate) estimate: bool,
    /// Write the plan of the build into --out, for workers: LM head, basis, the tokens of every task
    #[arg(long, group = "mode")]
    pub(crate) plan: bool,
    /// Do share I (from 0) of N of a planned build; without a value I and N come from the environment
    #[arg(long, value_name = "I/N", num_args = 0..=1, default_missing_value = "auto", group = "mode", conflicts_with_all = PLANNED)]
    pub(crate) worker: Option<String>,
    /// Join what the workers did into one manifest
    #[arg(long, group = "mode", conflicts_with_all = PLANNED)]
    pub(crate) commit: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) data: DataArgs,
}
