//! Training a student's adapters from a teacher cache.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::Cache;
use caskd_models::{LoadedModel, SeededRng, save_adapters};
use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::checkpoint::{self, Cursor};
use crate::losses::MissingLogits;
use crate::objective::{Objective, StepSize, check_fidelity};
use crate::optimizer::{AdamW, learning_rate};
use crate::order::Order;
use crate::reader::BatchReader;
use crate::run_folder::{RunFolder, RunRecord};
use crate::step::{NotFiniteTerm, forward_backward};
use crate::teacher_logits::LinearCode;
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
    /// Teacher logits that student-led losses looked up over the whole run, and did not find among the
    /// cached top K.
    #[serde(default)]
    pub missing_teacher_logits: MissingLogits,
    /// What the user should know: checkpoints passed over as damaged, teacher logits that were missing.
    pub notes: Vec<String>,
    /// False: stopped, and can be resumed.
    pub completed: bool,
}

/// Trains adapters of `student` (read from `student_path`) on `cache` into the run folder `out`.
///
/// The same configuration, student, cache and number of threads give the same bytes, however often
/// the run is stopped and resumed.
///
/// # Errors
/// A configuration that makes no sense, a student that does not fit the cache, a loss that the cache
/// cannot answer, an existing folder without `resume` or a different run in it, unreadable or
/// unwritable files, and losses or gradients that are not finite.
#[expect(
    clippy::needless_pass_by_value,
    reason = "a run keeps the cache for its threads"
)]
pub fn train(
    config: &TrainConfig,
    student: LoadedModel,
    student_path: &Path,
    cache: Arc<Cache>,
    out: &Path,
    control: &mut Control<'_>,
) -> Result<TrainSummary> {
    config.validate()?;
    let objective = Objective::resolve(&config.terms(), &student, cache.manifest())?;
    check_fidelity(config, &cache)?;
    let order = Order::new(cache.rows()?, &cache.manifest().data, config)?;
    let device = student.network.device();
    let kind = student.network.kind();
    let teacher = objective
        .full_logits
        .then(|| LinearCode::of(&cache, objective.vocabulary, kind, device))
        .transpose()?
        .flatten();
    let record = RunRecord::new(&student, student_path, &cache);
    let mut student = student.network;
    student.attach_lora(&config.lora, config.seed)?;

    // Whatever can be refused has been: from here on something is written.
    let mut run = RunFolder::open(out, config, record, control.resume)?;
    if let Some(summary) = run.record.summary.take() {
        return Ok(summary);
    }
    let mut optimizer = AdamW::new(student.trainable(), config);
    let restored = checkpoint::restore(&run.checkpoints(), &student.trainable(), &mut optimizer)?;
    let (mut cursor, notes) = restored.map_or_else(Default::default, |restored| {
        (restored.cursor, restored.passed_over)
    });
    for note in &notes {
        tracing::warn!("{note}; went back to step {}", cursor.step);
    }
    run.open_log(cursor.step)?;

    let steps_per_epoch = order.steps_per_epoch();
    let all_steps = steps_per_epoch * u64::from(config.epochs);
    let total_steps = config
        .max_steps
        .map_or(all_steps, |most| most.min(all_steps));
    let sequences = order.num_sequences() as u64;
    let steps: Vec<usize> = order.batches_per_step(cursor.step, total_steps);
    let schedule = order.steps_from(cursor.step).take(steps.len()).flatten();
    let mut batches = BatchReader::start(
        &cache,
        schedule,
        &objective.columns,
        objective.vocabulary,
        config.prefetch,
    );

    let mut saved = cursor.step;
    for batches_of_step in steps {
        if control.stop.load(Ordering::Relaxed) {
            if saved < cursor.step {
                checkpoint::save(
                    &run.checkpoints(),
                    &cursor,
                    &student.trainable(),
                    &optimizer,
                )?;
            }
            return Ok(summary_of(&cursor, sequences, notes, Completed::No));
        }
        let started = Instant::now();
        let micro_batches: Vec<Batch> = (0..batches_of_step)
            .map(|_| {
                Ok(batches
                    .next()
                    .unwrap_or(Err(Error::ReaderLost))?
                    .to_device(device))
            })
            .collect::<Result<_>>()?;
        let data_wait_seconds = started.elapsed().as_secs_f64();
        let size = step_size(&micro_batches);
        let step = cursor.step + 1;
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
        let mut values = vec![0.0; objective.terms.len()];
        let mut missing = MissingLogits::default();
        for (index, batch) in micro_batches.iter().enumerate() {
            student.set_dropout_seed(dropout_seed(config.seed, step, index));
            let shares = forward_backward(&student, &objective, teacher.as_ref(), batch, &size)
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
                .flat_map(|batch| batch.sources.clone())
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
            loss: objective
                .terms
                .iter()
                .zip(&values)
                .map(|(term, value)| term.weight * value)
                .sum(),
            terms: objective
                .terms
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
            missing_teacher_logits: missing,
        };
        cursor.advance(
            &report,
            steps_per_epoch,
            config.gradient_accumulation as u64,
        );
        run.log(&report)?;
        (control.progress)(&report);
        if config.checkpoint_every > 0 && step % config.checkpoint_every == 0 && step < total_steps
        {
            checkpoint::save(
                &run.checkpoints(),
                &cursor,
                &student.trainable(),
                &optimizer,
            )?;
            saved = step;
        }
    }

    save_adapters(&student, &run.adapter())?;
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

fn step_size(batches: &[Batch]) -> StepSize {
    batches
        .iter()
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
