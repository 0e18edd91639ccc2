//! Any loss and its gradient on given tensors, apart from any student or cache.

use tch::{Kind, Tensor};

use crate::head::{chunks, moments, rows_per_chunk, sigma_of_samples};
use crate::loss_term::{LossTerm, TermLoss};
use crate::losses::{
    HiddenKind, Labels, LogitKind, LogitRows, Lookups, Normalization, Projection, Requirement,
    SampleSigma,
};
use crate::{Error, Result};

/// A loss at every position, and the gradient of its mean.
#[derive(Debug)]
pub struct LossValues {
    /// [B, T] (or \[N\]): the values; 0 at positions left out.
    pub value: Tensor,
    /// d mean(value)/d student [B, T, V] (or [N, V]; the hidden width in V's place for hidden states),
    /// the mean over all positions, those left out as zeros.
    pub grad: Tensor,
    /// Positions.
    pub positions: u64,
    /// Of them, those with a value: neither masked out nor without a label that the loss needs.
    pub counted: u64,
    /// Mean over all positions.
    pub mean: f64,
}

/// Evaluates a term (its weight, reduction, layers and positions apart) on named tensors: `teacher` and
/// `student` [B, T, V] or [N, V] (no `teacher` where the loss reads none); `labels` [B, T] of integers for losses on labels, negative where
/// there is none; `of_student` [B, T] for `distillm-2`; `mask` [B, T], 0 where a position is to be left out. Losses on hidden states take
/// `teacher_hidden` and `student_hidden` [B, T, D], and `projection` [D_t, D_s] where that is learned. In f64 where student or teacher are f64, else in
/// f32. Positions are taken as many at a time as the fused head does; σ per sample spans a sequence
/// (all rows of [N, V]).
///
/// # Errors
/// A tensor that is missing, of another shape or type than it must be, or not finite; a value that is
/// not finite; settings that are not possible.
pub fn loss_values(term: &LossTerm, tensors: &[(String, Tensor)]) -> Result<LossValues> {
    term.validate()?;
    match &term.loss {
        TermLoss::Logits {
            loss, logits_norm, ..
        } => on_logits(loss, *logits_norm, &Inputs { tensors }),
        TermLoss::Hidden {
            loss, projection, ..
        } => on_hidden(loss, *projection, &Inputs { tensors }),
    }
}

/// Two tensors as rows, and which rows count.
struct Rows {
    /// [B·T, V].
    student: Tensor,
    /// [B·T, V].
    teacher: Tensor,
    /// [B, T] or \[N\].
    shape: Vec<i64>,
    /// Rows to leave out are false \[B·T\].
    kept: Tensor,
}

fn on_logits(loss: &LogitKind, norm: Normalization, inputs: &Inputs<'_>) -> Result<LossValues> {
    let of = loss.loss();
    // A loss that reads nothing of the teacher's does without it.
    let teacher = match of.requirement() {
        Requirement::Nothing => "student",
        _ => "teacher",
    };
    let mut rows = inputs.rows("student", teacher)?;
    let (vocabulary, teacher_vocabulary) = (rows.student.size()[1], rows.teacher.size()[1]);
    if vocabulary != teacher_vocabulary && !of.across_vocabularies() {
        return Err(bad(
            "teacher",
            &format!("has {teacher_vocabulary} logits a position, and `student` has {vocabulary}"),
            "give both the same vocabulary; `uld` compares different ones",
        ));
    }
    let labels = match of.labels() {
        Labels::Unused => Tensor::full(rows.kept.size(), -1, (Kind::Int64, tch::Device::Cpu)),
        Labels::Needed | Labels::OrTeachersFirst => {
            inputs.labels(loss.name(), &rows.shape, vocabulary)?
        }
    };
    if of.labels() == Labels::Needed {
        rows.kept = rows.kept.logical_and(&labels.ge(0));
    }
    let of_student = of
        .needs_responses()
        .then(|| inputs.of_student(loss.name(), &rows.shape))
        .transpose()?;
    let kept = rows.kept.nonzero().view(-1);
    let sigma = of
        .needs_sample_sigma()
        .then(|| sample_sigma(&rows, &kept, norm));
    let per_chunk = rows_per_chunk(vocabulary.max(teacher_vocabulary));
    rows.differentiate(&kept, per_chunk, &|index, student, teacher| {
        let (student, teacher) = (norm.apply(student), norm.apply(teacher));
        let sigma = sigma.as_ref().map(|(first, sigma)| SampleSigma {
            student: sigma.student.index_select(0, &first.index_select(0, index)),
            teacher: sigma.teacher.index_select(0, &first.index_select(0, index)),
        });
        of.value(&LogitRows {
            student: &student,
            teacher: Some(&teacher),
            teacher_sigma: None,
            top_k: None,
            labels: &labels.index_select(0, index),
            keys: index,
            sample_sigma: sigma.as_ref(),
            of_student: of_student
                .as_ref()
                .map(|all| all.index_select(0, index))
                .as_ref(),
            lookups: &Lookups::default(),
        })
    })
}

fn on_hidden(loss: &HiddenKind, projection: Projection, inputs: &Inputs<'_>) -> Result<LossValues> {
    let rows = inputs.rows("student_hidden", "teacher_hidden")?;
    let projection = match projection {
        Projection::Pool => None,
        Projection::Learned => Some(inputs.projection(&rows)?),
    };
    let kept = rows.kept.nonzero().view(-1);
    let per_chunk = rows_per_chunk(rows.student.size()[1].max(rows.teacher.size()[1]));
    rows.differentiate(&kept, per_chunk, &|_, student, teacher| match &projection {
        Some(projection) => loss
            .loss()
            .value(&student.matmul(&projection.tr()), teacher),
        None => loss.loss().value(student, teacher),
    })
}

/// For every row its index among the kept ones \[B·T\], and σ per sample of those [kept, 1].
fn sample_sigma(rows: &Rows, kept: &Tensor, norm: Normalization) -> (Tensor, SampleSigma) {
    let samples = if rows.shape.len() == 2 {
        rows.shape[0]
    } else {
        1
    };
    let per_sample = rows.kept.size()[0] / samples.max(1);
    let of = kept.divide_scalar_mode(per_sample.max(1), "floor");
    let sigma = |logits: &Tensor| {
        let chunk = rows_per_chunk(logits.size()[1]);
        let moments: Vec<Tensor> = chunks(kept.size()[0], chunk)
            .map(|(first, count)| {
                let some = logits.index_select(0, &kept.narrow(0, first, count));
                moments(&norm.apply(&some), None)
            })
            .collect();
        sigma_of_samples(&Tensor::cat(&moments, 0), &of, samples).to_kind(logits.kind())
    };
    let place = rows.kept.to_kind(Kind::Int64).cumsum(0, None::<Kind>) - 1;
    let sigma = SampleSigma {
        student: sigma(&rows.student),
        teacher: sigma(&rows.teacher),
    };
    (place, sigma)
}

impl Rows {
    /// Values and gradient, `per_chunk` kept rows at a time. `value` sees the rows' indices, the
    /// student's rows and the teacher's.
    fn differentiate(
        &self,
        kept: &Tensor,
        per_chunk: i64,
        value: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor,
    ) -> Result<LossValues> {
        let positions = self.kept.size()[0];
        let mut values = Tensor::zeros([positions], (self.student.kind(), tch::Device::Cpu));
        let mut grad = self.student.zeros_like();
        for (first, count) in chunks(kept.size()[0], per_chunk) {
            let index = kept.narrow(0, first, count);
            let student = self.student.index_select(0, &index).set_requires_grad(true);
            let teacher = self.teacher.index_select(0, &index);
            let of_chunk = value(&index, &student, &teacher);
            let total = of_chunk.sum(None::<Kind>) / positions as f64;
            let gradient = Tensor::run_backward(&[total], &[&student], false, false).swap_remove(0);
            let _ = values.index_copy_(0, &index, &of_chunk.detach());
            let _ = grad.index_copy_(0, &index, &gradient);
        }
        for (tensor, name) in [(&values, "value"), (&grad, "grad")] {
            if !all_finite(tensor) {
                return Err(bad(
                    name,
                    "of the result is not finite",
                    "the logits or the settings are too extreme; f64 tensors reach further than f32",
                ));
            }
        }
        let shape = |last: &[i64]| [self.shape.as_slice(), last].concat();
        Ok(LossValues {
            mean: values.sum(Kind::Double).double_value(&[]) / positions as f64,
            value: values.view(shape(&[]).as_slice()),
            grad: grad.view(shape(&[self.student.size()[1]]).as_slice()),
            positions: positions as u64,
            counted: kept.size()[0] as u64,
        })
    }
}

/// Tensors by name.
struct Inputs<'a> {
    tensors: &'a [(String, Tensor)],
}

impl Inputs<'_> {
    fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors
            .iter()
            .find(|(of, _)| of == name)
            .map(|(_, tensor)| tensor)
    }

    fn need(&self, name: &str, remedy: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| {
            let present: Vec<&str> = self.tensors.iter().map(|(name, _)| name.as_str()).collect();
            let reason = match present.len() {
                0 => "is missing: the file holds none".to_owned(),
                1..=12 => format!("is missing: the file holds {}", present.join(", ")),
                more => format!("is missing among the {more} of the file"),
            };
            bad(name, &reason, remedy)
        })
    }

    /// Both tensors of vectors as rows, in the kind to compute in.
    fn rows(&self, student: &str, teacher: &str) -> Result<Rows> {
        let remedy = format!("the loss compares `{student}` and `{teacher}`");
        let (of_student, of_teacher) = (self.need(student, &remedy)?, self.need(teacher, &remedy)?);
        for (name, tensor) in [(student, of_student), (teacher, of_teacher)] {
            let size = tensor.size();
            if !matches!(size.len(), 2 | 3) || size.contains(&0) {
                return Err(bad(
                    name,
                    &format!("has the shape {size:?}"),
                    "it must be [B, T, V] or [N, V], with no side 0",
                ));
            }
            if !tensor.is_floating_point() {
                return Err(bad(
                    name,
                    &format!("holds {:?}", tensor.kind()),
                    "it must hold floating-point numbers",
                ));
            }
            if !all_finite(tensor) {
                return Err(bad(
                    name,
                    "holds NaN or an infinity",
                    "replace them: a masked logit can be a large negative number",
                ));
            }
        }
        let (mut shape, mut other) = (of_student.size(), of_teacher.size());
        let (width, other_width) = (
            shape.pop().unwrap_or_default(),
            other.pop().unwrap_or_default(),
        );
        if shape != other {
            return Err(bad(
                teacher,
                &format!("has the positions {other:?}, and `{student}` has {shape:?}"),
                "both must have the same [B, T]",
            ));
        }
        let double = [of_student, of_teacher]
            .iter()
            .any(|tensor| tensor.kind() == Kind::Double);
        let kind = if double { Kind::Double } else { Kind::Float };
        let positions: i64 = shape.iter().product();
        let kept = match self.find("mask") {
            None => Tensor::ones([positions], (Kind::Bool, tch::Device::Cpu)),
            Some(mask) => {
                same_shape("mask", mask, &shape)?;
                mask.ne(0).view(-1)
            }
        };
        Ok(Rows {
            student: of_student.to_kind(kind).contiguous().view([-1, width]),
            teacher: of_teacher
                .to_kind(kind)
                .contiguous()
                .view([-1, other_width]),
            shape,
            kept,
        })
    }

    /// The learned projection [D_t, D_s], in the kind of the rows.
    fn projection(&self, rows: &Rows) -> Result<Tensor> {
        let remedy = "a learned projection goes from the student's width to the teacher's";
        let projection = self.need("projection", remedy)?;
        let shape = [rows.teacher.size()[1], rows.student.size()[1]];
        if projection.size() != shape || !projection.is_floating_point() {
            return Err(bad(
                "projection",
                &format!(
                    "has the shape {:?}, and the widths ask for {shape:?}",
                    projection.size()
                ),
                remedy,
            ));
        }
        Ok(projection.to_kind(rows.student.kind()))
    }

    /// Which positions belong to responses of the student's \[B·T\] bool.
    fn of_student(&self, loss: &str, shape: &[i64]) -> Result<Tensor> {
        let flags = self.need(
            "of_student",
            &format!("loss `{loss}` needs 1 where the student wrote the response and 0 elsewhere"),
        )?;
        same_shape("of_student", flags, shape)?;
        Ok(flags.ne(0).contiguous().view(-1))
    }

    /// Labels \[B·T\] i64.
    fn labels(&self, loss: &str, shape: &[i64], vocabulary: i64) -> Result<Tensor> {
        let labels = self.need(
            "labels",
            &format!(
                "loss `{loss}` needs the tokens that follow: integers, negative where there is none"
            ),
        )?;
        same_shape("labels", labels, shape)?;
        if labels.is_floating_point() || labels.kind() == Kind::Bool {
            return Err(bad(
                "labels",
                &format!("holds {:?}", labels.kind()),
                "it must hold integers",
            ));
        }
        let labels = labels.to_kind(Kind::Int64).contiguous().view(-1);
        let largest = labels.max().int64_value(&[]);
        if largest >= vocabulary {
            return Err(bad(
                "labels",
                &format!("holds {largest}, outside the vocabulary of {vocabulary}"),
                "labels are token ids below V",
            ));
        }
        Ok(labels)
    }
}

fn same_shape(name: &str, tensor: &Tensor, shape: &[i64]) -> Result<()> {
    if tensor.size() == shape {
        return Ok(());
    }
    Err(bad(
        name,
        &format!(
            "has the shape {:?}, and the positions are {shape:?}",
            tensor.size()
        ),
        "it needs one number for each position",
    ))
}

fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

fn bad(tensor: &str, reason: &str, remedy: &str) -> Error {
    Error::LossTensor {
        tensor: tensor.to_owned(),
        reason: reason.to_owned(),
        remedy: remedy.to_owned(),
    }
}
