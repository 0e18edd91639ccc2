//! What the losses on hidden states share, and the two that need no more than that.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{BadKey, over_last};

/// A loss on hidden states.
pub trait HiddenLoss: Send {
    /// One value per position: student [P, D_s], teacher [P, D_t] → \[P\], differentiable with
    /// respect to the student's.
    fn value(&self, student: &Tensor, teacher: &Tensor) -> Tensor;

    /// Are its keys possible?
    fn validate(&self) -> Result<(), BadKey> {
        Ok(())
    }
}

/// ‖h_s/‖h_s‖ − h_t/‖h_t‖‖² at each position (Patient-KD, Sun et al. 2019, arXiv 1908.09355, Eq. 7,
/// there at BERT's first token only). It equals 2 · (1 − cosine). Asks for the hidden states of its
/// layers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PatientKd {}

/// 1 − ⟨h_s, h_t⟩/(‖h_s‖‖h_t‖) at each position, the cosine loss of DistilBERT (Sanh et al. 2019,
/// arXiv 1910.01108, section 3). Asks for the hidden states of its layers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HiddenCosine {}

impl HiddenLoss for PatientKd {
    fn value(&self, student: &Tensor, teacher: &Tensor) -> Tensor {
        let (student, teacher) = match_width(student, teacher);
        over_last(&(unit(&student) - unit(&teacher)).square())
    }
}

impl HiddenLoss for HiddenCosine {
    fn value(&self, student: &Tensor, teacher: &Tensor) -> Tensor {
        let (student, teacher) = match_width(student, teacher);
        1.0f64 - over_last(&(unit(&student) * unit(&teacher)))
    }
}

/// x/‖x‖; a vector of zeros stays one, with the gradient 0.
fn unit(x: &Tensor) -> Tensor {
    const SMALLEST: f64 = 1e-24;
    let square = x
        .square()
        .sum_dim_intlist([-1].as_slice(), true, None::<Kind>);
    x / square.clamp_min(SMALLEST).sqrt() * square.gt(SMALLEST)
}

/// How widths that differ are brought together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// Without parameters: see [`match_width`].
    #[default]
    Pool,
    /// By a matrix of each layer from the student's width to the teacher's, without bias, that trains with the
    /// student (FitNets, Romero et al. 2015, arXiv 1412.6550, section 2.2) and is no part of it afterwards.
    Learned,
}

/// The paper's "fixed-dimension method" (BayesKD) without parameters: the wider of the two is brought
/// to the width of the narrower by adaptive average pooling over neighbouring channels. Equal widths
/// are left alone. [P, D_s], [P, D_t] → both [P, min(D_s, D_t)].
pub fn match_width(student: &Tensor, teacher: &Tensor) -> (Tensor, Tensor) {
    let (student_width, teacher_width) = (student.size()[1], teacher.size()[1]);
    let pooled =
        |x: &Tensor, width: i64| x.unsqueeze(1).adaptive_avg_pool1d([width]).squeeze_dim(1);
    match student_width.cmp(&teacher_width) {
        Ordering::Greater => (pooled(student, teacher_width), teacher.shallow_clone()),
        Ordering::Less => (student.shallow_clone(), pooled(teacher, student_width)),
        Ordering::Equal => (student.shallow_clone(), teacher.shallow_clone()),
    }
}

/// The student's layer at the same relative depth as a layer of the teacher: 0 ↔ 0, last ↔ last,
/// in between rounded to the nearest.
pub fn matched_layer(teacher_layer: u32, teacher_layers: u32, student_layers: u32) -> u32 {
    let (layer, of, to) = (
        u64::from(teacher_layer),
        u64::from(teacher_layers.max(1)),
        u64::from(student_layers),
    );
    ((2 * layer * to + of) / (2 * of)).min(to) as u32
}
