//! The arguments of `caskd build`.

use std::path::PathBuf;

use clap::Args;

use super::{DtypeArg, HiddenArg, TierArg};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd build --teacher SmolLM2.gguf --data train.jsonl --out cache --tier exact
  caskd build --teacher SmolLM2.gguf --data book.txt --out cache --tier compact --rate 130
  caskd build --teacher llama-70b/ --data book.txt --out cache --tier sparse --layers none --dtype bf16

A JSONL record has Alpaca's fields (instruction, input, output), or input_ids and an optional loss_mask.")]
pub(crate) struct BuildArgs {
    /// The teacher: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
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
