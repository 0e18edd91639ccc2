//! The crate's one error type.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong with a model. Messages are lower-case fragments; [`Error::hint`] says what to
/// do.
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
    /// A JSON file does not parse, or has not the shape it should have.
    #[error("`{path}` is not the JSON expected here: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's answer.
        source: serde_json::Error,
    },
    /// The path is neither a model folder nor a GGUF file.
    #[error("`{path}` is neither a model folder (with `config.json`) nor a GGUF file")]
    NotAModel {
        /// The path given.
        path: PathBuf,
    },
    /// A name that is no path here, and that the Hugging Face hub or the local cache did not serve.
    #[error("`{name}` is no path here, and as a model of the Hugging Face hub: {message}")]
    Hub {
        /// `org/name`, with the revision where one was asked for.
        name: String,
        /// What is wrong.
        message: String,
        /// HTTP status, 0 when there was none.
        status: u16,
    },
    /// A model folder without weights in a form that can be read.
    #[error("`{path}` holds neither `model.safetensors` nor `model.safetensors.index.json`")]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A weight file is damaged or is no such file.
    #[error("`{path}` is damaged or no {format} file: {message}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// "safetensors" or "GGUF".
        format: &'static str,
        /// What is wrong.
        message: String,
    },
    /// An architecture (`model_type`, `general.architecture`) that is not implemented.
    #[error("`{path}` holds a model of architecture `{name}`, which is not supported")]
    UnknownArchitecture {
        /// The file that names it.
        path: PathBuf,
        /// The name in the file.
        name: String,
    },
    /// A setting of a known architecture that is not implemented, or makes no sense.
    #[error("`{path}`: `{field}` = {value} is not supported")]
    Unsupported {
        /// The file that holds it.
        path: PathBuf,
        /// Its key.
        field: String,
        /// Its value.
        value: String,
    },
    /// A setting that must be there is not.
    #[error("`{path}` has no `{field}`")]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
    },
    /// A tensor that the configuration asks for is not in the weight files.
    #[error("`{path}` holds no tensor `{name}`")]
    MissingTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name there.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("`{path}`: tensor `{name}` has shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name there.
        name: String,
        /// Shape by the configuration.
        expected: Vec<i64>,
        /// Shape in the file.
        found: Vec<i64>,
    },
    /// The tokenizer cannot be read or built.
    #[error("the tokenizer of `{path}` cannot be used: {message}")]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// An output folder exists already.
    #[error("`{path}` exists already")]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Pruning options that cannot be followed.
    #[error("cannot prune: {message}")]
    Prune {
        /// What is wrong.
        message: String,
    },
    /// A LoRA configuration or adapter file that does not fit the network.
    #[error("cannot use these LoRA adapters: {message}")]
    Lora {
        /// What is wrong.
        message: String,
    },
    /// Weights that cannot be held or trained as asked.
    #[error("cannot train this way: {message}")]
    Training {
        /// What is wrong.
        message: String,
    },
    /// libtorch refused an operation.
    #[error("libtorch could not {action}: {source}")]
    Torch {
        /// What was tried.
        action: &'static str,
        /// libtorch's answer.
        source: tch::TchError,
    },
}

impl Error {
    /// True when the user can mend it (exit code 2), false when the fault is ours (exit code 1).
    pub fn is_user(&self) -> bool {
        !matches!(self, Error::Torch { .. })
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Io { source, path, .. } if source.kind() == ErrorKind::NotFound => {
                missing_file_hint(path)
            }
            Error::Io { source, .. }
                if matches!(
                    source.kind(),
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
                ) =>
            {
                "free some space and run the command again".to_owned()
            }
            Error::Io { .. } => "check the path and its permissions".to_owned(),
            Error::NotAModel { .. } => {
                "give a folder that holds config.json, tokenizer.json and model.safetensors, or a FILE.gguf".to_owned()
            }
            Error::Hub { status: 401 | 403, .. } => {
                "gated and private models need your consent on their page and a token: set HF_TOKEN, or log in with `hf auth login`".to_owned()
            }
            Error::Hub { .. } => {
                "check the path or name; without a network, give a folder or a GGUF file, or a model that HF_HOME holds".to_owned()
            }
            Error::NoWeights { .. } => {
                "older formats (pytorch_model.bin) are not read; save the model as safetensors with transformers".to_owned()
            }
            Error::Prune { .. } => "see `caskd prune --help`, and docs/STUDENTS.md".to_owned(),
            Error::Damaged { .. } => "fetch or copy the file again and compare its size".to_owned(),
            Error::UnknownArchitecture { .. } => {
                format!("supported are: {}", crate::config::ARCHITECTURES.join(", "))
            }
            Error::MissingTensor { .. } | Error::Shape { .. } => {
                "config.json and the weight files do not belong together; fetch them again".to_owned()
            }
            Error::Json { .. } | Error::MissingField { .. } => {
                "fetch or copy the model's small files again, or save it anew with transformers".to_owned()
            }
            Error::Tokenizer { .. } => {
                "fetch or copy tokenizer.json again; older tokenizers become one by transformers' save_pretrained".to_owned()
            }
            Error::Unsupported { .. } => {
                "this model cannot be run as it is; README names architectures and files that can".to_owned()
            }
            Error::Lora { .. } | Error::Training { .. } => {
                "docs/STUDENTS.md says what trains and how; `caskd train --print-config` shows every key with a value that it takes".to_owned()
            }
            Error::Exists { .. } => "choose another output folder, or remove this one".to_owned(),
            _ => return None,
        };
        Some(hint)
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Json { path, source }
    }

    pub(crate) fn torch(action: &'static str) -> impl FnOnce(tch::TchError) -> Error {
        move |source| Error::Torch { action, source }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers build the value on the spot"
    )]
    pub(crate) fn unsupported(path: &Path, field: &str, value: impl ToString) -> Error {
        Error::Unsupported {
            path: path.to_owned(),
            field: field.to_owned(),
            value: value.to_string(),
        }
    }
}

/// What to do about a file that is not there.
fn missing_file_hint(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    match name.unwrap_or_default() {
        "tokenizer.json" => "folders with tokenizer.model alone: load them with transformers' AutoTokenizer, whose save_pretrained writes tokenizer.json".to_owned(),
        shard if Path::new(shard).extension().is_some_and(|ending| ending == "safetensors") => {
            format!("{} names it: fetch the rest of the model", crate::weights::INDEX)
        }
        _ => "check the path".to_owned(),
    }
}
