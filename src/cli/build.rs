//! The arguments of `caskd build`.

use std::path::PathBuf;

use clap::Args;

use super::{DataArgs, DtypeArg, HiddenArg, TierArg};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd build --teacher SmolLM2.gguf --data train.jsonl --out cache --tier exact
  caskd build --teacher SmolLM2.gguf --data book.txt --out cache --tier compact --rate 130
  caskd build --teacher llama-70b/ --data book.txt --out cache --tier sparse --layers none --dtype bf16
  caskd build --teacher SmolLM2.gguf --data chats.parquet --out cache --validation 0.05 --on-error skip
  caskd build --teacher SmolLM2.gguf --data pages.jsonl --column text=body --out cache --pack

A record (a line of .jsonl, an entry of a .json list, a row of .parquet) has one of these forms, known by its names:
  instruction, input, output          Alpaca's fields
  messages: [{role, content}, ...]    a conversation, written by the teacher's own chat template
  conversations: [{from, value}, ...] the same in ShareGPT's names
  prompt, completion                  as they stand
  text                                running text; long ones are cut into windows
  input_ids, loss_mask                tokens made elsewhere")]
pub(crate) struct BuildArgs {
    /// The teacher: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) teacher: PathBuf,
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
    #[command(flatten)]
    pub(crate) data: DataArgs,
}
