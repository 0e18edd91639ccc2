//! Files in memory: for tests and fuzzing, where a disk would be the slowest part.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{Guard, Storage, is_taken, split};
use crate::cache::Io;
use crate::error::{Error, Result};
use crate::source::Source;

/// A cache in memory. A clone is the same cache.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    files: Arc<Mutex<BTreeMap<String, Bytes>>>,
    lock: Arc<Mutex<Lock>>,
}

/// Who holds a cache in memory.
#[derive(Debug, Default)]
enum Lock {
    #[default]
    Free,
    One,
    Many(usize),
}

impl Memory {
    /// A cache of these files, by their names in the cache's folder.
    pub fn new(files: impl IntoIterator<Item = (String, Bytes)>) -> Memory {
        Memory {
            files: Arc::new(Mutex::new(files.into_iter().collect())),
            lock: Arc::default(),
        }
    }

    /// Every file with its name, in order.
    pub fn files(&self) -> Vec<(String, Bytes)> {
        let files = self.held();
        let pairs = files
            .iter()
            .map(|(name, bytes)| (name.clone(), bytes.clone()));
        pairs.collect()
    }

    fn is_locked(&self) -> Error {
        Error::Locked {
            dir: self.root().to_owned(),
        }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // No code that holds the lock can leave the map half changed.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Memory {
    fn root(&self) -> &Path {
        Path::new("memory")
    }

    fn length(&self, name: &str) -> Result<Option<u64>> {
        Ok(self.held().get(name).map(|bytes| bytes.len() as u64))
    }

    fn open(&self, name: &str, _io: Io) -> Result<Option<Source>> {
        Ok(self.held().get(name).cloned().map(Source::Mapped))
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let files = self.held();
        let names = files.keys().map(|name| split(name));
        let inside = names.filter(|(of, _)| *of == folder);
        Ok(inside.map(|(_, name)| name.to_owned()).collect())
    }

    fn create_folder(&self, _folder: &str) -> Result<()> {
        Ok(())
    }

    fn publish(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let mut files = self.held();
        if files.contains_key(name) {
            return Err(is_taken(self.root().join(name)));
        }
        files.insert(name.to_owned(), parts.concat().into());
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.held().remove(name);
        Ok(())
    }

    fn sync(&self, _folder: &str) -> Result<()> {
        Ok(())
    }

    fn lock(&self) -> Result<Box<dyn Guard>> {
        let mut lock = locked(&self.lock);
        match *lock {
            Lock::Free => *lock = Lock::One,
            Lock::One | Lock::Many(_) => return Err(self.is_locked()),
        }
        Ok(Box::new(Held(self.lock.clone())))
    }

    fn share(&self) -> Result<Box<dyn Guard>> {
        let mut lock = locked(&self.lock);
        *lock = match *lock {
            Lock::Free => Lock::Many(1),
            Lock::Many(workers) => Lock::Many(workers + 1),
            Lock::One => return Err(self.is_locked()),
        };
        Ok(Box::new(Held(self.lock.clone())))
    }

    fn remove_folder(&self, folder: &str) -> Result<()> {
        self.held().retain(|name, _| split(name).0 != folder);
        Ok(())
    }
}

#[derive(Debug)]
struct Held(Arc<Mutex<Lock>>);

impl Guard for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        let mut lock = locked(&self.0);
        *lock = match *lock {
            Lock::Many(workers) if workers > 1 => Lock::Many(workers - 1),
            _ => Lock::Free,
        };
    }
}

fn locked(lock: &Mutex<Lock>) -> MutexGuard<'_, Lock> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
