//! The stage: one pass of the teacher over the data, written shard by shard.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use caskd_formats::{Basis, CacheSpec, Columns, Fidelity, Manifest, Sequence};

use crate::data::{BadRecord, validation_sequences};
use crate::options::BuildOptions;
use crate::pipeline::{Written, compute_and_write};
use crate::prepare::{Prepared, prepare};
use crate::teacher::Teacher;
use crate::teacher_pass::{PassTotals, TeacherPass};
use crate::transform_fit::Coder;
use crate::{Result, fidelity};

/// What the build is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The data files are read; the counts are bytes of them.
    Reading,
    /// The teacher reads the sample that the compact tier's basis is fitted on.
    Fitting,
    /// The teacher reads the data.
    Building,
    /// What is in the cache is compared with the teacher.
    Measuring,
}

/// How far the build is.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Progress<'a> {
    /// What it is at; the counts are those of this stage.
    pub stage: Stage,
    /// Positions whose teacher values are known, those of finished shards included.
    pub positions_done: u64,
    /// All positions.
    pub positions_total: u64,
    /// Positions a second of teacher time in this run.
    pub tokens_per_second: f64,
    /// A record that has just been passed over.
    pub bad_record: Option<&'a BadRecord>,
}

/// What a build did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct BuildReport {
    /// False when it was stopped and can be resumed.
    pub completed: bool,
    /// Sequences in the cache.
    pub sequences: u64,
    /// Positions in the cache.
    pub positions: u64,
    /// Positions that a loss may ask for.
    pub targets: u64,
    /// Sequences of the validation split.
    pub validation_sequences: u64,
    /// Records read, bad ones included; a text file is one.
    pub records: u64,
    /// Records that could not be used.
    pub bad_records: u64,
    /// The first of them.
    pub bad: Vec<BadRecord>,
    /// Sequences left out because the same tokens had come before.
    pub duplicates: u64,
    /// Records cut at the longest length.
    pub truncated: u64,
    /// Tokens that were cut off them.
    pub truncated_tokens: u64,
    /// Records dropped because the cut left no target.
    pub skipped: u64,
    /// The date that the chat template wrote into the prompts, where it asked for one.
    pub chat_date: Option<String>,
    /// Shards of the cache.
    pub shards: usize,
    /// Shards that an earlier, interrupted build had finished.
    pub shards_reused: usize,
    /// Positions that went through the teacher in this run.
    pub teacher_positions: u64,
    /// Seconds spent in the teacher (forward pass, head, statistics) in this run.
    pub teacher_seconds: f64,
    /// Of these, seconds until weights were read, where the teacher goes layer by layer.
    pub waiting_seconds: f64,
    /// Of these, seconds in statistics and top-k.
    pub statistics_seconds: f64,
    /// Seconds in encoding and writing shards, beside the teacher's.
    pub encoding_seconds: f64,
    /// Seconds from the teacher's first batch to the last shard on disk: what the overlap leaves of the two.
    pub pass_seconds: f64,
    /// Seconds until the teacher was loaded and the data were tokenised.
    pub load_seconds: f64,
    /// Seconds in the fit of the compact tier, its teacher pass over the sample included.
    pub fit_seconds: f64,
    /// Seconds in the comparison of the cache with the teacher.
    pub fidelity_seconds: f64,
    /// Positions that went through a layer while its weights were in memory; 0 where all weights were.
    pub block_positions: usize,
    /// Bytes of memory that the build was to take.
    pub memory_bytes: u64,
    /// The compact tier's K, and coefficients of a position.
    pub code: Option<(usize, usize)>,
    /// How near the cache is to the teacher, where it was measured.
    pub fidelity: Option<Fidelity>,
    /// Seconds from start to end, loading and writing included.
    pub seconds: f64,
    /// Positions a second of teacher time.
    pub tokens_per_second: f64,
    /// Size of the cache's files; 0 while it is not complete.
    pub cache_bytes: u64,
}

/// Builds the cache that `options` ask for. Stops between batches once `stop` is set; what is
/// finished then is kept, and the same call with `resume` completes it to the same bytes.
///
/// # Errors
/// Bad data, options that don't fit the teacher, values that are not finite, a folder or disk
/// that can't take the cache. Nothing is left under a final name that is not whole.
pub fn build(
    options: &BuildOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<BuildReport> {
    let started = Instant::now();
    let Some(mut prepared) = prepare(options, stop, progress)? else {
        return Ok(BuildReport {
            seconds: started.elapsed().as_secs_f64(),
            ..BuildReport::default()
        });
    };
    let Some(mut writer) = prepared.writer.take() else {
        return Ok(BuildReport {
            seconds: started.elapsed().as_secs_f64(),
            ..BuildReport::of(&prepared)
        });
    };
    let Prepared {
        teacher,
        sequences,
        shards,
        spec,
        ..
    } = &prepared;
    let basis = writer.basis().cloned();
    let pending: Vec<usize> = (0..shards.len())
        .filter(|&shard| !writer.is_done(shard))
        .collect();
    let waiting: u64 = pending
        .iter()
        .flat_map(|&shard| &sequences[shards[shard].clone()])
        .map(|sequence| sequence.token_ids.len() as u64)
        .sum();
    let mut pass = TeacherPass::new(teacher, spec, options.batch_tokens, stop);
    pass.coder = basis.as_deref().map(Coder::new);
    let written = compute_and_write(
        &mut pass,
        &pending,
        &mut |shard| Ok(Some(sequences[shards[shard].clone()].to_vec())),
        |shard, sequences| Ok(writer.write_shard(shard, sequences).map(|_| ())?),
        &mut building(spec.data.positions, spec.data.positions - waiting, progress),
    )?;
    let totals = pass.totals;
    // Its head in f32 is not needed beside what follows.
    drop(pass);

    let measuring = Instant::now();
    if written.completed && options.fidelity && !writer.is_finished() {
        let report = measure_fidelity(
            teacher,
            spec,
            basis.as_deref(),
            &fidelity::sample_places(sequences, shards),
            &mut |shard, row, columns| Ok(writer.read_back(shard, row, columns)?),
            progress,
        )?;
        writer.set_fidelity(report);
    }
    let fidelity_seconds = measuring.elapsed().as_secs_f64();
    let manifest = if written.completed {
        Some(writer.finish()?)
    } else {
        None
    };
    Ok(BuildReport {
        completed: written.completed,
        shards: shards.len(),
        shards_reused: shards.len() - pending.len(),
        fidelity_seconds,
        fidelity: manifest
            .as_ref()
            .and_then(|manifest| manifest.fidelity.clone()),
        seconds: started.elapsed().as_secs_f64(),
        cache_bytes: manifest.as_ref().map_or(0, cache_bytes),
        ..BuildReport::of(&prepared).with(&totals, &written)
    })
}

impl BuildReport {
    /// What is known before the first shard.
    pub(crate) fn of(prepared: &Prepared) -> BuildReport {
        let data = &prepared.spec.data;
        BuildReport {
            sequences: data.sequences,
            positions: data.positions,
            targets: data.targets,
            validation_sequences: validation_sequences(&prepared.sequences, data),
            records: data.preparation.records,
            bad_records: data.preparation.bad_records,
            bad: prepared.bad_records.clone(),
            duplicates: data.preparation.duplicates,
            truncated: data.truncated,
            truncated_tokens: data.preparation.truncated_tokens,
            skipped: data.skipped,
            chat_date: data.preparation.chat_date.clone(),
            load_seconds: prepared.load_seconds,
            fit_seconds: prepared.fit_seconds,
            block_positions: prepared.teacher.block_positions,
            memory_bytes: prepared.memory_bytes,
            code: prepared
                .spec
                .code
                .as_ref()
                .map(|code| (prepared.spec.top_k, code.basis.rank)),
            ..BuildReport::default()
        }
    }

    fn with(self, totals: &PassTotals, written: &Written) -> BuildReport {
        BuildReport {
            teacher_positions: totals.positions,
            teacher_seconds: totals.teacher_seconds,
            waiting_seconds: totals.waiting_seconds,
            statistics_seconds: totals.statistics_seconds,
            tokens_per_second: totals.tokens_per_second(),
            encoding_seconds: written.encoding_seconds,
            pass_seconds: written.seconds,
            ..self
        }
    }
}

/// Size of a cache's files, the manifest apart.
pub(crate) fn cache_bytes(manifest: &Manifest) -> u64 {
    manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>()
        + manifest.head.as_ref().map_or(0, |head| head.bytes)
        + manifest.code.as_ref().map_or(0, |code| code.basis.bytes)
}

/// Reports batches of the building stage; `done` positions were there before.
pub(crate) fn building(
    positions_total: u64,
    done: u64,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> impl FnMut(&PassTotals) {
    move |totals| {
        progress(&Progress {
            stage: Stage::Building,
            positions_done: done + totals.positions + totals.under_way,
            positions_total,
            tokens_per_second: totals.tokens_per_second(),
            bad_record: None,
        });
    }
}

/// Compares rows of the cache with the teacher, and with a student that is the teacher pruned.
pub(crate) fn measure_fidelity(
    teacher: &Teacher,
    spec: &CacheSpec,
    basis: Option<&Basis>,
    places: &[(usize, u32)],
    read: &mut dyn FnMut(usize, u32, &Columns) -> Result<Sequence>,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Fidelity> {
    progress(&Progress {
        stage: Stage::Measuring,
        positions_done: 0,
        positions_total: fidelity::SAMPLE_POSITIONS as u64,
        tokens_per_second: 0.0,
        bad_record: None,
    });
    let columns = fidelity::columns(spec);
    let sample: Vec<Sequence> = places
        .iter()
        .map(|&(shard, row)| read(shard, row, &columns))
        .collect::<Result<_>>()?;
    fidelity::measure_build(teacher, spec, basis, &sample)
}
