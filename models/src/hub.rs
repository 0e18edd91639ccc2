//! Models by their name on the Hugging Face hub: the local cache first, then the hub itself. The
//! only file of this crate that touches the network.
//!
//! Where things lie is told by the variables that Hugging Face's own tools read: `HF_HUB_CACHE`,
//! `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.

use std::borrow::Cow;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use crate::weights::{INDEX, SINGLE_FILE, shards_of_index};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Read where the model has them.
const OPTIONAL: [&str; 3] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const MAIN: &str = "main";

/// A path, or where the files of the model lie that the hub knows by this name: a path that is
/// there stays as it is, `org/name` and `org/name@revision` are looked up.
///
/// # Errors
/// The hub cannot be reached, does not know the name or does not give it to us, a file that
/// arrives is not the one it should be.
pub(crate) fn locate(path: &Path) -> Result<Cow<'_, Path>> {
    match HubName::parse(path).filter(|_| !path.exists()) {
        Some(name) => Hub::from_env().folder(&name).map(Cow::Owned),
        None => Ok(Cow::Borrowed(path)),
    }
}

/// The model's name where the path is one that [`locate`] looks up.
pub(crate) fn model_name(path: &Path) -> Option<String> {
    let name = HubName::parse(path).filter(|_| !path.exists())?;
    Some(name.repository)
}

/// `org/name`, with a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HubName {
    repository: String,
    revision: String,
}

impl HubName {
    /// `None` for what cannot be a name on the hub.
    fn parse(path: &Path) -> Option<HubName> {
        let text = path.to_str()?;
        let parts: Vec<Component<'_>> = path.components().collect();
        let &[Component::Normal(_), Component::Normal(_)] = parts.as_slice() else {
            return None;
        };
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (organisation, model) = repository.split_once('/')?;
        let plain = |word: &str| {
            !word.is_empty()
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let file = [".gguf", ".safetensors", ".json"]
            .iter()
            .any(|ending| model.to_ascii_lowercase().ends_with(ending));
        (plain(organisation) && plain(model) && plain(revision) && !file).then(|| HubName {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
        })
    }

    fn repo(&self, revision: &str) -> Repo {
        let model = RepoType::Model;
        Repo::with_revision(self.repository.clone(), model, revision.to_owned())
    }
}

/// Where the cache and the hub are.
#[derive(Debug, Clone)]
struct Hub {
    cache: PathBuf,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    fn from_env() -> Hub {
        let text = |key: &str| std::env::var(key).ok().filter(|value| !value.is_empty());
        let folder = |key: &str| text(key).map(PathBuf::from);
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|base| base.join("huggingface")))
            .or_else(|| folder("HOME").map(|base| base.join(".cache/huggingface")))
            .unwrap_or_else(|| PathBuf::from(".huggingface"));
        let token_path = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let stored = || std::fs::read_to_string(token_path).ok();
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(stored)
            .map(|token| token.trim().to_owned());
        Hub {
            cache: folder("HF_HUB_CACHE")
                .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            token: token.filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE").is_some_and(|value| {
                !matches!(value.to_lowercase().as_str(), "0" | "false" | "no")
            }),
        }
    }

    /// The folder of a model's files: from the cache when it is whole there, else from the hub.
    fn folder(&self, name: &HubName) -> Result<PathBuf> {
        let cached = self.cached(name);
        if let Some(folder) = cached.as_ref().filter(|folder| missing(folder).is_none()) {
            return Ok(folder.clone());
        }
        if self.offline {
            let what = match cached.as_deref().and_then(missing) {
                Some(file) => format!("its copy in `{}` has no `{file}`", self.cache.display()),
                None => format!("`{}` has no copy of it", self.cache.display()),
            };
            return Err(refuse(
                name,
                format!("{what}, and HF_HUB_OFFLINE is set"),
                0,
            ));
        }
        self.fetch(name)
    }

    /// The snapshot that the cache has under this revision, a branch or a commit.
    fn cached(&self, name: &HubName) -> Option<PathBuf> {
        let model = self.cache.join(name.repo(MAIN).folder_name());
        let commit = std::fs::read_to_string(model.join("refs").join(&name.revision));
        let commit = commit.map_or_else(|_| name.revision.clone(), |text| text.trim().to_owned());
        let snapshot = model.join("snapshots").join(commit);
        snapshot.is_dir().then_some(snapshot)
    }

    fn fetch(&self, name: &HubName) -> Result<PathBuf> {
        let failed = |e: ApiError| explain(name, &e);
        let mut builder = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_token(self.token.clone())
            .with_progress(std::io::stderr().is_terminal())
            .with_retries(3);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api: Api = builder.build().map_err(failed)?;
        let info = api.repo(name.repo(&name.revision)).info().map_err(failed)?;
        // All files of one commit, whatever happens to the branch meanwhile.
        let repo = api.repo(name.repo(&info.sha));
        let has = |file: &str| info.siblings.iter().any(|known| known.rfilename == file);
        for file in [CONFIG, TOKENIZER] {
            if !has(file) {
                return Err(refuse(name, format!("it has no `{file}`"), 0));
            }
        }
        let mut folder = self.get(&repo, name, CONFIG)?;
        folder.pop();
        for file in std::iter::once(TOKENIZER).chain(OPTIONAL.into_iter().filter(|file| has(file)))
        {
            self.get(&repo, name, file)?;
        }
        if has(SINGLE_FILE) {
            self.get(&repo, name, SINGLE_FILE)?;
        } else if has(INDEX) {
            let index = self.get(&repo, name, INDEX)?;
            for shard in shards_of_index(&index)? {
                self.get(&repo, name, &shard)?;
            }
        } else {
            return Err(Error::NoWeights {
                path: PathBuf::from(&name.repository),
            });
        }
        // Only now does the cache say that this is what the revision means.
        let reference = Cache::new(self.cache.clone()).repo(name.repo(&name.revision));
        let write = reference.create_ref(&info.sha);
        write.map_err(Error::io("write", &self.cache))?;
        Ok(folder)
    }

    /// One file, in the cache.
    fn get(&self, repo: &ApiRepo, name: &HubName, file: &str) -> Result<PathBuf> {
        let path = repo.get(file).map_err(|e| explain(name, &e))?;
        match verify(&path) {
            Ok(()) => Ok(path),
            Err(problem) => {
                // Neither the file nor its name in the snapshot may serve anyone.
                if let Ok(blob) = path.canonicalize() {
                    let _ = std::fs::remove_file(blob);
                }
                let _ = std::fs::remove_file(&path);
                Err(refuse(
                    name,
                    format!("`{file}` arrived damaged: {problem}"),
                    0,
                ))
            }
        }
    }
}

/// The first file that a folder lacks.
fn missing(folder: &Path) -> Option<String> {
    for file in [CONFIG, TOKENIZER] {
        if !folder.join(file).is_file() {
            return Some(file.to_owned());
        }
    }
    if folder.join(SINGLE_FILE).is_file() {
        return None;
    }
    match shards_of_index(&folder.join(INDEX)) {
        Ok(shards) => shards
            .into_iter()
            .find(|shard| !folder.join(shard).is_file()),
        Err(_) => Some(SINGLE_FILE.to_owned()),
    }
}

/// Large files carry their SHA-256 as their name in the cache; others are read as JSON later.
fn verify(path: &Path) -> std::result::Result<(), String> {
    let blob = path.canonicalize().map_err(|e| e.to_string())?;
    let name = blob
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    if name.len() != 64 || !name.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(());
    }
    let mut hasher = Sha256::new();
    File::open(&blob)
        .and_then(|mut file| std::io::copy(&mut file, &mut hasher))
        .map_err(|e| e.to_string())?;
    let found: String = hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if found.eq_ignore_ascii_case(&name) {
        Ok(())
    } else {
        Err(format!("its SHA-256 is {found}, not {name}"))
    }
}

fn explain(name: &HubName, error: &ApiError) -> Error {
    let status = match error {
        ApiError::RequestError(request) => match request.as_ref() {
            ureq::Error::StatusCode(status) => *status,
            _ => 0,
        },
        _ => 0,
    };
    let message = match status {
        401 | 403 => format!("the hub does not give it to us (status {status})"),
        404 => "the hub knows no such model".to_owned(),
        _ => format!("the hub could not be asked for it: {error}"),
    };
    refuse(name, message, status)
}

fn refuse(name: &HubName, message: String, status: u16) -> Error {
    let mut shown = name.repository.clone();
    if name.revision != MAIN {
        shown = format!("{shown}@{}", name.revision);
    }
    Error::Hub {
        name: shown,
        message,
        status,
    }
}
