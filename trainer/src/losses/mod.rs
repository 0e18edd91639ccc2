//! The losses. Each lives in one small file with its equation, its paper, what it asks of the cache
//! and its keys; this file holds what they share: the rows they see and what they may ask for.
//!
//! A *row* is one target position: position t of a sequence whose next token t+1 is a target. All
//! logit losses give one value per row, \[N\] from logits [N, V]; what becomes of the rows (mean or
//! the paper's sum / N²) is the step's business, and so is the normalisation of logits ahead of a
//! loss. Every loss computes in the kind of its inputs: f32 while training, f64 in the tests and
//! wherever f64 is put in.

mod atkd;
mod bild;
mod check;
mod cross_entropy;
mod decoupled;
mod distillm_2;
mod dkd;
mod dual_scaling;
mod hidden;
mod jensen_shannon;
mod kinds;
mod kl;
mod knowledge_alignment;
mod multi_level;
mod nkd;
mod norm_kd;
mod normalization;
mod random_sampling_kd;
mod reverse_kl;
mod skew_kl;
mod tail_kl;
mod top_k_kl;
mod total_variation;
mod uld;

use std::cell::Cell;

pub(crate) use normalization::population_sigma;
use normalization::unbiased;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use atkd::Atkd;
pub use bild::{Bild, BildStudentLed, BildTeacherLed};
pub use check::BadKey;
pub use cross_entropy::CrossEntropy;
pub use distillm_2::Distillm2;
pub use dkd::Dkd;
pub use dual_scaling::{DualScaling, Sigma};
pub use hidden::{HiddenCosine, HiddenLoss, PatientKd, Projection, match_width, matched_layer};
pub use jensen_shannon::JensenShannon;
pub use kinds::{HiddenKind, LogitKind};
pub(crate) use kl::divergence;
pub use kl::{Kl, Tail};
pub use knowledge_alignment::KnowledgeAlignment;
pub use multi_level::MultiLevel;
pub use nkd::Nkd;
pub use norm_kd::{LogitStandardization, NormKd};
pub(crate) use normalization::EPSILON;
pub(crate) use normalization::KnownSpread;
pub use normalization::Normalization;
pub use random_sampling_kd::RandomSamplingKd;
pub use reverse_kl::ReverseKl;
pub use skew_kl::{SkewKl, SkewReverseKl};
pub(crate) use tail_kl::SMALLEST_MASS;
pub use tail_kl::{GhostKl, UniformTailKl};
pub use top_k_kl::TopKKl;
pub use total_variation::TotalVariation;
pub use uld::Uld;

/// What a loss asks of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// Token ids only: no teacher column is read.
    Nothing,
    /// The k largest logits and the log-sum-exp over the whole vocabulary.
    TopK(usize),
    /// The k largest logits, and the teacher's logits of the student's k first tokens: from the
    /// whole vocabulary where it is to be had, else as far as the top K hold them.
    StudentsTopK(usize),
    /// The logits of the whole vocabulary.
    FullLogits,
}

/// What a loss makes of the tokens that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Labels {
    /// Nothing.
    Unused,
    /// It has no value where there is none.
    Needed,
    /// Where there is none, the teacher's first token stands in.
    OrTeachersFirst,
}

/// What a loss divides logits by before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// By a number, the same for both models.
    Temperature(f64),
    /// By a multiple of each model's own standard deviation.
    Sigma(f64),
}

/// What the student's softmax is drawn to by a loss that the head computes by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftTarget {
    /// The token that follows.
    Label,
    /// The teacher's softmax over the whole vocabulary.
    Teacher,
    /// The teacher's first K tokens, and one token for all the others; every cached one without a K.
    Ghost(Option<usize>),
    /// The teacher's first K tokens, and the rest of the mass spread evenly over the others.
    EvenTail(Option<usize>),
}

/// A loss as factor · KL(target ‖ softmax(s/scale)), with a constant scale: its gradient needs no
/// graph.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ByHand {
    /// The target.
    pub target: SoftTarget,
    /// Of the student's logits, and of the teacher's where the target is its softmax.
    pub scaling: Scaling,
    /// Factor.
    pub factor: f64,
}

/// What a logit loss sees of N target positions.
#[derive(Debug)]
pub struct LogitRows<'a> {
    /// Logits of the student [N, V]; gradients flow into these only.
    pub student: &'a Tensor,
    /// Logits of the teacher [N, V], when a loss asked for them.
    pub teacher: Option<&'a Tensor>,
    /// Their population σ over the vocabulary [N, 1], where it is known better than they show it.
    pub teacher_sigma: Option<&'a Tensor>,
    /// The teacher's largest logits, when a loss asked for them.
    pub top_k: Option<&'a TopKRows>,
    /// The tokens that follow \[N\] i64; negative where there is none.
    pub labels: &'a Tensor,
    /// What tells rows apart, whatever batch they come in \[N\] i64.
    pub keys: &'a Tensor,
    /// Standard deviations per sample, when a loss asked for them.
    pub sample_sigma: Option<&'a SampleSigma>,
    /// Whether the student wrote the row's response, not the teacher or the data \[N\] bool.
    pub of_student: Option<&'a Tensor>,
    /// Counts the teacher's logits that a loss looked up and did not find.
    pub lookups: &'a Lookups,
}

/// The K largest logits of the teacher at N positions.
#[derive(Debug)]
pub struct TopKRows {
    /// Token ids [N, K] i64, by descending logit.
    pub ids: Tensor,
    /// Logits [N, K].
    pub logits: Tensor,
    /// log Σ exp over the whole vocabulary at T = 1 \[N\].
    pub log_sum_exp: Tensor,
}

/// Standard deviation of all logits of the sample a row belongs to.
#[derive(Debug)]
pub struct SampleSigma {
    /// Of the student [N, 1].
    pub student: Tensor,
    /// Of the teacher [N, 1].
    pub teacher: Tensor,
}

/// The teacher's logits that losses looked up by token, and how many of them were missing.
#[derive(Debug, Default)]
pub struct Lookups {
    asked: Cell<u64>,
    missing: Cell<u64>,
}

/// A count of [`Lookups`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MissingLogits {
    /// Teacher logits that student-led losses asked for.
    pub asked: u64,
    /// Of them, those that the cached top K did not hold: their smallest logit stood in.
    pub missing: u64,
}

impl Lookups {
    /// So far.
    pub fn count(&self) -> MissingLogits {
        MissingLogits {
            asked: self.asked.get(),
            missing: self.missing.get(),
        }
    }

    fn add(&self, asked: u64, missing: u64) {
        self.asked.set(self.asked.get() + asked);
        self.missing.set(self.missing.get() + missing);
    }
}

impl std::ops::AddAssign for MissingLogits {
    fn add_assign(&mut self, other: MissingLogits) {
        self.asked += other.asked;
        self.missing += other.missing;
    }
}

impl LogitRows<'_> {
    /// The teacher's logits.
    ///
    /// # Panics
    /// When they were not provided: [`LogitLoss::requirement`] promises them.
    pub(crate) fn full_teacher(&self) -> &Tensor {
        self.teacher
            .expect("a loss that requires full logits is only run where they are rebuilt")
    }

    /// The teacher's k largest logits, or all V where there are no more: the cached ones where they
    /// reach, else from the whole vocabulary.
    ///
    /// # Panics
    /// When neither was provided: [`LogitLoss::requirement`] promises them.
    pub(crate) fn teacher_top(&self, k: usize) -> TopKRows {
        let k = (k as i64).min(self.student.size()[1]);
        if let Some(top) = self.top_k.filter(|top| top.ids.size()[1] >= k) {
            return TopKRows {
                ids: top.ids.narrow(1, 0, k),
                logits: top.logits.narrow(1, 0, k),
                log_sum_exp: top.log_sum_exp.shallow_clone(),
            };
        }
        let teacher = self.full_teacher();
        let (logits, ids) = teacher.topk(k, -1, true, true);
        TopKRows {
            ids,
            logits,
            log_sum_exp: teacher.logsumexp([-1].as_slice(), false),
        }
    }

    /// The teacher's logits of given tokens [N, k] → [N, k]. From the cached top K alone, a token
    /// that is not among them gets the smallest of them, an upper bound, and is counted.
    ///
    /// # Panics
    /// When neither was provided: [`LogitLoss::requirement`] promises them.
    pub(crate) fn teacher_at(&self, ids: &Tensor) -> Tensor {
        if let Some(teacher) = self.teacher {
            return teacher.gather(-1, ids, false);
        }
        let top = self
            .top_k
            .expect("a loss that looks logits up is only run where some are read");
        let same = ids.unsqueeze(-1).eq_tensor(&top.ids.unsqueeze(1));
        let found = same.any_dim(-1, false);
        let present = found.sum(Kind::Int64).int64_value(&[]) as u64;
        self.lookups
            .add(ids.numel() as u64, ids.numel() as u64 - present);
        let logits = over_last(&(top.logits.unsqueeze(1) * same));
        logits.where_self(&found, &top.logits.amin([-1], true))
    }

    /// Which rows belong to responses of the student's.
    ///
    /// # Panics
    /// When that was not provided: [`LogitLoss::needs_responses`] promises it.
    pub(crate) fn written_by_student(&self) -> &Tensor {
        self.of_student
            .expect("a loss that tells responses apart is only run where they are told apart")
    }

    /// Population σ of the teacher's logits over the vocabulary [N, 1].
    ///
    /// # Panics
    /// When there are no logits: [`LogitLoss::requirement`] promises them.
    pub(crate) fn sigma_of_teacher(&self) -> Tensor {
        match self.teacher_sigma {
            Some(sigma) => sigma.shallow_clone(),
            None => population_sigma(self.full_teacher()),
        }
    }

    /// The same with V − 1 in the denominator.
    ///
    /// # Panics
    /// As [`LogitRows::sigma_of_teacher`].
    pub(crate) fn unbiased_sigma_of_teacher(&self) -> Tensor {
        self.sigma_of_teacher() * unbiased(self.full_teacher().size()[1])
    }

    /// σ of each row's sample.
    ///
    /// # Panics
    /// When they were not provided: [`LogitLoss::needs_sample_sigma`] promises them.
    pub(crate) fn sigma_of_sample(&self) -> &SampleSigma {
        self.sample_sigma
            .expect("a loss that asks for σ per sample is only run where it was measured")
    }
}

/// A loss on logits.
pub trait LogitLoss: Send {
    /// What it asks of the cache.
    fn requirement(&self) -> Requirement;

    /// One value per row: \[N\], differentiable with respect to `rows.student`.
    fn value(&self, rows: &LogitRows<'_>) -> Tensor;

    /// What it divides logits by; `None` where it has no teacher.
    fn scaling(&self) -> Option<Scaling>;

    /// Are its keys possible?
    fn validate(&self) -> Result<(), BadKey> {
        Ok(())
    }

    /// What it makes of the tokens that follow.
    fn labels(&self) -> Labels {
        Labels::Unused
    }

    /// The loss in the form that the head computes by hand, gradient included; `None`: by autograd.
    fn by_hand(&self) -> Option<ByHand> {
        None
    }

    /// Does it need the standard deviation of all logits of a row's sample? That takes a pass of its
    /// own over the head.
    fn needs_sample_sigma(&self) -> bool {
        false
    }

    /// Does it weigh the teacher's kept entries against all others, by the cached log-sum-exp?
    fn needs_mass(&self) -> bool {
        false
    }

    /// Does it tell the student's own responses from the others?
    fn needs_responses(&self) -> bool {
        false
    }

    /// Can teacher and student have different vocabularies?
    fn across_vocabularies(&self) -> bool {
        false
    }
}

/// How the values of the target positions of one optimizer step become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogitReduction {
    /// The mean over all target positions of the step.
    #[default]
    Mean,
    /// Eq. 1 to the letter: the sum over all target positions divided by N², N the sequences of
    /// the step.
    Paper,
}

/// How the squared differences of hidden states become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenReduction {
    /// The mean over positions and width.
    #[default]
    Mean,
    /// Eq. 7 to the letter: the mean over positions of the squared norm (summed over the width).
    Paper,
}

/// Which positions hidden states are aligned at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenPositions {
    /// Every position of every sequence, the prompt's too (M of Eq. 7 is the token length).
    #[default]
    All,
    /// Only those that predict a target.
    Targets,
}

/// Σ over the last dimension.
fn over_last(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([-1].as_slice(), false, None::<Kind>)
}

#[cfg(test)]
mod tests;
