//! The one seam between a cache and what holds its files. Everything else names files relative to the cache's folder.
//!
//! [`Local`] is a folder of a disk, [`Spread`] one with further folders of shards, [`Memory`] a map for tests and fuzzing;
//! an object store would be another. What a cache asks of its storage is little: files appear whole or not at all and never change, the first writer of a name
//! wins, and one builder at a time holds the lock.

mod local;
mod memory;
mod spread;

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use local::Local;
pub use memory::Memory;
pub use spread::Spread;

use crate::cache::Io;
use crate::error::{Error, Result};
use crate::source::Source;

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const PLAN: &str = "plan.json";
pub(crate) const LOCK: &str = ".lock";
pub(crate) const SHARDS: &str = "shards";
pub(crate) const TASKS: &str = "tasks";
pub(crate) const RECEIPTS: &str = "receipts";

/// Begins the names of unfinished files.
const TEMPORARY: &str = ".tmp-";

/// What holds the files of one cache. Names are relative, with `/` between folder and file; `""` is the cache itself.
pub trait Storage: Debug + Send + Sync {
    /// What messages call it.
    fn root(&self) -> &Path;

    /// Where a file lies, or would lie: for messages.
    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Folders beside the cache's own in which shards are looked for.
    fn further(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Length of a file in bytes; `None` if there is none.
    fn length(&self, name: &str) -> Result<Option<u64>>;

    /// A file for reading any ranges of it, or `None`; mapped into memory where `io` asks for it and it can be.
    fn open(&self, name: &str, io: Io) -> Result<Option<Source>>;

    /// Names in a folder, sorted; empty if there is none.
    fn list(&self, folder: &str) -> Result<Vec<String>>;

    /// Makes a folder, durably, where folders exist.
    fn create_folder(&self, folder: &str) -> Result<()>;

    /// Puts a file under its name: whole, durably, or not at all, and only if no file has the name.
    ///
    /// # Errors
    /// [`Error::CacheExists`] where the name is taken, [`Error::DiskFull`].
    fn publish(&self, name: &str, parts: &[&[u8]]) -> Result<()>;

    /// Removes a file if it is there.
    fn remove(&self, name: &str) -> Result<()>;

    /// Makes the names in a folder durable.
    fn sync(&self, folder: &str) -> Result<()>;

    /// Locks the cache for one builder, until the guard is dropped or its process ends, however it ends.
    ///
    /// # Errors
    /// [`Error::Locked`] where another builder has it.
    fn lock(&self) -> Result<Box<dyn Guard>>;

    /// Locks the cache for one of many workers: they share it, and keep a single builder out.
    ///
    /// # Errors
    /// [`Error::Locked`] where a single builder has it.
    fn share(&self) -> Result<Box<dyn Guard>>;

    /// Removes a folder with all files in it, if it is there.
    fn remove_folder(&self, folder: &str) -> Result<()>;
}

/// Holds a lock.
pub trait Guard: Debug + Send + Sync {}

/// A cache's storage, with what every kind of storage has in common.
#[derive(Clone, Debug)]
pub(crate) struct Store(Arc<dyn Storage>);

impl Store {
    pub(crate) fn local(root: &Path) -> Store {
        Store(Arc::new(Local::new(root)))
    }

    pub(crate) fn new(storage: Arc<dyn Storage>) -> Store {
        Store(storage)
    }

    /// A small file as a whole; `None` if there is none.
    pub(crate) fn read_small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(source) = self.0.open(name, Io::Read)? else {
            return Ok(None);
        };
        let length = source.len();
        if length > limit {
            return Err(Error::damaged(
                name,
                format!("{length} bytes are more than any caskd writes"),
            ));
        }
        let bytes = source.range(0, length as usize);
        let bytes = bytes.map_err(|error| fault("read", &self.path(name), error))?;
        Ok(Some(bytes.to_vec()))
    }

    /// A published file, whose length must be the expected one.
    pub(crate) fn open(&self, name: &str, expected: u64, io: Io) -> Result<Source> {
        match self.0.open(name, io)? {
            Some(source) if source.len() == expected => Ok(source),
            Some(source) => Err(self.wrong_length(name, source.len(), expected)),
            None => Err(self.missing(name)),
        }
    }

    /// blake3 of a file, hexadecimal; reads in pieces, so a file that shrinks meanwhile is no signal.
    pub(crate) fn digest(&self, name: &str) -> Result<String> {
        let Some(source) = self.0.open(name, Io::Read)? else {
            return Err(self.missing(name));
        };
        let mut hasher = blake3::Hasher::new();
        let mut buffer = Vec::new();
        let mut start = 0;
        while start < source.len() {
            let length = (source.len() - start).min(1 << 20) as usize;
            let (bytes, _) = source
                .view(start, length, &mut buffer)
                .map_err(|error| fault("read", &self.path(name), error))?;
            hasher.update(bytes);
            start += length as u64;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Whether a published file is there and has its length.
    pub(crate) fn check(&self, name: &str, expected: u64) -> Result<()> {
        match self.0.length(name)? {
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(self.wrong_length(name, found, expected)),
            None => Err(self.missing(name)),
        }
    }

    /// What errors call a file: its name, or where it lies apart from the cache.
    pub(crate) fn called(&self, name: &str) -> String {
        let path = self.0.path(name);
        if path.starts_with(self.0.root()) {
            name.to_owned()
        } else {
            path.display().to_string()
        }
    }

    fn missing(&self, name: &str) -> Error {
        let mut looked_in = self.0.further();
        if split(name).0 != SHARDS {
            looked_in.clear();
        } else if !looked_in.is_empty() {
            looked_in.insert(0, self.0.root().join(SHARDS));
        }
        Error::Missing {
            file: name.to_owned(),
            looked_in,
        }
    }

    fn wrong_length(&self, name: &str, found: u64, expected: u64) -> Error {
        Error::WrongLength {
            file: self.called(name),
            found,
            expected,
        }
    }
}

impl std::ops::Deref for Store {
    type Target = dyn Storage;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

/// Whether a name is one that unfinished files have.
pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY)
}

/// Folder and file of a name.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

fn is_taken(path: PathBuf) -> Error {
    Error::CacheExists {
        dir: path,
        what: "another published file",
    }
}

fn fault(action: &'static str, path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::DiskFull {
                path: path.to_owned(),
            }
        }
        _ => Error::Io {
            action,
            path: path.to_owned(),
            error,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What every storage must do.
    fn conforms(storage: &dyn Storage) {
        assert_eq!(storage.length("a").unwrap(), None);
        assert!(storage.open("a", Io::Mmap).unwrap().is_none());
        assert_eq!(storage.list("shards").unwrap(), Vec::<String>::new());
        storage.create_folder("").unwrap();
        storage.create_folder("shards").unwrap();
        storage.create_folder("shards").unwrap();
        storage.publish("shards/b", &[b"one", b"", b"two"]).unwrap();
        storage.publish("shards/a", &[]).unwrap();
        storage.publish("c", &[b"x"]).unwrap();
        assert_eq!(storage.list("shards").unwrap(), ["a", "b"]);
        assert!(storage.list("").unwrap().contains(&"c".to_owned()));
        assert_eq!(storage.length("shards/b").unwrap(), Some(6));
        assert_eq!(storage.length("shards/a").unwrap(), Some(0));
        assert_eq!(storage.length("shards").unwrap(), None);

        let taken = storage.publish("shards/b", &[b"other"]).unwrap_err();
        assert!(matches!(taken, Error::CacheExists { .. }), "{taken:?}");
        for io in [Io::Mmap, Io::Read] {
            let source = storage.open("shards/b", io).unwrap().unwrap();
            assert_eq!(source.range(2, 3).unwrap(), "etw");
            assert_eq!(source.range(6, 0).unwrap(), "");
            assert!(source.range(6, 1).is_err() && source.range(u64::MAX, 2).is_err());
            // What is open stays readable.
            if io == Io::Read {
                storage.remove("shards/b").unwrap();
                assert_eq!(source.range(0, 6).unwrap(), "onetwo");
            }
        }
        assert_eq!(storage.list("shards").unwrap(), ["a"]);
        storage.remove("shards/b").unwrap();
        storage.publish("shards/b", &[b"again"]).unwrap();
        storage.sync("shards").unwrap();

        let held = storage.lock().unwrap();
        assert!(matches!(storage.lock(), Err(Error::Locked { .. })));
        assert!(matches!(storage.share(), Err(Error::Locked { .. })));
        drop(held);
        drop(storage.lock().unwrap());
        let first = storage.share().unwrap();
        let second = storage.share().unwrap();
        drop(first);
        assert!(matches!(storage.lock(), Err(Error::Locked { .. })));
        drop(second);
        drop(storage.lock().unwrap());

        storage.remove_folder("shards").unwrap();
        storage.remove_folder("shards").unwrap();
        assert_eq!(storage.list("shards").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn every_storage_conforms() {
        let dir = tempfile::tempdir().unwrap();
        conforms(&Local::new(&dir.path().join("new")));
        let further = [dir.path().join("further")];
        std::fs::create_dir(&further[0]).unwrap();
        conforms(&Spread::new(&dir.path().join("spread"), &further).unwrap());
        conforms(&Memory::default());
    }

    #[test]
    fn of_many_writers_of_a_name_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let storages: [Arc<dyn Storage>; 2] = [
            Arc::new(Local::new(dir.path())),
            Arc::new(Memory::default()),
        ];
        for storage in storages {
            let winners: usize = std::thread::scope(|scope| {
                let writers: Vec<_> = (0..8_u8)
                    .map(|writer| {
                        let storage = storage.clone();
                        scope.spawn(move || storage.publish("name", &[&[writer; 1000]]).is_ok())
                    })
                    .collect();
                let ended = writers.into_iter().map(|writer| writer.join().unwrap());
                ended.map(usize::from).sum()
            });
            assert_eq!(winners, 1);
            let bytes = Store::new(storage)
                .read_small("name", 1000)
                .unwrap()
                .unwrap();
            assert!(bytes.len() == 1000 && bytes.iter().all(|byte| *byte == bytes[0]));
        }
    }
}
