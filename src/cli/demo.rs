//! The arguments of `caskd demo`.

use std::path::PathBuf;

use clap::Args;

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
