//! Proof that a cache is what was written.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::alignment::{Alignment, AlignmentCheck};
use crate::cache::{Cache, Columns, RowInfo};
use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::sequence::{Sequence, Statistics, TopK, count_targets, token_digest};
use crate::shard::hidden_column;
use crate::store::{MANIFEST, Storage, Store};
use crate::topk::is_argmax_first;

/// Problems listed per shard; the rest is counted.
const LISTED: usize = 20;

/// One thing that is wrong.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file: its name in the cache's folder, or its path elsewhere.
    pub file: String,
    /// The column, where it can be told.
    pub column: Option<String>,
    /// The row, where it can be told.
    pub row: Option<u64>,
    /// What is wrong.
    pub message: String,
}

/// What [`verify`] found.
#[derive(Serialize, Clone, Debug, PartialEq)]
pub struct VerifyReport {
    /// No problem at all.
    pub ok: bool,
    /// Files looked at.
    pub files: usize,
    /// Rows of the shards looked at.
    pub rows: u64,
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
    /// Whether the labels fit the logits: looked at in the deep form, where there is a top-k.
    pub alignment: Option<Alignment>,
}

/// Compares every file with its digest; in a file that differs, looks for the rows and columns. `deep` also decodes
/// every row and checks that its columns agree.
///
/// # Errors
/// Only where there is no cache to speak of ([`Error::NotACache`], [`Error::Unfinished`], [`Error::UnknownVersion`]) or
/// the disk refuses; damage is in the report.
pub fn verify(dir: &Path, deep: bool) -> Result<VerifyReport> {
    verify_store(Store::local(dir), deep, &mut |_, _| {})
}

/// The same in any storage: [`crate::Spread`] where shards lie in other folders. `progress` hears (bytes done, all bytes); those
/// that are decoded count twice.
pub fn verify_in(
    storage: Arc<dyn Storage>,
    deep: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<VerifyReport> {
    verify_store(Store::new(storage), deep, progress)
}

fn verify_store(
    store: Store,
    deep: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<VerifyReport> {
    let mut report = VerifyReport {
        ok: false,
        files: 1,
        rows: 0,
        problems: Vec::new(),
        alignment: None,
    };
    let manifest = match Manifest::load(&store) {
        Ok(manifest) => manifest,
        Err(error @ (Error::Damaged { .. } | Error::UnknownCodec { .. })) => {
            report.problems.push(problem(error, MANIFEST));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    // A damaged manifest may name any sizes.
    let shards = manifest.shards.iter().map(|info| info.bytes);
    let again = shards.clone().filter(|_| deep);
    let head = manifest.head.iter().map(|info| info.bytes);
    let basis = manifest.code.iter().map(|code| code.basis.bytes);
    let total = shards
        .chain(again)
        .chain(head)
        .chain(basis)
        .fold(0, u64::saturating_add);
    let mut done = 0_u64;
    let mut advance = |bytes: u64| {
        done = done.saturating_add(bytes);
        progress(done, total);
    };
    let mut states = Vec::with_capacity(manifest.shards.len());
    for info in &manifest.shards {
        states.push(check_file(
            &store,
            &mut report,
            &info.file,
            info.bytes,
            &info.digest,
        )?);
        report.rows += info.sequences;
        advance(info.bytes);
    }
    let mut head_is_whole = true;
    if let Some(info) = &manifest.head {
        head_is_whole =
            check_file(&store, &mut report, &info.file, info.bytes, &info.digest)? == State::Whole;
        advance(info.bytes);
    }
    if let Some(code) = &manifest.code {
        let info = &code.basis;
        check_file(&store, &mut report, &info.file, info.bytes, &info.digest)?;
        advance(info.bytes);
    }
    let cache = Cache::for_verification(store, manifest.clone());
    let mut alignment = AlignmentCheck::default();
    for (index, state) in states.into_iter().enumerate() {
        match state {
            State::Whole if deep => look(
                &cache,
                index,
                Depth::Agreement,
                &mut report.problems,
                &mut alignment,
            ),
            State::Changed => look(
                &cache,
                index,
                Depth::Checksums,
                &mut report.problems,
                &mut alignment,
            ),
            State::Whole | State::Unreadable => {}
        }
        if deep {
            advance(manifest.shards[index].bytes);
        }
    }
    if deep
        && head_is_whole
        && let Err(error) = cache.head()
    {
        report.problems.push(problem(error, MANIFEST));
    }
    report.ok = report.problems.is_empty();
    report.alignment = alignment.finish();
    Ok(report)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Whole,
    Changed,
    Unreadable,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Find the damaged rows and columns.
    Checksums,
    /// Also compare the columns with each other.
    Agreement,
}

fn check_file(
    store: &Store,
    report: &mut VerifyReport,
    file: &str,
    expected: u64,
    digest: &str,
) -> Result<State> {
    report.files += 1;
    let called = store.called(file);
    let (error, state) = match store.check(file, expected) {
        Ok(()) if store.digest(file)? == digest => return Ok(State::Whole),
        Ok(()) => {
            let error = Error::damaged(&called, "its digest does not match");
            (error, State::Changed)
        }
        Err(error @ (Error::Missing { .. } | Error::WrongLength { .. })) => {
            (error, State::Unreadable)
        }
        Err(error) => return Err(error),
    };
    report.problems.push(problem(error, &called));
    Ok(state)
}

fn problem(error: Error, file: &str) -> Problem {
    match error {
        Error::Damaged {
            file,
            column,
            row,
            message,
        } => Problem {
            file,
            column,
            row,
            message,
        },
        Error::UnknownCodec {
            file,
            column,
            codec,
            version,
        } => Problem {
            file,
            column: Some(column),
            row: None,
            message: format!("codec {codec} version {version} is unknown"),
        },
        other => Problem {
            file: file.to_owned(),
            column: None,
            row: None,
            message: other.to_string(),
        },
    }
}

/// Reads a shard column by column and row by row.
fn look(
    cache: &Cache,
    index: usize,
    depth: Depth,
    problems: &mut Vec<Problem>,
    alignment: &mut AlignmentCheck,
) {
    let manifest = cache.manifest();
    let file = cache.called(&manifest.shards[index].file);
    let file = file.as_str();
    let mut found = Vec::new();
    let rows = match cache.shard_rows(index) {
        Ok(rows) => rows,
        Err(error) => {
            found.push(problem(error, file));
            Vec::new()
        }
    };
    let mut selections = vec![
        (
            "source, token_ids, loss_mask".to_owned(),
            Columns::default(),
        ),
        (
            "statistics".to_owned(),
            Columns {
                statistics: true,
                ..Columns::default()
            },
        ),
    ];
    if manifest.top_k > 0 {
        selections.push((
            "top_k".to_owned(),
            Columns {
                top_k: true,
                ..Columns::default()
            },
        ));
    }
    if manifest.code.is_some() {
        let columns = Columns {
            coefficients: true,
            ..Columns::default()
        };
        selections.push(("coefficients".to_owned(), columns));
    }
    for layer in &manifest.layers {
        let columns = Columns {
            layers: vec![layer.layer],
            ..Columns::default()
        };
        selections.push((hidden_column(layer.layer), columns));
    }
    for row in 0..manifest.shards[index].sequences as u32 {
        if depth == Depth::Agreement {
            match cache.read(index as u32, &[row], &Columns::all(manifest)) {
                Ok(sequences) => {
                    for sequence in &sequences {
                        alignment.add(sequence);
                        let disagreement = disagreement(manifest, sequence, rows.get(row as usize));
                        found.extend(disagreement.map(|(column, message)| Problem {
                            file: file.to_owned(),
                            column: Some(column),
                            row: Some(u64::from(row)),
                            message,
                        }));
                    }
                    continue;
                }
                Err(error) => found.push(problem(error, file)),
            }
        }
        for (name, columns) in &selections {
            if let Err(error) = cache.read(index as u32, &[row], columns) {
                let mut problem = problem(error, file);
                // The Parquet library does not say which row it could not decode.
                problem.column.get_or_insert_with(|| name.clone());
                problem.row.get_or_insert(u64::from(row));
                // Every later selection meets damaged tokens again.
                if !found.contains(&problem) {
                    found.push(problem);
                }
                if *columns == Columns::default() {
                    break;
                }
            }
        }
    }
    if found.len() > LISTED {
        let more = found.len() - LISTED;
        found.truncate(LISTED);
        found.push(Problem {
            file: file.to_owned(),
            column: None,
            row: None,
            message: format!("{more} more problems"),
        });
    }
    problems.extend(found);
}

/// The first column that contradicts another one.
fn disagreement(
    manifest: &Manifest,
    sequence: &Sequence,
    row: Option<&RowInfo>,
) -> Option<(String, String)> {
    let positions = sequence.token_ids.len();
    let wrong = |column: &str, message: String| Some((column.to_owned(), message));
    if let Some(row) = row {
        if row.positions as usize != positions || row.targets != count_targets(&sequence.loss_mask)
        {
            return wrong(
                "positions",
                "positions or targets contradict token_ids or loss_mask".to_owned(),
            );
        }
        if row.token_digest != token_digest(&sequence.token_ids)
            || row.split_hash != crate::split_hash(&sequence.token_ids)
        {
            return wrong(
                "token_digest",
                "it is not the digest of token_ids".to_owned(),
            );
        }
    }
    if positions == 0 || positions > manifest.max_len {
        return wrong("token_ids", format!("{positions} positions"));
    }
    if let Some(id) = sequence
        .token_ids
        .iter()
        .find(|id| **id as usize >= manifest.vocab_size)
    {
        return wrong(
            "token_ids",
            format!("token id {id} is beyond the vocabulary"),
        );
    }
    if let Some(statistics) = &sequence.statistics {
        for position in 0..positions {
            if let Some((column, message)) = statistics_disagree(manifest, statistics, position) {
                return wrong(column, format!("{message} at position {position}"));
            }
            if let Some(top_k) = &sequence.top_k
                && let Some(message) = top_k_disagrees(manifest, top_k, statistics, position)
            {
                return wrong("top_k", format!("{message} at position {position}"));
            }
        }
    }
    for state in &sequence.hidden {
        if let Some(at) = state.values.iter().position(|value| !value.is_finite()) {
            return wrong(
                &hidden_column(state.layer),
                format!("{} at value {at}", state.values[at]),
            );
        }
    }
    None
}

fn statistics_disagree(
    manifest: &Manifest,
    statistics: &Statistics,
    at: usize,
) -> Option<(&'static str, String)> {
    let (mean, std) = (statistics.mean[at], statistics.std[at]);
    let (min, max, sum) = (
        statistics.min[at],
        statistics.max[at],
        statistics.log_sum_exp[at],
    );
    // Room for the rounding of sums over the vocabulary in f32.
    let slack = 1e-3 + 1e-4 * max.abs();
    if !max.is_finite() {
        Some(("max", format!("{max}")))
    } else if !sum.is_finite()
        || sum < max - slack
        || sum > max + (manifest.vocab_size as f32).ln() + slack
    {
        Some((
            "log_sum_exp",
            format!("{sum} is not between max and max + ln V"),
        ))
    } else if std.is_nan() || std < 0.0 {
        Some(("std", format!("{std}")))
    } else if min.is_nan() || min > max {
        Some(("min", format!("{min} is above the maximum")))
    } else if mean.is_nan() || mean > max + slack || mean < min - slack {
        Some(("mean", format!("{mean} is not between minimum and maximum")))
    } else {
        None
    }
}

fn top_k_disagrees(
    manifest: &Manifest,
    top_k: &TopK,
    statistics: &Statistics,
    at: usize,
) -> Option<String> {
    let logits = &top_k.logits[at * top_k.k..(at + 1) * top_k.k];
    let ids = &top_k.ids[at * top_k.k..(at + 1) * top_k.k];
    let (min, max) = (statistics.min[at], statistics.max[at]);
    if logits[0] != max {
        return Some(format!(
            "the first logit {} is not the maximum {max}",
            logits[0]
        ));
    }
    if logits.iter().any(|logit| logit.is_nan()) || logits.windows(2).any(|pair| pair[0] < pair[1])
    {
        return Some("the logits do not descend".to_owned());
    }
    // The grid of the compact tier makes ties of its own.
    if manifest.code.is_none() && !is_argmax_first(logits, ids) {
        return Some("of equal largest logits the lower token id does not come first".to_owned());
    }
    // f16 keeps eleven bits of the distance to the maximum and nothing beyond 65504 of it.
    let last = logits[logits.len() - 1];
    if last < min - (max - min) / 1024.0 - 1e-3 && min.is_finite() {
        return Some(format!("the logit {last} is below the minimum {min}"));
    }
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted
        .windows(2)
        .any(|pair| pair[0] == pair[1])
        .then(|| "a token id comes twice".to_owned())
}
