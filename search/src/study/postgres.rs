//! A study in PostgreSQL, for workers on several machines: one schema per study.
//!
//! Every change first takes the study's advisory lock, so that changes follow one another and, at READ COMMITTED,
//! each sees all that came before. A transaction that failed because the server or the connection went away, or
//! because the server chose it as a victim, is tried again for a minute.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use postgres::error::SqlState;
use postgres::types::{FromSql, IsNull, ToSql, Type};
use postgres::{Client, Config, IsolationLevel, NoTls, Transaction};

use super::database::{Cell, Database, Outcome, Record, Sql, Work};
use super::store::SCHEMA_VERSION;
use crate::error::{BoxError, DatabaseError, Error, Result};

/// How long a server that went away is waited for.
const PATIENCE: Duration = Duration::from_mins(1);
/// The same for a server that was never there.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(10);

pub(super) struct Postgres {
    config: Config,
    schema: String,
    /// For messages.
    name: String,
    client: Option<Client>,
    /// The server has answered once.
    known: bool,
}

impl Postgres {
    pub(super) fn open(url: &str, schema: &str, name: &str) -> Result<Self> {
        let mut config: Config = url
            .parse()
            .map_err(|error: postgres::Error| Error::Address {
                address: name.to_owned(),
                message: DatabaseError::from(error).to_string(),
            })?;
        config
            .connect_timeout(CONNECT)
            .application_name("caskd")
            // Parameters of a session: a commit that was acknowledged survives the server's death, and a worker
            // that hangs inside a transaction does not hold up the others for ever.
            .options("-c synchronous_commit=on -c idle_in_transaction_session_timeout=30s -c client_min_messages=warning");
        Ok(Self {
            config,
            schema: schema.to_owned(),
            name: name.to_owned(),
            client: None,
            known: false,
        })
    }

    /// Runs `work` in a transaction until it is committed, with every failure that passes.
    fn persist<T>(
        &mut self,
        kind: Kind,
        work: &mut dyn FnMut(&mut Transaction<'_>, &str) -> Outcome<T>,
    ) -> Result<T> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(20);
        loop {
            let error = match self.attempt(kind, work) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if self.client.as_ref().is_some_and(Client::is_closed) || error.lost() {
                self.client = None;
            }
            let patience = if self.known { PATIENCE } else { FIRST_PATIENCE };
            if !error.passes() || begun.elapsed() > patience {
                return Err(Error::Database {
                    path: (&self.name).into(),
                    source: error,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    fn attempt<T>(
        &mut self,
        kind: Kind,
        work: &mut dyn FnMut(&mut Transaction<'_>, &str) -> Outcome<T>,
    ) -> Outcome<T> {
        if self.client.is_none() {
            let mut client = self.config.connect(NoTls)?;
            client.batch_execute(&format!("SET search_path TO {}", self.schema))?;
            self.client = Some(client);
            self.known = true;
        }
        let Some(client) = &mut self.client else {
            return Err(DatabaseError::Row("there is no connection".to_owned()));
        };
        let builder = client.build_transaction();
        let mut transaction = match kind {
            Kind::Read => builder
                .isolation_level(IsolationLevel::RepeatableRead)
                .read_only(true),
            Kind::Write => builder.isolation_level(IsolationLevel::ReadCommitted),
        }
        .start()?;
        if kind == Kind::Write {
            transaction.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
                &[&self.schema],
            )?;
        }
        let done = work(&mut transaction, &self.schema)?;
        transaction.commit()?;
        Ok(done)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

impl Database for Postgres {
    fn version(&mut self) -> Result<Option<i64>> {
        enum Found {
            Nothing,
            Foreign,
            Version(i64),
        }
        let found = self.persist(Kind::Read, &mut |tx, schema| {
            let tables: i64 = tx
                .query_one(
                    "SELECT count(*) FROM pg_tables WHERE schemaname = $1",
                    &[&schema],
                )?
                .get(0);
            if tables == 0 {
                return Ok(Found::Nothing);
            }
            let ours: i64 = tx
                .query_one(
                    "SELECT count(*) FROM pg_tables WHERE schemaname = $1 AND tablename IN ('meta', 'trial')",
                    &[&schema],
                )?
                .get(0);
            if ours != 2 {
                return Ok(Found::Foreign);
            }
            let version: Option<String> = tx
                .query_opt("SELECT value FROM meta WHERE key = 'schema_version'", &[])?
                .map(|row| row.get(0));
            Ok(version
                .and_then(|version| version.parse().ok())
                .map_or(Found::Foreign, Found::Version))
        })?;
        match found {
            Found::Nothing => Ok(None),
            Found::Version(version) => Ok(Some(version)),
            Found::Foreign => Err(Error::StudyForeign {
                path: (&self.name).into(),
                message: "the schema holds another program's tables".to_owned(),
            }),
        }
    }

    fn create(&mut self, fill: &mut Work<'_>) -> Result<bool> {
        let tables = include_str!("schema.sql")
            .replace("INTEGER", "BIGINT")
            .replace("REAL", "DOUBLE PRECISION")
            .replace(" STRICT", "");
        self.persist(Kind::Write, &mut |tx, schema| {
            let there: i64 = tx
                .query_one(
                    "SELECT count(*) FROM pg_tables WHERE schemaname = $1",
                    &[&schema],
                )?
                .get(0);
            if there > 0 {
                return Ok(false);
            }
            tx.batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {schema}"))?;
            tx.batch_execute(&tables)?;
            tx.execute(
                "INSERT INTO meta (key, value) VALUES ('schema_version', $1)",
                &[&SCHEMA_VERSION.to_string()],
            )?;
            fill(&mut Open(tx))?;
            Ok(true)
        })
    }

    fn read(&mut self, work: &mut Work<'_>) -> Result<()> {
        self.persist(Kind::Read, &mut |tx, _| work(&mut Open(tx)))
    }

    fn write(&mut self, work: &mut Work<'_>) -> Result<()> {
        self.persist(Kind::Write, &mut |tx, _| work(&mut Open(tx)))
    }
}

struct Open<'a, 'b>(&'a mut Transaction<'b>);

impl Sql for Open<'_, '_> {
    fn execute(&mut self, sql: &str, values: &[Cell]) -> Outcome<u64> {
        Ok(self.0.execute(&numbered(sql), &borrowed(values))?)
    }

    fn query(&mut self, sql: &str, values: &[Cell]) -> Outcome<Vec<Record>> {
        let rows = self.0.query(&numbered(sql), &borrowed(values))?;
        rows.iter()
            .map(|row| {
                let cells = (0..row.len()).map(|column| Ok(row.try_get(column)?));
                Ok(Record(cells.collect::<Outcome<_>>()?))
            })
            .collect()
    }

    fn now(&mut self) -> Outcome<f64> {
        let row = self.0.query_one(
            "SELECT extract(epoch FROM clock_timestamp())::double precision",
            &[],
        )?;
        Ok(row.try_get(0)?)
    }
}

/// `?1` is `$1` here; no statement holds a question mark otherwise.
fn numbered(sql: &str) -> String {
    sql.replace('?', "$")
}

fn borrowed(values: &[Cell]) -> Vec<&(dyn ToSql + Sync)> {
    values
        .iter()
        .map(|value| value as &(dyn ToSql + Sync))
        .collect()
}

impl ToSql for Cell {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> std::result::Result<IsNull, BoxError> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Integer(integer) if *ty == Type::FLOAT8 => (*integer as f64).to_sql(ty, out),
            Self::Integer(integer) => integer.to_sql(ty, out),
            Self::Real(real) => real.to_sql(ty, out),
            // The one character that PostgreSQL's texts cannot hold.
            Self::Text(text) => text.replace('\0', "\u{fffd}").to_sql(ty, out),
        }
    }

    fn accepts(ty: &Type) -> bool {
        [Type::INT8, Type::FLOAT8, Type::TEXT].contains(ty)
    }

    postgres::types::to_sql_checked!();
}

impl<'a> FromSql<'a> for Cell {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> std::result::Result<Self, BoxError> {
        Ok(match *ty {
            Type::INT8 => Self::Integer(i64::from_sql(ty, raw)?),
            Type::FLOAT8 => Self::Real(f64::from_sql(ty, raw)?),
            _ => Self::Text(String::from_sql(ty, raw)?),
        })
    }

    fn from_sql_null(_: &Type) -> std::result::Result<Self, BoxError> {
        Ok(Self::Null)
    }

    fn accepts(ty: &Type) -> bool {
        [Type::INT8, Type::FLOAT8, Type::TEXT].contains(ty)
    }
}

impl DatabaseError {
    /// The connection is gone.
    fn lost(&self) -> bool {
        match self {
            Self::Postgres(error) => error.is_closed() || error.as_db_error().is_none(),
            _ => false,
        }
    }

    /// The same transaction may succeed later.
    fn passes(&self) -> bool {
        let Self::Postgres(error) = self else {
            return false;
        };
        match error.code() {
            Some(code) => {
                [
                    SqlState::T_R_SERIALIZATION_FAILURE,
                    SqlState::T_R_DEADLOCK_DETECTED,
                    SqlState::ADMIN_SHUTDOWN,
                    SqlState::CRASH_SHUTDOWN,
                    SqlState::CANNOT_CONNECT_NOW,
                    SqlState::TOO_MANY_CONNECTIONS,
                    SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
                ]
                .contains(code)
                    // Class 08: connection exceptions.
                    || code.code().starts_with("08")
            }
            // No answer of the server: the connection broke, or none could be made.
            None => !error.to_string().contains("invalid configuration"),
        }
    }
}
