//! What can go wrong in a search, and what the user can do about it.

use std::io::ErrorKind;
use std::path::PathBuf;

/// Errors that an [`Objective`](crate::Objective) may return.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that this crate reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not TOML of the documented form.
    #[error("the search space is not readable: {message}")]
    SpaceSyntax {
        /// The parser's words, with line and column.
        message: String,
    },
    /// The space is readable, but contradicts itself.
    #[error("search space, parameter `{parameter}`: {message}")]
    SpaceParameter {
        /// Name of the parameter (or a description of the `forbid` entry).
        parameter: String,
        /// What is wrong with it.
        message: String,
    },
    /// No point of the space is allowed.
    #[error("search space: {message}")]
    SpaceEmpty {
        /// What leaves nothing to search.
        message: String,
    },
    /// A set of parameters does not belong to the space.
    #[error("parameters do not fit the search space: {message}")]
    Params {
        /// What does not fit.
        message: String,
    },
    /// A setting of the study makes no sense.
    #[error("study setting `{setting}`: {message}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The folder holds a study, and nobody asked to go on with it.
    #[error("`{}` already holds a study", path.display())]
    StudyExists {
        /// The study's folder.
        path: PathBuf,
    },
    /// The folder holds no study.
    #[error("`{}` holds no study", path.display())]
    StudyMissing {
        /// The study's folder.
        path: PathBuf,
    },
    /// The study was created with something else than what is asked for now.
    #[error("the study in `{}` was created with another {what}: it has {stored}, asked for {asked}", path.display())]
    StudyDiffers {
        /// The study's folder.
        path: PathBuf,
        /// Which setting differs.
        what: String,
        /// The stored value.
        stored: String,
        /// The value asked for.
        asked: String,
    },
    /// The file is no study of ours, or one of a later version.
    #[error("`{}` is not a study that this version reads: {message}", path.display())]
    StudyForeign {
        /// The database file.
        path: PathBuf,
        /// What was found.
        message: String,
    },
    /// A row of the study cannot be understood.
    #[error("study `{}`, trial {trial}: {message}", path.display())]
    StudyDamaged {
        /// The database file.
        path: PathBuf,
        /// Number of the trial.
        trial: u64,
        /// What is wrong with its row.
        message: String,
    },
    /// The study has no such trial.
    #[error("the study has no trial {trial}")]
    TrialUnknown {
        /// The number asked for.
        trial: u64,
    },
    /// The trial already has a result.
    #[error("trial {trial} is already {state}")]
    TrialFinished {
        /// Number of the trial.
        trial: u64,
        /// Its state.
        state: &'static str,
    },
    /// What was given as a study's place cannot be one.
    #[error("`{address}` is no study: {message}")]
    Address {
        /// The address, without its password.
        address: String,
        /// What is wrong with it.
        message: String,
    },
    /// The study has no folder for its trials' files.
    #[error("the study `{study}` has no folder for its trials' files")]
    NoFolder {
        /// Where the study is.
        study: String,
    },
    /// The database refused.
    #[error("database `{}`: {source}", path.display())]
    Database {
        /// The database.
        path: PathBuf,
        /// Its own words.
        source: DatabaseError,
    },
    /// The file system refused a folder.
    #[error("cannot create `{}`: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// The objective broke down (a failed trial is no error, see [`Outcome::Failed`](crate::Outcome::Failed)).
    #[error("trial {trial} could not be evaluated: {source}")]
    Objective {
        /// Number of the trial, which was given back and will be resumed.
        trial: u64,
        /// The objective's own words.
        source: BoxError,
    },
    /// The discrepancy S(x) could not be measured.
    #[error("the discrepancy of {params} could not be measured: {source}")]
    Discrepancy {
        /// The parameters, as JSON.
        params: String,
        /// The objective's own words.
        source: BoxError,
    },
    /// The surrogate's covariance matrix is not positive definite at any jitter.
    #[error("the Gaussian process could not be fitted to {observations} observations")]
    Surrogate {
        /// Number of observations.
        observations: usize,
    },
}

/// What a database says when it refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    /// SQLite's own words.
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL's own words.
    #[cfg(feature = "postgres")]
    #[error("{}", words_of(.0))]
    Postgres(#[from] postgres::Error),
    /// A row is not what the schema says.
    #[error("{0}")]
    Row(String),
}

#[cfg(feature = "postgres")]
/// The crate's own text is "db error" or "error connecting to server"; the cause says which.
fn words_of(error: &postgres::Error) -> String {
    let mut words = match error.as_db_error() {
        Some(error) => return format!("{} ({})", error.message(), error.code().code()),
        None => error.to_string(),
    };
    if let Some(cause) = std::error::Error::source(error) {
        let cause = cause.to_string();
        if !words.contains(&cause) {
            words = format!("{words}: {cause}");
        }
    }
    words
}

impl Error {
    /// What the user can do, where there is something.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::SpaceSyntax { .. } | Self::SpaceParameter { .. } | Self::SpaceEmpty { .. } => {
                "a space is a list of [[param]] tables with name, kind (float, int, ordinal, categorical) and low/high or values"
            }
            Self::StudyExists { .. } => "go on with it by --resume, or choose another folder",
            Self::StudyMissing { .. } => "check the folder, or start a study there first",
            Self::StudyDiffers { .. } => {
                "ask for what the study was created with, or choose another folder"
            }
            Self::StudyForeign { .. } => "read it with the version of caskd that wrote it",
            Self::TrialUnknown { .. } => "ask for a trial first, or look at the study's status",
            Self::TrialFinished { .. } => "a trial's first result counts; ask for a new trial",
            Self::Objective { .. } => "mend the cause and go on with --resume",
            Self::Address { .. } => {
                "a study is a folder, sqlite:FILE, or postgres://USER@HOST/DATABASE#NAME"
            }
            Self::Setting { .. } => "`caskd search --help` says what each option takes",
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded
                ) =>
            {
                "free some space and go on with --resume"
            }
            Self::Io { .. } => "check the path and its permissions",
            Self::NoFolder { .. } => "give --out, a folder that every worker sees",
            Self::Database {
                source: DatabaseError::Sqlite(source),
                ..
            } if is_busy(source) => {
                "another process holds the study; wait for it and go on with --resume"
            }
            Self::Database {
                source: DatabaseError::Sqlite(source),
                ..
            } if is_refused(source) => {
                "check that you may read and write the file and its folder, and that the disk is not full"
            }
            #[cfg(feature = "postgres")]
            Self::Database {
                source: DatabaseError::Postgres(source),
                ..
            } => match source.as_db_error() {
                None => "check that the server runs and can be reached from here",
                Some(_) => "check the user, the password and the rights in the address",
            },
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// True where the user can mend it (exit code 2), false where it is our fault or the machine's (exit code 1).
    pub fn is_user(&self) -> bool {
        if let Self::Database {
            source: DatabaseError::Sqlite(source),
            ..
        } = self
        {
            return is_refused(source);
        }
        !matches!(
            self,
            Self::StudyDamaged { .. }
                | Self::Database {
                    source: DatabaseError::Row(_),
                    ..
                }
                | Self::Objective { .. }
                | Self::Discrepancy { .. }
                | Self::Surrogate { .. }
        )
    }
}

/// The file system refused what SQLite wanted.
fn is_refused(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            rusqlite::ErrorCode::CannotOpen
                | rusqlite::ErrorCode::ReadOnly
                | rusqlite::ErrorCode::PermissionDenied
                | rusqlite::ErrorCode::DiskFull
        )
    )
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked)
    )
}
