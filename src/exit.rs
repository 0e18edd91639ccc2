//! Exit codes, and errors on their way to the terminal.

use std::fmt::Display;
use std::process::ExitCode;

/// What the process says to its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The work is done.
    Done = 0,
    /// Our fault: a bug, or a system that failed in a way the user can't mend.
    Ours = 1,
    /// The user can mend it: bad input, bad options, a full disk.
    User = 2,
    /// Stopped on request; the same command with `--resume` goes on.
    Stopped = 75,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with its hint and exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
}

/// The result type of every command.
pub(crate) type Outcome = Result<Exit, Failure>;

impl Failure {
    /// Something that the user can mend.
    pub(crate) fn user(message: impl Display, hint: impl Display) -> Self {
        Self {
            exit: Exit::User,
            message: message.to_string(),
            hint: Some(hint.to_string()),
        }
    }

    /// Something that only we can mend.
    pub(crate) fn ours(message: impl Display) -> Self {
        Self {
            exit: Exit::Ours,
            message: message.to_string(),
            hint: None,
        }
    }

    /// A file that can't be read or written.
    pub(crate) fn file(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let hint = match error.kind() {
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => {
                "the disk or your share of it is full: free some space and run the command again"
            }
            std::io::ErrorKind::NotFound => "check the path",
            _ => "check the path and its permissions",
        };
        Self::user(format!("can't {doing} `{}`: {error}", path.display()), hint)
    }

    /// Prints the error as the user sees it and gives the exit code.
    pub(crate) fn report(&self) -> Exit {
        eprintln!("error: {}", self.message);
        if let Some(hint) = &self.hint {
            eprintln!("hint: {hint}");
        }
        if self.exit == Exit::Ours {
            eprintln!(
                "hint: this looks like a fault of caskd; please report it with the command and this output"
            );
        }
        self.exit
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The crates' errors all answer the same two questions.
macro_rules! from_crate_error {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                let exit = if error.is_user() { Exit::User } else { Exit::Ours };
                Self { exit, message: with_causes(&error), hint: error.hint() }
            }
        }
    )*};
}

from_crate_error!(
    caskd_formats::Error,
    caskd_models::Error,
    caskd_cache_builder::Error,
    caskd_trainer::Error
);

impl From<caskd_search::Error> for Failure {
    /// What stopped a trial is often something that the user can mend; only its own error knows.
    fn from(error: caskd_search::Error) -> Self {
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            if let Some(of_trainer) = inner.downcast_ref::<caskd_trainer::Error>() {
                let exit = if of_trainer.is_user() {
                    Exit::User
                } else {
                    Exit::Ours
                };
                return Self {
                    exit,
                    message: with_causes(&error),
                    hint: of_trainer.hint(),
                };
            }
            if let Some(of_ours) = inner.downcast_ref::<Failure>() {
                return Self {
                    exit: of_ours.exit,
                    message: with_causes(&error),
                    hint: of_ours.hint.clone(),
                };
            }
            cause = inner.source();
        }
        let exit = if error.is_user() {
            Exit::User
        } else {
            Exit::Ours
        };
        Self {
            exit,
            message: with_causes(&error),
            hint: error.hint(),
        }
    }
}

/// The message followed by those causes that it does not already quote.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    message
}
