//! The loss terms of a run, resolved against student and cache: what is read, what is computed, how
//! it is reduced.

use caskd_formats::{Cache, Columns, Manifest, Statistic, Tier};
use caskd_models::{LoadedModel, SeededRng};
use tch::{Device, Tensor};

use crate::loss_term::{LossTerm, TermLoss};
use crate::losses::{
    HiddenKind, HiddenPositions, LogitKind, LogitReduction, Normalization, Projection, Requirement,
    Scaling, Tail,
};
use crate::recipe::LayerPair;
use crate::schedule::Schedule;
use crate::{Error, Result, TrainConfig};

/// A sum of loss terms that the cache can answer.
pub(crate) struct Objective {
    /// The terms, in the order of the configuration.
    pub(crate) terms: Vec<Term>,
    /// What is read of every sequence.
    pub(crate) columns: Columns,
    /// Full logits of the teacher are rebuilt.
    pub(crate) full_logits: bool,
    /// Rows of the student's head that losses see: those that the teacher's has too, or all with another tokenizer.
    pub(crate) vocabulary: usize,
    /// Rows of the teacher's head.
    pub(crate) teacher_vocabulary: usize,
}

/// One resolved term.
pub(crate) struct Term {
    /// Name in reports: its kind, numbered where a kind comes twice.
    pub(crate) name: String,
    /// Factor in the total at the step under way.
    pub(crate) weight: f64,
    /// Factor in the total that the schedule begins with or rises to.
    full_weight: f64,
    schedule: Schedule,
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
        /// Of each pair, from the student's width to the teacher's [D_t, D_s] f32; none where widths are pooled.
        projections: Vec<Tensor>,
        /// Whether there are to be some.
        projection: Projection,
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

/// Whether the cache can answer the terms of a configuration for a student: what training refuses before it writes anything.
pub fn check_terms(config: &TrainConfig, student: &LoadedModel, cache: &Cache) -> Result<()> {
    Objective::resolve(&config.terms(), student, cache.manifest(), false).map(|_| ())
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
    let (student_rows, cache_rows) = (student.network.vocab_size(), manifest.vocab_size);
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

/// Every term must be one that compares two tokenizations, or none with the teacher at all.
fn fit_across(terms: &[LossTerm]) -> Result<()> {
    let misfit = terms.iter().find(|term| match &term.loss {
        TermLoss::Logits {
            loss, logits_norm, ..
        } => {
            let of = loss.loss();
            !(of.across_vocabularies() || of.requirement() == Requirement::Nothing)
                || *logits_norm != Normalization::None
        }
        TermLoss::Hidden { .. } => true,
    });
    match misfit {
        Some(term) => Err(Error::AcrossTokenizers {
            term: term.kind().to_owned(),
        }),
        None => Ok(()),
    }
}

/// Gradient error above which a run warns.
const DOUBTFUL: f64 = 0.03;

/// Gradient error above which a run is refused unless it is allowed.
const TOO_FAR: f64 = 0.10;

/// Compares the loss terms with the cache's fidelity report; what is not measured passes.
///
/// Returns warnings about losses whose gradient is off by more than 3%.
///
/// # Errors
/// [`Error::LowFidelity`] above 10%, unless the configuration says `allow_low_fidelity`.
pub fn check_fidelity(config: &TrainConfig, cache: &Cache) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let Some(report) = &cache.manifest().fidelity else {
        return Ok(warnings);
    };
    for term in config.terms() {
        let TermLoss::Logits {
            loss,
            logits_norm: Normalization::None,
            ..
        } = &term.loss
        else {
            continue;
        };
        // The report of a sparse cache is that of KL with one rule for its tail.
        let rule = match loss {
            LogitKind::Kl(kl) if kl.tail == Tail::Uniform => Some("uniform"),
            LogitKind::UniformTailKl(_) => Some("uniform"),
            LogitKind::Kl(kl) if kl.tail == Tail::Ghost => Some("ghost"),
            LogitKind::GhostKl(_) => Some("ghost"),
            loss if loss.loss().requirement() == Requirement::FullLogits => None,
            _ => continue,
        };
        if report.tail.as_deref() != rule && report.tail.is_some() {
            continue;
        }
        let (what, error) = match loss.loss().scaling() {
            Some(Scaling::Temperature(temperature)) => (
                format!("{} at temperature {temperature}", term.kind()),
                report.gradient_error_at(temperature),
            ),
            Some(Scaling::Sigma(_)) => (
                term.kind().to_owned(),
                report.gradient_error_of_dual_scaling(),
            ),
            None => continue,
        };
        let Some(error) = error.filter(|error| *error > DOUBTFUL) else {
            continue;
        };
        if error > TOO_FAR && !config.allow_low_fidelity {
            return Err(Error::LowFidelity {
                term: what,
                percent: 100.0 * error,
                limit: 100.0 * TOO_FAR,
            });
        }
        warnings.push(format!(
            "the cache's gradient of {what} is off by {:.1}% (measured against {})",
            100.0 * error,
            report.student
        ));
    }
    Ok(warnings)
}

impl Objective {
    /// Resolves terms for a student and a cache that fit each other.
    ///
    /// `across` tokenizers a student fits every cache, and only losses that match no tokens fit it.
    pub(crate) fn resolve(
        terms: &[LossTerm],
        student: &LoadedModel,
        manifest: &Manifest,
        across: bool,
    ) -> Result<Objective> {
        if across {
            fit_across(terms)?;
        } else {
            fits(student, manifest)?;
        }
        let rows = student.network.vocab_size();
        let shared = rows.min(manifest.vocab_size);
        let student_layers = student.network.num_layers() as u32;
        let mut objective = Objective {
            terms: Vec::new(),
            columns: Columns::default(),
            full_logits: false,
            vocabulary: if across { rows } else { shared },
            teacher_vocabulary: if across { manifest.vocab_size } else { shared },
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
                    projection,
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
                        projections: Vec::new(),
                        projection: *projection,
                    }
                }
            };
            let name = objective.free_name(term.kind());
            objective.terms.push(Term {
                name,
                weight: term.weight,
                full_weight: term.weight,
                schedule: term.schedule,
                work,
            });
        }
        objective.columns.layers.sort_unstable();
        objective.columns.layers.dedup();
        Ok(objective)
    }

    /// Gives every term the weight of a step, counted from 0, of a run of `total_steps`.
    pub(crate) fn set_step(&mut self, step: u64, total_steps: u64) {
        for term in &mut self.terms {
            term.weight = term.schedule.weight(term.full_weight, step, total_steps);
        }
    }

    /// Makes the projections that terms ask for: the identity where the widths are equal, else uniform in ±1/√D_s
    /// from the named stream of `seed`.
    pub(crate) fn make_projections(
        &mut self,
        student_width: usize,
        manifest: &Manifest,
        seed: u64,
        device: Device,
    ) {
        for term in &mut self.terms {
            let Work::Hidden {
                pairs,
                projections,
                projection: Projection::Learned,
                ..
            } = &mut term.work
            else {
                continue;
            };
            *projections = pairs
                .iter()
                .map(|pair| {
                    let cached = manifest.layers.iter().find(|of| of.layer == pair.teacher);
                    let width = cached.map_or(student_width, |layer| layer.width);
                    let name = format!("{}.{}", term.name, pair.teacher);
                    projection(student_width, width, &name, seed)
                        .to_device(device)
                        .set_requires_grad(true)
                })
                .collect();
        }
    }

    /// Takes the projections of another cache's terms, the same tensors.
    pub(crate) fn share_projections(&mut self, other: &Objective) {
        for (term, of) in self.terms.iter_mut().zip(&other.terms) {
            if let (
                Work::Hidden { projections, .. },
                Work::Hidden {
                    projections: others,
                    ..
                },
            ) = (&mut term.work, &of.work)
            {
                *projections = others.iter().map(Tensor::shallow_clone).collect();
            }
        }
    }

    /// What the terms themselves train, by name: `projection.{term}.{teacher layer}`.
    pub(crate) fn trainable(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for term in &self.terms {
            if let Work::Hidden {
                pairs, projections, ..
            } = &term.work
            {
                for (pair, projection) in pairs.iter().zip(projections) {
                    let name = format!("projection.{}.{}", term.name, pair.teacher);
                    tensors.push((name, projection.shallow_clone()));
                }
            }
        }
        tensors
    }

    /// The first term that tells the student's own responses from the others.
    pub(crate) fn needs_responses(&self) -> Option<&str> {
        self.terms.iter().find_map(|term| match &term.work {
            Work::Logits { loss, .. } if loss.loss().needs_responses() => Some(term.name.as_str()),
            _ => None,
        })
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
                    Tier::Compact => "compact".to_owned(),
                    Tier::Exact => "exact".to_owned(),
                },
                reason: reason.to_owned(),
                remedy: remedy.to_owned(),
            })
        };
        let whole_vocabulary = manifest.tier != Tier::Sparse;
        let imported = manifest.origin.as_ref();
        if needs_mass(term) && !manifest.knows(Statistic::LogSumExp) {
            return refuse(
                "it weighs the kept tokens against all others, and the values that this cache was imported from do not \
                 say what the others weigh",
                "top-k-kl and bild run on it; for the mass of the others, import log-probabilities of the whole \
                 vocabulary that were not renormalised over the top k",
            );
        }
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
                let needed = Columns::for_logits(manifest).unwrap_or_default();
                self.columns.statistics |= needed.statistics;
                self.columns.top_k |= needed.top_k;
                self.columns.coefficients |= needed.coefficients;
                self.columns.layers.extend(needed.layers);
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
                &match imported {
                    None => format!(
                        "set its `k` to {} at most, or build the cache with `--top-k {k}` or `--tier exact`",
                        manifest.top_k
                    ),
                    Some(_) => format!("set its `k` to {} at most", manifest.top_k),
                },
            ),
            Requirement::FullLogits if imported.is_some() => refuse(
                "it asks for the logits of the whole vocabulary, and the cache was imported from the largest of them",
                "KL at temperature 1 runs on it with `tail` set to \"uniform\" or \"ghost\", and so do ghost-kl, \
                 top-k-kl and bild; for the others let caskd run the teacher: `caskd build --tier compact`",
            ),
            Requirement::FullLogits => refuse(
                "it asks for the logits of the whole vocabulary, and a top-k target without its tail harms the student",
                "build the cache with `--tier compact` or `--tier exact`; KL at temperature 1 also runs on this one with \
                 `tail` set to \"uniform\" or \"ghost\", and so do ghost-kl, top-k-kl and bild",
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

fn needs_mass(term: &LossTerm) -> bool {
    match &term.loss {
        TermLoss::Logits { loss, .. } => loss.loss().needs_mass(),
        TermLoss::Hidden { .. } => false,
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

fn projection(from: usize, to: usize, name: &str, seed: u64) -> Tensor {
    if from == to {
        return Tensor::eye(from as i64, (tch::Kind::Float, Device::Cpu));
    }
    let mut rng = SeededRng::named(seed, &format!("projection {name}"));
    let bound = 1.0 / (from as f64).sqrt();
    let values: Vec<f32> = (0..from * to)
        .map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32)
        .collect();
    Tensor::from_slice(&values).view([to as i64, from as i64])
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
