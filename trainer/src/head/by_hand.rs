//! The fused head by the row kernel, where every loss has a form for that.

use caskd_models::unchecked::read;
use tch::Tensor;

use super::{HeadGradient, Heads, NotFiniteRow, ScaledLoss, add_head_gradient, chunks};
use crate::batch::Batch;
use crate::losses::{MissingLogits, Normalization, SoftTarget};
use crate::matmul::{times, times_transposed};
use crate::row_kernel::{
    HandLoss, Known, TeacherParts, TopEntries, values_and_gradient, values_of,
};
use crate::teacher_logits::{LinearCode, TeacherRows};

/// The losses as the row kernel takes them; `None` where one of them needs autograd.
pub(super) fn by_hand(
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

/// [`super::fused_head`] by the row kernel; `None` where a tensor does not lie in the CPU's memory.
pub(super) fn head_by_hand(
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
