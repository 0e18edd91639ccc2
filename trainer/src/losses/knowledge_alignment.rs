//! Knowledge Alignment of hidden states.

use std::cmp::Ordering;

use tch::{Kind, Tensor};

use super::{HiddenReduction, Normalization};

/// Σ_l β · mean over positions of ‖n(h_s\[l\]) − n(h_t\[l\])‖²: BayesKD Eq. 7 with one β for all layers,
/// and Eq. 9 (or none, or standardisation) as n, over the width of one position.
#[derive(Debug, Clone, Copy)]
pub struct KnowledgeAlignment {
    /// β of Eq. 7.
    pub beta: f64,
    /// n.
    pub hidden_norm: Normalization,
    /// Over the width: mean, or Eq. 7's sum.
    pub reduction: HiddenReduction,
}

impl KnowledgeAlignment {
    /// The sum over positions for one layer: student [P, D_s], teacher [P, D_t] → scalar. The caller
    /// divides by the positions of the whole step.
    pub fn sum_over_positions(&self, student: &Tensor, teacher: &Tensor) -> Tensor {
        let (student, teacher) = match_width(student, teacher);
        let difference = self.hidden_norm.apply(&student) - self.hidden_norm.apply(&teacher);
        let width = difference.size()[1] as f64;
        let sum = difference.square().sum(None::<Kind>);
        match self.reduction {
            HiddenReduction::Mean => sum * (self.beta / width),
            HiddenReduction::Paper => sum * self.beta,
        }
    }
}

/// The paper's "fixed-dimension method" without parameters: the wider of the two is brought to the
/// width of the narrower by adaptive average pooling over neighbouring channels. Equal widths are
/// left alone. [P, D_s], [P, D_t] → both [P, min(D_s, D_t)].
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
