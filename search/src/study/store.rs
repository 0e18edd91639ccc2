//! What a study does in its database. Every change is one transaction; nothing is held between calls.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::database::{Database, Outcome, Record, Sql, cells};
use super::lease::is_dead;
use super::location::{Location, Place};
#[cfg(feature = "postgres")]
use super::postgres::Postgres;
use super::sqlite::Sqlite;
use crate::config::StudyConfig;
use crate::error::{DatabaseError, Error, Result};
use crate::objective::DependsOn;
use crate::params::Params;
use crate::sampler::Part;
use crate::space::Space;
use crate::view::{LateResult, TrialState, TrialView, Why};

/// Version of the schema. Other versions are refused.
pub(super) const SCHEMA_VERSION: i64 = 2;

/// An open study database.
pub(crate) struct Store {
    /// For messages.
    name: String,
    database: RefCell<Box<dyn Database>>,
}

/// A trial that was handed out.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) number: u64,
    pub(crate) token: u64,
    pub(crate) params: Params,
    pub(crate) seed: u64,
    pub(crate) why: Why,
    pub(crate) rung: u64,
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
    pub(crate) rung: u64,
    pub(crate) parent: Option<u64>,
}

/// Who takes a trial, and for how long.
pub(crate) struct Taker<'a> {
    pub(crate) owner: &'a str,
    /// Different at every handing out.
    pub(crate) claim: &'a str,
    pub(crate) seconds: f64,
}

/// What happened to a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It is the trial's result.
    Recorded,
    /// It was the trial's result already.
    Known,
    /// The trial had gone to another worker: the result is kept apart.
    Late,
}

impl Store {
    /// Opens a place that may not hold a study yet.
    pub(crate) fn open(location: &Location) -> Result<Self> {
        let name = location.to_string();
        let database: Box<dyn Database> = match &location.place {
            Place::Memory => Box::new(Sqlite::open(":memory:".as_ref())?),
            Place::Sqlite(file) => Box::new(Sqlite::open(file)?),
            #[cfg(feature = "postgres")]
            Place::Postgres { url, schema } => Box::new(Postgres::open(url, schema, &name)?),
            #[cfg(not(feature = "postgres"))]
            Place::Postgres { .. } => {
                return Err(Error::Address {
                    address: name,
                    message: "this caskd was built without the feature `postgres`".to_owned(),
                });
            }
        };
        Ok(Self {
            name,
            database: RefCell::new(database),
        })
    }

    /// Opens an existing study for reading only.
    pub(crate) fn open_read_only(location: &Location) -> Result<Self> {
        match &location.place {
            Place::Sqlite(file) => Ok(Self {
                name: location.to_string(),
                database: RefCell::new(Box::new(Sqlite::open_read_only(file)?)),
            }),
            _ => Self::open(location),
        }
    }

    /// True where there is a study of ours; an error where there is something else.
    pub(crate) fn has_study(&self) -> Result<bool> {
        match self.database.borrow_mut().version()? {
            None => Ok(false),
            Some(SCHEMA_VERSION) => Ok(true),
            Some(version) => Err(Error::StudyForeign {
                path: (&self.name).into(),
                message: format!(
                    "its schema has version {version}, this program knows version {SCHEMA_VERSION}"
                ),
            }),
        }
    }

    /// Writes schema, space and settings in one transaction; false where another process was faster.
    pub(crate) fn create(&self, space: &Space, config: &StudyConfig) -> Result<bool> {
        self.database.borrow_mut().create(&mut |sql| {
            for (key, value) in [
                ("caskd_version", env!("CARGO_PKG_VERSION").to_owned()),
                ("space", space.to_json()),
                ("config", to_json(config)),
            ] {
                sql.execute(
                    "INSERT INTO meta (key, value) VALUES (?1, ?2)",
                    cells![key, value],
                )?;
            }
            Ok(())
        })
    }

    pub(crate) fn space_and_config(&self) -> Result<(String, StudyConfig)> {
        let missing = |what: &str| Error::StudyForeign {
            path: (&self.name).into(),
            message: format!("it has no {what}"),
        };
        let space = self.note("space")?.ok_or_else(|| missing("space"))?;
        let config = self.note("config")?.ok_or_else(|| missing("settings"))?;
        let config = serde_json::from_str(&config).map_err(|error| Error::StudyForeign {
            path: (&self.name).into(),
            message: format!("its settings are unreadable: {error}"),
        })?;
        Ok((space, config))
    }

    pub(crate) fn set_config(&self, config: &StudyConfig) -> Result<()> {
        self.set_note("config", &to_json(config))
    }

    /// A text that is kept with the study.
    pub(crate) fn note(&self, key: &str) -> Result<Option<String>> {
        self.read(|sql| {
            sql.query("SELECT value FROM meta WHERE key = ?1", cells![key])?
                .first()
                .map(|row| row.text(0))
                .transpose()
        })
    }

    /// The texts whose name starts with `prefix`, by what follows it.
    pub(crate) fn notes(&self, prefix: &str) -> Result<BTreeMap<String, String>> {
        self.read(|sql| {
            let rows = sql.query("SELECT key, value FROM meta ORDER BY key", &[])?;
            let mut notes = BTreeMap::new();
            for row in rows {
                if let Some(name) = row.text(0)?.strip_prefix(prefix) {
                    notes.insert(name.to_owned(), row.text(1)?);
                }
            }
            Ok(notes)
        })
    }

    pub(crate) fn set_note(&self, key: &str, value: &str) -> Result<()> {
        self.write(|sql| {
            sql.execute(
                "INSERT INTO meta (key, value) VALUES (?1, ?2)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                cells![key, value],
            )?;
            Ok(())
        })
    }

    /// All trials by number.
    pub(crate) fn trials(&self) -> Result<Vec<TrialRow>> {
        let rows: Vec<RawTrial> = self.read(|sql| {
            sql.query(&format!("SELECT {COLUMNS} FROM trial ORDER BY number"), &[])?
                .iter()
                .map(RawTrial::read)
                .collect()
        })?;
        rows.into_iter().map(|row| row.parse(&self.name)).collect()
    }

    pub(crate) fn late_results(&self) -> Result<Vec<LateResult>> {
        self.read(|sql| {
            sql.query(
                "SELECT trial, value, error, at FROM late_result ORDER BY at, trial, token",
                &[],
            )?
            .iter()
            .map(|row| {
                Ok(LateResult {
                    trial: row.integer(0)? as u64,
                    value: row.maybe_real(1)?,
                    error: row.maybe_text(2)?,
                    at: row.real(3)?,
                })
            })
            .collect()
        })
    }

    /// Takes up the first trial that was given back or whose worker is silent or dead. A trial on which
    /// `max_attempts` workers died becomes a failure instead.
    pub(crate) fn take_up(&self, taker: &Taker<'_>, max_attempts: u64) -> Result<Option<Lease>> {
        let found = self.write(|sql| {
            let mine = sql.query(&lease_query("claim = ?1"), cells![taker.claim])?;
            if let Some(row) = mine.first() {
                return Ok(Some(row.clone()));
            }
            let now = sql.now()?;
            let open = sql.query(
                "SELECT number, state, owner, lease_expires, attempts FROM trial
                 WHERE state IN ('running', 'stopped') ORDER BY number",
                &[],
            )?;
            for trial in open {
                let number = trial.integer(0)?;
                let running = trial.text(1)? == TrialState::Running.name();
                let silent = trial.maybe_real(3)?.is_none_or(|expires| expires < now);
                let dead = trial.maybe_text(2)?.as_deref().is_none_or(is_dead);
                if running && !silent && !dead {
                    continue;
                }
                let attempts = trial.integer(4)? + i64::from(running);
                if running && attempts as u64 >= max_attempts {
                    let error = format!("given up: {attempts} workers died or fell silent on it");
                    sql.execute(
                        "UPDATE trial SET attempts = ?2, token = token + 1 WHERE number = ?1",
                        cells![number, attempts],
                    )?;
                    finish(sql, number, None, Some(&error), 0.0)?;
                    continue;
                }
                sql.execute(
                    "UPDATE trial SET state = 'running', owner = ?2, token = token + 1, claim = ?3,
                            lease_expires = ?4, attempts = ?5 WHERE number = ?1",
                    cells![
                        number,
                        taker.owner,
                        taker.claim,
                        now + taker.seconds,
                        attempts
                    ],
                )?;
                let taken = sql.query(&lease_query("number = ?1"), cells![number])?;
                return Ok(taken.into_iter().next());
            }
            Ok(None)
        })?;
        found.map(|row| self.lease(&row)).transpose()
    }

    fn lease(&self, row: &Record) -> Result<Lease> {
        let read = || -> Outcome<(i64, i64, String, i64, String, i64)> {
            Ok((
                row.integer(0)?,
                row.integer(1)?,
                row.text(2)?,
                row.integer(3)?,
                row.text(4)?,
                row.integer(5)?,
            ))
        };
        let (number, token, params, seed, why, rung) =
            read().map_err(|source| self.wrap(source))?;
        let damaged = |error: serde_json::Error| damaged(&self.name, number as u64, &error);
        Ok(Lease {
            number: number as u64,
            token: token as u64,
            params: serde_json::from_str(&params).map_err(damaged)?,
            seed: seed as u64,
            why: serde_json::from_str(&why).map_err(damaged)?,
            rung: rung as u64,
        })
    }

    /// Writes a new running trial with its lease, unless another worker took its number meanwhile.
    pub(crate) fn insert(&self, trial: &NewTrial<'_>, taker: &Taker<'_>) -> Result<bool> {
        let why = to_json(trial.why);
        self.write(|sql| {
            let mine = sql.query(
                "SELECT number FROM trial WHERE claim = ?1",
                cells![taker.claim],
            )?;
            if !mine.is_empty() {
                return Ok(true);
            }
            let next = sql.query("SELECT count(*) FROM trial", &[])?;
            let next = next.first().map_or(Ok(0), |row| row.integer(0))?;
            if next as u64 != trial.number {
                return Ok(false);
            }
            let now = sql.now()?;
            sql.execute(
                "INSERT INTO trial (number, state, params, seed, why, seen, rung, parent, owner, token, claim,
                                    lease_expires, started_at)
                 VALUES (?1, 'running', ?2, ?3, ?4, ?5, ?6, ?7, ?8, 1, ?9, ?10, ?11)",
                cells![
                    trial.number,
                    trial.params.to_json(),
                    trial.seed,
                    why.as_str(),
                    trial.seen,
                    trial.rung,
                    trial.parent,
                    taker.owner,
                    taker.claim,
                    now + taker.seconds,
                    now
                ],
            )?;
            Ok(true)
        })
    }

    /// Prolongs a lease from now on.
    pub(crate) fn renew(&self, number: u64, token: u64, seconds: f64) -> Result<()> {
        self.write(|sql| {
            let expires = sql.now()? + seconds;
            sql.execute(
                "UPDATE trial SET lease_expires = ?3 WHERE number = ?1 AND token = ?2 AND state = 'running'",
                cells![number, token, expires],
            )?;
            Ok(())
        })
    }

    /// Gives a trial back, to be taken up again.
    pub(crate) fn give_back(&self, number: u64, token: u64, seconds: f64) -> Result<()> {
        self.write(|sql| {
            sql.execute(
                "UPDATE trial SET state = 'stopped', owner = NULL, claim = NULL, lease_expires = NULL,
                        seconds = seconds + ?3
                 WHERE number = ?1 AND token = ?2 AND state = 'running'",
                cells![number, token, seconds],
            )?;
            Ok(())
        })
    }

    /// Records a result. With a `token` that is no longer the trial's, the result is kept apart; without one, the
    /// first result counts. The same result again changes nothing.
    pub(crate) fn tell(
        &self,
        number: u64,
        token: Option<u64>,
        value: Option<f64>,
        error: Option<&str>,
        seconds: f64,
    ) -> Result<Told> {
        self.write(|sql| {
            let found = sql.query(
                "SELECT state, token, value, error FROM trial WHERE number = ?1",
                cells![number],
            )?;
            let Some(row) = found.first() else {
                return Ok(Err(Error::TrialUnknown { trial: number }));
            };
            let finished =
                TrialState::from_name(&row.text(0)?).filter(|state| state.is_finished());
            let current = row.integer(1)? as u64;
            let same_lease = token.is_none_or(|token| token == current);
            match finished {
                Some(_)
                    if same_lease
                        && row.maybe_real(2)? == value
                        && row.maybe_text(3)?.as_deref() == error =>
                {
                    return Ok(Ok(Told::Known));
                }
                Some(state) if token.is_none() => {
                    return Ok(Err(Error::TrialFinished {
                        trial: number,
                        state: state.name(),
                    }));
                }
                None if same_lease => {
                    finish(sql, number as i64, value, error, seconds)?;
                    return Ok(Ok(Told::Recorded));
                }
                _ => {}
            }
            let now = sql.now()?;
            sql.execute(
                "INSERT INTO late_result (trial, token, value, error, at) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (trial, token) DO NOTHING",
                cells![number, token.unwrap_or(current), value, error, now],
            )?;
            Ok(Ok(Told::Late))
        })?
    }

    /// The current lease of a trial.
    pub(crate) fn token(&self, number: u64) -> Result<Option<u64>> {
        let token = self.read(|sql| {
            sql.query("SELECT token FROM trial WHERE number = ?1", cells![number])?
                .first()
                .map(|row| row.integer(0))
                .transpose()
        })?;
        Ok(token.map(|token| token as u64))
    }

    pub(crate) fn discrepancies(&self) -> Result<BTreeMap<(Part, String), f64>> {
        self.read(|sql| {
            sql.query("SELECT part, settings, value FROM discrepancy", &[])?
                .iter()
                .map(|row| {
                    let part = if row.text(0)? == Part::Logits.name() {
                        Part::Logits
                    } else {
                        Part::Hidden
                    };
                    Ok(((part, row.text(1)?), row.real(2)?))
                })
                .collect()
        })
    }

    /// On which parameters S(x) depends, once somebody has measured it.
    pub(crate) fn dependence(&self) -> Result<Option<DependsOn>> {
        let json = self.note("depends_on")?;
        Ok(json.and_then(|json| serde_json::from_str(&json).ok()))
    }

    /// The first objective that measures S(x) decides on which parameters it depends, so that every worker and
    /// every replay looks a measurement up in the same way.
    pub(crate) fn agree_on_dependence(&self, proposed: &DependsOn) -> Result<DependsOn> {
        if let Some(agreed) = self.dependence()? {
            return Ok(agreed);
        }
        let json = to_json(proposed);
        self.write(|sql| {
            sql.execute(
                "INSERT INTO meta (key, value) VALUES ('depends_on', ?1) ON CONFLICT (key) DO NOTHING",
                cells![json.as_str()],
            )?;
            Ok(())
        })?;
        Ok(self.dependence()?.unwrap_or_else(|| proposed.clone()))
    }

    /// Keeps measured discrepancies; what another worker measured first stays.
    pub(crate) fn keep_discrepancies(&self, fresh: &[(Part, String, f64)]) -> Result<()> {
        if fresh.is_empty() {
            return Ok(());
        }
        self.write(|sql| {
            for (part, settings, value) in fresh {
                sql.execute(
                    "INSERT INTO discrepancy (part, settings, value) VALUES (?1, ?2, ?3)
                     ON CONFLICT (part, settings) DO NOTHING",
                    cells![part.name(), settings.as_str(), *value],
                )?;
            }
            Ok(())
        })
    }

    fn read<T>(&self, mut work: impl FnMut(&mut dyn Sql) -> Outcome<T>) -> Result<T> {
        let mut result = None;
        self.database.borrow_mut().read(&mut |sql| {
            result = Some(work(sql)?);
            Ok(())
        })?;
        result.ok_or_else(|| self.unfinished())
    }

    fn write<T>(&self, mut work: impl FnMut(&mut dyn Sql) -> Outcome<T>) -> Result<T> {
        let mut result = None;
        self.database.borrow_mut().write(&mut |sql| {
            result = Some(work(sql)?);
            Ok(())
        })?;
        result.ok_or_else(|| self.unfinished())
    }

    fn unfinished(&self) -> Error {
        self.wrap(DatabaseError::Row("a transaction did nothing".to_owned()))
    }

    fn wrap(&self, source: DatabaseError) -> Error {
        Error::Database {
            path: (&self.name).into(),
            source,
        }
    }
}

fn lease_query(condition: &str) -> String {
    format!(
        "SELECT number, token, params, seed, why, rung FROM trial WHERE state = 'running' AND {condition}"
    )
}

fn finish(
    sql: &mut dyn Sql,
    number: i64,
    value: Option<f64>,
    error: Option<&str>,
    seconds: f64,
) -> Outcome<()> {
    let state = if value.is_some() {
        TrialState::Complete
    } else {
        TrialState::Failed
    };
    let now = sql.now()?;
    sql.execute(
        "UPDATE trial SET state = ?2, value = ?3, error = ?4, seconds = seconds + ?5, finished_at = ?6,
                lease_expires = NULL,
                finish_order = (SELECT coalesce(max(finish_order), 0) + 1 FROM trial)
         WHERE number = ?1",
        cells![number, state.name(), value, error, seconds, now],
    )?;
    Ok(())
}

/// In the order of [`RawTrial::read`].
const COLUMNS: &str = "number, state, params, seed, why, seen, rung, parent, value, error, seconds, attempts, owner, \
                       lease_expires, started_at, finished_at, finish_order";

/// A row before its texts are understood.
struct RawTrial {
    state: String,
    params: String,
    why: String,
    /// Everything that needs no understanding.
    view: TrialView,
    finish_order: Option<u64>,
}

impl RawTrial {
    fn read(row: &Record) -> Outcome<Self> {
        Ok(Self {
            state: row.text(1)?,
            params: row.text(2)?,
            why: row.text(4)?,
            view: TrialView {
                number: row.integer(0)? as u64,
                state: TrialState::Running,
                params: Params::default(),
                value: row.maybe_real(8)?,
                seconds: Some(row.real(10)?),
                why: Why::default(),
                error: row.maybe_text(9)?,
                seed: row.integer(3)? as u64,
                seen: row.integer(5)? as u64,
                rung: row.integer(6)? as u64,
                parent: row.maybe_integer(7)?.map(|parent| parent as u64),
                attempts: row.integer(11)? as u64,
                owner: row.maybe_text(12)?,
                lease_expires: row.maybe_real(13)?,
                started_at: row.real(14)?,
                finished_at: row.maybe_real(15)?,
            },
            finish_order: row.maybe_integer(16)?.map(|order| order as u64),
        })
    }

    fn parse(self, name: &str) -> Result<TrialRow> {
        let number = self.view.number;
        let unreadable = |error: serde_json::Error| damaged(name, number, &error);
        let state = TrialState::from_name(&self.state)
            .ok_or_else(|| damaged(name, number, &format!("its state is `{}`", self.state)))?;
        let seconds = self
            .view
            .seconds
            .filter(|seconds| *seconds > 0.0 || state.is_finished());
        Ok(TrialRow {
            finish_order: self.finish_order,
            view: TrialView {
                state,
                seconds,
                params: serde_json::from_str(&self.params).map_err(unreadable)?,
                why: serde_json::from_str(&self.why).map_err(unreadable)?,
                ..self.view
            },
        })
    }
}

fn damaged(name: &str, trial: u64, message: &dyn std::fmt::Display) -> Error {
    Error::StudyDamaged {
        path: name.into(),
        trial,
        message: message.to_string(),
    }
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    // The types written here have string keys and finite numbers only, which cannot fail.
    serde_json::to_string(value).unwrap_or_default()
}
