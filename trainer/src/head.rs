//! The fused head: LM head, logit losses and their backward pass over chunks of target positions.
//!
//! [N, V] tensors never exist for a whole batch. For each chunk the student's logits are made
//! without a graph, the losses and their gradient are taken on them by autograd inside the chunk, and
//! only dL/dh [N, D] is kept; the trunk's backward pass starts from that. Prompt positions never
//! reach the head.

use tch::{Kind, Tensor};

use crate::batch::Batch;
use crate::losses::{
    LogitLoss, LogitRows, Lookups, MissingLogits, Normalization, SampleSigma, Scaling, TopKRows,
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
    let sigmas = sample_sigmas(hidden, of_teacher.as_ref(), batch, heads, losses, chunk);
    let norms = norms_of(losses.iter());
    let lookups = Lookups::default();
    // In the compact tier the logits that hold at temperature 1 are not those of the others.
    let at_one = heads.teacher.is_some_and(LinearCode::differs_at_one)
        && losses.iter().any(ScaledLoss::is_at_temperature_one);
    let mut sums = vec![0.0; losses.len()];
    let mut gradients = Vec::new();
    let mut weight = heads.trains.then(|| Tensor::zeros(heads.student.size(), (Kind::Float, heads.student.device())));
    for (first, rows) in chunks(hidden.size()[0], chunk) {
        let student = logits(&hidden.narrow(0, first, rows), heads.student).set_requires_grad(true);
        let teacher = teacher_chunk(heads.teacher, of_teacher.as_ref(), first, rows);
        let teacher_at_one = heads.teacher.zip(of_teacher.as_ref()).filter(|_| at_one);
        let teacher_at_one = teacher_at_one
            .map(|(code, all)| tch::no_grad(|| code.logits_at_one(&all.narrow(first, rows))));
        let top_k = batch.top_k.as_ref().map(|top_k| TopKRows {
            ids: top_k.ids.narrow(0, first, rows),
            logits: top_k.logits.narrow(0, first, rows),
            log_sum_exp: top_k.log_sum_exp.narrow(0, first, rows),
        });
        let labels = batch.labels.narrow(0, first, rows);
        let keys = batch.keys.narrow(0, first, rows);
        let of_student = batch.of_student.narrow(0, first, rows);
        let mut total: Option<Tensor> = None;
        // Each normalisation is made once, for all the losses that it stands ahead of.
        for &norm in &norms {
            let student = norm.apply(&student);
            let teacher = teacher.as_ref().map(|teacher| norm.apply(teacher));
            let sigma = sigmas.iter().find(|(of, _)| *of == norm).map(|(_, sigma)| {
                let student = sigma.student.narrow(0, first, rows);
                let teacher = sigma.teacher.narrow(0, first, rows);
                SampleSigma { student, teacher }
            });
            let rows = LogitRows {
                student: &student,
                teacher: teacher.as_ref(),
                top_k: top_k.as_ref().filter(|_| norm == Normalization::None),
                labels: &labels,
                keys: &keys,
                sample_sigma: sigma.as_ref(),
                of_student: Some(&of_student),
                lookups: &lookups,
            };
            let of_norm = |(_, scaled): &(usize, &ScaledLoss<'_>)| scaled.norm == norm;
            for (index, scaled) in losses.iter().enumerate().filter(of_norm) {
                let values = match &teacher_at_one {
                    Some(teacher) if scaled.is_at_temperature_one() => {
                        scaled.loss.value(&LogitRows {
                            teacher: Some(teacher),
                            ..rows
                        })
                    }
                    _ => scaled.loss.value(&rows),
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

fn teacher_chunk(
    code: Option<&LinearCode>,
    of_teacher: Option<&TeacherRows>,
    first: i64,
    rows: i64,
) -> Option<Tensor> {
    let (code, of_teacher) = (code?, of_teacher?);
    Some(tch::no_grad(|| {
        code.logits(&of_teacher.narrow(first, rows))
    }))
}

/// σ per sample for each normalisation that a loss asks for, spread over the target positions: a
/// pass of its own, since σ needs all positions of a sample before the first of them has a loss.
fn sample_sigmas(
    hidden: &Tensor,
    of_teacher: Option<&TeacherRows>,
    batch: &Batch,
    heads: &Heads<'_>,
    losses: &[ScaledLoss<'_>],
    chunk: i64,
) -> Vec<(Normalization, SampleSigma)> {
    let per_sample = losses
        .iter()
        .filter(|scaled| scaled.loss.needs_sample_sigma());
    norms_of(per_sample)
        .into_iter()
        .map(|norm| {
            let (mut student, mut teacher) = (Vec::new(), Vec::new());
            for (first, rows) in chunks(hidden.size()[0], chunk) {
                student.push(moments(
                    &norm.apply(&logits(&hidden.narrow(0, first, rows), heads.student)),
                ));
                if let Some(logits) = teacher_chunk(heads.teacher, of_teacher, first, rows) {
                    teacher.push(moments(&norm.apply(&logits)));
                }
            }
            let spread = |chunks: &[Tensor]| {
                let moments = Tensor::cat(chunks, 0);
                let samples = batch.num_sequences() as i64;
                sigma_of_samples(&moments, &batch.sequence_of_target, samples).to_kind(Kind::Float)
            };
            (
                norm,
                SampleSigma {
                    student: spread(&student),
                    teacher: spread(&teacher),
                },
            )
        })
        .collect()
}

/// Mean and mean square over the vocabulary in f64: [N, V] → [N, 2].
pub(crate) fn moments(logits: &Tensor) -> Tensor {
    let mean = logits.mean_dim([-1].as_slice(), true, None::<Kind>);
    let variance = (logits - &mean)
        .square()
        .mean_dim([-1].as_slice(), true, None::<Kind>)
        .to_kind(Kind::Double);
    let mean = mean.to_kind(Kind::Double);
    Tensor::cat(&[mean.shallow_clone(), variance + mean.square()], 1)
}

/// From the moments of the rows [N, 2] to the σ of each row's sample [N, 1] f64; `of` \[N\] says which
/// of the `samples` that is.
pub(crate) fn sigma_of_samples(moments: &Tensor, of: &Tensor, samples: i64) -> Tensor {
    let sums =
        Tensor::zeros([samples, 2], (Kind::Double, moments.device())).index_add(0, of, moments);
    let counts = of
        .bincount(None::<Tensor>, samples)
        .clamp_min(1)
        .to_kind(Kind::Double)
        .unsqueeze(1);
    let means = sums / counts;
    let variance = means.narrow(1, 1, 1) - means.narrow(1, 0, 1).square();
    variance.clamp_min(1e-12).sqrt().index_select(0, of)
}

fn first_not_finite(values: &Tensor) -> i64 {
    values
        .isfinite()
        .to_kind(Kind::Int64)
        .argmin(0, false)
        .int64_value(&[])
}

#[cfg(test)]
mod tests {
    use caskd_formats::{Columns, HiddenState, Sequence, Statistics, TopK};
    use caskd_models::SeededRng;
    use tch::Device;

    use super::*;
    use crate::losses::{BildTeacherLed, CrossEntropy, DualScaling, Kl, Sigma, UniformTailKl};

    const WIDTH: usize = 6;
    const VOCABULARY: usize = 23;

    fn random(rng: &mut SeededRng, shape: &[i64]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product::<i64>())
            .map(|_| rng.normal() as f32)
            .collect();
        Tensor::from_slice(&values).view(shape)
    }

    fn sequence(rng: &mut SeededRng, positions: usize) -> Sequence {
        let values = |rng: &mut SeededRng, n: usize| {
            (0..n).map(|_| rng.normal() as f32).collect::<Vec<f32>>()
        };
        Sequence {
            source: format!("test:{positions}"),
            token_ids: (0..positions)
                .map(|_| rng.below(VOCABULARY as u64) as u32)
                .collect(),
            loss_mask: (0..positions).map(|t| t >= 2).collect(),
            statistics: Some(Statistics {
                log_sum_exp: vec![4.0; positions],
                ..Statistics::default()
            }),
            top_k: Some(TopK {
                k: 2,
                ids: [3, 7].repeat(positions),
                logits: [2.0, 1.5].repeat(positions),
            }),
            hidden: vec![HiddenState {
                layer: 2,
                width: WIDTH,
                values: values(rng, positions * WIDTH),
            }],
            coefficients: None,
        }
    }

    /// The fused head's sums and gradient, whatever the chunk, are those of autograd through one
    /// product over all positions.
    #[test]
    fn chunks_add_up_to_unchunked_autograd() {
        let mut rng = SeededRng::new(2);
        let sequences: Vec<Sequence> = [5, 9, 3]
            .map(|positions| sequence(&mut rng, positions))
            .into();
        let columns = Columns {
            statistics: true,
            top_k: true,
            layers: vec![2],
            coefficients: false,
        };
        let batch = Batch::collate(&sequences, &columns, VOCABULARY).unwrap();
        let rows = batch.num_targets() as i64;
        assert_eq!((batch.num_positions(), rows), (17, 3 + 7 + 1));
        let hidden = random(&mut rng, &[rows, WIDTH as i64]);
        let (student_head, teacher_head) = (
            random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]),
            random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]),
        );
        let code = LinearCode::for_test(&teacher_head, 2);
        let dual = |sigma: Sigma| DualScaling {
            scaling_value: 2.0,
            sigma,
            ..DualScaling::default()
        };
        let kl = Kl {
            temperature: 3.0,
            temperature_squared: true,
            ..Kl::default()
        };
        let losses: [(&dyn LogitLoss, Normalization); 8] = [
            (&CrossEntropy {}, Normalization::None),
            (&kl, Normalization::None),
            (&dual(Sigma::Position), Normalization::MaxMin),
            (&dual(Sigma::Sample), Normalization::None),
            (&dual(Sigma::Sample), Normalization::Standardize),
            (&UniformTailKl { k: 2 }, Normalization::None),
            (&kl, Normalization::Standardize),
            (&BildTeacherLed::default(), Normalization::MaxMin),
        ];
        let scaled: Vec<ScaledLoss<'_>> = losses
            .iter()
            .enumerate()
            .map(|(index, &(loss, norm))| ScaledLoss {
                loss,
                norm,
                scale: 0.1 + index as f64,
            })
            .collect();
        let heads = Heads {
            student: &student_head,
            teacher: Some(&code),
            trains: true,
        };

        let leaf = hidden.copy().set_requires_grad(true);
        let head_leaf = student_head.copy().set_requires_grad(true);
        let student = leaf.matmul(&head_leaf.tr());
        let coefficients = batch
            .teacher_hidden(2)
            .index_select(0, &batch.targets_in_positions);
        let teacher = coefficients.matmul(&teacher_head.tr());
        let of_sample = |logits: &Tensor| {
            let per_row: Vec<Tensor> = (0..rows)
                .map(|row| {
                    let sample = batch.sequence_of_target.int64_value(&[row]);
                    let same = batch.sequence_of_target.eq(sample).nonzero().view(-1);
                    logits.index_select(0, &same).std(false)
                })
                .collect();
            Tensor::stack(&per_row, 0).unsqueeze(1)
        };
        let lookups = Lookups::default();
        let sums: Vec<Tensor> = losses
            .iter()
            .map(|(loss, norm)| {
                let (student, teacher) = (norm.apply(&student), norm.apply(&teacher));
                let sigma = SampleSigma {
                    student: of_sample(&student.detach()),
                    teacher: of_sample(&teacher),
                };
                let top_k = batch.top_k.as_ref();
                loss.value(&LogitRows {
                    student: &student,
                    teacher: Some(&teacher),
                    top_k: top_k.filter(|_| *norm == Normalization::None),
                    labels: &batch.labels,
                    keys: &batch.keys,
                    sample_sigma: Some(&sigma),
                    of_student: None,
                    lookups: &lookups,
                })
                .sum(None::<Kind>)
            })
            .collect();
        let total: Tensor = sums
            .iter()
            .zip(&scaled)
            .map(|(sum, scaled)| sum * scaled.scale)
            .sum();
        let mut expected = Tensor::run_backward(&[total], &[&leaf, &head_leaf], false, false);
        let of_head = expected.swap_remove(1);
        let expected = expected.swap_remove(0);

        for chunk in [1, 4, 100] {
            let fused = fused_head(&hidden, &batch, &heads, &scaled, chunk).unwrap();
            for (got, expected) in fused.sums.iter().zip(&sums) {
                let expected = expected.double_value(&[]);
                assert!(
                    (got - expected).abs() < 1e-4 * expected.abs(),
                    "{got} and {expected}"
                );
            }
            let error = (&fused.hidden - &expected).abs().max().double_value(&[]);
            assert!(
                error < 1e-5 * expected.abs().max().double_value(&[]),
                "chunk {chunk}: {error}"
            );
            let weight = fused.weight.unwrap();
            let error = (&weight - &of_head).abs().max().double_value(&[]);
            assert!(
                error < 1e-5 * of_head.abs().max().double_value(&[]),
                "chunk {chunk}, head: {error}"
            );
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_found() {
        let mut rng = SeededRng::new(3);
        let sequences = [sequence(&mut rng, 4), sequence(&mut rng, 6)];
        let batch = Batch::collate(&sequences, &Columns::default(), VOCABULARY).unwrap();
        let hidden = random(&mut rng, &[batch.num_targets() as i64, WIDTH as i64]);
        let _ = hidden.get(3).fill_(f64::NAN);
        let head = Tensor::ones(
            [VOCABULARY as i64, WIDTH as i64],
            (Kind::Float, Device::Cpu),
        );
        let heads = Heads {
            student: &head,
            teacher: None,
            trains: false,
        };
        let losses = [ScaledLoss {
            loss: &CrossEntropy {},
            norm: Normalization::None,
            scale: 1.0,
        }];
        let Err(bad) = fused_head(&hidden, &batch, &heads, &losses, 2) else {
            panic!("it is not finite")
        };
        assert_eq!(
            (bad.loss, bad.row, batch.source_of_target(bad.row)),
            (0, 3, "test:6")
        );
    }
}
