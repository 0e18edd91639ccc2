//! A build for many machines, written down: one task a shard, which any worker can do at any time.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use caskd_formats::{CacheWriter, TaskInfo, Work};
use serde::{Deserialize, Serialize};

use crate::build::{BuildReport, Progress};
use crate::data::TokenizedSequence;
use crate::options::BuildOptions;
use crate::prepare::prepare;
use crate::{Error, Result, fidelity};

/// Far above the tokens of the largest shard; a damaged task must not ask for more.
const TASK_LIMIT: u64 = 4 << 30;

/// What a plan holds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PlanReport {
    /// False when it was stopped and can be resumed.
    pub completed: bool,
    /// Tasks, one a shard.
    pub tasks: usize,
    /// What is known of the data, and of the fit; the rest of a build is still to come.
    #[serde(skip)]
    pub data: BuildReport,
    /// Sequences in the cache to be.
    pub sequences: u64,
    /// Their positions.
    pub positions: u64,
    /// Positions that a loss may ask for.
    pub targets: u64,
    /// Records cut at the longest length.
    pub truncated: u64,
    /// Records dropped because the cut left no target.
    pub skipped: u64,
    /// Records that could not be used.
    pub bad_records: u64,
    /// Sequences left out because the same tokens had come before.
    pub duplicates: u64,
    /// The compact tier's K, and coefficients of a position.
    pub code: Option<(usize, usize)>,
    /// Seconds in the fit of the compact tier.
    pub fit_seconds: f64,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// What the planner leaves for its workers beside the spec.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Instructions {
    /// Where the teacher was when the plan was written.
    pub(crate) teacher: PathBuf,
    /// Tokens of a batch at most: another limit rounds differently.
    pub(crate) batch_tokens: usize,
    /// Shard and row of the sequences that the fidelity is measured on; none where it is not.
    pub(crate) sample: Vec<(usize, u32)>,
}

/// Writes the plan of the build that `options` ask for: LM head, basis, and the tokens of every shard.
///
/// # Errors
/// As [`crate::build()`], before its first shard.
pub fn plan(
    options: &BuildOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<PlanReport> {
    let started = Instant::now();
    let Some(mut prepared) = prepare(options, stop, progress)? else {
        return Ok(PlanReport::default());
    };
    let data = BuildReport::of(&prepared);
    let mut report = PlanReport {
        completed: false,
        tasks: prepared.shards.len(),
        sequences: data.sequences,
        positions: data.positions,
        targets: data.targets,
        truncated: data.truncated,
        skipped: data.skipped,
        bad_records: data.bad_records,
        duplicates: data.duplicates,
        code: data.code,
        fit_seconds: data.fit_seconds,
        seconds: started.elapsed().as_secs_f64(),
        data,
    };
    let Some(writer) = prepared.writer.take() else {
        return Ok(report);
    };
    if !writer.is_finished() {
        write_tasks(options, writer, &prepared.sequences, &prepared.shards)?;
    }
    report.completed = true;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn write_tasks(
    options: &BuildOptions,
    writer: CacheWriter,
    sequences: &[TokenizedSequence],
    shards: &[std::ops::Range<usize>],
) -> Result<Work> {
    let tasks: Vec<TaskInfo> = shards
        .iter()
        .enumerate()
        .map(|(shard, range)| {
            let of_shard = &sequences[range.clone()];
            let positions = of_shard.iter().map(|one| one.token_ids.len() as u64).sum();
            Ok(writer.write_task(shard, positions, &encode_task(of_shard)?)?)
        })
        .collect::<Result<_>>()?;
    let instructions = Instructions {
        // Workers may start elsewhere. A name that is no path stays as it is.
        teacher: options
            .teacher
            .canonicalize()
            .unwrap_or_else(|_| options.teacher.clone()),
        batch_tokens: options.batch_tokens,
        sample: if options.fidelity {
            fidelity::sample_places(sequences, shards)
        } else {
            Vec::new()
        },
    };
    let instructions = serde_json::to_value(instructions).map_err(|error| task_fault(&error))?;
    Ok(writer.publish_work(tasks, instructions)?)
}

/// JSON in zstd: ids and masks take about two bytes a position.
fn encode_task(sequences: &[TokenizedSequence]) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(sequences).map_err(|error| task_fault(&error))?;
    zstd::encode_all(text.as_slice(), 1).map_err(|error| task_fault(&error))
}

pub(crate) fn decode_task(bytes: &[u8]) -> Result<Vec<TokenizedSequence>> {
    let text = zstd::Decoder::new(bytes).map_err(|error| task_fault(&error))?;
    let text = std::io::BufReader::new(std::io::Read::take(text, TASK_LIMIT));
    serde_json::from_reader(text).map_err(|error| task_fault(&error))
}

/// What the planner left in a plan's `builder` field.
pub(crate) fn instructions(work: &Work) -> Result<Instructions> {
    serde_json::from_value(work.builder.clone()).map_err(|error| task_fault(&error))
}

/// The teacher that a worker or committer was given, or else the planner's.
pub(crate) fn teacher_path(given: Option<&Path>, instructions: &Instructions) -> PathBuf {
    given.map_or_else(|| instructions.teacher.clone(), Path::to_owned)
}

fn task_fault(error: &dyn std::error::Error) -> Error {
    Error::Plan {
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_comes_back_as_it_was() {
        let sequences: Vec<TokenizedSequence> = (1..40)
            .map(|length: usize| TokenizedSequence {
                source: format!("a.jsonl:{length}"),
                token_ids: (0..length as u32).map(|id| id * 7919 % 50_000).collect(),
                loss_mask: (0..length).map(|at| at % 3 != 0).collect(),
            })
            .collect();
        let bytes = encode_task(&sequences).unwrap();
        assert_eq!(decode_task(&bytes).unwrap(), sequences);
        assert!(decode_task(&bytes[..bytes.len() / 2]).is_err());
        assert!(decode_task(b"no task").is_err());
    }
}
