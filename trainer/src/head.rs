//! The fused head: LM head, logit losses and their backward pass over chunks of target positions.
//!
//! [N, V] tensors never exist for a whole batch. For each chunk the student's logits are made
//! without a graph, the losses and their gradient are taken on them (by hand where every loss has a
//! form for that, see `row_kernel`, else by autograd inside the chunk), and only dL/dh [N, D] is kept; the trunk's backward pass starts from that. Prompt positions never
//! reach the head.

mod by_hand;
mod sample_sigma;

use tch::{Kind, Tensor};

use self::by_hand::{by_hand, head_by_hand};
use self::sample_sigma::sample_sigmas;
pub(crate) use self::sample_sigma::{moments, sigma_of_samples};
use crate::batch::Batch;
use crate::losses::{
    KnownSpread, LogitLoss, LogitRows, Lookups, MissingLogits, Normalization, SampleSigma, Scaling,
    TopKRows,
};
use crate::matmul::{times, times_transposed};
use crate::teacher_logits::{LinearCode, TeacherRows};

/// Logits that one chunk holds. In f32 they stay below the 32 MiB above which glibc's allocator gives
/// every tensor fresh pages: there an element-wise pass costs four times as much (28 against 112 µs
/// a row of 49,152 for log_softmax). Smaller chunks slow the matrix products down.
const CHUNK_LOGITS: i64 = 6 << 20;

/// Rows of a chunk, whatever the vocabulary.
const CHUNK_ROWS: std::ops::RangeInclusive<i64> = 16..=1024;

/// A logit loss and what each of its values is multiplied with in the total.
pub(crate) struct ScaledLoss<'a> {
    /// The loss.
    pub(crate) loss: &'a dyn LogitLoss,
    /// Of both models' logits, ahead of it.
    pub(crate) norm: Normalization,
    /// Weight over the denominator of the reduction.
    pub(crate) scale: f64,
}

impl ScaledLoss<'_> {
    /// Does it see the teacher through the softmax of its logits as they are?
    fn is_at_temperature_one(&self) -> bool {
        self.norm == Normalization::None && self.loss.scaling() == Some(Scaling::Temperature(1.0))
    }
}

/// The two heads.
pub(crate) struct Heads<'a> {
    /// [V, D], the student's, frozen.
    pub(crate) student: &'a Tensor,
    /// The teacher's; `None` where no loss asks for full logits.
    pub(crate) teacher: Option<&'a LinearCode>,
    /// The student's trains too: its gradient is wanted.
    pub(crate) trains: bool,
}

impl Heads<'_> {
    /// Zeros to add the gradient of the student's head to, where it trains.
    fn weight_gradient(&self) -> Option<Tensor> {
        let of = (Kind::Float, self.student.device());
        self.trains.then(|| Tensor::zeros(self.student.size(), of))
    }
}

/// What the head gives back.
pub(crate) struct HeadGradient {
    /// dL/dh at the target positions [N, D], in the kind of the student's matrix products.
    pub(crate) hidden: Tensor,
    /// dL/dW of the student's head [V, D] f32, where it trains.
    pub(crate) weight: Option<Tensor>,
    /// Σ of the values of each loss over the target positions, unscaled.
    pub(crate) sums: Vec<f64>,
    /// Teacher logits that were looked up, and not found.
    pub(crate) missing: MissingLogits,
}

/// A loss value that is not finite.
#[derive(Debug)]
pub(crate) struct NotFiniteRow {
    /// Index of the loss.
    pub(crate) loss: usize,
    /// Index of the target position in the batch.
    pub(crate) row: i64,
}

/// Rows of a chunk for a vocabulary.
pub(crate) fn rows_per_chunk(vocabulary: i64) -> i64 {
    (CHUNK_LOGITS / vocabulary.max(1)).clamp(*CHUNK_ROWS.start(), *CHUNK_ROWS.end())
}

/// Losses and dL/dh of the rows `hidden` [N, D] (detached, the student's kind), N the batch's target
/// positions, `chunk` rows at a time.
pub(crate) fn fused_head(
    hidden: &Tensor,
    batch: &Batch,
    heads: &Heads<'_>,
    losses: &[ScaledLoss<'_>],
    chunk: i64,
) -> Result<HeadGradient, NotFiniteRow> {
    let of_teacher = heads.teacher.map(|code| code.rows(batch));
    if let Some(by_hand) = by_hand(losses, batch, heads.teacher) {
        let done = head_by_hand(hidden, batch, heads, of_teacher.as_ref(), &by_hand, chunk);
        if let Some(done) = done {
            return done;
        }
    }
    let sigmas = sample_sigmas(hidden, of_teacher.as_ref(), batch, heads, losses, chunk);
    let norms = norms_of(losses.iter());
    let lookups = Lookups::default();
    // The teacher's logits that hold at temperature 1 are not those of the others.
    let at_one = losses.iter().any(ScaledLoss::is_at_temperature_one);
    let mut sums = vec![0.0; losses.len()];
    let mut gradients = Vec::new();
    let mut weight = heads.weight_gradient();
    for (first, rows) in chunks(hidden.size()[0], chunk) {
        let student = logits(&hidden.narrow(0, first, rows), heads.student).set_requires_grad(true);
        let teacher = TeacherChunk::of(heads.teacher, of_teacher.as_ref(), (first, rows), at_one);
        let teacher_at_one = teacher.as_ref().and_then(|teacher| teacher.at_one.as_ref());
        let top_k = batch.top_k.as_ref().map(|top_k| TopKRows {
            ids: top_k.ids.narrow(0, first, rows),
            logits: top_k.logits.narrow(0, first, rows),
            log_sum_exp: top_k.log_sum_exp.narrow(0, first, rows),
        });
        let labels = batch.labels.narrow(0, first, rows);
        let keys = batch.keys.narrow(0, first, rows);
        let of_student = batch.of_student.narrow(0, first, rows);
        let paired = batch.paired.as_ref();
        let paired = paired.map(|paired| paired.narrow(0, first, rows));
        let mut total: Option<Tensor> = None;
        // Each normalisation is made once, for all the losses that it stands ahead of.
        for &norm in &norms {
            let student = norm.apply(&student);
            let teacher = teacher.as_ref().map(|teacher| teacher.normalized(norm));
            let (teacher, teacher_sigma) = match &teacher {
                Some((teacher, sigma)) => (Some(teacher), sigma.as_ref()),
                None => (None, None),
            };
            let sigma = sigmas.iter().find(|(of, _)| *of == norm).map(|(_, sigma)| {
                let student = sigma.student.narrow(0, first, rows);
                let teacher = sigma.teacher.narrow(0, first, rows);
                SampleSigma { student, teacher }
            });
            let rows = LogitRows {
                student: &student,
                teacher,
                teacher_sigma,
                top_k: top_k.as_ref().filter(|_| norm == Normalization::None),
                labels: &labels,
                keys: &keys,
                sample_sigma: sigma.as_ref(),
                of_student: Some(&of_student),
                lookups: &lookups,
            };
            let of_norm = |(_, scaled): &(usize, &ScaledLoss<'_>)| scaled.norm == norm;
            for (index, scaled) in losses.iter().enumerate().filter(of_norm) {
                let values = match teacher_at_one {
                    Some(teacher) if scaled.is_at_temperature_one() => {
                        scaled.loss.value(&LogitRows {
                            teacher: Some(teacher),
                            ..rows
                        })
                    }
                    _ => scaled.loss.value(&rows),
                };
                // Where tokenizers differ, a comparison has its value where both predict the same place of the text.
                let values = match &paired {
                    Some(paired) if scaled.loss.across_vocabularies() => values * paired,
                    _ => values,
                };
                let sum = values.sum(Kind::Double).double_value(&[]);
                if !sum.is_finite() {
                    return Err(NotFiniteRow {
                        loss: index,
                        row: first + first_not_finite(&values),
                    });
                }
                sums[index] += sum;
                let value = values.sum(None::<Kind>) * scaled.scale;
                total = Some(total.map_or_else(|| value.shallow_clone(), |total| total + &value));
            }
        }
        if let Some(total) = total {
            let gradient = Tensor::run_backward(&[total], &[&student], false, false).swap_remove(0);
            gradients.push(times(&gradient, heads.student));
            if let Some(weight) = &mut weight {
                add_head_gradient(weight, &gradient, &hidden.narrow(0, first, rows));
            }
        }
    }
    Ok(HeadGradient {
        hidden: Tensor::cat(&gradients, 0),
        weight,
        sums,
        missing: lookups.count(),
    })
}

/// dL/dW += dL/dzᵀ · h, in f32: [V, D], [N, V], [N, D].
fn add_head_gradient(weight: &mut Tensor, gradient: &Tensor, hidden: &Tensor) {
    tch::no_grad(|| {
        let (gradient, hidden) = (gradient.to_kind(Kind::Float), hidden.to_kind(Kind::Float));
        let _ = weight.addmm_(&gradient.tr(), &hidden);
    });
}

/// The normalisations ahead of some losses, each once, in a fixed order.
fn norms_of<'a>(losses: impl Iterator<Item = &'a ScaledLoss<'a>>) -> Vec<Normalization> {
    let mut norms: Vec<Normalization> = losses.map(|scaled| scaled.norm).collect();
    norms.sort_by_key(|norm| *norm as u8);
    norms.dedup();
    norms
}

/// Logits in f32 of hidden states, without a graph: [N, D], [V, D] → [N, V].
pub(crate) fn logits(hidden: &Tensor, head: &Tensor) -> Tensor {
    times_transposed(hidden, head).to_kind(Kind::Float)
}

/// Starts and lengths of chunks that cover `rows`.
pub(crate) fn chunks(rows: i64, chunk: i64) -> impl Iterator<Item = (i64, i64)> {
    let chunk = chunk.max(1);
    (0..rows)
        .step_by(chunk as usize)
        .map(move |first| (first, chunk.min(rows - first)))
}

/// The teacher's logits of some rows [N, V].
struct TeacherChunk {
    logits: Tensor,
    /// Those that hold at temperature 1.
    at_one: Option<Tensor>,
    spread: Option<KnownSpread>,
}

impl TeacherChunk {
    fn of(
        code: Option<&LinearCode>,
        of_teacher: Option<&TeacherRows>,
        (first, rows): (i64, i64),
        at_one: bool,
    ) -> Option<TeacherChunk> {
        let (code, of_teacher) = (code?, of_teacher?);
        let of_teacher = of_teacher.narrow(first, rows);
        let (logits, at_one) = tch::no_grad(|| code.both_logits(&of_teacher, at_one));
        Some(TeacherChunk {
            logits,
            at_one,
            spread: code
                .known_spread(&of_teacher)
                .map(KnownSpread::shallow_clone),
        })
    }

    /// After a normalisation, and their σ then, where it is known.
    fn normalized(&self, norm: Normalization) -> (Tensor, Option<Tensor>) {
        match &self.spread {
            Some(spread) => {
                let (logits, sigma) = spread.normalize(norm, &self.logits);
                (logits, Some(sigma))
            }
            None => (norm.apply(&self.logits), None),
        }
    }
}

fn first_not_finite(values: &Tensor) -> i64 {
    values
        .isfinite()
        .to_kind(Kind::Int64)
        .argmin(0, false)
        .int64_value(&[])
}

#[cfg(test)]
mod tests;
