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
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
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
  caskd search --cache cache --student student --out study --fractions 0.05,0.2,1 --promote 4
  caskd search --cache cache --student student --out study --compare sabo,gp,random --seeds 5
  caskd search --command 'python objective.py {params.json}' --out study --space space.toml
  caskd search --out study --resume
  caskd search --worker --study postgres://me@host/db#study --out /shared/study

Without --space the space is BayesKD's Table 2 (25,920 points). A trial trains the student on the given fraction of \
the cache and is judged by its perplexity on validation sequences that no trial trains on.

With --command a trial is a program, run by sh: {params.json} is the path of a file with the parameters, {params} the \
same as text, {trial}, {seed}, {fraction}, {budget} and {dir} what they say; the environment has them too \
(CASKD_PARAM_NAME, CASKD_TRIAL …). The last line of its output is the value: a number, or JSON with \"value\". An \
exit code other than 0 is a failed trial.")]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct SearchArgs {
    /// The teacher's cache
    #[arg(long, value_name = "CACHE", requires = "student")]
    pub(crate) cache: Option<PathBuf>,
    /// The student: a Hugging Face folder or a GGUF file
    #[arg(long, value_name = "DIR", requires = "cache")]
    pub(crate) student: Option<PathBuf>,
    /// Any program as the objective, instead of training from a cache
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["cache", "config", "settings"])]
    pub(crate) command: Option<String>,
    /// How long the program may take; a trial that takes longer has failed
    #[arg(long, value_name = "TIME", value_parser = seconds, requires = "command")]
    pub(crate) timeout: Option<f64>,
    /// The study's folder: the database unless --study names another, and the trials' files
    #[arg(long, value_name = "DIR", required_unless_present = "study")]
    pub(crate) out: Option<PathBuf>,
    /// Where the study is kept: a folder, sqlite:FILE, or postgres://USER@HOST/DATABASE#NAME [default: --out]
    #[arg(long, value_name = "STUDY")]
    pub(crate) study: Option<String>,
    /// sabo: Bayesian search with LAEI. gp: expected improvement alone. tpe, sobol, random: as in the books [default: sabo]
    #[arg(long, value_enum)]
    pub(crate) sampler: Option<SamplerArg>,
    #[command(flatten)]
    pub(crate) sabo: SaboArgs,
    /// Trials in all [default: 30]
    #[arg(long, value_name = "N")]
    pub(crate) trials: Option<u64>,
    /// Large values are good [default: small ones]
    #[arg(long)]
    pub(crate) maximize: bool,
    /// Share of the cache that a trial trains on; the same sequences for everyone [default: 0.05]
    #[arg(long)]
    pub(crate) fraction: Option<f64>,
    /// Share of the cache that judges the trials; no trial trains on it [default: 0.1]
    #[arg(long)]
    pub(crate) validation: Option<f64>,
    #[command(flatten)]
    pub(crate) ladder: LadderArgs,
    /// The space to search: table2, or a TOML file [default: table2]
    #[arg(long, value_name = "table2|FILE.toml")]
    pub(crate) space: Option<String>,
    /// Settings of every trial, as TOML
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// One setting of every trial; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Seed of the study [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// How long a silent worker keeps its trial; living ones say so by themselves [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub(crate) lease: Option<f64>,
    /// Go on with a study as it was begun; add trials to a finished one with --trials
    #[arg(long)]
    pub(crate) resume: bool,
    /// Train even where the cache's gradient of a loss is off by more than 10%
    #[arg(long)]
    pub(crate) allow_low_fidelity: bool,
    /// Join a study that somebody else began, from any process or machine; all settings are the study's
    #[arg(long, conflicts_with_all = ["resume", "compare", "sampler", "seed", "space", "fraction", "validation"])]
    pub(crate) worker: bool,
    /// Run these samplers side by side, each in studies of its own, and test whether they differ
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "SAMPLER,…",
        conflicts_with = "sampler"
    )]
    pub(crate) compare: Vec<SamplerArg>,
    /// Studies per sampler of a comparison, with the seeds --seed, --seed + 1, …
    #[arg(long, default_value_t = 5, value_name = "N", requires = "compare")]
    pub(crate) seeds: u64,
    /// Print the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of the sampler `sabo`; see `docs/SEARCH.md`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of sabo")]
pub(crate) struct SaboArgs {
    /// LAEI to the letter of BayesKD's Eqs. 10-12: constant weight, raw S(x)
    #[arg(long, conflicts_with_all = ["decay", "inverted"])]
    pub(crate) laei: bool,
    /// Weight of S(x) (α of Eq. 10)
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) alpha: Option<f64>,
    /// Weight of the logits' discrepancy (λ1 of Eq. 12)
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) lambda1: Option<f64>,
    /// Weight of the hidden states' discrepancy (λ2 of Eq. 12)
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) lambda2: Option<f64>,
    /// Least improvement that counts (ξ of Eq. 11)
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) xi: Option<f64>,
    /// Trials after which the weight of S(x) has halved; 0 keeps it constant
    #[arg(long, value_name = "TRIALS")]
    pub(crate) decay: Option<f64>,
    /// Prefer a small S(x) instead of a large one
    #[arg(long)]
    pub(crate) inverted: bool,
}

/// Cheap trials first, the best few on more.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cheap trials first")]
pub(crate) struct LadderArgs {
    /// Shares of the cache, ascending: all trials on the first, the best few on the next with fresh seeds
    #[arg(long, value_delimiter = ',', value_name = "F,F,…", conflicts_with_all = ["fraction", "halving"])]
    pub(crate) fractions: Vec<f64>,
    /// Trials that go on to the second share; of those, every third to the next [default: 3]
    #[arg(long, value_name = "N")]
    pub(crate) promote: Option<u64>,
    /// Successive halving: all trials are paused early, the best go on from their checkpoints
    #[arg(long)]
    pub(crate) halving: bool,
    /// One of so many trials goes on, for so many times the steps
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=100))]
    pub(crate) eta: u64,
    /// Stages of the halving
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=10))]
    pub(crate) rungs: u64,
    /// Rank correlation below which a cheap stage is distrusted, and twice as many go on
    #[arg(
        long,
        default_value_t = 0.4,
        value_name = "RHO",
        allow_hyphen_values = true
    )]
    pub(crate) trust: f64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd ask study --space table2 --sampler sabo --seed 1 --json
  caskd ask study --json                              (the next trial; several may be open at once)
  caskd tell study 12 --value 21.7
  caskd ask postgres://me@host/db#mine --space space.toml --maximize --json

A study that is not there yet is created; one that is keeps what it was created with.")]
pub(crate) struct AskArgs {
    /// The study: a folder, a .sqlite or .db file, sqlite:FILE, or postgres://USER@HOST/DATABASE#NAME
    #[arg(value_name = "STUDY")]
    pub(crate) study: String,
    /// The space to search: table2, or a TOML file [default: table2]
    #[arg(long, value_name = "table2|FILE.toml")]
    pub(crate) space: Option<String>,
    /// How trials are chosen [default: sabo]
    #[arg(long, value_enum)]
    pub(crate) sampler: Option<SamplerArg>,
    #[command(flatten)]
    pub(crate) sabo: SaboArgs,
    /// Seed of the study [default: 0]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Large values are good [default: small ones]
    #[arg(long)]
    pub(crate) maximize: bool,
    /// Trials of a space-filling start before the first model [default: 5]
    #[arg(long, value_name = "N")]
    pub(crate) startup: Option<u64>,
    /// How long you may take; after that the trial is handed out again
    #[arg(long, default_value = "24h", value_name = "TIME", value_parser = seconds)]
    pub(crate) lease: f64,
    /// A teacher's cache on which sabo measures S(x)
    #[arg(long, value_name = "CACHE", requires = "student")]
    pub(crate) cache: Option<PathBuf>,
    /// The student whose S(x) is measured
    #[arg(long, value_name = "DIR", requires = "cache")]
    pub(crate) student: Option<PathBuf>,
    /// Print the trial as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd tell study 12 --value 21.7
  caskd tell study 13 --failed --reason 'out of memory'")]
#[command(group(clap::ArgGroup::new("result").required(true).args(["value", "failed"])))]
pub(crate) struct TellArgs {
    /// The study, as for ask
    #[arg(value_name = "STUDY")]
    pub(crate) study: String,
    /// The trial's number, as ask gave it
    #[arg(value_name = "TRIAL")]
    pub(crate) trial: u64,
    /// The trial's value
    #[arg(long, value_name = "VALUE", allow_hyphen_values = true)]
    pub(crate) value: Option<f64>,
    /// The configuration did not work
    #[arg(long)]
    pub(crate) failed: bool,
    /// Why it did not work
    #[arg(long, value_name = "TEXT", requires = "failed")]
    pub(crate) reason: Option<String>,
    /// The token that ask gave: a result that comes after the trial went to somebody else is kept apart
    #[arg(long, value_name = "TOKEN")]
    pub(crate) token: Option<u64>,
    /// How long the evaluation took, for the report
    #[arg(long, value_name = "TIME", value_parser = seconds, default_value = "0")]
    pub(crate) seconds: f64,
    /// Print what was recorded as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  caskd status study
  caskd status postgres://me@host/db#study --watch")]
pub(crate) struct StatusArgs {
    /// The study, as for ask
    #[arg(value_name = "STUDY")]
    pub(crate) study: String,
    /// Look again every two seconds until the study is complete
    #[arg(long)]
    pub(crate) watch: bool,
    /// Print the state as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  caskd report study run-kd run-bayeskd --out report.html")]
pub(crate) struct ReportArgs {
    /// Studies and comparisons of `caskd search`, studies of `caskd ask`, runs of `caskd train`
    #[arg(required = true, value_name = "STUDY|RUN")]
    pub(crate) inputs: Vec<String>,
    /// The page to write: one file, no network needed
    #[arg(long, value_name = "FILE.html")]
    pub(crate) out: PathBuf,
    /// Print what was written as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `90`, `90s`, `30m`, `24h`, `7d` → seconds.
fn seconds(text: &str) -> Result<f64, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1.0),
        Some((at, 'm')) => (&text[..at], 60.0),
        Some((at, 'h')) => (&text[..at], 3600.0),
        Some((at, 'd')) => (&text[..at], 86_400.0),
        _ => (text, 1.0),
    };
    number
        .parse::<f64>()
        .ok()
        .map(|number| number * unit)
        .filter(|seconds| (0.0..1e12).contains(seconds))
        .ok_or_else(|| "a time is a number with s, m, h or d, such as 90s or 24h".to_owned())
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
    fn times_have_units() {
        assert_eq!(seconds("90"), Ok(90.0));
        assert_eq!(seconds("1.5h"), Ok(5400.0));
        assert_eq!(seconds("2d"), Ok(172_800.0));
        for bad in ["", "h", "-1s", "nan", "1e300", "5 weeks"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

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
