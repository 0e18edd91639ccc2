//! The losses. Each lives in one small file with its equation and paper; this file holds what they
//! share: the rows they see, what they may ask of the cache, and how a configured term becomes one.
//!
//! A *row* is one target position: position t of a sequence whose next token t+1 is a target. All
//! logit losses give one value per row, \[N\] from logits [N, V]; what becomes of the rows (mean or
//! the paper's sum / N²) is the step's business. Every loss computes in the kind of its inputs:
//! f32 while training, f64 in the tests.

mod cross_entropy;
mod dual_scaling;
mod kl;
mod knowledge_alignment;
mod normalization;
mod top_k_kl;

use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use cross_entropy::CrossEntropy;
pub use dual_scaling::{DualScaling, Sigma};
pub use kl::Kl;
pub use knowledge_alignment::{KnowledgeAlignment, match_width, matched_layer};
pub use normalization::Normalization;
pub use top_k_kl::{Tail, TopKKl};

/// What a loss asks of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Requirement {
    /// Token ids only: no teacher column is read.
    Nothing,
    /// The K largest logits and the log-sum-exp over the whole vocabulary.
    TopK,
    /// The logits of the whole vocabulary.
    FullLogits,
}

/// What a logit loss sees of N target positions.
#[derive(Debug)]
pub struct LogitRows<'a> {
    /// Logits of the student [N, V]; gradients flow into these only.
    pub student: &'a Tensor,
    /// Logits of the teacher [N, V], when a loss asked for them.
    pub teacher: Option<&'a Tensor>,
    /// The teacher's largest logits, when a loss asked for them.
    pub top_k: Option<&'a TopKRows>,
    /// The tokens that follow \[N\] i64.
    pub labels: &'a Tensor,
    /// Standard deviations per sample, when a loss asked for them, by the normalisation ahead.
    pub sample_sigmas: &'a [(Normalization, SampleSigma)],
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

impl LogitRows<'_> {
    /// The teacher's logits.
    ///
    /// # Panics
    /// When they were not provided: [`LogitLoss::requirement`] promises them.
    pub(crate) fn full_teacher(&self) -> &Tensor {
        self.teacher
            .expect("a loss that requires full logits is only run where they are rebuilt")
    }

    /// σ per sample of logits under one normalisation.
    ///
    /// # Panics
    /// When they were not provided: [`LogitLoss::sample_sigma`] promises them.
    pub(crate) fn sigma_of(&self, norm: Normalization) -> &SampleSigma {
        let found = self.sample_sigmas.iter().find(|(of, _)| *of == norm);
        &found
            .expect("a loss that asks for σ per sample is only run where it was measured")
            .1
    }
}

/// A loss on logits.
pub trait LogitLoss: Send {
    /// What it asks of the cache.
    fn requirement(&self) -> Requirement;

    /// One value per row: \[N\], differentiable with respect to `rows.student`.
    fn value(&self, rows: &LogitRows<'_>) -> Tensor;

    /// `Some(norm)` where it needs the standard deviation of all (normalised) logits of a row's
    /// sample, which takes a pass of its own over the head.
    fn sample_sigma(&self) -> Option<Normalization> {
        None
    }

    /// Whether it sees the teacher through the softmax of its logits as they are, for which a cache may know more.
    fn is_at_temperature_one(&self) -> bool {
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

#[cfg(test)]
mod tests;
