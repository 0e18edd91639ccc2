//! The one error type of the crate.

use std::path::PathBuf;

use crate::store::SHARDS;

/// What can go wrong with a cache; every variant says where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a [`crate::CacheSpec`] contradicts the others or the format's limits.
    #[error("the cache's `{field}`: {message}")]
    InvalidSpec {
        /// Dotted name of the field.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// A sequence handed to the writer does not fit the spec, or holds a value that cannot be stored.
    #[error("sequence `{source_name}`, column {column}: {message}")]
    InvalidSequence {
        /// The sequence's `source`.
        source_name: String,
        /// Column name as in the shard.
        column: String,
        /// What is wrong with it.
        message: String,
    },
    /// An argument of a call is out of its range.
    #[error("{0}")]
    InvalidRequest(String),
    /// The folder for a new cache holds something already.
    #[error("`{}` already holds {what}", .dir.display())]
    CacheExists {
        /// The folder.
        dir: PathBuf,
        /// What was found.
        what: &'static str,
    },
    /// Another process is building in the folder.
    #[error("another process is building a cache in `{}`", .dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// The unfinished build in the folder was started with another plan.
    #[error("`{}` was begun with another plan: {field} was {found}, now {expected}", .dir.display())]
    PlanDiffers {
        /// The folder.
        dir: PathBuf,
        /// Dotted name of the first field that differs.
        field: String,
        /// Its value on disk.
        found: String,
        /// Its value now.
        expected: String,
    },
    /// `finish` was called before everything was written.
    #[error("the cache in `{}` is not complete: {missing}", .dir.display())]
    Incomplete {
        /// The folder.
        dir: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// Receipts of a planned build are missing.
    #[error("tasks {tasks} of {total} in `{}` are not done", .dir.display())]
    TasksMissing {
        /// The folder.
        dir: PathBuf,
        /// Their numbers, as `1-3, 7`.
        tasks: String,
        /// All tasks.
        total: usize,
    },
    /// The folder holds no plan that workers can take up.
    #[error("`{}` holds no finished plan", .dir.display())]
    NoWork {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds a build that was never finished.
    #[error("the cache in `{}` is unfinished", .dir.display())]
    Unfinished {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder is not a cache.
    #[error("`{}` is not a caskd cache: it has no manifest.json", .dir.display())]
    NotACache {
        /// The folder.
        dir: PathBuf,
    },
    /// The cache was written in a format version that this reader does not know.
    #[error("`{file}` has format version {found}, this caskd reads version {expected}")]
    UnknownVersion {
        /// The file.
        file: String,
        /// Version on disk.
        found: u64,
        /// Version of this reader.
        expected: u32,
    },
    /// A column is stored with a codec that this reader does not know.
    #[error("`{file}`, column {column}: codec {codec} version {version} is unknown to this caskd")]
    UnknownCodec {
        /// The file.
        file: String,
        /// The column.
        column: String,
        /// Codec name or number on disk.
        codec: String,
        /// Codec version on disk.
        version: u32,
    },
    /// A file of the cache is not there.
    #[error("`{file}` is missing{}", searched(.looked_in))]
    Missing {
        /// The file.
        file: String,
        /// Where it was looked for, where that is more than the cache's folder.
        looked_in: Vec<PathBuf>,
    },
    /// A file of the cache has not the length that the manifest tells.
    #[error("`{file}` has {found} bytes, the manifest says {expected}")]
    WrongLength {
        /// The file.
        file: String,
        /// Length on disk.
        found: u64,
        /// Length in the manifest.
        expected: u64,
    },
    /// A file of the cache was changed after it was written.
    #[error("`{file}`{} is damaged: {message}", place(.column.as_deref(), *.row))]
    Damaged {
        /// The file.
        file: String,
        /// The column, where it can be told.
        column: Option<String>,
        /// The row, where it can be told.
        row: Option<u64>,
        /// What does not match.
        message: String,
    },
    /// The cache does not hold what was asked for.
    #[error("the cache has no column {column}, it has {available}")]
    NoColumn {
        /// The column.
        column: String,
        /// What there is.
        available: String,
    },
    /// The disk is full.
    #[error("no space left while writing `{}`", .path.display())]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`: {error}", .path.display())]
    Io {
        /// Verb.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's own error.
        #[source]
        error: std::io::Error,
    },
    /// Our own encoder failed; never caused by the input.
    #[error("cannot encode shard {shard}: {message}")]
    Encode {
        /// Shard number.
        shard: usize,
        /// What the library said.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn place(column: Option<&str>, row: Option<u64>) -> String {
    let column = column.map_or_else(String::new, |column| format!(", column {column}"));
    let row = row.map_or_else(String::new, |row| format!(", row {row}"));
    column + &row
}

fn searched(folders: &[PathBuf]) -> String {
    let folders = folders
        .iter()
        .map(|folder| format!("`{}`", folder.display()));
    let list = folders.collect::<Vec<_>>().join(", ");
    if list.is_empty() {
        list
    } else {
        format!(": it was looked for in {list}")
    }
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::InvalidSpec { field, .. } if field == "top_k" => {
                "choose a smaller --top-k, at least 1"
            }
            Error::InvalidSpec { field, .. } if field == "layers" => {
                "choose among the teacher's layers with --layers"
            }
            Error::InvalidSpec { field, .. } if field == "data.sequences" => {
                "give a data file with at least one usable record"
            }
            Error::InvalidSequence { column, .. } if column.starts_with("hidden.") => {
                "the teacher's activations must be finite; where f16 is too narrow, store the layer as int8"
            }
            Error::InvalidSequence { .. } => {
                "the teacher's output must be finite: try --dtype f32, and check the weights"
            }
            Error::CacheExists {
                what: "an unfinished build",
                ..
            } => "pass --resume to complete it, or choose another folder",
            Error::CacheExists { .. } => {
                "choose a folder that does not exist yet, or remove this one first"
            }
            Error::Locked { .. } => "wait for the other build to end, or choose another folder",
            Error::PlanDiffers { .. } => {
                "resume with the arguments, data and teacher of the first run, or choose another folder"
            }
            Error::Unfinished { .. } | Error::Incomplete { .. } => {
                "complete it by running the build again with --resume"
            }
            Error::TasksMissing { .. } => {
                "run their workers again, or `caskd build --worker 0/1 --out CACHE`, which does whatever is left"
            }
            Error::NoWork { .. } => {
                "write one with `caskd build --plan`, or complete an interrupted one with --plan --resume"
            }
            Error::NotACache { .. } => "give the folder that `caskd build --out` wrote",
            Error::UnknownVersion { .. } | Error::UnknownCodec { .. } => {
                "read it with the caskd that wrote it, or a newer one"
            }
            Error::Missing { file, .. } if file.starts_with(SHARDS) => {
                "name the folder that holds it with --shards, or copy the cache again, or build it again"
            }
            Error::Missing { .. } | Error::WrongLength { .. } => {
                "the copy is incomplete: copy the cache again, or build it again"
            }
            Error::Damaged { .. } => {
                "run `caskd verify` to list all damage, then restore the file from a copy or build the cache again"
            }
            Error::NoColumn { .. } => {
                "build the cache with this column, or ask for one that it has"
            }
            Error::DiskFull { .. } => {
                "free some space, then run the same command again with --resume"
            }
            Error::Io { error, .. } if error.kind() == std::io::ErrorKind::NotFound => {
                "check the path"
            }
            Error::Io { .. } => "give a folder that you may read, and to write a cache also change",
            Error::InvalidSpec { .. } | Error::InvalidRequest(_) | Error::Encode { .. } => {
                return None;
            }
        };
        Some(hint.to_owned())
    }

    /// Whether the user can mend it (exit code 2) or it is our fault (exit code 1).
    pub fn is_user(&self) -> bool {
        !matches!(self, Error::Encode { .. } | Error::InvalidRequest(_))
    }

    pub(crate) fn damaged(file: &str, message: impl Into<String>) -> Error {
        Error::Damaged {
            file: file.to_owned(),
            column: None,
            row: None,
            message: message.into(),
        }
    }

    pub(crate) fn invalid(
        source_name: &str,
        column: impl Into<String>,
        message: impl Into<String>,
    ) -> Error {
        Error::InvalidSequence {
            source_name: source_name.to_owned(),
            column: column.into(),
            message: message.into(),
        }
    }
}
