//! The arguments of searches and studies.

use std::path::PathBuf;

use clap::Args;

use super::{SamplerArg, ShardArgs};

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
    /// The student: a Hugging Face folder, a GGUF file, or org/name on the Hugging Face hub
    #[arg(long, value_name = "DIR", requires = "cache")]
    pub(crate) student: Option<PathBuf>,
    /// Any program as the objective, instead of training from a cache
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["cache", "config", "settings", "shards", "validation", "allow_low_fidelity"])]
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
    /// Trials in all [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
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
    /// The space to search: table2, or a TOML file [default: table2]
    #[arg(long, value_name = "table2|FILE.toml")]
    pub(crate) space: Option<String>,
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
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
    #[arg(long, default_value_t = 5, value_name = "N", requires = "compare", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seeds: u64,
    /// Print the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) sabo: SaboArgs,
    #[command(flatten)]
    pub(crate) ladder: LadderArgs,
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
#[command(group(clap::ArgGroup::new("stages").args(["fractions", "halving"]).multiple(true)))]
pub(crate) struct LadderArgs {
    /// Shares of the cache, ascending: all trials on the first, the best few on the next with fresh seeds
    #[arg(long, value_delimiter = ',', value_name = "F,F,…", conflicts_with_all = ["fraction", "halving"])]
    pub(crate) fractions: Vec<f64>,
    /// Trials that go on to the second share; of those, every third to the next [default: 3]
    #[arg(long, value_name = "N", requires = "stages")]
    pub(crate) promote: Option<u64>,
    /// Successive halving: all trials are paused early, the best go on from their checkpoints
    #[arg(long)]
    pub(crate) halving: bool,
    /// One of so many trials goes on, for so many times the steps
    #[arg(long, default_value_t = 3, value_name = "N", requires = "stages", value_parser = clap::value_parser!(u64).range(2..=100))]
    pub(crate) eta: u64,
    /// Stages of the halving
    #[arg(long, default_value_t = 3, value_name = "N", requires = "halving", conflicts_with = "fractions", value_parser = clap::value_parser!(u64).range(2..=10))]
    pub(crate) rungs: u64,
    /// Rank correlation below which a cheap stage is distrusted, and twice as many go on
    #[arg(
        long,
        default_value_t = 0.4,
        value_name = "RHO",
        requires = "stages",
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
    #[command(flatten)]
    pub(crate) elsewhere: ShardArgs,
    /// The student whose S(x) is measured
    #[arg(long, value_name = "DIR", requires = "cache")]
    pub(crate) student: Option<PathBuf>,
    /// Print the trial as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) sabo: SaboArgs,
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
    #[arg(
        long,
        value_name = "TEXT",
        requires = "failed",
        allow_hyphen_values = true
    )]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(seconds("90"), Ok(90.0));
        assert_eq!(seconds("1.5h"), Ok(5400.0));
        assert_eq!(seconds("2d"), Ok(172_800.0));
        for bad in ["", "h", "-1s", "nan", "1e300", "5 weeks"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
