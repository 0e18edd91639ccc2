//! The arguments of `caskd import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::data::OnErrorArg;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd import responses.jsonl --tokenizer teacher --out cache
  caskd import --from llama-cpp logits.bin --tokenizer teacher.gguf --top-k 64 --out cache
  caskd import --from distillkit data_0.parquet data_1.parquet --compression-config config.yml --tokenizer teacher --out cache
  caskd import logits.npy --tokens ids.npy --tokenizer teacher --out cache

Formats: vllm (JSONL of responses with prompt_logprobs; SGLang's and the OpenAI completions form too), axolotl (JSONL with \
target_token_ids and target_logprobs, or messages with logprobs), llama-cpp (--save-all-logits), distillkit (Parquet), numpy (.npy, .npz) and \
safetensors (logits beside input_ids). docs/IMPORT.md shows how to make each of them.

The files are read twice: once to check everything, and then to write. If the values fit the tokens better one place \
beside, the import is refused and says which --shift fits.")]
pub(crate) struct ImportArgs {
    /// The files to import, in this order
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Their format [default: found out from the first file]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) from: Option<ImportFormat>,
    /// The teacher's tokenizer; students must have the same
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub(crate) tokenizer: PathBuf,
    /// The cache's folder
    #[arg(long, value_name = "CACHE")]
    pub(crate) out: PathBuf,
    /// Entries to keep of each position [default: all that every position has; 64 of a whole vocabulary]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Cut sequences at N tokens [default: keep them whole]
    #[arg(long, value_name = "N")]
    pub(crate) max_len: Option<usize>,
    /// Only the first N sequences
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// The temperature that the values were computed at
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    pub(crate) temperature: f64,
    /// What the values are
    #[arg(long, value_enum, default_value = "auto", value_name = "KIND")]
    pub(crate) values: ValuesArg,
    /// Move the values by N positions [default: 0, refused where another fits better]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) shift: Option<i64>,
    /// Token ids of .npy logits
    #[arg(long, value_name = "FILE.npy")]
    pub(crate) tokens: Option<PathBuf>,
    /// DistillKit's compression configuration (YAML)
    #[arg(long, value_name = "FILE.yml")]
    pub(crate) compression_config: Option<PathBuf>,
    /// llama.cpp: the token that every window began with, or `recorded` [default: the tokenizer's BOS if the text begins with it]
    #[arg(long, value_name = "ID|recorded")]
    pub(crate) window_start: Option<String>,
    /// For records of messages without token ids: one of the tokenizer's chat templates by name, or a file with another one
    #[arg(long, value_name = "NAME|FILE.jinja")]
    pub(crate) chat_template: Option<PathBuf>,
    /// The date that chat templates which ask for today's are told [default: 2024-07-26]
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub(crate) chat_date: Option<chrono::NaiveDate>,
    /// What a bad record does: stop the import, or be named, counted and skipped
    #[arg(long, value_enum, default_value = "stop")]
    pub(crate) on_error: OnErrorArg,
    /// Rows of the teacher's LM head, where it has more than the tokenizer has tokens
    #[arg(long, value_name = "V")]
    pub(crate) vocab_size: Option<usize>,
    /// The teacher's name, for the cache's card
    #[arg(long, value_name = "NAME")]
    pub(crate) teacher: Option<String>,
    /// Go on with an interrupted import
    #[arg(long)]
    pub(crate) resume: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImportFormat {
    #[value(aliases = ["sglang", "openai"])]
    Vllm,
    Axolotl,
    LlamaCpp,
    Distillkit,
    Numpy,
    Safetensors,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ValuesArg {
    /// Find out
    Auto,
    /// Log-probabilities over the whole vocabulary
    Logprobs,
    /// Log-probabilities normalised over the kept tokens
    Renormalized,
    /// Logits
    Logits,
}
