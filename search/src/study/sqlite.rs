//! A study in a SQLite file: write-ahead log, every commit on the disk, one immediate transaction per change.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, OpenFlags, ToSql, TransactionBehavior, params_from_iter};

use super::database::{Cell, Database, Outcome, Record, Sql, Work};
use super::lease::now;
use super::store::SCHEMA_VERSION;
use crate::error::{DatabaseError, Error, Result};

/// "cskd", kept in `application_id`.
const APPLICATION_ID: i64 = 0x6373_6b64;
/// How long to wait for another process's transaction.
const BUSY: Duration = Duration::from_mins(1);

pub(super) struct Sqlite {
    path: PathBuf,
    connection: Connection,
    /// How the file was when it was opened as one that nobody writes.
    still: Option<Still>,
}

/// A file without a write-ahead log beside it: nobody has it open.
#[derive(Debug, Clone, PartialEq)]
struct Still {
    length: u64,
    modified: SystemTime,
}

impl Still {
    fn of(path: &Path) -> Option<Self> {
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        if Path::new(&log).exists() {
            return None;
        }
        let metadata = path.metadata().ok()?;
        Some(Self {
            length: metadata.len(),
            modified: metadata.modified().ok()?,
        })
    }
}

impl Sqlite {
    /// Opens or creates the file; it may not hold a study yet.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut sqlite = Self::connect(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE
                | OpenFlags::SQLITE_OPEN_CREATE
                | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        sqlite.version()?;
        let settings = |c: &Connection| -> rusqlite::Result<()> {
            c.pragma_update(None, "journal_mode", "WAL")?;
            // Every commit is on the disk before it counts.
            c.pragma_update(None, "synchronous", "FULL")?;
            c.pragma_update(None, "foreign_keys", true)
        };
        settings(&sqlite.connection).map_err(|error| sqlite.wrap(error))?;
        Ok(sqlite)
    }

    /// Opens an existing file for reading only. Where nobody has it open it is read as it lies there: SQLite would
    /// put a log beside it, which leaves traces (of another user, perhaps) and fails in a folder that can't be written.
    pub(super) fn open_read_only(path: &Path) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let (Some(still), Some(text)) = (Still::of(path), path.to_str()) else {
            return Self::connect(path, flags);
        };
        let quoted = text
            .replace('%', "%25")
            .replace('?', "%3f")
            .replace('#', "%23");
        let address = format!("file:{quoted}?immutable=1");
        let mut sqlite = Self::connect(Path::new(&address), flags | OpenFlags::SQLITE_OPEN_URI)?;
        path.clone_into(&mut sqlite.path);
        sqlite.still = Some(still);
        Ok(sqlite)
    }

    fn connect(path: &Path, flags: OpenFlags) -> Result<Self> {
        let connect = || -> rusqlite::Result<Connection> {
            let connection = Connection::open_with_flags(path, flags)?;
            connection.busy_timeout(BUSY)?;
            Ok(connection)
        };
        match connect() {
            Ok(connection) => Ok(Self {
                path: path.to_owned(),
                connection,
                still: None,
            }),
            Err(error) => Err(Error::Database {
                path: path.to_owned(),
                source: error.into(),
            }),
        }
    }

    fn wrap(&self, error: impl Into<DatabaseError>) -> Error {
        Error::Database {
            path: self.path.clone(),
            source: error.into(),
        }
    }

    fn transaction(&mut self, behavior: TransactionBehavior, work: &mut Work<'_>) -> Result<()> {
        let mut run = || -> Outcome<()> {
            let tx = self.connection.transaction_with_behavior(behavior)?;
            work(&mut Open(&tx))?;
            tx.commit()?;
            Ok(())
        };
        let done = run();
        done.map_err(|error| self.wrap(error))
    }
}

impl Database for Sqlite {
    fn version(&mut self) -> Result<Option<i64>> {
        let foreign = |message: &str| {
            Err(Error::StudyForeign {
                path: self.path.clone(),
                message: message.to_owned(),
            })
        };
        let read = |name: &str| {
            self.connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
        };
        let (version, application) = match (read("user_version"), read("application_id")) {
            (Ok(version), Ok(application)) => (version, application),
            (Err(error), _) | (_, Err(error))
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) =>
            {
                return foreign("it is no SQLite database");
            }
            (Err(error), _) | (_, Err(error)) => return Err(self.wrap(error)),
        };
        match (version, application) {
            (0, 0) => {
                let tables: i64 = self
                    .connection
                    .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
                    .map_err(|error| self.wrap(error))?;
                if tables == 0 {
                    Ok(None)
                } else {
                    foreign("it is another program's database")
                }
            }
            (version, APPLICATION_ID) => Ok(Some(version)),
            _ => foreign("it is another program's database"),
        }
    }

    fn create(&mut self, fill: &mut Work<'_>) -> Result<bool> {
        let mut create = || -> Outcome<bool> {
            let tx = self
                .connection
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            let version: i64 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
            if version != 0 {
                return Ok(false);
            }
            tx.execute_batch(include_str!("schema.sql"))?;
            fill(&mut Open(&tx))?;
            tx.pragma_update(None, "application_id", APPLICATION_ID)?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            tx.commit()?;
            Ok(true)
        };
        let created = create();
        created.map_err(|error| self.wrap(error))
    }

    fn read(&mut self, work: &mut Work<'_>) -> Result<()> {
        let seen = self.transaction(TransactionBehavior::Deferred, work);
        if let Some(still) = self.still.take() {
            if Still::of(&self.path) == Some(still.clone()) {
                self.still = Some(still);
            } else {
                // Somebody began to write meanwhile: look again, with the log.
                *self = Self::connect(
                    &self.path.clone(),
                    OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
                )?;
                return self.transaction(TransactionBehavior::Deferred, work);
            }
        }
        seen
    }

    fn write(&mut self, work: &mut Work<'_>) -> Result<()> {
        self.transaction(TransactionBehavior::Immediate, work)
    }
}

struct Open<'a>(&'a Connection);

impl Sql for Open<'_> {
    fn execute(&mut self, sql: &str, values: &[Cell]) -> Outcome<u64> {
        let changed = self
            .0
            .prepare_cached(sql)?
            .execute(params_from_iter(values))?;
        Ok(changed as u64)
    }

    fn query(&mut self, sql: &str, values: &[Cell]) -> Outcome<Vec<Record>> {
        let mut statement = self.0.prepare_cached(sql)?;
        let columns = statement.column_count();
        let mut rows = statement.query(params_from_iter(values))?;
        let mut records = Vec::new();
        while let Some(row) = rows.next()? {
            let cells = (0..columns).map(|column| Ok(cell(row.get_ref(column)?)));
            records.push(Record(cells.collect::<rusqlite::Result<_>>()?));
        }
        Ok(records)
    }

    fn now(&mut self) -> Outcome<f64> {
        Ok(now())
    }
}

fn cell(value: ValueRef<'_>) -> Cell {
    match value {
        ValueRef::Integer(integer) => Cell::Integer(integer),
        ValueRef::Real(real) => Cell::Real(real),
        ValueRef::Text(text) => Cell::Text(String::from_utf8_lossy(text).into_owned()),
        // The schema has no blobs.
        ValueRef::Null | ValueRef::Blob(_) => Cell::Null,
    }
}

impl ToSql for Cell {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Null => ToSqlOutput::Owned(Value::Null),
            Self::Integer(integer) => ToSqlOutput::Owned(Value::Integer(*integer)),
            Self::Real(real) => ToSqlOutput::Owned(Value::Real(*real)),
            Self::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
        })
    }
}
