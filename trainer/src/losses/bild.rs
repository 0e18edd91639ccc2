//! Bi-directional logits difference.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::kl::{divergence, divided};
use super::{BadKey, LogitLoss, LogitRows, Requirement, Scaling, check};

/// t-LD + s-LD: both halves below, added (BiLD, Li et al. 2024, arXiv 2406.13555, Eq. 10).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bild {
    /// Leading tokens.
    pub k: usize,
    /// τ.
    pub temperature: f64,
}

/// KL(softmax(d_t/τ) ‖ softmax(d_s/τ)) over the k(k−1)/2 differences d of logits, i < j, of the
/// tokens that the teacher ranks first. Runs on every cache with K ≥ `k`, and from rebuilt logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BildTeacherLed {
    /// Leading tokens.
    pub k: usize,
    /// τ.
    pub temperature: f64,
}

/// The same over the tokens that the student ranks first.
///
/// On a sparse cache the teacher's logit of such a token may be missing. Its smallest cached logit,
/// which is an upper bound, then stands in, and the run counts and reports how often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BildStudentLed {
    /// Leading tokens.
    pub k: usize,
    /// τ.
    pub temperature: f64,
}

const K: usize = 8;
const TEMPERATURE: f64 = 3.0;

impl Default for Bild {
    fn default() -> Self {
        Bild {
            k: K,
            temperature: TEMPERATURE,
        }
    }
}

impl Default for BildTeacherLed {
    fn default() -> Self {
        BildTeacherLed {
            k: K,
            temperature: TEMPERATURE,
        }
    }
}

impl Default for BildStudentLed {
    fn default() -> Self {
        BildStudentLed {
            k: K,
            temperature: TEMPERATURE,
        }
    }
}

impl LogitLoss for Bild {
    fn requirement(&self) -> Requirement {
        Requirement::StudentsTopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        validate(self.k, self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        teacher_led(rows, self.k, self.temperature) + student_led(rows, self.k, self.temperature)
    }
}

impl LogitLoss for BildTeacherLed {
    fn requirement(&self) -> Requirement {
        Requirement::TopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        validate(self.k, self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        teacher_led(rows, self.k, self.temperature)
    }
}

impl LogitLoss for BildStudentLed {
    fn requirement(&self) -> Requirement {
        Requirement::StudentsTopK(self.k)
    }

    fn scaling(&self) -> Option<Scaling> {
        Some(Scaling::Temperature(self.temperature))
    }

    fn validate(&self) -> Result<(), BadKey> {
        validate(self.k, self.temperature)
    }

    fn value(&self, rows: &LogitRows<'_>) -> Tensor {
        student_led(rows, self.k, self.temperature)
    }
}

fn validate(k: usize, temperature: f64) -> Result<(), BadKey> {
    check::at_least("k", k, 2)?;
    check::positive("temperature", temperature)
}

fn teacher_led(rows: &LogitRows<'_>, k: usize, temperature: f64) -> Tensor {
    let top = rows.teacher_top(k);
    let student = rows.student.gather(-1, &top.ids, false);
    differences_kl(&top.logits, &student, temperature)
}

fn student_led(rows: &LogitRows<'_>, k: usize, temperature: f64) -> Tensor {
    let k = (k as i64).min(rows.student.size()[1]);
    let (student, ids) = rows.student.topk(k, -1, true, true);
    differences_kl(&rows.teacher_at(&ids), &student, temperature)
}

/// KL between the softmaxes of all differences x_i − x_j, i < j: [N, k], [N, k] → \[N\].
fn differences_kl(teacher: &Tensor, student: &Tensor, temperature: f64) -> Tensor {
    let k = teacher.size()[1];
    let pairs = Tensor::triu_indices(k, k, 1, (Kind::Int64, teacher.device()));
    let (first, second) = (pairs.select(0, 0), pairs.select(0, 1));
    let differences = |logits: &Tensor| {
        let logits = divided(logits, temperature);
        logits.index_select(-1, &first) - logits.index_select(-1, &second)
    };
    divergence(&differences(teacher), &differences(student))
}
