//! The crate's one error type.

use std::io::ErrorKind;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong while training or evaluating. Messages are lower-case fragments;
/// [`Error::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("cannot {action} `{path}`: {source}")]
    Io {
        /// What was tried ("read", "write", …).
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A tensor file could not be read or written.
    #[error("cannot {action} the tensors of `{path}`: {source}")]
    Tensors {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// libtorch's answer.
        source: tch::TchError,
    },
    /// A JSON file of the run folder does not parse.
    #[error("`{path}` is not the JSON expected here: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's answer.
        source: serde_json::Error,
    },
    /// The teacher cache cannot answer.
    #[error(transparent)]
    Cache(#[from] caskd_formats::Error),
    /// The student cannot be loaded, extended or saved.
    #[error(transparent)]
    Model(#[from] caskd_models::Error),
    /// The configuration is no TOML.
    #[error("the configuration does not parse: {message}")]
    ConfigSyntax {
        /// The parser's answer, with line and column.
        message: String,
    },
    /// A key that the configuration does not have.
    #[error("unknown configuration key `{key}`")]
    UnknownKey {
        /// As it was given.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// A value that its key does not take.
    #[error("`{key}` = {value} is not possible: {message}")]
    BadValue {
        /// The key, dotted where nested.
        key: String,
        /// As it was given.
        value: String,
        /// What is wrong with it.
        message: String,
    },
    /// A kind of loss that does not exist.
    #[error("{}", if kind.is_empty() { "a loss needs a kind".to_owned() } else { format!("there is no loss `{kind}`") })]
    UnknownLoss {
        /// As it was given.
        kind: String,
        /// The kind that looks most like it.
        nearest: Option<String>,
        /// Those that exist, as a list.
        known: String,
    },
    /// A key that a kind of loss does not have.
    #[error("loss `{kind}` has no key `{key}`")]
    UnknownLossKey {
        /// The loss.
        kind: String,
        /// As it was given.
        key: String,
        /// Its key that looks most like it.
        nearest: Option<String>,
        /// The keys it has, as a list.
        known: String,
    },
    /// A value that a key of a loss does not take.
    #[error("loss `{kind}`: `{key}` = {value} is not possible: {message}")]
    BadLossValue {
        /// The loss.
        kind: String,
        /// The key.
        key: String,
        /// As it was given.
        value: String,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor that a loss is to be evaluated on.
    #[error("tensor `{tensor}` {reason}")]
    LossTensor {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// Recipe keys and `[[loss]]` entries in one configuration.
    #[error("`{key}` has no effect beside explicit [[loss]] entries")]
    RecipeBesideLosses {
        /// The first recipe key that was set.
        key: String,
    },
    /// Student and cache were made with different tokenizers.
    #[error(
        "the tokenizer of student `{student}` is not the one the cache was built with \
         (fingerprints {student_fingerprint} and {cache_fingerprint})"
    )]
    TokenizerMismatch {
        /// The student's name.
        student: String,
        /// Its tokenizer's fingerprint, shortened.
        student_fingerprint: String,
        /// The cache's, shortened.
        cache_fingerprint: String,
    },
    /// The heads differ by more than padding rows.
    #[error(
        "vocabulary mismatch: student `{student}` has {student_rows} rows in its head, the teacher \
         {cache_rows}, their tokenizer {tokens} tokens"
    )]
    VocabularyMismatch {
        /// The student's name.
        student: String,
        /// V of the student.
        student_rows: usize,
        /// V of the cached teacher.
        cache_rows: usize,
        /// Tokens of the tokenizer, added ones included.
        tokens: usize,
    },
    /// A loss asks for more than the cache holds.
    #[error("loss `{term}` cannot be answered by this {tier} cache: {reason}")]
    TierCannotAnswer {
        /// The loss.
        term: String,
        /// The cache's tier.
        tier: String,
        /// What is missing, and why it matters.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// A loss that matches tokens, with a student of another tokenizer.
    #[error("loss `{term}` matches the tokens of teacher and student, whose tokenizers differ")]
    AcrossTokenizers {
        /// The loss.
        term: String,
    },
    /// A tokenizer that is not the one of the cache's teacher.
    #[error("`{path}` does not have the tokenizer of the cache's teacher")]
    OtherTeacherTokenizer {
        /// As it was given.
        path: PathBuf,
    },
    /// A loss that compares responses of both models, and a cache without those of one.
    #[error(
        "loss `{term}` compares the responses of teacher and student, and the cache holds none by the {missing}"
    )]
    MissingResponses {
        /// The loss.
        term: String,
        /// "teacher" or "student".
        missing: &'static str,
    },
    /// What the cache gives back is too far from its teacher for a loss.
    #[error("the cache's gradient of {term} is off by {percent:.1}%, more than {limit:.0}%")]
    LowFidelity {
        /// The loss and its temperature.
        term: String,
        /// Gradient error of the cache's report.
        percent: f64,
        /// The limit.
        limit: f64,
    },
    /// Hidden layers that the cache does not hold.
    #[error("the cache holds no teacher layer {missing}; it has {present}")]
    MissingLayers {
        /// Those asked for and absent, as a list.
        missing: String,
        /// Those the cache has, as a list.
        present: String,
    },
    /// Nothing to train or evaluate on.
    #[error("no sequence to use: {reason}")]
    NoSequences {
        /// Why none is left.
        reason: String,
    },
    /// A weight of a cache that makes no sense, or a cache that was given twice.
    #[error("cache `{cache}` with weight {weight}: {message}")]
    BadWeight {
        /// The cache's folder.
        cache: PathBuf,
        /// As it was given.
        weight: f64,
        /// What is wrong.
        message: String,
    },
    /// A cached token that the student has no embedding for.
    #[error("{sequence}: token {token} is outside the vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// Where the sequence comes from ("file.jsonl:17").
        sequence: String,
        /// The token.
        token: u32,
        /// Rows both heads have.
        vocabulary: usize,
    },
    /// A text that the tokenizer refuses.
    #[error("the text cannot be tokenized: {message}")]
    Tokenizer {
        /// The tokenizer's answer.
        message: String,
    },
    /// A line of a task file that is no item of the task.
    #[error("`{path}` line {line} is no item of {task}: {message}")]
    BadItem {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The harness's name of the task.
        task: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A task file without an item.
    #[error("`{path}` holds no item")]
    NoItems {
        /// The file.
        path: PathBuf,
    },
    /// A context and continuation that cannot be scored.
    #[error("request {request} cannot be scored: {message}")]
    BadRequest {
        /// From 0.
        request: usize,
        /// What is wrong.
        message: String,
    },
    /// An item of a task that cannot be scored.
    #[error("`{path}` line {line} cannot be scored: {message}")]
    UnscorableItem {
        /// The task's file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A log-likelihood that is NaN.
    #[error("the log-likelihood of request {request} is not a number")]
    RequestNotANumber {
        /// From 0.
        request: usize,
    },
    /// What is wrong with one of several caches.
    #[error("cache `{path}`: {source}")]
    OfCache {
        /// Its folder.
        path: PathBuf,
        /// What it is.
        source: Box<Error>,
    },
    /// A model whose log-probabilities are NaN or infinite.
    #[error("the model's log-probabilities on {what} are not finite")]
    ScoreNotFinite {
        /// The text or the sequences.
        what: String,
    },
    /// The output folder exists and no resumption was asked for.
    #[error("`{path}` exists already")]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process trains in the folder.
    #[error("another process is training in `{path}`")]
    RunBusy {
        /// The folder.
        path: PathBuf,
    },
    /// A folder that is no run (any more).
    #[error("`{path}` is not a run folder: {reason}")]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A run can only be resumed with what it was started with.
    #[error("cannot resume `{path}`: {what} was {then} and is now {now}")]
    ResumeDiffers {
        /// The run folder.
        path: PathBuf,
        /// A configuration key, "student" or "cache".
        what: String,
        /// At the start of the run.
        then: String,
        /// Now.
        now: String,
    },
    /// A student that is no longer the one the run trained.
    #[error("`{path}` has changed since run `{run}` was trained on it")]
    StudentChanged {
        /// The student.
        path: PathBuf,
        /// The run.
        run: PathBuf,
    },
    /// A student that is not where the run found it.
    #[error(
        "run `{run}` has only adapters, and the student that they belong to can't be loaded: {source}"
    )]
    StudentLost {
        /// The run.
        run: PathBuf,
        /// Why.
        source: caskd_models::Error,
    },
    /// A file of a checkpoint is not what was written.
    #[error("`{path}`: {reason}")]
    DamagedCheckpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Every checkpoint of a run is damaged.
    #[error("no checkpoint of `{path}` can be read: {reason}")]
    NoCheckpoint {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// What is wrong with the newest.
        reason: String,
    },
    /// A loss or gradient left the finite numbers.
    #[error("{what} is not finite at step {step}, in {sources}")]
    NotFinite {
        /// "loss `kl`" or "the gradient of `…`".
        what: String,
        /// The step, from 1.
        step: u64,
        /// Where the sequences come from ("file.jsonl:17, …").
        sources: String,
        /// The newest checkpoint, from before it happened.
        checkpoint: Option<PathBuf>,
    },
    /// A device this build or machine does not have.
    #[error("device `{device}` is not available")]
    NoDevice {
        /// As configured.
        device: String,
    },
    /// A reading thread ended without an answer.
    #[error("a thread reading the cache ended unexpectedly")]
    ReaderLost,
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Cache(error) => error.hint(),
            Error::OfCache { source, .. } => source.hint(),
            Error::Model(error) => error.hint(),
            Error::UnknownKey { nearest: Some(key), .. } => Some(format!("did you mean `{key}`?")),
            Error::UnknownKey { .. } | Error::BadValue { .. } | Error::ConfigSyntax { .. } => {
                Some("`caskd train --print-config` shows every key with a value that it takes".to_owned())
            }
            Error::UnknownLoss { nearest, known, .. } => Some(match nearest {
                Some(kind) => format!("did you mean `{kind}`? there are {known}"),
                None => format!("there are {known}"),
            }),
            Error::UnknownLossKey { nearest, known, .. } => Some(match nearest {
                Some(key) => format!("did you mean `{key}`? it has {known}"),
                None => format!("it has {known}"),
            }),
            Error::BadLossValue { .. } => {
                Some("`caskd loss --list` shows every kind with its keys and defaults".to_owned())
            }
            Error::RecipeBesideLosses { .. } => {
                Some("remove the recipe keys, or the [[loss]] entries: one of the two decides the loss".to_owned())
            }
            Error::TokenizerMismatch { .. } => {
                Some(
                    "train a student of the teacher's tokenizer, or build a cache from a teacher of this one; or set \
                     `teacher_tokenizer` to the teacher and train with [[loss]] kind = \"uld\""
                        .to_owned(),
                )
            }
            Error::VocabularyMismatch { .. } => Some(
                "heads may differ only by padding rows: both need at least as many rows as the tokenizer has tokens"
                    .to_owned(),
            ),
            Error::TierCannotAnswer { remedy, .. } | Error::LossTensor { remedy, .. } => Some(remedy.clone()),
            Error::AcrossTokenizers { .. } => Some(
                "with `teacher_tokenizer` set, train with [[loss]] entries of kind uld and cross-entropy only".to_owned(),
            ),
            Error::OtherTeacherTokenizer { .. } => Some(
                "`teacher_tokenizer` is the folder or GGUF file that the cache was built from".to_owned(),
            ),
            Error::MissingResponses { .. } => Some(
                "build the cache from records with `response_by` set to \"student\" and others to \"teacher\""
                    .to_owned(),
            ),
            Error::LowFidelity { .. } => Some(
                "build the cache with a higher --rate or `--tier exact`, choose another loss or temperature, or pass \
                 --allow-low-fidelity"
                    .to_owned(),
            ),
            Error::MissingLayers { missing, .. } => {
                Some(format!("choose `layers` among those, or rebuild the cache with `--layers` naming {missing}"))
            }
            Error::NoSequences { .. } => Some("give more: a larger `fraction`, a cache of more data, a longer text".to_owned()),
            Error::TokenOutOfRange { .. } => Some(
                "take a model whose head has as many rows as the teacher's: padding rows that one of them lacks are among \
                 the teacher's first tokens, or tokenizer and weights do not belong together"
                    .to_owned(),
            ),
            Error::NoItems { .. } => Some("give a file with an item a line".to_owned()),
            Error::BadWeight { .. } => Some("for instance: --cache first --cache second=0.3".to_owned()),
            Error::BadItem { .. } => Some(
                "give the harness's dataset fields, or `query`, `choices` and `gold`; `caskd eval --help` shows the forms"
                    .to_owned(),
            ),
            Error::BadRequest { .. } | Error::UnscorableItem { .. } => {
                Some("leave it out, or take a model whose window and vocabulary it fits".to_owned())
            }
            Error::RequestNotANumber { .. } | Error::ScoreNotFinite { .. } => Some("the model's weights may be damaged, or overflow in this dtype".to_owned()),
            Error::OutputExists { .. } => Some("choose another folder, or continue this run with `--resume`".to_owned()),
            Error::RunBusy { .. } => Some("wait for it or stop it, or choose another folder".to_owned()),
            Error::NotARun { .. } => Some("name a folder that `caskd train` wrote".to_owned()),
            Error::ResumeDiffers { .. } => {
                Some("resume with what the run was started with, or start a new run in another folder".to_owned())
            }
            Error::StudentLost { .. } => Some("put the student back where it was when the run was made".to_owned()),
            Error::StudentChanged { .. } => Some("train again, or put the original student back".to_owned()),
            Error::NotFinite { checkpoint, step, .. } => Some(match checkpoint {
                Some(path) => format!(
                    "the last good checkpoint is `{}`; try a lower learning_rate or loss weight in a new run",
                    path.display()
                ),
                None if *step == 1 => {
                    "no weight has changed yet: look at the student with `caskd eval`, or try a lower loss weight".to_owned()
                }
                None => "no checkpoint was written before it; try a lower learning_rate or loss weight".to_owned(),
            }),
            Error::NoCheckpoint { .. } | Error::DamagedCheckpoint { .. } => Some("start the run again in another folder".to_owned()),
            Error::NoDevice { .. } => Some("set `device` to \"cpu\", or to a GPU that libtorch sees, as \"cuda:0\"".to_owned()),
            Error::Io { source, .. }
                if matches!(
                    source.kind(),
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
                ) =>
            {
                Some("free some space and continue with `--resume`".to_owned())
            }
            Error::Io { source, .. } if source.kind() == ErrorKind::InvalidData => {
                Some("texts and task files (JSON Lines) must be unpacked text in UTF-8".to_owned())
            }
            Error::Io { .. } => Some("check the path and its permissions".to_owned()),
            Error::Json { .. } => Some("the file is damaged; start the run again in another folder".to_owned()),
            Error::Tensors { action: "write", .. } => {
                Some("is the disk full? free some space and continue with `--resume`".to_owned())
            }
            _ => None,
        }
    }

    /// True where a loss or gradient left the finite numbers: the configuration diverges, nothing is
    /// broken.
    pub fn is_divergence(&self) -> bool {
        matches!(self, Error::NotFinite { .. } | Error::ScoreNotFinite { .. })
    }

    /// True where the user can mend it (exit code 2), false where it is our fault (exit code 1).
    pub fn is_user(&self) -> bool {
        match self {
            Error::Cache(error) => error.is_user(),
            Error::OfCache { source, .. } => source.is_user(),
            Error::Model(error) => error.is_user(),
            Error::ReaderLost => false,
            _ => true,
        }
    }
}
