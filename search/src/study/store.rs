//! The study's SQLite file. Every change is one immediate transaction; nothing is held between calls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior, params,
};

use super::lease::{is_dead, now};
use crate::config::StudyConfig;
use crate::error::{Error, Result};
use crate::objective::DependsOn;
use crate::params::Params;
use crate::sampler::Part;
use crate::space::Space;
use crate::view::{LateResult, TrialState, TrialView, Why};

/// Version of the schema, kept in `user_version`. Readers refuse later ones.
const SCHEMA_VERSION: i64 = 1;
/// "cskd", kept in `application_id`.
const APPLICATION_ID: i64 = 0x6373_6b64;
/// How long to wait for another process's transaction.
const BUSY: Duration = Duration::from_mins(1);

/// An open study database.
pub(crate) struct Store {
    path: PathBuf,
    connection: Connection,
}

/// A trial that was handed out.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) number: u64,
    pub(crate) token: u64,
    pub(crate) params: Params,
    pub(crate) seed: u64,
    pub(crate) why: Why,
}

/// A trial as the database has it.
#[derive(Debug, Clone)]
pub(crate) struct TrialRow {
    pub(crate) view: TrialView,
    pub(crate) finish_order: Option<u64>,
}

/// A new trial to be written.
pub(crate) struct NewTrial<'a> {
    pub(crate) number: u64,
    pub(crate) params: &'a Params,
    pub(crate) seed: u64,
    pub(crate) why: &'a Why,
    pub(crate) seen: u64,
}

/// What happened to a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It is the trial's result.
    Recorded,
    /// The trial had gone to another worker: the result is kept apart.
    Late,
}

impl Store {
    /// Opens or creates the file; it may not hold a study yet.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::connect(path, flags)?;
        store.has_study()?;
        store.check(|c| {
            c.pragma_update(None, "journal_mode", "WAL")?;
            // Every commit is on the disk before it counts.
            c.pragma_update(None, "synchronous", "FULL")?;
            c.pragma_update(None, "foreign_keys", true)
        })?;
        Ok(store)
    }

    /// Opens an existing file for reading only.
    pub(crate) fn open_read_only(path: &Path) -> Result<Self> {
        Self::connect(
            path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
    }

    fn connect(path: &Path, flags: OpenFlags) -> Result<Self> {
        let wrap = |source| Error::Database {
            path: path.to_owned(),
            source,
        };
        let connection = Connection::open_with_flags(path, flags).map_err(wrap)?;
        connection.busy_timeout(BUSY).map_err(wrap)?;
        Ok(Self {
            path: path.to_owned(),
            connection,
        })
    }

    /// True where the file holds a study of ours; an error where it holds something else.
    pub(crate) fn has_study(&self) -> Result<bool> {
        let foreign = |message: String| Error::StudyForeign {
            path: self.path.clone(),
            message,
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
                return Err(foreign("it is no SQLite database".to_owned()));
            }
            (Err(error), _) | (_, Err(error)) => return Err(self.wrap(error)),
        };
        match (version, application) {
            (0, 0) => {
                let tables: i64 = self.check(|c| {
                    c.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
                })?;
                if tables == 0 {
                    Ok(false)
                } else {
                    Err(foreign("it is another program's database".to_owned()))
                }
            }
            (SCHEMA_VERSION, APPLICATION_ID) => Ok(true),
            (version, APPLICATION_ID) => Err(foreign(format!(
                "its schema has version {version}, this program knows version {SCHEMA_VERSION}"
            ))),
            _ => Err(foreign("it is another program's database".to_owned())),
        }
    }

    /// Writes schema, space and settings in one transaction; false where another process was faster.
    pub(crate) fn create(&mut self, space: &Space, config: &StudyConfig) -> Result<bool> {
        let config_json = to_json(config);
        self.change(|tx| {
            let version: i64 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
            if version != 0 {
                return Ok(false);
            }
            tx.execute_batch(include_str!("schema.sql"))?;
            let mut insert = tx.prepare("INSERT INTO meta (key, value) VALUES (?1, ?2)")?;
            insert.execute(params!["caskd_version", env!("CARGO_PKG_VERSION")])?;
            insert.execute(params!["space", space.to_json()])?;
            insert.execute(params!["config", config_json])?;
            drop(insert);
            tx.pragma_update(None, "application_id", APPLICATION_ID)?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            Ok(true)
        })
    }

    pub(crate) fn space_and_config(&self) -> Result<(String, StudyConfig)> {
        let read = |key: &str| {
            self.check(|c| {
                c.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| {
                    row.get::<_, String>(0)
                })
            })
        };
        let config = read("config")?;
        let config = serde_json::from_str(&config).map_err(|error| Error::StudyForeign {
            path: self.path.clone(),
            message: format!("its settings are unreadable: {error}"),
        })?;
        Ok((read("space")?, config))
    }

    pub(crate) fn set_config(&mut self, config: &StudyConfig) -> Result<()> {
        let config = to_json(config);
        self.change(|tx| {
            tx.execute("UPDATE meta SET value = ?1 WHERE key = 'config'", [&config])?;
            Ok(())
        })
    }

    /// All trials by number.
    pub(crate) fn trials(&self) -> Result<Vec<TrialRow>> {
        let rows = self.check(|c| {
            c.prepare_cached(
                "SELECT number, state, params, seed, why, seen, value, error, seconds, attempts, owner,
                        started_at, finished_at, finish_order
                 FROM trial ORDER BY number",
            )?
            .query_map([], RawTrial::read)?
            .collect::<rusqlite::Result<Vec<RawTrial>>>()
        })?;
        rows.into_iter().map(|row| row.parse(&self.path)).collect()
    }

    pub(crate) fn late_results(&self) -> Result<Vec<LateResult>> {
        self.check(|c| {
            c.prepare("SELECT trial, value, error, at FROM late_result ORDER BY rowid")?
                .query_map([], |row| {
                    Ok(LateResult {
                        trial: row.get::<_, i64>(0)? as u64,
                        value: row.get(1)?,
                        error: row.get(2)?,
                        at: row.get(3)?,
                    })
                })?
                .collect()
        })
    }

    /// Takes up the first trial that was given back or whose worker is silent or dead. A trial on which
    /// `max_attempts` workers died becomes a failure instead.
    pub(crate) fn take_up(
        &mut self,
        owner: &str,
        lease_seconds: f64,
        max_attempts: u64,
    ) -> Result<Option<Lease>> {
        let path = self.path.clone();
        let found = self.change(|tx| {
            let now = now();
            let open: Vec<OpenTrial> = tx
                .prepare_cached(
                    "SELECT number, state, owner, lease_expires, attempts FROM trial
                     WHERE state IN ('running', 'stopped') ORDER BY number",
                )?
                .query_map([], |row| {
                    Ok(OpenTrial {
                        number: row.get(0)?,
                        state: row.get(1)?,
                        holder: row.get(2)?,
                        expires: row.get(3)?,
                        attempts: row.get(4)?,
                    })
                })?
                .collect::<rusqlite::Result<_>>()?;
            for trial in open {
                let number = trial.number;
                let running = trial.state == TrialState::Running.name();
                let silent = trial.expires.is_none_or(|expires| expires < now);
                let dead = trial.holder.as_deref().is_none_or(is_dead);
                if running && !silent && !dead {
                    continue;
                }
                let attempts = trial.attempts + i64::from(running);
                if running && attempts as u64 >= max_attempts {
                    let error = format!("given up: {attempts} workers died or fell silent on it");
                    tx.execute(
                        "UPDATE trial SET attempts = ?2, token = token + 1 WHERE number = ?1",
                        params![number, attempts],
                    )?;
                    finish(tx, number, None, Some(&error), 0.0)?;
                    continue;
                }
                tx.execute(
                    "UPDATE trial SET state = 'running', owner = ?2, token = token + 1,
                            lease_expires = ?3, attempts = ?4 WHERE number = ?1",
                    params![number, owner, now + lease_seconds, attempts],
                )?;
                let lease: (i64, String, i64, String) = tx.query_row(
                    "SELECT token, params, seed, why FROM trial WHERE number = ?1",
                    [number],
                    |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
                )?;
                return Ok(Some((number, lease)));
            }
            Ok(None)
        })?;
        found
            .map(|(number, (token, params, seed, why))| {
                let damaged = |error: serde_json::Error| damaged(&path, number as u64, &error);
                Ok(Lease {
                    number: number as u64,
                    token: token as u64,
                    params: serde_json::from_str(&params).map_err(damaged)?,
                    seed: seed as u64,
                    why: serde_json::from_str(&why).map_err(damaged)?,
                })
            })
            .transpose()
    }

    /// Writes a new running trial with its lease, unless another worker took its number meanwhile.
    pub(crate) fn insert(
        &mut self,
        trial: &NewTrial<'_>,
        owner: &str,
        lease_seconds: f64,
    ) -> Result<bool> {
        let why = to_json(trial.why);
        self.change(|tx| {
            let next: i64 = tx.query_row("SELECT count(*) FROM trial", [], |row| row.get(0))?;
            if next as u64 != trial.number {
                return Ok(false);
            }
            let now = now();
            tx.execute(
                "INSERT INTO trial (number, state, params, seed, why, seen, owner, token, lease_expires, started_at)
                 VALUES (?1, 'running', ?2, ?3, ?4, ?5, ?6, 1, ?7, ?8)",
                params![
                    trial.number as i64,
                    trial.params.to_json(),
                    trial.seed as i64,
                    why,
                    trial.seen as i64,
                    owner,
                    now + lease_seconds,
                    now
                ],
            )?;
            Ok(true)
        })
    }

    pub(crate) fn renew(&mut self, number: u64, token: u64, expires: f64) -> Result<()> {
        self.change(|tx| {
            tx.execute(
                "UPDATE trial SET lease_expires = ?3 WHERE number = ?1 AND token = ?2 AND state = 'running'",
                params![number as i64, token as i64, expires],
            )?;
            Ok(())
        })
    }

    /// Gives a trial back, to be taken up again.
    pub(crate) fn give_back(&mut self, number: u64, token: u64, seconds: f64) -> Result<()> {
        self.change(|tx| {
            tx.execute(
                "UPDATE trial SET state = 'stopped', owner = NULL, lease_expires = NULL, seconds = seconds + ?3
                 WHERE number = ?1 AND token = ?2 AND state = 'running'",
                params![number as i64, token as i64, seconds],
            )?;
            Ok(())
        })
    }

    /// Records a result. With a `token` that is no longer the trial's, the result is kept apart; without one, the
    /// first result counts.
    pub(crate) fn tell(
        &mut self,
        number: u64,
        token: Option<u64>,
        value: Option<f64>,
        error: Option<&str>,
        seconds: f64,
    ) -> Result<Told> {
        self.change(|tx| {
            let found: Option<(String, i64)> = tx
                .query_row(
                    "SELECT state, token FROM trial WHERE number = ?1",
                    [number as i64],
                    |row| Ok((row.get(0)?, row.get(1)?)),
                )
                .optional()?;
            let Some((state, current)) = found else {
                return Ok(Err(Error::TrialUnknown { trial: number }));
            };
            let finished = TrialState::from_name(&state).filter(|state| state.is_finished());
            match (token, finished) {
                (None, Some(state)) => Ok(Err(Error::TrialFinished {
                    trial: number,
                    state: state.name(),
                })),
                (Some(token), finished) if finished.is_some() || token as i64 != current => {
                    tx.execute(
                        "INSERT INTO late_result (trial, token, value, error, at) VALUES (?1, ?2, ?3, ?4, ?5)",
                        params![number as i64, token as i64, value, error, now()],
                    )?;
                    Ok(Ok(Told::Late))
                }
                _ => {
                    finish(tx, number as i64, value, error, seconds)?;
                    Ok(Ok(Told::Recorded))
                }
            }
        })?
    }

    /// The current lease of a trial.
    pub(crate) fn token(&self, number: u64) -> Result<Option<u64>> {
        self.check(|c| {
            c.query_row(
                "SELECT token FROM trial WHERE number = ?1",
                [number as i64],
                |row| row.get::<_, i64>(0),
            )
            .optional()
        })
        .map(|token| token.map(|token| token as u64))
    }

    pub(crate) fn discrepancies(&self) -> Result<BTreeMap<(Part, String), f64>> {
        self.check(|c| {
            c.prepare("SELECT part, settings, value FROM discrepancy")?
                .query_map([], |row| {
                    let part = if row.get::<_, String>(0)? == Part::Logits.name() {
                        Part::Logits
                    } else {
                        Part::Hidden
                    };
                    Ok(((part, row.get(1)?), row.get(2)?))
                })?
                .collect()
        })
    }

    /// On which parameters S(x) depends, once somebody has measured it.
    pub(crate) fn dependence(&self) -> Result<Option<DependsOn>> {
        let json: Option<String> = self.check(|c| {
            c.query_row(
                "SELECT value FROM meta WHERE key = 'depends_on'",
                [],
                |row| row.get(0),
            )
            .optional()
        })?;
        Ok(json.and_then(|json| serde_json::from_str(&json).ok()))
    }

    /// The first objective that measures S(x) decides on which parameters it depends, so that every worker and
    /// every replay looks a measurement up in the same way.
    pub(crate) fn agree_on_dependence(&mut self, proposed: &DependsOn) -> Result<DependsOn> {
        if let Some(agreed) = self.dependence()? {
            return Ok(agreed);
        }
        let json = to_json(proposed);
        self.change(|tx| {
            tx.execute(
                "INSERT OR IGNORE INTO meta (key, value) VALUES ('depends_on', ?1)",
                [&json],
            )?;
            Ok(())
        })?;
        Ok(self.dependence()?.unwrap_or_else(|| proposed.clone()))
    }

    /// Keeps measured discrepancies; what another worker measured first stays.
    pub(crate) fn keep_discrepancies(&mut self, fresh: &[(Part, String, f64)]) -> Result<()> {
        if fresh.is_empty() {
            return Ok(());
        }
        self.change(|tx| {
            let mut insert = tx.prepare(
                "INSERT OR IGNORE INTO discrepancy (part, settings, value) VALUES (?1, ?2, ?3)",
            )?;
            for (part, settings, value) in fresh {
                insert.execute(params![part.name(), settings, value])?;
            }
            Ok(())
        })
    }

    fn check<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        read(&self.connection).map_err(|source| self.wrap(source))
    }

    fn change<T>(
        &mut self,
        write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let path = &self.path;
        let wrap = |source| Error::Database {
            path: path.clone(),
            source,
        };
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(wrap)?;
        let result = write(&tx).map_err(wrap)?;
        tx.commit().map_err(wrap)?;
        Ok(result)
    }

    fn wrap(&self, source: rusqlite::Error) -> Error {
        Error::Database {
            path: self.path.clone(),
            source,
        }
    }
}

fn finish(
    tx: &Transaction<'_>,
    number: i64,
    value: Option<f64>,
    error: Option<&str>,
    seconds: f64,
) -> rusqlite::Result<()> {
    let state = if value.is_some() {
        TrialState::Complete
    } else {
        TrialState::Failed
    };
    tx.execute(
        "UPDATE trial SET state = ?2, value = ?3, error = ?4, seconds = seconds + ?5, finished_at = ?6,
                lease_expires = NULL,
                finish_order = (SELECT coalesce(max(finish_order), 0) + 1 FROM trial)
         WHERE number = ?1",
        params![number, state.name(), value, error, seconds, now()],
    )?;
    Ok(())
}

/// A trial without a result.
struct OpenTrial {
    number: i64,
    state: String,
    holder: Option<String>,
    expires: Option<f64>,
    attempts: i64,
}

/// A row before its texts are understood.
struct RawTrial {
    number: i64,
    state: String,
    params: String,
    seed: i64,
    why: String,
    seen: i64,
    value: Option<f64>,
    error: Option<String>,
    seconds: f64,
    attempts: i64,
    owner: Option<String>,
    started_at: f64,
    finished_at: Option<f64>,
    finish_order: Option<i64>,
}

impl RawTrial {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            number: row.get(0)?,
            state: row.get(1)?,
            params: row.get(2)?,
            seed: row.get(3)?,
            why: row.get(4)?,
            seen: row.get(5)?,
            value: row.get(6)?,
            error: row.get(7)?,
            seconds: row.get(8)?,
            attempts: row.get(9)?,
            owner: row.get(10)?,
            started_at: row.get(11)?,
            finished_at: row.get(12)?,
            finish_order: row.get(13)?,
        })
    }

    fn parse(self, path: &Path) -> Result<TrialRow> {
        let number = self.number as u64;
        let unreadable = |error: serde_json::Error| damaged(path, number, &error);
        let state = TrialState::from_name(&self.state)
            .ok_or_else(|| damaged(path, number, &format!("its state is `{}`", self.state)))?;
        Ok(TrialRow {
            finish_order: self.finish_order.map(|order| order as u64),
            view: TrialView {
                number,
                state,
                params: serde_json::from_str(&self.params).map_err(unreadable)?,
                value: self.value,
                seconds: (self.seconds > 0.0 || state.is_finished()).then_some(self.seconds),
                why: serde_json::from_str(&self.why).map_err(unreadable)?,
                error: self.error,
                seed: self.seed as u64,
                seen: self.seen as u64,
                attempts: self.attempts as u64,
                owner: self.owner,
                started_at: self.started_at,
                finished_at: self.finished_at,
            },
        })
    }
}

fn damaged(path: &Path, trial: u64, message: &dyn std::fmt::Display) -> Error {
    Error::StudyDamaged {
        path: path.to_owned(),
        trial,
        message: message.to_string(),
    }
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    // The types written here have string keys and finite numbers only, which cannot fail.
    serde_json::to_string(value).unwrap_or_default()
}
