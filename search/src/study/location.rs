//! Where a study is kept: a SQLite file, or a schema of a PostgreSQL database.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Name of the database in a study's folder.
pub const STUDY_FILE: &str = "study.sqlite";

/// The schema of a PostgreSQL study whose address names none.
const DEFAULT_SCHEMA: &str = "caskd";

/// Where a study is kept, and where its trials' files go.
///
/// | written as | means |
/// |---|---|
/// | a folder | `study.sqlite` inside |
/// | `sqlite:FILE`, or a path ending in `.sqlite`, `.sqlite3` or `.db` | that file |
/// | `postgres://USER@HOST/DATABASE#NAME` | the schema `NAME` (`caskd` without one) of that database |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub(crate) place: Place,
    folder: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Memory,
    Sqlite(PathBuf),
    Postgres { url: String, schema: String },
}

impl Location {
    /// Reads an address in one of the forms of [`Location`].
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |message: &str| {
            Err(Error::Address {
                address: without_password(text),
                message: message.to_owned(),
            })
        };
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            let (url, schema) = text.split_once('#').unwrap_or((text, DEFAULT_SCHEMA));
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            let starts_well = schema.starts_with(|c: char| c.is_ascii_lowercase());
            if !starts_well
                || !schema.chars().all(plain)
                || schema.len() > 60
                || schema.starts_with("pg_")
            {
                return refuse(
                    "the name after # must be a to z, 0 to 9 and _, and start with a letter",
                );
            }
            return Ok(Self::at(Place::Postgres {
                url: url.to_owned(),
                schema: schema.to_owned(),
            }));
        }
        if let Some(file) = text.strip_prefix("sqlite:") {
            if file.is_empty() {
                return refuse("there is no file after `sqlite:`");
            }
            return Ok(Self::at(Place::Sqlite(file.into())));
        }
        if text.is_empty() {
            return refuse("its name is empty");
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return refuse(&format!("there is no kind of study called `{scheme}`"));
        }
        Ok(Self::from(Path::new(text)))
    }

    /// A study that lives in memory.
    pub(crate) fn memory() -> Self {
        Self::at(Place::Memory)
    }

    /// The same study with its trials' files in `folder`.
    #[must_use]
    pub fn with_folder(self, folder: &Path) -> Self {
        Self {
            folder: Some(folder.to_owned()),
            ..self
        }
    }

    /// The same, where the trials need one.
    pub fn trials_folder(&self) -> Result<PathBuf> {
        self.folder().ok_or_else(|| Error::NoFolder {
            study: self.to_string(),
        })
    }

    /// Where the files of the trials go: what was asked for, else beside a SQLite file; nowhere for the others.
    pub fn folder(&self) -> Option<PathBuf> {
        match (&self.folder, &self.place) {
            (Some(folder), _) => Some(folder.clone()),
            (None, Place::Sqlite(file)) if file.file_name().is_some_and(|n| n == STUDY_FILE) => {
                Some(file.parent().unwrap_or(Path::new("")).to_owned())
            }
            (None, Place::Sqlite(file)) => {
                let mut name = file.file_name().unwrap_or_default().to_owned();
                name.push("-files");
                Some(file.with_file_name(name))
            }
            _ => None,
        }
    }

    /// Another study of the same kind beside this one: `NAME` becomes a folder, or a part of the schema's name.
    #[must_use]
    pub fn sibling(&self, name: &str) -> Self {
        let folder = self.folder().map(|folder| folder.join(name));
        let place = match &self.place {
            Place::Memory => Place::Memory,
            Place::Sqlite(_) => Place::Sqlite(folder.clone().unwrap_or_default().join(STUDY_FILE)),
            Place::Postgres { url, schema } => Place::Postgres {
                url: url.clone(),
                schema: format!("{schema}_{}", name.replace('-', "_")),
            },
        };
        Self { place, folder }
    }

    /// False where it is certain without opening anything that there is no study.
    pub fn may_exist(&self) -> bool {
        match &self.place {
            Place::Sqlite(file) => file.is_file(),
            _ => true,
        }
    }

    /// The folder of a SQLite file.
    pub(crate) fn parent(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Sqlite(file) => file
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .map(Path::to_owned),
            _ => None,
        }
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            folder: None,
        }
    }
}

/// A path is a folder, unless it is a file or has a database's ending.
impl From<&Path> for Location {
    fn from(path: &Path) -> Self {
        let named = path.extension().is_some_and(|ending| {
            ["sqlite", "sqlite3", "db"]
                .iter()
                .any(|known| ending.eq_ignore_ascii_case(known))
        });
        Self::at(Place::Sqlite(
            if path.is_file() || (named && !path.is_dir()) {
                path.to_owned()
            } else {
                path.join(STUDY_FILE)
            },
        ))
    }
}

impl From<&PathBuf> for Location {
    fn from(path: &PathBuf) -> Self {
        Self::from(path.as_path())
    }
}

impl From<&Location> for Location {
    fn from(location: &Location) -> Self {
        location.clone()
    }
}

/// What can be typed to get the same study, passwords left out.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Memory => f.write_str("memory"),
            Place::Sqlite(file) if file.file_name().is_some_and(|n| n == STUDY_FILE) => {
                match file.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => {
                        write!(f, "{}", parent.display())
                    }
                    _ => f.write_str("."),
                }
            }
            Place::Sqlite(file) => write!(f, "{}", file.display()),
            Place::Postgres { url, schema } => write!(f, "{}#{schema}", without_password(url)),
        }
    }
}

fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    match rest.split_once('@') {
        Some((user, host)) => {
            let user = user.split_once(':').map_or(user, |(user, _)| user);
            format!("{scheme}://{user}@{host}")
        }
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let check = |text: &str, shown: &str, folder: Option<&str>| {
            let location = Location::parse(text).unwrap();
            assert_eq!(location.to_string(), shown);
            assert_eq!(location.folder(), folder.map(PathBuf::from));
        };
        check("some/study", "some/study", Some("some/study"));
        check("sqlite:a/b.sqlite", "a/b.sqlite", Some("a/b.sqlite-files"));
        check("b.db", "b.db", Some("b.db-files"));
        check("study.sqlite", ".", Some(""));
        check(
            "postgres://me:secret@host/db",
            "postgres://me@host/db#caskd",
            None,
        );
        check(
            "postgresql://host/db#mine_2",
            "postgresql://host/db#mine_2",
            None,
        );
        for bad in [
            "sqlite:",
            "mysql://host/db",
            "postgres://h/d#Two words",
            "postgres://h/d#",
        ] {
            assert!(matches!(Location::parse(bad), Err(Error::Address { .. })));
        }
        let sub = Location::parse("postgres://h/d#s").unwrap().sibling("gp-1");
        assert_eq!(sub.to_string(), "postgres://h/d#s_gp_1");
        let sub = Location::parse("out").unwrap().sibling("gp-1");
        assert_eq!(sub.to_string(), "out/gp-1");
    }
}
