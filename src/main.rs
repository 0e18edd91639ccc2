//! `caskd`: the command line, and the one place where the crates are put together.

mod cli;
mod commands;
mod exit;
mod objective;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use exit::Outcome;

fn main() -> ExitCode {
    caskd_models::keep_freed_memory();
    let cli = Cli::parse();
    terminal::show_warnings();
    run(&cli.command)
        .unwrap_or_else(|failure| failure.report())
        .into()
}

fn run(command: &Command) -> Outcome {
    if stops_cleanly(command) {
        terminal::install_stop_handler()?;
    }
    match command {
        Command::Build(args) => commands::build::run(args),
        Command::Import(args) => commands::import::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Fidelity(args) => commands::fidelity::run(args),
        Command::Prune(args) => commands::prune::run(args),
        Command::Train(args) => commands::train::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Loss(args) => commands::loss::run(args),
        Command::ExportModel(args) => commands::export_model::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Search(args) => commands::search::run(args),
        Command::Ask(args) => commands::ask::run(args),
        Command::Tell(args) => commands::tell::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Report(args) => commands::report::run(args),
        Command::Demo(args) => commands::demo::run(args),
    }
}

/// Whether the command looks at a request to stop while it works. The others write a result in one piece at their end, so
/// the first Ctrl-C ends them.
fn stops_cleanly(command: &Command) -> bool {
    matches!(
        command,
        Command::Build(_)
            | Command::Import(_)
            | Command::Train(_)
            | Command::Export(_)
            | Command::Search(_)
            | Command::Status(_)
            | Command::Demo(_)
    )
}
