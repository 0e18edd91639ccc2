//! The arguments of the commands on students: train, eval, loss.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{DtypeArg, ShardArgs, SplitArg};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd train --cache cache --student student --out run --set kd_type=dual-scaling --set scaling_value=4
  caskd train --cache cache --student student --out run --set soft_weight=0      (plain LoRA fine-tuning)
  caskd train --cache cache --student student --out run --config study/best.toml
  caskd train --cache prose --cache dialogues=0.3 --student student --out run --tensorboard board

The keys of the configuration and their defaults: caskd train --print-config")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
pub(crate) struct TrainArgs {
    /// The teacher's cache; may be repeated, with a weight: how many times an epoch goes through it
    #[arg(
        long,
        value_name = "CACHE[=WEIGHT]",
        required_unless_present = "print_config"
    )]
    pub(crate) cache: Vec<PathBuf>,
    /// The student: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
    #[arg(long, value_name = "DIR", required_unless_present = "print_config")]
    pub(crate) student: Option<PathBuf>,
    /// The run's folder: adapters, checkpoints, log
    #[arg(long, value_name = "RUN", required_unless_present = "print_config")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// Settings as TOML
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// One setting; may be repeated, and wins over --config
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Share of the sequences to train on, by a stable hash of their tokens (the key `fraction`)
    #[arg(long, value_name = "SHARE")]
    pub(crate) fraction: Option<f64>,
    /// How the cache is read: mmap, or read for network file systems (the key `io`)
    #[arg(long, value_name = "mmap|read")]
    pub(crate) io: Option<String>,
    /// Write TensorBoard's event files into this folder (the key `tensorboard`)
    #[arg(long, value_name = "DIR")]
    pub(crate) tensorboard: Option<PathBuf>,
    /// Go on with an interrupted run
    #[arg(long)]
    pub(crate) resume: bool,
    /// Train even where the cache's gradient of a loss is off by more than 10%
    #[arg(long)]
    pub(crate) allow_low_fidelity: bool,
    /// Print every key of the configuration with its value and what it does, and exit
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

Tasks: openbookqa, hellaswag, winogrande, piqa, arc_easy, arc_challenge, boolq, qnli, qqp, sst2, lambada, wikitext. A line \
of a task's file has the fields of its dataset as lm-evaluation-harness loads it, or is prepared: query, choices, gold; \
or contexts, continuation, gold; or context, continuation; a page for wikitext. Scores are the harness's.")]
pub(crate) struct EvalArgs {
    /// A Hugging Face folder, a GGUF file, org/name on the Hugging Face hub, or a run of `caskd train`
    #[arg(long, value_name = "DIR|FILE.gguf|RUN")]
    pub(crate) model: PathBuf,
    /// Text for perplexity; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Vec<PathBuf>,
    /// A teacher's cache for KL to the teacher and perplexity on its targets [default for a run without --text: its own cache]
    #[arg(long, value_name = "CACHE")]
    pub(crate) cache: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// Which sequences of a cache [default: validation where it was built with one, else all]
    #[arg(long, value_enum)]
    pub(crate) split: Option<SplitArg>,
    /// A task and its items; may be repeated. NAME= may be left out where the file is called NAME.jsonl
    #[arg(long, value_name = "NAME=FILE.jsonl")]
    pub(crate) task: Vec<String>,
    /// Write one line for each task item: log-likelihoods of its choices, gold, prediction
    #[arg(long, value_name = "OUT.jsonl")]
    pub(crate) per_item: Option<PathBuf>,
    /// Only the first N items of each task
    #[arg(long, value_name = "N", requires = "task")]
    pub(crate) limit: Option<NonZeroUsize>,
    /// Window of a text in tokens [default: 512; for wikitext the model's own, as in lm-evaluation-harness]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_len: Option<usize>,
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
labels; of_student [B,T] for distillm-2 (1 where the student wrote the response); teacher_hidden and student_hidden \
[B,T,D] for losses on hidden states, with projection [D_t,D_s] where projection=learned; mask [B,T] on demand. Output tensors: \
value [B,T] and grad, the derivative of the mean of value with respect to the student, in f64 when an input is f64.")]
pub(crate) struct LossArgs {
    /// Which loss, as `kind` of a loss entry names it
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
