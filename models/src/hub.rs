//! Models by their name on the Hugging Face hub: the local cache first, then the hub itself. The
//! only file of this crate that touches the network.
//!
//! Where things lie is told by the variables that Hugging Face's own tools read: `HF_HUB_CACHE`,
//! `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::tokenizer::{GENERATION_CONFIG, TEMPLATE_FOLDER};
use crate::weights::{INDEX, SINGLE_FILE, shards_of_index};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Read where the model has them.
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
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
        let mut folder = Hub::get(&repo, name, CONFIG)?;
        folder.pop();
        for file in std::iter::once(TOKENIZER).chain(OPTIONAL.into_iter().filter(|file| has(file)))
        {
            Hub::get(&repo, name, file)?;
        }
        for file in info.siblings.iter().map(|known| &known.rfilename) {
            let named = file.strip_prefix(TEMPLATE_FOLDER);
            let named = named.and_then(|rest| rest.strip_prefix('/'));
            // One folder deep: a name of the hub's is no way through our folders.
            if named.is_some_and(|name| {
                name.strip_suffix(".jinja")
                    .is_some_and(|name| !name.contains('/'))
            }) {
                Hub::get(&repo, name, file)?;
            }
        }
        if has(SINGLE_FILE) {
            Hub::get(&repo, name, SINGLE_FILE)?;
        } else if has(INDEX) {
            let index = Hub::get(&repo, name, INDEX)?;
            for shard in shards_of_index(&index)? {
                Hub::get(&repo, name, &shard)?;
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
    fn get(repo: &ApiRepo, name: &HubName, file: &str) -> Result<PathBuf> {
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

/// A file's name in the cache is its digest: SHA-256 of a large file, git's SHA-1 of a small one.
fn verify(path: &Path) -> std::result::Result<(), String> {
    let blob = path.canonicalize().map_err(|e| e.to_string())?;
    let name = blob.file_name().unwrap_or_default().to_string_lossy();
    let read = |e: std::io::Error| e.to_string();
    let (what, found) = match name.len() {
        _ if !name.chars().all(|c| c.is_ascii_hexdigit()) => return Ok(()),
        64 => ("SHA-256", digest_of(Sha256::new(), &blob).map_err(read)?),
        40 => {
            let length = blob.metadata().map_err(read)?.len();
            let mut hasher = Sha1::new();
            hasher.update(format!("blob {length}\0"));
            ("git hash", digest_of(hasher, &blob).map_err(read)?)
        }
        _ => return Ok(()),
    };
    if found.eq_ignore_ascii_case(&name) {
        Ok(())
    } else {
        Err(format!("its {what} is {found}, not {name}"))
    }
}

/// The hexadecimal digest, begun in `hasher`, of a file.
fn digest_of<D: Digest>(mut hasher: D, path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hex(&hasher.finalize()))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const NAME: &str = "caskd/tiny";

    /// A hub on the loopback device: one model, whose large file carries its SHA-256 as etag.
    struct FakeHub {
        files: BTreeMap<String, Vec<u8>>,
        token: Option<&'static str>,
        /// A file that does not arrive as it is.
        corrupt: Option<&'static str>,
    }

    impl FakeHub {
        /// The files of a golden model.
        fn with(model: &str) -> FakeHub {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/golden")
                .join(model);
            let files = std::fs::read_dir(folder).unwrap().map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, std::fs::read(entry.path()).unwrap())
            });
            FakeHub {
                files: files
                    .filter(|(name, _)| !name.starts_with("golden"))
                    .collect(),
                token: None,
                corrupt: None,
            }
        }

        /// Serves until the process ends; gives its address and what was asked of it.
        fn serve(self) -> (String, Arc<Mutex<Vec<String>>>) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let asked = Arc::new(Mutex::new(Vec::new()));
            let log = Arc::clone(&asked);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    let head: Vec<String> = std::iter::from_fn(|| lines.next()?.ok())
                        .take_while(|line| !line.is_empty())
                        .collect();
                    let target = head[0].split(' ').nth(1).unwrap().to_owned();
                    stream.write_all(&self.answer(&target, &head)).unwrap();
                    log.lock().unwrap().push(target);
                }
            });
            (endpoint, asked)
        }

        fn answer(&self, target: &str, head: &[String]) -> Vec<u8> {
            let header = |key: &str| {
                head.iter().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case(key).then(|| value.to_owned())
                })
            };
            let respond = |status: &str, extra: &str, body: &[u8]| {
                let length = body.len();
                let mut bytes = format!(
                    "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{extra}\r\n"
                )
                .into_bytes();
                bytes.extend_from_slice(body);
                bytes
            };
            if let Some(token) = self.token
                && header("authorization") != Some(format!("Bearer {token}"))
            {
                return respond("401 Unauthorized", "", b"");
            }
            if target == format!("/api/models/{NAME}/revision/main") {
                let siblings: Vec<_> = self
                    .files
                    .keys()
                    .map(|name| serde_json::json!({ "rfilename": name }))
                    .collect();
                let info = serde_json::json!({ "siblings": siblings, "sha": COMMIT });
                return respond("200 OK", "", info.to_string().as_bytes());
            }
            let file = target.strip_prefix(&format!("/{NAME}/resolve/{COMMIT}/"));
            let Some(bytes) = file.and_then(|file| self.files.get(file)) else {
                return respond("404 Not Found", "", b"");
            };
            let range = header("range").unwrap();
            let (first, last) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            let first: usize = first.parse().unwrap();
            let last = last.parse().map_or(bytes.len(), |last: usize| last + 1);
            let etag = if target.ends_with(".safetensors") {
                hex(&Sha256::digest(bytes))
            } else {
                let mut whole = format!("blob {}\0", bytes.len()).into_bytes();
                whole.extend_from_slice(bytes);
                hex(&Sha1::digest(&whole))
            };
            let extra = format!(
                "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {first}-{}/{}\r\n",
                last - 1,
                bytes.len()
            );
            let mut body = bytes[first..last].to_vec();
            if file == self.corrupt && body.len() > 1 {
                let middle = body.len() / 2;
                body[middle] ^= 1;
            }
            respond("206 Partial Content", &extra, &body)
        }
    }

    fn hub(cache: &Path, endpoint: &str) -> Hub {
        Hub {
            cache: cache.to_owned(),
            endpoint: Some(endpoint.to_owned()),
            token: None,
            offline: false,
        }
    }

    fn name() -> HubName {
        HubName::parse(Path::new(NAME)).unwrap()
    }

    fn bytes_of(folder: &Path, file: &str) -> Vec<u8> {
        std::fs::read(folder.join(file)).unwrap()
    }

    #[test]
    fn names_are_told_from_paths() {
        let parse = |text: &str| HubName::parse(Path::new(text));
        assert_eq!(
            parse("Qwen/Qwen2.5-0.5B").unwrap().repository,
            "Qwen/Qwen2.5-0.5B"
        );
        let pinned = parse("org/name@v1.0").unwrap();
        assert_eq!(
            (&*pinned.repository, &*pinned.revision),
            ("org/name", "v1.0")
        );
        for path in [
            "folder",
            "/org/name",
            "./org/name",
            "../name",
            "a/b/c",
            "models/teacher.gguf",
            "org/na me",
            "org/name@",
            "org/",
            "C:\\models\\a",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn fetched_once_and_then_served_from_the_cache() {
        for model in ["mha_tied", "bf16_sharded"] {
            let cache = tempfile::tempdir().unwrap();
            let source = FakeHub::with(model);
            let files = source.files.clone();
            let (endpoint, asked) = source.serve();
            let hub = hub(cache.path(), &endpoint);
            let folder = hub.folder(&name()).unwrap();
            for (file, bytes) in &files {
                assert_eq!(&bytes_of(&folder, file), bytes, "{file}");
            }
            let requests = asked.lock().unwrap().len();
            assert!(requests > 2 * files.len(), "{requests}");
            assert_eq!(hub.folder(&name()).unwrap(), folder);
            assert_eq!(asked.lock().unwrap().len(), requests, "the cache was whole");

            // A weight file that is missing is fetched again, and only that.
            let weights = files
                .keys()
                .find(|file| file.ends_with(".safetensors"))
                .unwrap();
            std::fs::remove_file(folder.join(weights)).unwrap();
            assert_eq!(hub.folder(&name()).unwrap(), folder);
            assert_eq!(&bytes_of(&folder, weights), &files[weights]);
            let again = asked.lock().unwrap()[requests..].join(" ");
            assert!(
                again.contains(weights.as_str()) && !again.contains(TOKENIZER),
                "{again}"
            );
        }
    }

    #[test]
    fn a_made_up_cache_needs_no_hub() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--caskd--tiny");
        let snapshot = model.join("snapshots").join(COMMIT);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), COMMIT).unwrap();
        for (file, bytes) in FakeHub::with("qwen2_tied").files {
            std::fs::write(snapshot.join(file), bytes).unwrap();
        }
        let offline = Hub {
            offline: true,
            ..hub(cache.path(), "http://127.0.0.1:9")
        };
        assert_eq!(offline.folder(&name()).unwrap(), snapshot);
        let pinned = HubName {
            revision: COMMIT.to_owned(),
            ..name()
        };
        assert_eq!(offline.folder(&pinned).unwrap(), snapshot);

        std::fs::remove_file(snapshot.join(TOKENIZER)).unwrap();
        let error = offline.folder(&name()).unwrap_err();
        assert!(error.to_string().contains(TOKENIZER), "{error}");
        assert!(error.is_user() && error.hint().unwrap().contains("HF_HOME"));
    }

    #[test]
    fn what_the_hub_refuses_is_explained() {
        let cache = tempfile::tempdir().unwrap();
        let gated = FakeHub {
            token: Some("hf_secret"),
            ..FakeHub::with("mha_tied")
        };
        let (endpoint, _) = gated.serve();
        let stranger = hub(cache.path(), &endpoint);
        let error = stranger.folder(&name()).unwrap_err();
        assert!(error.to_string().contains("401"), "{error}");
        assert!(error.hint().unwrap().contains("HF_TOKEN"));
        let known = Hub {
            token: Some("hf_secret".to_owned()),
            ..stranger.clone()
        };
        known.folder(&name()).unwrap();

        let unknown = HubName {
            repository: "caskd/other".to_owned(),
            ..name()
        };
        let error = known.folder(&unknown).unwrap_err();
        assert!(error.to_string().contains("knows no such model"), "{error}");
        // Nothing listens there.
        let error = hub(cache.path(), "http://127.0.0.1:9")
            .folder(&unknown)
            .unwrap_err();
        assert!(error.to_string().contains("could not be asked"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_not_kept() {
        for (file, hash) in [(SINGLE_FILE, "SHA-256"), (CONFIG, "git hash")] {
            let cache = tempfile::tempdir().unwrap();
            let damaging = FakeHub {
                corrupt: Some(file),
                ..FakeHub::with("mha_tied")
            };
            let (endpoint, _) = damaging.serve();
            let error = hub(cache.path(), &endpoint).folder(&name()).unwrap_err();
            assert!(error.to_string().contains(hash), "{error}");
            let (endpoint, _) = FakeHub::with("mha_tied").serve();
            let folder = hub(cache.path(), &endpoint).folder(&name()).unwrap();
            assert_eq!(
                bytes_of(&folder, file),
                FakeHub::with("mha_tied").files[file]
            );
        }
    }
}
