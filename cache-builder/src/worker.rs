//! One of many workers on a planned build, and the one who joins what they did.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use caskd_formats::{Cache, CacheSpec, CacheWriter, Io, SharedBuild};
use caskd_models::ModelFiles;
use serde::Serialize;
use tch::Kind;

use crate::build::{Progress, building, cache_bytes, measure_fidelity};
use crate::footprint::Footprint;
use crate::pipeline::{Written, compute_and_write};
use crate::plan::{decode_task, instructions, teacher_path};
use crate::teacher::{Placement, Teacher};
use crate::teacher_pass::{PassTotals, TeacherPass};
use crate::transform_fit::Coder;
use crate::{Error, Result};

/// Share `index` of `count`: the tasks whose number leaves that remainder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Share {
    /// From 0.
    pub index: usize,
    /// Workers in all.
    pub count: usize,
}

impl Share {
    /// Its tasks of so many.
    fn of(self, tasks: usize) -> Vec<usize> {
        (self.index..tasks).step_by(self.count).collect()
    }
}

/// What a worker is asked to do.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The folder with the plan.
    pub out: PathBuf,
    /// Its tasks.
    pub share: Share,
    /// The teacher, where it is not at the planner's path; its weights must be the same.
    pub teacher: Option<PathBuf>,
    /// Where the teacher runs, and in how much memory.
    pub placement: Placement,
}

/// What a worker did.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerReport {
    /// False when it was stopped; the same command goes on.
    pub completed: bool,
    /// The share.
    pub worker: Share,
    /// Tasks of the share.
    pub tasks: usize,
    /// Of these, done in this run.
    pub tasks_done: usize,
    /// Of these, done before, or by another worker meanwhile.
    pub tasks_found: usize,
    /// Of these, done by another worker with other bytes, which stay.
    pub tasks_contradicted: u64,
    /// Tasks of the whole plan that nobody has done yet.
    pub tasks_left: usize,
    /// Whether this worker measured the fidelity for the manifest.
    pub measured: bool,
    /// Positions that went through the teacher.
    pub teacher_positions: u64,
    /// Seconds spent in the teacher.
    pub teacher_seconds: f64,
    /// Seconds in encoding and writing, beside the teacher's.
    pub encoding_seconds: f64,
    /// Positions a second of teacher time.
    pub tokens_per_second: f64,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// Does a share of a planned build. Repeating it, also at the same time elsewhere, is harmless.
///
/// # Errors
/// No plan, another teacher, what [`crate::build()`] refuses in a pass.
pub fn work(
    options: &WorkerOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<WorkerReport> {
    let started = Instant::now();
    let shared = match SharedBuild::join(&options.out) {
        Err(caskd_formats::Error::CacheExists { .. }) => return found_joined(options, started),
        shared => shared?,
    };
    let instructions = instructions(shared.work())?;
    let share = options.share.of(shared.work().tasks.len());
    let pending = shared.pending(share.iter().copied())?;
    let positions = |tasks: &[usize]| -> u64 {
        let infos = tasks.iter().map(|&task| &shared.work().tasks[task]);
        infos.map(|info| info.positions).sum()
    };
    let (total, waiting) = (positions(&share), positions(&pending));

    let load = |path: &Path| {
        let batch_tokens = instructions.batch_tokens;
        load_teacher(path, shared.spec(), batch_tokens, &options.placement)
    };
    let mut teacher = None;
    let contradicted = AtomicU64::new(0);
    let mut totals = PassTotals::default();
    let mut written = Written {
        completed: true,
        ..Written::default()
    };
    if !pending.is_empty() {
        let path = teacher_path(options.teacher.as_deref(), &instructions);
        let teacher = teacher.insert(load(&path)?);
        let mut pass = TeacherPass::new(teacher, shared.spec(), instructions.batch_tokens, stop);
        pass.coder = shared.basis().map(|basis| Coder::new(basis));
        written = compute_and_write(
            &mut pass,
            &pending,
            &mut |task| {
                if shared.is_done(task)? {
                    return Ok(None);
                }
                decode_task(&shared.read_task(task)?).map(Some)
            },
            |task, sequences| {
                if !shared.write_shard(task, sequences)? {
                    contradicted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            },
            &mut building(total, total - waiting, progress),
        )?;
        totals = pass.totals;
    }

    let mut tasks_left = 0;
    for task in 0..shared.work().tasks.len() {
        tasks_left += usize::from(!shared.is_done(task)?);
    }
    // Whoever finds everything done measures, so that the commit needs no teacher.
    let measured = written.completed
        && tasks_left == 0
        && !instructions.sample.is_empty()
        && shared.fidelity()?.is_none();
    if measured {
        let path = teacher_path(options.teacher.as_deref(), &instructions);
        let teacher = match teacher {
            Some(teacher) => teacher,
            None => load(&path)?,
        };
        let report = measure_fidelity(
            &teacher,
            shared.spec(),
            shared.basis().map(Arc::as_ref),
            &instructions.sample,
            &mut |shard, row, columns| Ok(shared.read_back(shard, row, columns)?),
            progress,
        )?;
        shared.put_fidelity(&report)?;
    }
    Ok(WorkerReport {
        completed: written.completed,
        worker: options.share,
        tasks: share.len(),
        tasks_done: written.shards,
        tasks_found: share.len()
            - if written.completed {
                written.shards
            } else {
                pending.len()
            },
        tasks_contradicted: contradicted.into_inner(),
        tasks_left,
        measured,
        teacher_positions: totals.positions,
        teacher_seconds: totals.teacher_seconds,
        encoding_seconds: written.encoding_seconds,
        tokens_per_second: totals.tokens_per_second(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What a worker finds that starts again after the commit: its share done.
fn found_joined(options: &WorkerOptions, started: Instant) -> Result<WorkerReport> {
    let cache = Cache::open(&options.out, Io::Read)?;
    let tasks = options.share.of(cache.manifest().shards.len()).len();
    Ok(WorkerReport {
        completed: true,
        worker: options.share,
        tasks,
        tasks_done: 0,
        tasks_found: tasks,
        tasks_contradicted: 0,
        tasks_left: 0,
        measured: false,
        teacher_positions: 0,
        teacher_seconds: 0.0,
        encoding_seconds: 0.0,
        tokens_per_second: 0.0,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What a commit is asked to do.
#[derive(Debug, Clone)]
pub struct CommitOptions {
    /// The folder with the plan and the shards.
    pub out: PathBuf,
    /// The teacher, where it is not at the planner's path. Needed only where no worker has measured the fidelity.
    pub teacher: Option<PathBuf>,
    /// Where the teacher runs, and in how much memory.
    pub placement: Placement,
}

/// What a commit did.
#[derive(Debug, Clone, Serialize)]
pub struct CommitReport {
    /// Always true: anything else is an error.
    pub completed: bool,
    /// Shards of the cache.
    pub shards: usize,
    /// Sequences in the cache.
    pub sequences: u64,
    /// Their positions.
    pub positions: u64,
    /// Size of the cache's files.
    pub cache_bytes: u64,
    /// How near the cache is to the teacher, where it was measured.
    pub fidelity: Option<caskd_formats::Fidelity>,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// Joins the receipts of all workers into the manifest: the cache is the one that a single build would have made.
///
/// # Errors
/// Tasks that are not done (by number), workers that are still alive, shards that are not what their receipts say.
pub fn commit(
    options: &CommitOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<CommitReport> {
    let started = Instant::now();
    let (mut writer, work) = CacheWriter::commit(&options.out)?;
    if let Some(work) = work
        && !writer.has_fidelity()
    {
        let instructions = instructions(&work)?;
        if !instructions.sample.is_empty() {
            let path = teacher_path(options.teacher.as_deref(), &instructions);
            let teacher = load_teacher(
                &path,
                writer.spec(),
                instructions.batch_tokens,
                &options.placement,
            )?;
            let report = measure_fidelity(
                &teacher,
                writer.spec(),
                writer.basis().map(Arc::as_ref),
                &instructions.sample,
                &mut |shard, row, columns| Ok(writer.read_back(shard, row, columns)?),
                progress,
            )?;
            writer.set_fidelity(report);
        }
    }
    let manifest = writer.finish()?;
    Ok(CommitReport {
        completed: true,
        shards: manifest.shards.len(),
        sequences: manifest.data.sequences,
        positions: manifest.data.positions,
        cache_bytes: cache_bytes(&manifest),
        fidelity: manifest.fidelity,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn load_teacher(
    path: &Path,
    spec: &CacheSpec,
    batch_tokens: usize,
    placement: &Placement,
) -> Result<Teacher> {
    let kind = if spec.teacher.compute_dtype == "bf16" {
        Kind::BFloat16
    } else {
        Kind::Float
    };
    let files = ModelFiles::open(path)?;
    let digest = files.digest();
    if digest != spec.teacher.digest {
        return Err(Error::Option {
            problem: format!(
                "`{}` is not the teacher of the plan, which is {}",
                path.display(),
                spec.teacher.name
            ),
            hint: "give --teacher the same weights that the plan was made with".into(),
        });
    }
    let footprint = Footprint::new(&files, kind, spec, batch_tokens);
    Teacher::load((files, digest), path, kind, placement, &footprint)
}
