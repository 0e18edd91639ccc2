//! A cache whose shards do not all lie beside its manifest.

use std::path::{Path, PathBuf};

use super::{Guard, Local, SHARDS, Storage, fault, split};
use crate::cache::Io;
use crate::error::Result;
use crate::source::Source;

/// A cache's folder, and further ones in which a shard that is not in it is looked for by its file name, in order: in
/// the folder itself and in its `shards/`, for it may be another copy of the cache. The name tells the content, so one
/// folder may serve several caches. Only reading goes there: what is written is written
/// to the cache's folder.
#[derive(Debug)]
pub struct Spread {
    home: Local,
    further: Vec<Local>,
}

impl Spread {
    /// The cache in the folder `root`, with further folders of shards.
    ///
    /// # Errors
    /// [`crate::Error::Io`] for a further folder that is not there.
    pub fn new(root: &Path, further: &[PathBuf]) -> Result<Spread> {
        for folder in further {
            std::fs::read_dir(folder)
                .map_err(|error| fault("look for shards in", folder, error))?;
        }
        Ok(Spread {
            home: Local::new(root),
            further: further.iter().map(|folder| Local::new(folder)).collect(),
        })
    }

    /// The places of a file, in the order in which they are looked at.
    fn places<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Local, &'a str)> {
        let (folder, file) = split(name);
        let further = self.further.iter().filter(move |_| folder == SHARDS);
        let further = further.flat_map(move |local| [(local, file), (local, name)]);
        std::iter::once((&self.home, name)).chain(further)
    }
}

impl Storage for Spread {
    fn root(&self) -> &Path {
        self.home.root()
    }

    fn path(&self, name: &str) -> PathBuf {
        let found = self
            .places(name)
            .map(|(local, name)| local.path(name))
            .find(|path| path.is_file());
        found.unwrap_or_else(|| self.home.path(name))
    }

    fn further(&self) -> Vec<PathBuf> {
        let roots = self.further.iter().map(|local| local.root().to_owned());
        roots.collect()
    }

    fn length(&self, name: &str) -> Result<Option<u64>> {
        let mut lengths = self.places(name).map(|(local, name)| local.length(name));
        lengths.find_map(Result::transpose).transpose()
    }

    fn open(&self, name: &str, io: Io) -> Result<Option<Source>> {
        let mut opened = self.places(name).map(|(local, name)| local.open(name, io));
        opened.find_map(Result::transpose).transpose()
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        self.home.list(folder)
    }

    fn create_folder(&self, folder: &str) -> Result<()> {
        self.home.create_folder(folder)
    }

    fn publish(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        self.home.publish(name, parts)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.home.remove(name)
    }

    fn sync(&self, folder: &str) -> Result<()> {
        self.home.sync(folder)
    }

    fn lock(&self) -> Result<Box<dyn Guard>> {
        self.home.lock()
    }

    fn share(&self) -> Result<Box<dyn Guard>> {
        self.home.share()
    }

    fn remove_folder(&self, folder: &str) -> Result<()> {
        self.home.remove_folder(folder)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::Store;
    use crate::{Error, Io};

    #[test]
    fn shards_are_found_in_the_first_folder_that_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["cache/shards", "two", "three/shards"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in [
            "cache/shards/a",
            "two/a",
            "two/b",
            "three/b",
            "three/shards/c",
            "two/head",
        ] {
            fs::write(at(file), file).unwrap();
        }
        let spread = Spread::new(&at("cache"), &[at("two"), at("three")]).unwrap();
        let store = Store::new(std::sync::Arc::new(spread));
        for (name, place, called) in [
            ("shards/a", "cache/shards/a", "shards/a".to_owned()),
            ("shards/b", "two/b", at("two/b").display().to_string()),
            (
                "shards/c",
                "three/shards/c",
                at("three/shards/c").display().to_string(),
            ),
        ] {
            let source = store.open(name, place.len() as u64, Io::Read).unwrap();
            assert_eq!(source.range(0, place.len()).unwrap(), place);
            assert_eq!(store.called(name), called);
            let error = store.open(name, 1, Io::Mmap).unwrap_err();
            assert!(matches!(&error, Error::WrongLength { file, .. } if *file == called));
        }
        assert!(matches!(
            store.check("head", 8),
            Err(Error::Missing { looked_in, .. }) if looked_in.is_empty()
        ));
        let message = store.check("shards/d", 1).unwrap_err().to_string();
        for folder in ["cache/shards", "two", "three"] {
            let folder = format!("`{}`", at(folder).display());
            assert!(message.contains(&folder), "{message}");
        }
        assert!(matches!(
            Spread::new(&at("cache"), &[at("four")]),
            Err(Error::Io { path, .. }) if path == at("four")
        ));
    }
}
