//! What a build may choose about its data.

use std::collections::BTreeMap;
use std::path::PathBuf;

use caskd_formats::LossOn;

use super::record::FIELDS;
use crate::{Error, Result};

/// How data files become sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataOptions {
    /// Field of a record form to the column or key that holds it, where the file calls it otherwise.
    pub columns: BTreeMap<String, String>,
    /// Which tokens are targets.
    pub loss_on: LossOn,
    /// How an instruction record becomes a prompt.
    pub prompt: PromptForm,
    /// One of the tokenizer's chat templates by name, or a file with another one (Jinja).
    pub chat_template: Option<PathBuf>,
    /// The date that chat templates are told, in place of [`USUAL_CHAT_DATE`].
    pub chat_date: Option<chrono::NaiveDate>,
    /// Put several short records into one sequence.
    pub pack: bool,
    /// Keep sequences whose token digest has come before.
    pub keep_duplicates: bool,
    /// Share of the hash range, in millionths, that is kept for validation.
    pub validation_millionths: u32,
    /// What a bad record does.
    pub on_error: OnError,
    /// Sequences that are taken at most, the first ones, before any are packed together.
    pub limit: Option<usize>,
}

/// How an instruction record becomes a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PromptForm {
    /// As Stanford Alpaca words it.
    #[default]
    Alpaca,
    /// As a conversation of one question and one answer, by the chat template.
    Chat,
}

impl PromptForm {
    /// The name in the manifest.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca-v1",
            Self::Chat => "chat",
        }
    }
}

/// What a record does that can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// It stops the build.
    #[default]
    Stop,
    /// It is named, counted and passed over.
    Skip,
}

/// What chat templates that ask for today's date are told. The real date would give another cache every day.
pub const USUAL_CHAT_DATE: chrono::NaiveDate = match chrono::NaiveDate::from_ymd_opt(2024, 7, 26) {
    Some(date) => date,
    None => chrono::NaiveDate::MIN,
};

impl DataOptions {
    /// Takes `--column FIELD=NAME` entries.
    ///
    /// # Errors
    /// An entry of another form, an unknown field, a field named twice.
    pub fn set_columns(&mut self, entries: &[String]) -> Result<()> {
        let refuse = |problem: String| Error::Option {
            problem,
            hint: format!(
                "--column FIELD=NAME with one of {}; for instance --column text=body",
                FIELDS.join(", ")
            ),
        };
        for entry in entries {
            let (field, name) = entry
                .split_once('=')
                .filter(|(_, name)| !name.is_empty())
                .ok_or_else(|| refuse(format!("--column {entry} is not FIELD=NAME")))?;
            if !FIELDS.contains(&field) {
                return Err(refuse(format!("no record form has a field `{field}`")));
            }
            if self
                .columns
                .insert(field.to_owned(), name.to_owned())
                .is_some()
            {
                return Err(refuse(format!("--column names `{field}` twice")));
            }
        }
        Ok(())
    }

    /// The key under which a record has `field`.
    pub(crate) fn key<'a>(&'a self, field: &'a str) -> &'a str {
        self.columns.get(field).map_or(field, String::as_str)
    }
}
