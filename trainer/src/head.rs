//! The fused head: LM head, logit losses and their backward pass over chunks of target positions.
//!
//! [N, V] tensors never exist for a whole batch. For each chunk the student's logits are made
//! without a graph, the losses and their gradient are taken on them (by hand where every loss has a
//! form for that, see `row_kernel`, else by autograd inside the chunk), and only dL/dh [N, D] is kept; the trunk's backward pass starts from that. Prompt positions never
//! reach the head.

use tch::{Kind, Tensor};

use crate::batch::Batch;
use crate::losses::{
    LogitLoss, LogitRows, Lookups, MissingLogits, Normalization, SampleSigma, Scaling, SoftTarget,
    TopKRows,
};
use crate::matmul::{times, times_transposed};
use crate::row_kernel::{HandLoss, Known, TeacherParts, TopEntries, values_and_gradient};
use crate::teacher_logits::{LinearCode, TeacherRows};
use crate::unchecked::{read, values_of};

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
    // In the compact tier the logits that hold at temperature 1 are not those of the others.
    let at_one = heads.teacher.is_some_and(LinearCode::differs_at_one)
        && losses.iter().any(ScaledLoss::is_at_temperature_one);
    let mut sums = vec![0.0; losses.len()];
    let mut gradients = Vec::new();
    let mut weight = heads.weight_gradient();
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
        let paired = batch.paired.as_ref();
        let paired = paired.map(|paired| paired.narrow(0, first, rows));
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

/// The losses as the row kernel takes them; `None` where one of them needs autograd.
fn by_hand(
    losses: &[ScaledLoss<'_>],
    batch: &Batch,
    teacher: Option<&LinearCode>,
) -> Option<Vec<HandLoss>> {
    let cached = batch
        .top_k
        .as_ref()
        .map(|top_k| top_k.ids.size()[1] as usize);
    let hand = |scaled: &ScaledLoss<'_>| {
        let mut form = scaled.loss.by_hand()?;
        if let SoftTarget::Ghost(k) | SoftTarget::EvenTail(k) = form.target {
            match (k, cached) {
                // Where the whole vocabulary is at hand there is no tail to make up.
                (None, None) => form.target = SoftTarget::Teacher,
                (None, Some(_)) => {}
                (Some(k), cached) => {
                    cached.filter(|&cached| cached >= k)?;
                }
            }
        }
        let at_hand = form.target != SoftTarget::Teacher || teacher.is_some();
        (scaled.norm == Normalization::None && at_hand).then_some(HandLoss {
            form,
            scale: scaled.scale,
        })
    };
    losses.iter().map(hand).collect()
}

/// [`fused_head`] by the row kernel; `None` where a tensor does not lie in the CPU's memory.
fn head_by_hand(
    hidden: &Tensor,
    batch: &Batch,
    heads: &Heads<'_>,
    of_teacher: Option<&TeacherRows>,
    losses: &[HandLoss],
    chunk: i64,
) -> Option<Result<HeadGradient, NotFiniteRow>> {
    let threads = tch::get_num_threads().max(1) as usize;
    let mut sums = vec![0.0; losses.len()];
    let mut gradients = Vec::new();
    let mut weight = heads.weight_gradient();
    for (first, rows) in chunks(hidden.size()[0], chunk) {
        let mut student = times_transposed(&hidden.narrow(0, first, rows), heads.student);
        let of_teacher = of_teacher.map(|all| all.narrow(first, rows));
        let of_teacher = heads.teacher.zip(of_teacher.as_ref());
        let mut teacher = of_teacher.map(|(code, rows)| code.products(rows));
        let labels = batch.labels.narrow(0, first, rows);
        let top_k = batch.top_k.as_ref().map(|top_k| {
            let narrow = |tensor: &Tensor| tensor.narrow(0, first, rows);
            (
                narrow(&top_k.ids),
                narrow(&top_k.logits),
                narrow(&top_k.log_sum_exp),
            )
        });
        let known = Known {
            labels: read(&labels)?,
            top_k: match &top_k {
                None => None,
                Some((ids, logits, log_sum_exp)) => Some(TopEntries {
                    k: ids.size()[1] as usize,
                    ids: read(ids)?,
                    logits: read(logits)?,
                    log_sum_exp: read(log_sum_exp)?,
                }),
            },
            teacher: match of_teacher {
                Some((code, rows)) => code.parts(rows)?,
                None => TeacherParts::default(),
            },
        };
        let of_teacher = match &mut teacher {
            Some(teacher) => Some(values_of(teacher)?),
            None => None,
        };
        let values = values_and_gradient(
            losses,
            values_of(&mut student)?,
            of_teacher,
            &known,
            threads,
        );
        for (row, values) in values.chunks_exact(losses.len()).enumerate() {
            for (index, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                if !value.is_finite() {
                    let row = first + row as i64;
                    return Some(Err(NotFiniteRow { loss: index, row }));
                }
                *sum += value;
            }
        }
        gradients.push(times(&student, heads.student));
        if let Some(weight) = &mut weight {
            add_head_gradient(weight, &student, &hidden.narrow(0, first, rows));
        }
    }
    Some(Ok(HeadGradient {
        hidden: Tensor::cat(&gradients, 0),
        weight,
        sums,
        missing: MissingLogits::default(),
    }))
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
    use crate::losses::{
        BildTeacherLed, CrossEntropy, DualScaling, GhostKl, Kl, Sigma, Tail, UniformTailKl,
    };

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

    /// By hand as by autograd, whatever the chunk: every form, alone and all together, in both kinds.
    #[test]
    fn the_row_kernel_agrees_with_autograd() {
        let mut rng = SeededRng::new(7);
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
        let hidden = random(&mut rng, &[rows, WIDTH as i64]);
        let student_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
        let teacher_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
        let kl = |temperature: f64, tail: Tail| Kl {
            temperature,
            temperature_squared: temperature > 2.0,
            tail,
        };
        let dual = DualScaling {
            scaling_value: 0.7,
            gamma: 1.5,
            temperature_squared: true,
            ..DualScaling::default()
        };
        let losses: [&dyn LogitLoss; 8] = [
            &CrossEntropy {},
            &kl(1.0, Tail::Refuse),
            &kl(3.0, Tail::Refuse),
            &dual,
            &GhostKl { k: 2 },
            &UniformTailKl { k: 1 },
            &kl(1.0, Tail::Ghost),
            &kl(1.0, Tail::Uniform),
        ];
        for kind in [Kind::Float, Kind::BFloat16] {
            // In bfloat16 both begin with the same rounded products; the gradient is rounded once more.
            let allowed = if kind == Kind::Float { 1e-5 } else { 2e-2 };
            let (hidden, student_head) = (hidden.to_kind(kind), student_head.to_kind(kind));
            let teacher_head = teacher_head.to_kind(kind);
            let code = LinearCode::for_test(&teacher_head, 2);
            let heads = Heads {
                student: &student_head,
                teacher: Some(&code),
                trains: false,
            };
            let of_teacher = code.rows(&batch);
            let alone = (0..losses.len()).map(|one| vec![one]);
            for chosen in alone.chain([(0..losses.len()).collect()]) {
                let scaled: Vec<ScaledLoss<'_>> = chosen
                    .iter()
                    .map(|&index| ScaledLoss {
                        loss: losses[index],
                        norm: Normalization::None,
                        scale: 0.3 + index as f64,
                    })
                    .collect();
                // The reference in f64: a student's small tail mass is lost in f32.
                let wide = |logits: Tensor| logits.to_kind(Kind::Double);
                let leaf = wide(logits(&hidden, &student_head)).set_requires_grad(true);
                let teacher = wide(code.logits(&of_teacher));
                let lookups = Lookups::default();
                let rows = LogitRows {
                    student: &leaf,
                    teacher: Some(&teacher),
                    top_k: batch.top_k.as_ref(),
                    labels: &batch.labels,
                    keys: &batch.keys,
                    sample_sigma: None,
                    of_student: None,
                    lookups: &lookups,
                };
                let sums: Vec<Tensor> = scaled
                    .iter()
                    .map(|scaled| scaled.loss.value(&rows).sum(None::<Kind>))
                    .collect();
                let total: Tensor = sums
                    .iter()
                    .zip(&scaled)
                    .map(|(sum, scaled)| sum * scaled.scale)
                    .sum();
                let gradient = Tensor::run_backward(&[total], &[&leaf], false, false);
                let gradient = gradient[0].to_kind(Kind::Float);
                let expected = times(&gradient, &student_head).to_kind(Kind::Float);
                for chunk in [1, 4, 100] {
                    let hand = by_hand(&scaled, &batch, heads.teacher).unwrap();
                    let of_teacher = Some(&of_teacher);
                    let done = head_by_hand(&hidden, &batch, &heads, of_teacher, &hand, chunk);
                    let done = done.unwrap().unwrap();
                    for (got, expected) in done.sums.iter().zip(&sums) {
                        let expected = expected.double_value(&[]);
                        assert!(
                            (got - expected).abs() < 1e-5 * expected.abs().max(1.0),
                            "{kind:?} {chosen:?}: {got} and {expected}"
                        );
                    }
                    let error = (done.hidden.to_kind(Kind::Float) - &expected).abs().max();
                    let largest = expected.abs().max().double_value(&[]);
                    assert!(
                        error.double_value(&[]) < allowed * largest,
                        "{kind:?} {chosen:?} in chunks of {chunk}: {error} of {largest}"
                    );
                }
            }
        }
    }

    /// What the compact tier lays over its products, with the logits of temperature 1 beside the others.
    #[test]
    fn the_row_kernel_lays_exact_logits_over_products() {
        let (rows, vocabulary, k) = (3usize, 29usize, 2usize);
        let mut rng = SeededRng::new(8);
        let mut draw = |shape: &[i64]| random(&mut rng, shape);
        let shape = [rows as i64, vocabulary as i64];
        let (student, product) = (draw(&shape), draw(&shape) * 2.0);
        let (bias, mean) = (draw(&[vocabulary as i64]), draw(&[rows as i64, 1]));
        let ids = Tensor::from_slice(&[3i64, 7, 0, 28, 11, 12]).view([rows as i64, k as i64]);
        let exact = draw(&[rows as i64, k as i64]) + 4.0;
        let log_sum_exp = exact.logsumexp([-1].as_slice(), true) + 0.4;
        let labels = [1i64, 28, 7];

        let laid = (&product + &bias + &mean).scatter(-1, &ids, &exact);
        let kept =
            (&exact - &log_sum_exp)
                .exp()
                .sum_dim_intlist([-1].as_slice(), true, Kind::Float);
        let rest = (1.0f64 - kept).log() + &log_sum_exp;
        let others = laid.scatter_value(-1, &ids, f64::NEG_INFINITY);
        let shift = rest - others.logsumexp([-1].as_slice(), true);
        let at_one = (&laid + shift).scatter(-1, &ids, &exact);
        let leaf = student.copy().set_requires_grad(true);
        let (one, two) = (
            Kl::default(),
            Kl {
                temperature: 2.0,
                ..Kl::default()
            },
        );
        let values = [
            (crate::losses::divergence(&at_one, &leaf), 1.5),
            (
                crate::losses::divergence(&(&laid / 2.0), &(&leaf / 2.0)),
                0.5,
            ),
        ];
        let total: Tensor = values
            .iter()
            .map(|(value, scale)| value.sum(None::<Kind>) * *scale)
            .sum();
        let expected = Tensor::run_backward(&[total], &[&leaf], false, false).swap_remove(0);

        let losses = [(&one, 1.5), (&two, 0.5)].map(|(loss, scale)| HandLoss {
            form: loss.by_hand().unwrap(),
            scale,
        });
        let entries = TopEntries {
            k,
            ids: read(&ids).unwrap(),
            logits: read(&exact).unwrap(),
            log_sum_exp: read(&log_sum_exp).unwrap(),
        };
        let known = Known {
            labels: &labels,
            top_k: None,
            teacher: TeacherParts {
                bias: read(&bias),
                mean: read(&mean),
                exact: Some(entries),
                smallest_mass: 1e-6,
            },
        };
        for threads in [1, 2, 5] {
            let (mut gradient, mut product) = (student.copy(), product.copy());
            let got = values_and_gradient(
                &losses,
                values_of(&mut gradient).unwrap(),
                values_of(&mut product),
                &known,
                threads,
            );
            for (index, (value, _)) in values.iter().enumerate() {
                for row in 0..rows {
                    let expected = value.double_value(&[row as i64]);
                    let got = got[row * 2 + index];
                    assert!((got - expected).abs() < 1e-5, "{got} and {expected}");
                }
            }
            let error = (&gradient - &expected).abs().max().double_value(&[]);
            assert!(error < 1e-6, "{error}");
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
