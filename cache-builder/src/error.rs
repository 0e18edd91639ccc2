//! The one error type of this crate.

use std::path::PathBuf;

/// What can go wrong while a cache is built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A data file can't be read.
    #[error("can't read the data file `{path}`: {source}")]
    DataFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A data file's name has an ending that is not known.
    #[error("the ending of `{path}` says nothing of what it holds")]
    DataKind {
        /// The file.
        path: PathBuf,
    },
    /// A record of a data file is not of the form it should have.
    #[error("`{path}` {unit} {number}: {problem}")]
    Record {
        /// The file.
        path: PathBuf,
        /// `line`, `row` or `record`.
        unit: &'static str,
        /// Which of them, from 1.
        number: u64,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A file that another program wrote is not what it should be.
    #[error("`{path}`{place}: {problem}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Where in it, for instance ` line 17`; may be empty.
        place: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A file is another one than when it was first read.
    #[error("`{path}` changed while it was imported")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Stopped before anything was written.
    #[error("stopped before anything was written")]
    Stopped,
    /// A data file as a whole is not what its name says.
    #[error("can't read the data file `{path}`: {message}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
        /// What to do.
        hint: String,
    },
    /// No sequence with a target is left.
    #[error(
        "the data hold no sequence to learn from ({records} records read, {bad_records} of them bad; {skipped} without a target within --max-len {max_len})"
    )]
    EmptyData {
        /// Records read.
        records: u64,
        /// Records that could not be used.
        bad_records: u64,
        /// Records dropped because truncation left no target.
        skipped: u64,
        /// The limit.
        max_len: usize,
    },
    /// The tokenizer refused a text.
    #[error("can't tokenize {source_name}: {message}")]
    Tokenizer {
        /// The record's name.
        source_name: String,
        /// What the tokenizer said.
        message: String,
    },
    /// An option doesn't fit the teacher.
    #[error("{problem}")]
    Option {
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// The teacher gave a value that is not a number, or infinite.
    #[error("not finite: the teacher's {what} of {source_name} at position {position}")]
    NotFinite {
        /// `logits` or `hidden state of layer N`.
        what: String,
        /// The record's name.
        source_name: String,
        /// The position in the sequence.
        position: usize,
    },
    /// The folder for activations refuses.
    #[error("activations can't wait in `{folder}`: {source}")]
    Spill {
        /// The folder of --spill.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A plan can't be written, or what was planned can't be read.
    #[error("the plan is damaged: {message}")]
    Plan {
        /// What does not fit.
        message: String,
    },
    /// The teacher can't be loaded or run.
    #[error(transparent)]
    Model(#[from] caskd_models::Error),
    /// The cache can't be written.
    #[error(transparent)]
    Cache(#[from] caskd_formats::Error),
    /// libtorch refused an operation.
    #[error("libtorch failed while {doing}: {source}")]
    Torch {
        /// What was being computed.
        doing: String,
        /// What libtorch said.
        source: tch::TchError,
    },
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DataFile { .. } => Some("check the path, and whether it may be read".into()),
            Self::DataKind { .. } => Some("records are .jsonl, .json or .parquet, running text is .txt or .md, .gz or .zst may stand behind it (not behind .parquet); rename the file or make a link".into()),
            Self::Record { hint, .. } | Self::Damaged { hint, .. } | Self::Foreign { hint, .. } | Self::Option { hint, .. } => Some(hint.clone()),
            Self::Changed { .. } => Some("let nobody write to it meanwhile, and run the command again".into()),
            Self::Stopped | Self::Tokenizer { .. } => None,
            Self::EmptyData { .. } => Some("give more data, or a larger --max-len".into()),
            Self::Spill { .. } => Some("give --spill a folder on a disk with room".into()),
            Self::Plan { .. } => Some("write it again, with the same caskd: `caskd build --plan --resume`".into()),
            Self::NotFinite { .. } => Some("a compute type with a wider range may help (--dtype f32); if it does not, the teacher's weights are damaged".into()),
            Self::Model(error) => error.hint(),
            Self::Cache(error) => error.hint(),
            Self::Torch { .. } => Some("out of memory? a smaller --max-len needs less, and --memory-budget reads the teacher layer by layer".into()),
        }
    }

    /// Whether the user can mend it (exit code 2) or the fault is ours (1).
    pub fn is_user(&self) -> bool {
        match self {
            Self::Model(error) => error.is_user(),
            Self::Cache(error) => error.is_user(),
            Self::Torch { .. } | Self::Tokenizer { .. } => false,
            _ => true,
        }
    }
}

/// Turns what libtorch says into this crate's error.
pub(crate) fn torch(doing: &'static str) -> impl Fn(tch::TchError) -> Error {
    move |source| Error::Torch {
        doing: doing.to_owned(),
        source,
    }
}
