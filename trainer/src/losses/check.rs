//! Is a key's value possible?

use std::fmt::Display;

/// A value that a key of a loss does not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadKey {
    /// The key.
    pub key: &'static str,
    /// As it was given.
    pub value: String,
    /// What is wrong with it.
    pub message: &'static str,
}

pub(super) fn that(
    key: &'static str,
    fits: bool,
    value: impl Display,
    message: &'static str,
) -> Result<(), BadKey> {
    if fits {
        return Ok(());
    }
    let value = value.to_string();
    Err(BadKey {
        key,
        value,
        message,
    })
}

pub(super) fn positive(key: &'static str, value: f64) -> Result<(), BadKey> {
    let fits = value > 0.0 && value.is_finite();
    that(key, fits, value, "it must be above 0")
}

pub(super) fn not_negative(key: &'static str, value: f64) -> Result<(), BadKey> {
    let fits = value >= 0.0 && value.is_finite();
    that(key, fits, value, "it must not be below 0")
}

pub(super) fn inside_unit(key: &'static str, value: f64) -> Result<(), BadKey> {
    let fits = value > 0.0 && value < 1.0;
    that(key, fits, value, "it must be above 0 and below 1")
}

pub(super) fn at_least(key: &'static str, value: usize, least: usize) -> Result<(), BadKey> {
    let message = if least == 2 {
        "it must be at least 2"
    } else {
        "it must be at least 1"
    };
    that(key, value >= least, value, message)
}
