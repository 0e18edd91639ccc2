//! Training a student's adapters from a teacher cache.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::Columns;
use caskd_models::{
    LoadOptions, LoadedModel, Network, SeededRng, load, load_in_8_bits, save_adapters,
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::batch::BY_STUDENT;
use crate::checkpoint::{self, Cursor};
use crate::config::{Mode, Quantize};
use crate::losses::MissingLogits;
use crate::memory;
use crate::mix::{CacheMix, MixPart};
use crate::objective::{StepSize, check_fidelity};
use crate::optimizer::{AdamW, learning_rate};
use crate::reader::{BatchReader, Read};
use crate::run_folder::{RunFolder, RunRecord};
use crate::step::{NotFiniteTerm, forward_backward};
use crate::tensorboard::EventFile;
use crate::{Error, Result, TrainConfig};

/// How the caller steers a run and hears of it.
pub struct Control<'a> {
    /// Go on with the run in the folder, if there is one.
    pub resume: bool,
    /// Once true, the run writes a checkpoint after the step under way and returns.
    pub stop: &'a AtomicBool,
    /// Called after every step.
    pub progress: &'a mut dyn FnMut(&StepReport),
}

/// One step, as in `log.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// From 1.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Weighted sum of the terms.
    pub loss: f64,
    /// Value of each term, unweighted.
    pub terms: Vec<(String, f64)>,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Positions of this step, padding not counted.
    pub tokens: u64,
    /// Of them, those that predict a target.
    pub targets: u64,
    /// Wall time of this step.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
    /// Of the seconds, those spent waiting for the cache.
    pub data_wait_seconds: f64,
    /// Resident memory of the process after the step; `None` where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// Teacher logits that student-led losses looked up, and did not find among the cached top K.
    pub missing_teacher_logits: MissingLogits,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSummary {
    /// Steps made.
    pub steps: u64,
    /// Sequences of one epoch.
    pub sequences: u64,
    /// Positions trained on, padding not counted.
    pub tokens: u64,
    /// Seconds in steps, over all resumptions.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
    /// Loss of the last step.
    pub final_loss: f64,
    /// Value of each term at the last step, unweighted.
    pub terms: Vec<(String, f64)>,
    /// Seconds spent waiting for the cache.
    pub data_wait_seconds: f64,
    /// Largest resident memory of the process that ended the run; `None` where the system does not tell.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
    /// Teacher logits that student-led losses looked up over the whole run, and did not find among the
    /// cached top K.
    #[serde(default)]
    pub missing_teacher_logits: MissingLogits,
    /// What the user should know: checkpoints passed over as damaged, teacher logits that were missing.
    pub notes: Vec<String>,
    /// False: stopped, and can be resumed.
    pub completed: bool,
}

/// Trains adapters of `student` (read from `student_path`) on a cache, or several mixed, into the run
/// folder `out`.
///
/// The same configuration, student, caches and number of threads give the same bytes, however often
/// the run is stopped and resumed.
///
/// # Errors
/// A configuration that makes no sense, a student that does not fit the cache, a loss that the cache
/// cannot answer, an existing folder without `resume` or a different run in it, unreadable or
/// unwritable files, and losses or gradients that are not finite.
pub fn train(
    config: &TrainConfig,
    student: LoadedModel,
    student_path: &Path,
    caches: impl Into<CacheMix>,
    out: &Path,
    control: &mut Control<'_>,
) -> Result<TrainSummary> {
    config.validate()?;
    let caches = caches.into();
    let mut parts = caches.resolve(config, &student)?;
    for (cache, _) in caches.iter() {
        check_fidelity(config, cache)?;
    }
    check_responses(&caches, &parts)?;
    let order = caches.order(config)?;
    let device = student.network.device();
    let record = RunRecord::new(&student, student_path, &caches, &config.shards);
    let mut model = student;
    let student = &mut model.network;
    prepare(student, config)?;
    make_projections(&mut parts, student, config);
    let mut trainable = student.trainable();
    trainable.extend(parts[0].objective.trainable());

    // Whatever can be refused has been: from here on something is written.
    let mut run = RunFolder::open(out, config, record, control.resume)?;
    if let Some(summary) = run.record.summary.take() {
        return Ok(summary);
    }
    let mut optimizer = AdamW::new(shallow(&trainable), config);
    let restored = checkpoint::restore(&run.checkpoints(), &trainable, &mut optimizer)?;
    let (mut cursor, notes) = restored.map_or_else(Default::default, |restored| {
        (restored.cursor, restored.passed_over)
    });
    for note in &notes {
        tracing::warn!("{note}; going on from step {}", cursor.step);
    }
    run.open_log(cursor.step)?;
    let mut events = match &config.tensorboard {
        Some(folder) => Some(EventFile::create(folder, cursor.step)?),
        None => None,
    };

    let steps_per_epoch = order.steps_per_epoch();
    let all_steps = steps_per_epoch * u64::from(config.epochs);
    let total_steps = config
        .max_steps
        .map_or(all_steps, |most| most.min(all_steps));
    let sequences = order.num_sequences();
    let steps: Vec<u64> = (cursor.step..total_steps)
        .map(|step| order.batches_of_step(step))
        .collect();
    let num_batches = steps.iter().sum::<u64>() as usize;
    let mut batches = BatchReader::start(
        parts.iter().map(MixPart::source).collect(),
        order.batches_from(cursor.step).take(num_batches),
        config.prefetch,
    );

    let mut context = student.config().last_position();
    let mut saved = cursor.step;
    for batches_of_step in steps {
        if control.stop.load(Ordering::Relaxed) {
            if saved < cursor.step {
                checkpoint::save(&run.checkpoints(), &cursor, &trainable, &optimizer)?;
            }
            return Ok(summary_of(&cursor, sequences, notes, Completed::No));
        }
        let started = Instant::now();
        let micro_batches: Vec<Read> = (0..batches_of_step)
            .map(|_| batches.next().unwrap_or(Err(Error::ReaderLost)))
            .collect::<Result<_>>()?;
        let data_wait_seconds = started.elapsed().as_secs_f64();
        if let Some(positions) = context
            && micro_batches
                .iter()
                .any(|read| read.batch.input_ids.size()[1] > positions as i64)
        {
            tracing::warn!(
                "the cache has sequences longer than the {positions} positions that the student was made for \
                 (`caskd build --max-len {positions}` cuts them)"
            );
            context = None;
        }
        let size = step_size(&micro_batches);
        let step = cursor.step + 1;
        for part in &mut parts {
            part.objective.set_step(cursor.step, total_steps);
        }
        let not_finite = |what: String, sources: String| {
            let checkpoint = checkpoint::newest(&run.checkpoints());
            Error::NotFinite {
                what,
                step,
                sources,
                checkpoint,
            }
        };

        optimizer.zero_grad();
        // The terms have the same names for every cache.
        let terms = &parts[0].objective.terms;
        let mut values = vec![0.0; terms.len()];
        let mut missing = MissingLogits::default();
        for (index, Read { part, batch }) in micro_batches.iter().enumerate() {
            student.set_dropout_seed(dropout_seed(config.seed, step, index));
            let MixPart {
                objective, teacher, ..
            } = &parts[*part];
            let batch = batch.to_device(device);
            let shares = forward_backward(
                student,
                objective,
                teacher.as_ref(),
                &batch,
                &size,
                config.recompute,
            )
            .map_err(|NotFiniteTerm { term, sources }| {
                not_finite(format!("loss `{term}`"), sources)
            })?;
            missing += shares.missing;
            values
                .iter_mut()
                .zip(shares.values)
                .for_each(|(value, share)| *value += share);
        }
        let learning_rate = learning_rate(config, cursor.step, total_steps);
        let grad_norm = optimizer.step(learning_rate).map_err(|bad| {
            let sources: Vec<String> = micro_batches
                .iter()
                .flat_map(|read| read.batch.sources.clone())
                .collect();
            not_finite(
                format!("the gradient of `{}`", bad.parameter),
                sources.join(", "),
            )
        })?;

        let seconds = started.elapsed().as_secs_f64();
        let report = StepReport {
            step,
            total_steps,
            epoch: cursor.epoch,
            loss: terms
                .iter()
                .zip(&values)
                .map(|(term, value)| term.weight * value)
                .sum(),
            terms: terms
                .iter()
                .map(|term| term.name.clone())
                .zip(values)
                .collect(),
            grad_norm,
            learning_rate,
            tokens: size.positions as u64,
            targets: size.targets as u64,
            seconds,
            tokens_per_second: size.positions as f64 / seconds,
            data_wait_seconds,
            memory_bytes: memory::resident(),
            missing_teacher_logits: missing,
        };
        cursor.advance(
            &report,
            steps_per_epoch,
            config.gradient_accumulation as u64,
        );
        run.log(&report)?;
        if let Some(events) = &mut events {
            events.add(&report)?;
        }
        (control.progress)(&report);
        if config.checkpoint_every > 0 && step % config.checkpoint_every == 0 && step < total_steps
        {
            checkpoint::save(&run.checkpoints(), &cursor, &trainable, &optimizer)?;
            saved = step;
        }
    }

    match config.mode {
        Mode::Lora => save_adapters(student, &run.adapter())?,
        Mode::Full => {
            student.freeze();
            run.save_model(&model)?;
        }
    }
    let projections = parts[0].objective.trainable();
    if !projections.is_empty() {
        run.save_projections(&projections)?;
    }
    let summary = summary_of(&cursor, sequences, notes, Completed::Yes);
    run.finish(&summary)?;
    Ok(summary)
}

#[derive(Clone, Copy)]
enum Completed {
    Yes,
    No,
}

fn summary_of(
    cursor: &Cursor,
    sequences: u64,
    mut notes: Vec<String>,
    completed: Completed,
) -> TrainSummary {
    let MissingLogits { asked, missing } = cursor.missing;
    if missing > 0 {
        notes.push(format!(
            "{missing} of {asked} teacher logits at the student's first tokens ({:.1}%) were not among the cached top K; \
             the smallest cached logit, an upper bound, stood in",
            100.0 * missing as f64 / asked as f64
        ));
    }
    TrainSummary {
        steps: cursor.step,
        sequences,
        tokens: cursor.tokens,
        seconds: cursor.seconds,
        tokens_per_second: cursor.tokens as f64 / cursor.seconds.max(f64::MIN_POSITIVE),
        final_loss: cursor.loss,
        terms: cursor.terms.clone(),
        data_wait_seconds: cursor.data_wait_seconds,
        peak_memory_bytes: memory::peak(),
        missing_teacher_logits: cursor.missing,
        notes,
        completed: matches!(completed, Completed::Yes),
    }
}

impl Cursor {
    fn advance(&mut self, report: &StepReport, steps_per_epoch: u64, batches_per_step: u64) {
        self.step = report.step;
        self.epoch = self.step / steps_per_epoch;
        self.batch = self.step % steps_per_epoch * batches_per_step;
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        self.data_wait_seconds += report.data_wait_seconds;
        self.loss = report.loss;
        self.terms.clone_from(&report.terms);
        self.missing += report.missing_teacher_logits;
    }
}

/// Loads a student as a run with this `quantize` holds it: in 8 bits at once, not as a whole before.
///
/// # Errors
/// Those of [`caskd_models::load`]; a masked student in 8 bits.
pub fn load_base(path: &Path, options: &LoadOptions, quantize: Quantize) -> Result<LoadedModel> {
    Ok(match quantize {
        Quantize::None => load(path, options)?,
        Quantize::Int8 => load_in_8_bits(path, options)?,
    })
}

/// Makes what the configuration trains trainable.
pub(crate) fn prepare(student: &mut Network, config: &TrainConfig) -> Result<()> {
    match config.mode {
        Mode::Full => student.train_all()?,
        Mode::Lora => {
            if config.quantize == Quantize::Int8 && !student.is_quantized() {
                student.quantize()?;
            }
            student.attach_lora(&config.lora, config.seed)?;
        }
    }
    Ok(())
}

/// The same tensors under the same names.
fn shallow(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect()
}

/// The projections of the first cache's terms train for all: layers and widths are the same, or the caches do not fit
/// each other.
fn make_projections(parts: &mut [MixPart], student: &Network, config: &TrainConfig) {
    let Some((first, rest)) = parts.split_first_mut() else {
        return;
    };
    first.make_projections(student.hidden_size(), config.seed, student.device());
    for part in rest {
        part.objective.share_projections(&first.objective);
    }
}

/// A loss that tells the student's own responses from the teacher's needs both in the caches.
fn check_responses(caches: &CacheMix, parts: &[MixPart]) -> Result<()> {
    let Some(term) = parts[0].objective.needs_responses() else {
        return Ok(());
    };
    let (mut by_student, mut by_others) = (false, false);
    for (cache, _) in caches.iter() {
        let rows = cache.rows()?;
        for rows in rows.chunk_by(|a, b| a.shard == b.shard) {
            let numbers: Vec<u32> = rows.iter().map(|row| row.row).collect();
            for sequence in cache.read(rows[0].shard, &numbers, &Columns::default())? {
                let student = sequence.source.ends_with(BY_STUDENT);
                by_student |= student;
                by_others |= !student;
            }
            if by_student && by_others {
                return Ok(());
            }
        }
    }
    let missing = if by_student { "teacher" } else { "student" };
    Err(Error::MissingResponses {
        term: term.to_owned(),
        missing,
    })
}

fn step_size(batches: &[Read]) -> StepSize {
    batches
        .iter()
        .map(|read| &read.batch)
        .fold(StepSize::default(), |size, batch| StepSize {
            sequences: size.sequences + batch.num_sequences(),
            positions: size.positions + batch.num_positions(),
            targets: size.targets + batch.num_targets(),
        })
}

/// A seed for every forward pass, whatever came before it: a resumed run drops the same elements.
fn dropout_seed(seed: u64, step: u64, batch: usize) -> u64 {
    SeededRng::named(seed, &format!("dropout of step {step} batch {batch}")).next_u64()
}
