//! The one place that touches files. Everything else names files relative to the cache's folder, so that another
//! kind of storage needs to replace this module only.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::cache::Io;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::unchecked::map_file;

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const PLAN: &str = "plan.json";
pub(crate) const LOCK: &str = ".lock";
pub(crate) const SHARDS: &str = "shards";
const TEMPORARY: &str = ".tmp-";

/// A cache's folder on a local disk.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    root: PathBuf,
    /// Test only: how many more changes of the disk succeed before this process counts as killed.
    #[cfg(test)]
    pub(crate) fuse: Option<Arc<std::sync::atomic::AtomicI64>>,
}

impl Store {
    pub(crate) fn new(root: &Path) -> Store {
        Store {
            root: root.to_owned(),
            #[cfg(test)]
            fuse: None,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Every change of the disk passes here first.
    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps))]
    fn step(&self, path: &Path) -> Result<()> {
        #[cfg(test)]
        if let Some(fuse) = &self.fuse
            && fuse.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) <= 0
        {
            return Err(fault(
                "change",
                path,
                io::Error::other("killed by the test"),
            ));
        }
        let _ = path;
        Ok(())
    }

    /// Length of a regular file; `None` if there is none.
    pub(crate) fn length(&self, name: &str) -> Result<Option<u64>> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(fault("look at", &path, error)),
        }
    }

    /// A small file as a whole; `None` if there is none.
    pub(crate) fn read_small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let Some(length) = self.length(name)? else {
            return Ok(None);
        };
        if length > limit {
            return Err(Error::damaged(
                name,
                format!("{length} bytes are more than any caskd writes"),
            ));
        }
        fs::read(&path)
            .map(Some)
            .map_err(|error| fault("read", &path, error))
    }

    /// A published file, whose length must be the expected one.
    pub(crate) fn open(&self, name: &str, expected: u64, io: Io) -> Result<Source> {
        let path = self.path(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_absent(&error) => {
                return Err(Error::Missing {
                    file: name.to_owned(),
                });
            }
            Err(error) => return Err(fault("open", &path, error)),
        };
        let found = file
            .metadata()
            .map_err(|error| fault("look at", &path, error))?
            .len();
        if found != expected {
            return Err(Error::WrongLength {
                file: name.to_owned(),
                found,
                expected,
            });
        }
        match io {
            Io::Mmap => {
                let map = map_file(&file).map_err(|error| fault("map", &path, error))?;
                Ok(Source::Mapped(Bytes::from_owner(map)))
            }
            Io::Read => Ok(Source::File(Arc::new(file), found)),
        }
    }

    /// blake3 of a file, hexadecimal; reads in pieces, so a file that shrinks meanwhile is no signal.
    pub(crate) fn digest(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        let mut file = File::open(&path).map_err(|error| fault("open", &path, error))?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(fault("read", &path, error)),
            };
        }
    }

    /// Names in a folder, sorted; empty if the folder does not exist. `""` is the cache's folder.
    pub(crate) fn list(&self, folder: &str) -> Result<Vec<String>> {
        let path = self.path(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fault("list", &path, error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| fault("list", &path, error))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Creates the cache's folder (`""`) or a folder in it, durably.
    pub(crate) fn create_folder(&self, folder: &str) -> Result<()> {
        let path = self.path(folder);
        if path.is_dir() {
            return Ok(());
        }
        self.step(&path)?;
        fs::create_dir_all(&path).map_err(|error| fault("create", &path, error))?;
        // Of a new path of several folders only the last is synced: the others hold nothing that could be lost.
        match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => sync_folder(Path::new(".")),
            Some(parent) => sync_folder(parent),
            None => Ok(()),
        }
    }

    /// Writes a file so that it appears under its name whole or not at all.
    pub(crate) fn publish(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let path = self.path(name);
        let (folder, file_name) = split(name);
        let temporary = self.path(folder).join(format!("{TEMPORARY}{file_name}"));
        let written = self.write_whole(&temporary, parts).and_then(|()| {
            self.step(&path)?;
            fs::rename(&temporary, &path).map_err(|error| fault("rename to", &path, error))
        });
        if let Err(error) = written {
            // A full disk gets its space back; if even this fails the next build removes the file.
            if self.step(&temporary).is_ok() {
                let _ = fs::remove_file(&temporary);
            }
            return Err(error);
        }
        self.step(&path)?;
        sync_folder(&self.path(folder))
    }

    fn write_whole(&self, path: &Path, parts: &[&[u8]]) -> Result<()> {
        self.step(path)?;
        let mut file = File::create(path).map_err(|error| fault("create", path, error))?;
        for part in parts {
            if let Err(error) = self.step(path) {
                // A killed writer leaves a torn file.
                let _ = file.write_all(&part[..part.len() / 2]);
                return Err(error);
            }
            file.write_all(part)
                .map_err(|error| fault("write", path, error))?;
        }
        self.step(path)?;
        file.sync_all().map_err(|error| fault("sync", path, error))
    }

    /// Removes a file if it is there.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        self.step(&path)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) => Err(fault("remove", &path, error)),
        }
    }

    pub(crate) fn sync(&self, folder: &str) -> Result<()> {
        self.step(&self.path(folder))?;
        sync_folder(&self.path(folder))
    }

    /// Locks the folder for this process. The lock goes with the returned file, however the process ends.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.path(LOCK);
        loop {
            self.step(&path)?;
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|error| fault("create", &path, error))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Locked {
                        dir: self.root.clone(),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(fault("lock", &path, error)),
            }
            // A build that ended between our open and our lock has removed the file that we now hold.
            if is_same_file(&file, &path) {
                return Ok(file);
            }
        }
    }
}

/// Whether a name is one that [`Store::publish`] uses for unfinished files.
pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY)
}

fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn fault(action: &'static str, path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
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

#[cfg(unix)]
fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| fault("sync", path, error))
}

/// Elsewhere a folder cannot be opened; the rename is journaled by the file system.
#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(named)) => held.ino() == named.ino() && held.dev() == named.dev(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_same_file(_file: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_an_error_of_its_own_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        // The temporary name leads to a device that is always full.
        std::os::unix::fs::symlink("/dev/full", dir.path().join(".tmp-data")).unwrap();
        let error = store.publish("data", &[&[1, 2, 3]]).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
        assert!(error.is_user() && error.hint().is_some());
        assert_eq!(store.list("").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_lock_is_exclusive_and_ends_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let held = store.lock().unwrap();
        assert!(matches!(store.lock(), Err(Error::Locked { .. })));
        drop(held);
        store.lock().unwrap();
    }
}
