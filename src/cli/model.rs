//! The arguments of the commands that make models from models: prune, export-model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{DtypeArg, ShardArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd prune --model SmolLM2.gguf --method wanda --ratio 0.25 --cache cache --out student
  caskd prune --model SmolLM2.gguf --method taylor --ratio 0.25 --calibration train.jsonl --out student
  caskd prune --model SmolLM2.gguf --sparsity 2:4 --method wanda --cache cache --out student

LLaMA-7B at 0.25 keeps 80.5% of its parameters, as in Table 5 of BayesKD (LLM-Pruner's layers 4-30).")]
pub(crate) struct PruneArgs {
    /// The dense model: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) model: PathBuf,
    /// What the removed matter least by: their size, their size times their input's, or what the loss would lose
    /// [default: wanda with calibration data, else magnitude]
    #[arg(long, value_enum)]
    pub(crate) method: Option<MethodArg>,
    /// Share of each layer's attention groups and FFN channels to remove, between 0 and 1; of the weights under
    /// --sparsity unstructured [default: 0.25, and 0.5 for unstructured]
    #[arg(long)]
    pub(crate) ratio: Option<f64>,
    /// The student's folder; it must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Layers to prune, from FIRST up to but without END, counted from 0, as LLM-Pruner's 4-30 [default: 4 to L-2]
    #[arg(long, value_name = "FIRST-END")]
    pub(crate) scope: Option<String>,
    /// What structured pruning removes
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) parts: PartsArg,
    /// structured cuts groups and channels out; unstructured, or N:M like 2:4, sets single weights to zero
    #[arg(
        long,
        default_value = "structured",
        value_name = "structured|unstructured|N:M"
    )]
    pub(crate) sparsity: String,
    /// Calibrate on this file's records or text; may be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "cache")]
    pub(crate) calibration: Vec<PathBuf>,
    /// Calibrate on a cache's own sequences
    #[arg(long, value_name = "CACHE")]
    pub(crate) cache: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// Tokens to calibrate on
    #[arg(long, default_value_t = 8192, value_name = "N")]
    pub(crate) calibration_tokens: usize,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodArg {
    /// |w|; no data needed, and far worse than the others
    Magnitude,
    /// |w| times the norm of its input on calibration data
    Wanda,
    /// |w times its gradient| of the cross-entropy on calibration data
    Taylor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartsArg {
    /// FFN channels, and heads where none shares its keys and values, but for BLOOM's (the sizes of BayesKD's Table 5)
    Auto,
    /// Attention groups and FFN channels
    All,
    /// Attention groups only
    Heads,
    /// FFN channels only
    Ffn,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd export-model run --out student-hf
  caskd export-model student --pruned own-config --out student-hf
  caskd export-model run --peft --out adapter

The folder loads with transformers: AutoModelForCausalLM.from_pretrained(folder); with --pruned own-config add \
trust_remote_code=True. With --peft: PeftModel.from_pretrained(base, folder), where the base is the student's own \
folder, or folder/base if the student was pruned or a GGUF file.")]
pub(crate) struct ExportModelArgs {
    /// A run of `caskd train`, a Hugging Face folder or a GGUF file
    #[arg(value_name = "RUN|MODEL")]
    pub(crate) model: PathBuf,
    /// The new folder; it must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Pruned blocks filled up with zeros to the dense sizes, or in their own sizes with the code to load them
    #[arg(long, value_enum, default_value = "padded")]
    pub(crate) pruned: PrunedArg,
    /// Write a run's adapters in PEFT's form, and merge nothing
    #[arg(long)]
    pub(crate) peft: bool,
    /// The type of the written weights
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: DtypeArg,
    /// Print what was written as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrunedArg {
    Padded,
    OwnConfig,
}
