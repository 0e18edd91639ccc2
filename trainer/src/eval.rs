//! A model against a cached teacher: perplexity, KL, agreement and calibration on the cache's targets.

use std::time::Instant;

use caskd_formats::{Cache, Columns, RowInfo, Statistic};
use caskd_models::{LoadedModel, Network};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::calibration::{Calibration, confidence};
use crate::head::{chunks, logits, rows_per_chunk};
use crate::losses::divergence;
use crate::objective::check_fit;
use crate::reader::read_batch;
use crate::teacher_logits::{LinearCode, gold_log_probabilities};
use crate::{Error, Result};

/// A model's score against a cached teacher, over the target positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheScore {
    /// The model's perplexity.
    pub perplexity: f64,
    /// The teacher's on the same targets, from the cache alone (see [`teacher_perplexity`]); `None` where
    /// `missing_teacher_logits` is not 0, and on a cache that was imported without the mass of the tokens outside the top K.
    pub teacher_perplexity: Option<f64>,
    /// Targets outside the top K of a sparse cache, whose probability it does not know.
    pub missing_teacher_logits: u64,
    /// Mean KL(teacher ‖ model) at T = 1 over the whole vocabulary; `None` on a sparse cache.
    pub kl: Option<f64>,
    /// Share of targets where both put the same token first.
    pub top1_agreement: f64,
    /// The model's expected calibration error (see [`Calibration`]).
    pub ece: f64,
    /// The teacher's, from the cache alone.
    pub teacher_ece: Option<f64>,
    /// Target positions.
    pub targets: u64,
    /// Positions read.
    pub tokens: u64,
    /// Wall time.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
}

/// Scores a model on the target positions of a cache: all its sequences, or `rows` of them, in
/// batches of at most `batch_tokens` padded tokens. `progress` hears (tokens done, all tokens).
///
/// # Errors
/// A model that does not fit the cache, unreadable files, no target at all, logits of the model that are not finite.
pub fn evaluate_cache(
    model: &LoadedModel,
    cache: &Cache,
    rows: Option<&[RowInfo]>,
    batch_tokens: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CacheScore> {
    check_fit(model, cache)?;
    let started = Instant::now();
    let vocabulary = model.network.vocab_size().min(cache.manifest().vocab_size);
    let device = model.network.device();
    let code = LinearCode::of(cache, vocabulary, model.network.kind(), device)?;
    let columns = columns_of(cache);
    let head = model.network.head().narrow(0, 0, vocabulary as i64);
    let batches = length_batches(cache, rows, batch_tokens)?;
    let total_tokens = tokens_in(batches.iter().flatten());
    let has_mass = cache.manifest().knows(Statistic::LogSumExp);
    let mut sums = Sums::default();
    for rows in &batches {
        let batch = read_batch(cache, rows, &columns, vocabulary)?.to_device(device);
        if has_mass {
            sums.of_teacher.add(&batch, code.as_ref())?;
        }
        let hidden = hidden_rows(&model.network, &batch.input_ids, &batch.targets);
        tch::no_grad(|| sums.add(&hidden, &batch, &head, code.as_ref()))?;
        sums.tokens += batch.num_positions() as u64;
        progress(sums.tokens, total_tokens);
    }
    let seconds = started.elapsed().as_secs_f64();
    let mean = |sum: f64| sum / sums.targets as f64;
    Ok(CacheScore {
        perplexity: mean(sums.nats).exp(),
        teacher_perplexity: sums.of_teacher.perplexity().filter(|_| has_mass),
        missing_teacher_logits: sums.of_teacher.missing,
        kl: code.is_some().then(|| mean(sums.kl)),
        top1_agreement: mean(sums.agreements),
        ece: sums.calibration.error(),
        teacher_ece: has_mass.then(|| sums.teacher_calibration.error()),
        targets: sums.targets,
        tokens: sums.tokens,
        seconds,
        tokens_per_second: sums.tokens as f64 / seconds,
    })
}

/// The teacher's perplexity on the targets of a cache, without any model: the gold token's logit
/// (cached where it is among the top K, else rebuilt from the last hidden state) less the cached
/// log-sum-exp.
///
/// # Errors
/// A sparse cache with targets outside its top K, unreadable files, no target at all.
pub fn teacher_perplexity(cache: &Cache) -> Result<f64> {
    const BATCH_TOKENS: usize = 8192;
    if !cache.manifest().knows(Statistic::LogSumExp) {
        return Err(Error::NoSequences {
            reason: "the cache was imported without the mass of the tokens outside its top k"
                .to_owned(),
        });
    }
    let vocabulary = cache.manifest().vocab_size;
    let code = LinearCode::of(cache, vocabulary, Kind::Float, Device::Cpu)?;
    let columns = columns_of(cache);
    let mut of_teacher = TeacherSums::default();
    for rows in length_batches(cache, None, BATCH_TOKENS)? {
        let batch = read_batch(cache, &rows, &columns, vocabulary)?;
        of_teacher.add(&batch, code.as_ref())?;
    }
    of_teacher.perplexity().ok_or_else(|| Error::NoSequences {
        reason: format!(
            "{} of the cache's targets are outside its top k, and nothing says how likely they are",
            of_teacher.missing
        ),
    })
}

/// Log-likelihoods of targets under the cached teacher.
#[derive(Default)]
struct TeacherSums {
    nats: f64,
    targets: u64,
    /// Targets that the cache knows no probability of.
    missing: u64,
}

impl TeacherSums {
    fn add(&mut self, batch: &Batch, code: Option<&LinearCode>) -> Result<()> {
        let log_p = gold_log_probabilities(batch, code).ok_or_else(|| Error::NoSequences {
            reason: "the cache holds neither top-k logits nor a last hidden state".to_owned(),
        })?;
        let missing = log_p.isnan();
        self.missing += missing.sum(Kind::Int64).int64_value(&[]) as u64;
        self.nats -= log_p
            .masked_fill(&missing, 0.0)
            .sum(Kind::Double)
            .double_value(&[]);
        self.targets += batch.num_targets() as u64;
        Ok(())
    }

    fn perplexity(&self) -> Option<f64> {
        (self.missing == 0).then(|| (self.nats / self.targets as f64).exp())
    }
}

#[derive(Default)]
struct Sums {
    nats: f64,
    of_teacher: TeacherSums,
    kl: f64,
    agreements: f64,
    calibration: Calibration,
    teacher_calibration: Calibration,
    targets: u64,
    tokens: u64,
}

impl Sums {
    /// Adds what follows from the logits of a batch's target positions, chunk by chunk.
    ///
    /// # Errors
    /// Logits of the model that are not finite.
    fn add(
        &mut self,
        hidden: &Tensor,
        batch: &Batch,
        head: &Tensor,
        code: Option<&LinearCode>,
    ) -> Result<()> {
        let of_teacher = code.map(|code| (code, code.rows(batch)));
        for (first, rows) in chunks(hidden.size()[0], rows_per_chunk(head.size()[0])) {
            let student = logits(&hidden.narrow(0, first, rows), head);
            let labels = batch.labels.narrow(0, first, rows);
            self.nats += student
                .cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0)
                .double_value(&[]);
            if !self.nats.is_finite() {
                return Err(Error::ScoreNotFinite {
                    what: batch.source_of_target(first).to_owned(),
                });
            }
            let teacher = of_teacher
                .as_ref()
                .map(|(code, all)| code.logits_at_one(&all.narrow(first, rows)));
            let teacher_first = match (&batch.top_k, &teacher) {
                (Some(top_k), _) => top_k.ids.narrow(0, first, rows).select(1, 0),
                (None, Some(teacher)) => teacher.argmax(-1, false),
                (None, None) => continue, // A cache holds at least one of the two.
            };
            let teacher_confidence = match (&batch.top_k, &teacher) {
                (Some(top_k), _) => {
                    let largest = top_k.logits.narrow(0, first, rows).select(1, 0);
                    (largest - top_k.log_sum_exp.narrow(0, first, rows)).exp()
                }
                (None, Some(teacher)) => confidence(teacher),
                (None, None) => continue,
            };
            self.teacher_calibration
                .add(&teacher_confidence, &teacher_first.eq_tensor(&labels));
            let student_first = student.argmax(-1, false);
            self.calibration
                .add(&confidence(&student), &student_first.eq_tensor(&labels));
            let agree = student_first.eq_tensor(&teacher_first);
            self.agreements += agree.sum(Kind::Double).double_value(&[]);
            if let Some(teacher) = &teacher {
                let kl = divergence(teacher, &student);
                self.kl += kl.sum(Kind::Double).double_value(&[]);
            }
        }
        self.targets += batch.num_targets() as u64;
        Ok(())
    }
}

/// Last hidden states [N, D] at positions given as indices into B·T.
pub(crate) fn hidden_rows(network: &Network, input_ids: &Tensor, positions: &Tensor) -> Tensor {
    let device = network.device();
    tch::no_grad(|| {
        let hidden = network
            .forward(&input_ids.to_device(device), &[], false)
            .last_hidden;
        let width = *hidden.size().last().unwrap_or(&0);
        hidden
            .view([-1, width])
            .index_select(0, &positions.to_device(device))
    })
}

fn columns_of(cache: &Cache) -> Columns {
    let manifest = cache.manifest();
    Columns {
        statistics: true,
        top_k: manifest.top_k > 0,
        ..Columns::for_logits(manifest).unwrap_or_default()
    }
}

/// Rows that have a target, by length, cut into batches of at most `batch_tokens` padded tokens.
fn length_batches(
    cache: &Cache,
    rows: Option<&[RowInfo]>,
    batch_tokens: usize,
) -> Result<Vec<Vec<RowInfo>>> {
    let mut rows: Vec<RowInfo> = rows.map_or_else(|| cache.rows(), |rows| Ok(rows.to_vec()))?;
    rows.retain(|row| row.targets > 0);
    if rows.is_empty() {
        return Err(Error::NoSequences {
            reason: "none of the cache's has a target".to_owned(),
        });
    }
    rows.sort_by_key(|row| row.positions);
    let mut batches: Vec<Vec<RowInfo>> = Vec::new();
    for row in rows {
        match batches.last_mut() {
            // Ascending lengths: the newest row is the one the batch is padded to.
            Some(batch) if (batch.len() + 1) * row.positions as usize <= batch_tokens => {
                batch.push(row);
            }
            _ => batches.push(vec![row]),
        }
    }
    Ok(batches)
}

fn tokens_in<'a>(rows: impl Iterator<Item = &'a RowInfo>) -> u64 {
    rows.map(|row| u64::from(row.positions)).sum()
}
