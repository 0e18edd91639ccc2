//! A folder of a local disk.

use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tempfile::TempPath;

use super::{Guard, LOCK, Storage, TEMPORARY, fault, is_taken, split};
use crate::cache::Io;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::unchecked::map_file;

/// A cache's folder on a local disk.
#[derive(Debug)]
pub struct Local {
    root: PathBuf,
    /// Tells apart what several processes write at one time, on this machine or another.
    nonce: u64,
    /// The same for the threads of this process.
    written: AtomicU64,
    /// Test only: how many more changes of the disk succeed before this process counts as killed.
    #[cfg(test)]
    pub(crate) fuse: Option<std::sync::atomic::AtomicI64>,
}

impl Local {
    /// The cache in the folder `root`, which need not exist.
    pub fn new(root: &Path) -> Local {
        Local {
            root: root.to_owned(),
            nonce: RandomState::new().hash_one(std::process::id()),
            written: AtomicU64::new(0),
            #[cfg(test)]
            fuse: None,
        }
    }

    /// Every change of the disk passes here first.
    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps))]
    fn step(&self, path: &Path) -> Result<()> {
        #[cfg(test)]
        if let Some(fuse) = &self.fuse
            && fuse.fetch_sub(1, Ordering::SeqCst) <= 0
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

    /// The lock is on the file `.lock`; the operating system ends it with the process.
    fn lock_file(
        &self,
        try_lock: impl Fn(&File) -> std::result::Result<(), TryLockError>,
    ) -> Result<Box<dyn Guard>> {
        let path = self.path(LOCK);
        loop {
            self.step(&path)?;
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|error| fault("create", &path, error))?;
            match try_lock(&file) {
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
                return Ok(Box::new(LockedFile { _file: file }));
            }
        }
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
}

impl Storage for Local {
    fn root(&self) -> &Path {
        &self.root
    }

    fn length(&self, name: &str) -> Result<Option<u64>> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(fault("look at", &path, error)),
        }
    }

    fn open(&self, name: &str, io: Io) -> Result<Option<Source>> {
        let path = self.path(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(fault("open", &path, error)),
        };
        let metadata = file
            .metadata()
            .map_err(|error| fault("look at", &path, error))?;
        if !metadata.is_file() {
            return Ok(None);
        }
        match io {
            Io::Mmap => {
                let map = map_file(&file).map_err(|error| fault("map", &path, error))?;
                Ok(Some(Source::Mapped(Bytes::from_owner(map))))
            }
            Io::Read => Ok(Some(Source::File(Arc::new(file), metadata.len()))),
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
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

    fn create_folder(&self, folder: &str) -> Result<()> {
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

    fn publish(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let path = self.path(name);
        if path.exists() {
            return Err(is_taken(path));
        }
        let (folder, file_name) = split(name);
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .path(folder)
            .join(format!("{TEMPORARY}{:x}-{number}-{file_name}", self.nonce));
        let written = self
            .write_whole(&temporary, parts)
            .and_then(|()| self.step(&path));
        if let Err(error) = written {
            // A full disk gets its space back; if even this fails the next build removes the file.
            if self.step(&temporary).is_ok() {
                let _ = fs::remove_file(&temporary);
            }
            return Err(error);
        }
        rename_to_new_name(&temporary, &path)?;
        self.step(&path)?;
        sync_folder(&self.path(folder))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        self.step(&path)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) => Err(fault("remove", &path, error)),
        }
    }

    fn sync(&self, folder: &str) -> Result<()> {
        self.step(&self.path(folder))?;
        sync_folder(&self.path(folder))
    }

    fn lock(&self) -> Result<Box<dyn Guard>> {
        self.lock_file(File::try_lock)
    }

    fn share(&self) -> Result<Box<dyn Guard>> {
        self.lock_file(File::try_lock_shared)
    }

    fn remove_folder(&self, folder: &str) -> Result<()> {
        let path = self.path(folder);
        self.step(&path)?;
        match fs::remove_dir_all(&path) {
            Ok(()) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) => Err(fault("remove", &path, error)),
        }
    }
}

/// A lock that the operating system releases when the file is closed.
#[derive(Debug)]
struct LockedFile {
    _file: File,
}

impl Guard for LockedFile {}

/// Renames in one step that fails where the new name is taken.
fn rename_to_new_name(from: &Path, to: &Path) -> Result<()> {
    let temporary = TempPath::try_from_path(from).map_err(|error| fault("rename", from, error))?;
    temporary.persist_noclobber(to).map_err(|failed| {
        if failed.error.kind() == io::ErrorKind::AlreadyExists {
            is_taken(to.to_owned())
        } else {
            fault("rename to", to, failed.error)
        }
    })
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
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
        let mut local = Local::new(dir.path());
        local.nonce = 7;
        // The temporary name leads to a device that is always full.
        std::os::unix::fs::symlink("/dev/full", dir.path().join(".tmp-7-0-data")).unwrap();
        let error = local.publish("data", &[&[1, 2, 3]]).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
        assert!(error.is_user() && error.hint().is_some());
        assert_eq!(local.list("").unwrap(), Vec::<String>::new());
    }
}
