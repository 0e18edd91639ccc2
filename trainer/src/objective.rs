//! The loss terms of a run, resolved against student and cache: what is read, what is computed, how
//! it is reduced.

use caskd_formats::{Cache, Columns, Manifest, Tier};
use caskd_models::LoadedModel;

use crate::loss_term::{LossTerm, TermLoss};
use crate::losses::{
    HiddenKind, HiddenPositions, LogitKind, LogitReduction, Normalization, Requirement,
};
use crate::recipe::LayerPair;
use crate::{Error, Result};

/// A sum of loss terms that the cache can answer.
pub(crate) struct Objective {
    /// The terms, in the order of the configuration.
    pub(crate) terms: Vec<Term>,
    /// What is read of every sequence.
    pub(crate) columns: Columns,
    /// Full logits of the teacher are rebuilt.
    pub(crate) full_logits: bool,
    /// Rows that both heads have.
    pub(crate) vocabulary: usize,
}

/// One resolved term.
pub(crate) struct Term {
    /// Name in reports: its kind, numbered where a kind comes twice.
    pub(crate) name: String,
    /// Factor in the total.
    pub(crate) weight: f64,
    /// What it computes.
    pub(crate) work: Work,
}

/// On logits or on hidden states.
pub(crate) enum Work {
    /// Values of target positions.
    Logits {
        /// The loss.
        loss: LogitKind,
        /// Ahead of it.
        logits_norm: Normalization,
        /// From values to a number.
        reduction: LogitReduction,
    },
    /// Differences of hidden states.
    Hidden {
        /// The loss.
        loss: HiddenKind,
        /// Which layers.
        pairs: Vec<LayerPair>,
        /// At which positions.
        positions: HiddenPositions,
    },
}

/// What one optimizer step is made of; reductions divide by it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepSize {
    /// N.
    pub(crate) sequences: usize,
    /// All real positions.
    pub(crate) positions: usize,
    /// Those that predict a target.
    pub(crate) targets: usize,
}

/// A student fits a cache when their tokenizers are the same and their heads differ by padding rows
/// at most. Padding rows are those beyond the tokenizer's tokens; where the heads differ, the softmax
/// of both models runs over the rows that both have.
pub fn check_fit(student: &LoadedModel, cache: &Cache) -> Result<()> {
    fits(student, cache.manifest())
}

fn fits(student: &LoadedModel, manifest: &Manifest) -> Result<()> {
    if student.fingerprint != manifest.tokenizer.fingerprint {
        let short = |fingerprint: &str| fingerprint.chars().take(12).collect();
        return Err(Error::TokenizerMismatch {
            student: student.name.clone(),
            student_fingerprint: short(&student.fingerprint),
            cache_fingerprint: short(&manifest.tokenizer.fingerprint),
        });
    }
    let (student_rows, cache_rows) = (student.network.config().vocab_size, manifest.vocab_size);
    let tokens = manifest.tokenizer.vocab_size;
    if student_rows != cache_rows && student_rows.min(cache_rows) < tokens {
        let student = student.name.clone();
        return Err(Error::VocabularyMismatch {
            student,
            student_rows,
            cache_rows,
            tokens,
        });
    }
    Ok(())
}

impl Objective {
    /// Resolves terms for a student and a cache that fit each other.
    pub(crate) fn resolve(
        terms: &[LossTerm],
        student: &LoadedModel,
        manifest: &Manifest,
    ) -> Result<Objective> {
        fits(student, manifest)?;
        let student_layers = student.network.num_layers() as u32;
        let mut objective = Objective {
            terms: Vec::new(),
            columns: Columns::default(),
            full_logits: false,
            vocabulary: student.network.config().vocab_size.min(manifest.vocab_size),
        };
        for term in terms {
            if let Some(requirement) = term.requirement() {
                objective.read_for(term, requirement, manifest)?;
            }
            let work = match &term.loss {
                TermLoss::Logits {
                    loss,
                    reduction,
                    logits_norm,
                } => Work::Logits {
                    loss: loss.clone(),
                    logits_norm: *logits_norm,
                    reduction: *reduction,
                },
                TermLoss::Hidden {
                    loss,
                    layers,
                    positions,
                } => {
                    let pairs = layers.pairs(manifest.teacher.num_layers, student_layers);
                    require_layers(&pairs, manifest)?;
                    objective
                        .columns
                        .layers
                        .extend(pairs.iter().map(|pair| pair.teacher));
                    Work::Hidden {
                        loss: loss.clone(),
                        pairs,
                        positions: *positions,
                    }
                }
            };
            let name = objective.free_name(term.kind());
            objective.terms.push(Term {
                name,
                weight: term.weight,
                work,
            });
        }
        objective.columns.layers.sort_unstable();
        objective.columns.layers.dedup();
        Ok(objective)
    }

    /// Layers of the student that a forward pass must keep.
    pub(crate) fn student_layers(&self) -> Vec<u32> {
        let mut layers: Vec<u32> = self
            .terms
            .iter()
            .filter_map(|term| match &term.work {
                Work::Hidden { pairs, .. } => Some(pairs.iter().map(|pair| pair.student)),
                Work::Logits { .. } => None,
            })
            .flatten()
            .collect();
        layers.sort_unstable();
        layers.dedup();
        layers
    }

    fn read_for(
        &mut self,
        term: &LossTerm,
        requirement: Requirement,
        manifest: &Manifest,
    ) -> Result<()> {
        let refuse = |reason: &str, remedy: &str| {
            Err(Error::TierCannotAnswer {
                term: term.kind().to_owned(),
                tier: match manifest.tier {
                    Tier::Sparse => "sparse".to_owned(),
                    Tier::Exact => "exact".to_owned(),
                },
                reason: reason.to_owned(),
                remedy: remedy.to_owned(),
            })
        };
        let whole_vocabulary = manifest.tier == Tier::Exact;
        let fits = |k: usize| k.min(self.vocabulary) <= manifest.top_k;
        match requirement {
            Requirement::Nothing => Ok(()),
            Requirement::TopK(k) if fits(k) => {
                self.columns.top_k = true;
                self.columns.statistics = true;
                Ok(())
            }
            Requirement::TopK(_) | Requirement::StudentsTopK(_) | Requirement::FullLogits
                if whole_vocabulary =>
            {
                self.full_logits = true;
                self.columns.layers.push(manifest.teacher.num_layers);
                Ok(())
            }
            Requirement::StudentsTopK(k) if fits(k) => {
                self.columns.top_k = true;
                self.columns.statistics = true;
                Ok(())
            }
            Requirement::TopK(k) | Requirement::StudentsTopK(k) => refuse(
                &format!(
                    "it asks for the teacher's {k} largest logits, and the cache holds {}",
                    manifest.top_k
                ),
                &format!(
                    "set its `k` to {} at most, or build the cache with `--top-k {k}` or `--tier exact`",
                    manifest.top_k
                ),
            ),
            Requirement::FullLogits => refuse(
                "it asks for the logits of the whole vocabulary, and a top-k target without its tail harms the student",
                "build the cache with `--tier exact`; KL at temperature 1 also runs on this one with `tail` set to \
                 \"uniform\" or \"ghost\", and so do ghost-kl, top-k-kl and bild",
            ),
        }
    }

    fn free_name(&self, kind: &str) -> String {
        let of_kind = |term: &&Term| {
            let rest = term.name.strip_prefix(kind);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('#'))
        };
        match self.terms.iter().filter(of_kind).count() {
            0 => kind.to_owned(),
            before => format!("{kind}#{}", before + 1),
        }
    }
}

impl Term {
    /// What the term's sum over a step is divided by.
    pub(crate) fn denominator(&self, step: &StepSize) -> f64 {
        match &self.work {
            Work::Logits {
                reduction: LogitReduction::Mean,
                ..
            }
            | Work::Hidden {
                positions: HiddenPositions::Targets,
                ..
            } => step.targets as f64,
            Work::Logits {
                reduction: LogitReduction::Paper,
                ..
            } => (step.sequences as f64).powi(2),
            Work::Hidden {
                positions: HiddenPositions::All,
                ..
            } => step.positions as f64,
        }
    }
}

fn require_layers(pairs: &[LayerPair], manifest: &Manifest) -> Result<()> {
    let cached: Vec<u32> = manifest.layers.iter().map(|layer| layer.layer).collect();
    let missing: Vec<u32> = pairs
        .iter()
        .map(|pair| pair.teacher)
        .filter(|layer| !cached.contains(layer))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = |layers: &[u32]| {
        layers
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let present = if cached.is_empty() {
        "none".to_owned()
    } else {
        list(&cached)
    };
    Err(Error::MissingLayers {
        missing: list(&missing),
        present,
    })
}
