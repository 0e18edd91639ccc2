//! σ over the vocabulary and all target positions of a sample, Eq. 2 of BayesKD to the letter.

use tch::{Kind, Tensor};

use super::{Heads, ScaledLoss, TeacherChunk, chunks, logits, norms_of};
use crate::batch::Batch;
use crate::losses::{Normalization, SampleSigma};
use crate::teacher_logits::TeacherRows;

/// σ per sample for each normalisation that a loss asks for, spread over the target positions: a
/// pass of its own, since σ needs all positions of a sample before the first of them has a loss.
pub(super) fn sample_sigmas(
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
                let own = logits(&hidden.narrow(0, first, rows), heads.student);
                student.push(moments(&norm.apply(&own), None));
                if let Some(chunk) =
                    TeacherChunk::of(heads.teacher, of_teacher, (first, rows), false)
                {
                    let (logits, sigma) = chunk.normalized(norm);
                    teacher.push(moments(&logits, sigma.as_ref()));
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

/// Mean and mean square over the vocabulary in f64: [N, V] → [N, 2]; by their population σ [N, 1] where it is known.
pub(crate) fn moments(logits: &Tensor, sigma: Option<&Tensor>) -> Tensor {
    let mean = logits.mean_dim([-1].as_slice(), true, None::<Kind>);
    let variance = match sigma {
        Some(sigma) => sigma.square(),
        None => (logits - &mean)
            .square()
            .mean_dim([-1].as_slice(), true, None::<Kind>),
    };
    let variance = variance.to_kind(Kind::Double);
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
