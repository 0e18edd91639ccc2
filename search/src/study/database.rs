//! The one seam between a study and the database that holds it.
//!
//! Both databases take the same statements (parameters are written `?1`), so that what a study does is written once.
//! A write is alone: no other write of the same study runs at the same time, and what it changed is on the disk
//! before it counts. A write may be repeated after a lost connection, therefore each one must find out what an
//! earlier try of itself has already done.

use crate::error::{DatabaseError, Result};

/// One value of a row or a statement.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cell {
    Null,
    Integer(i64),
    Real(f64),
    Text(String),
}

/// What goes wrong inside a transaction.
pub(crate) type Outcome<T> = std::result::Result<T, DatabaseError>;

/// An open transaction.
pub(crate) trait Sql {
    /// Runs a statement and returns how many rows it changed.
    fn execute(&mut self, sql: &str, values: &[Cell]) -> Outcome<u64>;

    /// Runs a query and returns its rows.
    fn query(&mut self, sql: &str, values: &[Cell]) -> Outcome<Vec<Record>>;

    /// Seconds since 1970 by the clock that all workers of the study share.
    fn now(&mut self) -> Outcome<f64>;
}

/// The work of one transaction.
pub(crate) type Work<'a> = dyn FnMut(&mut dyn Sql) -> Outcome<()> + 'a;

/// A database that holds one study.
pub(crate) trait Database {
    /// Whether a study of ours is there: the version of its schema, or `None` in an empty place. Something else in
    /// its place is an error.
    fn version(&mut self) -> Result<Option<i64>>;

    /// Makes the tables and fills them in one transaction; false where a study is there already.
    fn create(&mut self, fill: &mut Work<'_>) -> Result<bool>;

    /// One consistent look.
    fn read(&mut self, work: &mut Work<'_>) -> Result<()>;

    /// One change.
    fn write(&mut self, work: &mut Work<'_>) -> Result<()>;
}

/// One row of a result.
#[derive(Debug, Clone)]
pub(crate) struct Record(pub(crate) Vec<Cell>);

impl Record {
    pub(crate) fn integer(&self, column: usize) -> Outcome<i64> {
        match self.0.get(column) {
            Some(Cell::Integer(value)) => Ok(*value),
            other => Err(unexpected(column, "a whole number", other)),
        }
    }

    pub(crate) fn maybe_integer(&self, column: usize) -> Outcome<Option<i64>> {
        match self.0.get(column) {
            Some(Cell::Null) => Ok(None),
            _ => self.integer(column).map(Some),
        }
    }

    pub(crate) fn real(&self, column: usize) -> Outcome<f64> {
        match self.0.get(column) {
            Some(Cell::Real(value)) => Ok(*value),
            Some(Cell::Integer(value)) => Ok(*value as f64),
            other => Err(unexpected(column, "a number", other)),
        }
    }

    pub(crate) fn maybe_real(&self, column: usize) -> Outcome<Option<f64>> {
        match self.0.get(column) {
            Some(Cell::Null) => Ok(None),
            _ => self.real(column).map(Some),
        }
    }

    pub(crate) fn text(&self, column: usize) -> Outcome<String> {
        match self.0.get(column) {
            Some(Cell::Text(value)) => Ok(value.clone()),
            other => Err(unexpected(column, "a text", other)),
        }
    }

    pub(crate) fn maybe_text(&self, column: usize) -> Outcome<Option<String>> {
        match self.0.get(column) {
            Some(Cell::Null) => Ok(None),
            _ => self.text(column).map(Some),
        }
    }
}

fn unexpected(column: usize, wanted: &str, found: Option<&Cell>) -> DatabaseError {
    DatabaseError::Row(format!(
        "column {column} holds {found:?} instead of {wanted}"
    ))
}

impl From<i64> for Cell {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

impl From<u64> for Cell {
    fn from(value: u64) -> Self {
        Self::Integer(value as i64)
    }
}

impl From<f64> for Cell {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<&str> for Cell {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Cell {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// A list of [`Cell`]s from anything that becomes one.
macro_rules! cells {
    ($($value:expr),* $(,)?) => { &[$($crate::study::database::Cell::from($value)),*] };
}
pub(crate) use cells;
