//! What student and teacher differ in before any training: the D and A of BayesKD's Eq. 12, measured
//! once and looked up for every configuration of a search.

use std::collections::BTreeMap;

use caskd_formats::{Cache, Columns};
use caskd_models::LoadedModel;
use tch::{Kind, Tensor};

use crate::batch::Batch;
use crate::head::{chunks, logits, rows_per_chunk};
use crate::loss_term::TermLoss;
use crate::losses::{
    HiddenKind, HiddenLoss, HiddenReduction, KnowledgeAlignment, Normalization, Scaling,
};
use crate::objective::check_fit;
use crate::recipe::{LayerPair, Layers};
use crate::{Error, Result, TrainConfig};

/// Measured differences of an untouched student and its cached teacher.
#[derive(Debug, Clone)]
pub struct Probe {
    /// Target positions it was measured on.
    pub targets: u64,
    /// Mean over positions of the logits' standard deviation over the vocabulary.
    pub sigma: Pair,
    /// Mean over positions of max − min of the logits.
    pub range: Pair,
    /// mean ‖n(h_t) − n(h_s)‖² by (teacher layer, student layer, normalisation).
    hidden: BTreeMap<(u32, u32, usize), f64>,
    /// Depth of both models, to resolve layer names.
    layers: (u32, u32),
}

/// A quantity of both models.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The teacher's.
    pub teacher: f64,
    /// The student's.
    pub student: f64,
}

/// Measures on the `sequences` of lowest split hash: a random choice that lies inside every fraction
/// and does not depend on the cache's order.
///
/// # Errors
/// A student that does not fit the cache, unreadable files, no sequence with a target.
pub fn probe(student: &LoadedModel, cache: &Cache, sequences: usize) -> Result<Probe> {
    check_fit(student, cache)?;
    let manifest = cache.manifest();
    let network = &student.network;
    let layers = (manifest.teacher.num_layers, network.num_layers() as u32);
    let cached: Vec<u32> = manifest.layers.iter().map(|layer| layer.layer).collect();
    let mut pairs = Layers::Listed(cached.clone()).pairs(layers.0, layers.1);
    pairs.extend(
        Layers::LastMiddle
            .pairs(layers.0, layers.1)
            .into_iter()
            .filter(|pair| cached.contains(&pair.teacher)),
    );

    let mut rows = cache.rows()?;
    rows.retain(|row| row.targets > 0);
    rows.sort_by_key(|row| (row.split_hash, row.shard, row.row));
    rows.truncate(sequences.max(1));
    if rows.is_empty() {
        return Err(Error::NoSequences {
            reason: "none of the cache's has a target".to_owned(),
        });
    }
    let columns = Columns {
        statistics: true,
        top_k: false,
        layers: cached,
        coefficients: false,
    };
    let vocabulary = network.vocab_size().min(manifest.vocab_size);
    let head = network.head().narrow(0, 0, vocabulary as i64);
    let keep: Vec<u32> = pairs.iter().map(|pair| pair.student).collect();

    let mut sums = Sums::default();
    for row in rows {
        let sequences = cache.read(row.shard, &[row.row], &columns)?;
        let batch = Batch::collate(&sequences, &columns, vocabulary)?.to_device(network.device());
        for sequence in &sequences {
            let Some(statistics) = &sequence.statistics else {
                continue;
            };
            for t in (0..sequence.token_ids.len())
                .filter(|t| sequence.loss_mask.get(t + 1) == Some(&true))
            {
                sums.teacher_sigma += f64::from(statistics.std[t]);
                sums.teacher_range += f64::from(statistics.max[t] - statistics.min[t]);
            }
        }
        tch::no_grad(|| {
            let forward = network.forward(&batch.input_ids, &keep, false);
            let flat = |hidden: &Tensor| hidden.view([-1, *hidden.size().last().unwrap_or(&0)]);
            let last = flat(&forward.last_hidden).index_select(0, &batch.targets);
            for (first, rows) in chunks(last.size()[0], rows_per_chunk(vocabulary as i64)) {
                let logits = logits(&last.narrow(0, first, rows), &head);
                let sigma = logits.std_dim([-1].as_slice(), false, false);
                let range = logits.amax([-1], false) - logits.amin([-1], false);
                sums.student_sigma += sigma.sum(Kind::Double).double_value(&[]);
                sums.student_range += range.sum(Kind::Double).double_value(&[]);
            }
            for pair in &pairs {
                let Some((_, hidden)) = forward
                    .hidden
                    .iter()
                    .find(|(layer, _)| *layer == pair.student)
                else {
                    continue; // The forward pass returns every layer it was asked for.
                };
                let of_student = flat(hidden)
                    .index_select(0, &batch.positions)
                    .to_kind(Kind::Float);
                for (index, hidden_norm) in Normalization::ALL.into_iter().enumerate() {
                    let loss = KnowledgeAlignment {
                        beta: 1.0,
                        hidden_norm,
                        reduction: HiddenReduction::Paper,
                    };
                    let values = loss.value(&of_student, batch.teacher_hidden(pair.teacher));
                    let key = (pair.teacher, pair.student, index);
                    *sums.hidden.entry(key).or_default() +=
                        values.sum(Kind::Double).double_value(&[]);
                }
            }
        });
        sums.targets += batch.num_targets() as f64;
        sums.positions += batch.num_positions() as f64;
    }
    let mean = |sum: f64| sum / sums.targets;
    let positions = sums.positions;
    Ok(Probe {
        targets: sums.targets as u64,
        sigma: Pair {
            teacher: mean(sums.teacher_sigma),
            student: mean(sums.student_sigma),
        },
        range: Pair {
            teacher: mean(sums.teacher_range),
            student: mean(sums.student_range),
        },
        hidden: sums
            .hidden
            .into_iter()
            .map(|(key, sum)| (key, sum / positions))
            .collect(),
        layers,
    })
}

impl Probe {
    /// (D, A) of Eq. 12 for a configuration.
    ///
    /// D = |1/t_t − 1/t_s|, the factor before T in Eq. 6: t_t and t_s are the effective scaling values,
    /// what the configuration divides the raw logits of teacher and student by before the softmax.
    /// Plain KL divides both by the same temperature, so its D is 0; Dual-Scaling and standardised
    /// logits divide by σ · b, max-min logits by (max − min) · b. The normalisations' shifts leave the
    /// softmax alone. A = Σ_l mean ‖n(h_t\[l\]) − n(h_s\[l\])‖² over the configured layers. Both are 0
    /// where the configuration has no such term.
    ///
    /// # Errors
    /// Layers that the cache does not hold.
    pub fn discrepancy(&self, config: &TrainConfig) -> Result<(f64, f64)> {
        let (mut logits, mut hidden) = (0.0, 0.0);
        for term in config.terms() {
            match &term.loss {
                TermLoss::Logits {
                    loss, logits_norm, ..
                } => {
                    if let Some(scaling) = loss.loss().scaling() {
                        logits += self.scale_difference(scaling, *logits_norm);
                    }
                }
                TermLoss::Hidden { loss, layers, .. } => {
                    // Without a norm of their own the others compare directions: the plain distance
                    // stands for them.
                    let norm = match loss {
                        HiddenKind::KnowledgeAlignment(loss) => loss.hidden_norm,
                        HiddenKind::PatientKd(_) | HiddenKind::HiddenCosine(_) => {
                            Normalization::None
                        }
                    };
                    for pair in layers.pairs(self.layers.0, self.layers.1) {
                        hidden += self.alignment(pair, norm)?;
                    }
                }
            }
        }
        Ok((logits, hidden))
    }

    /// A of one pair of layers: the mean over positions of the squared norm of the difference.
    ///
    /// # Errors
    /// A pair that was not measured, since the cache does not hold the teacher's layer.
    pub fn alignment(&self, pair: LayerPair, hidden_norm: Normalization) -> Result<f64> {
        let index = Normalization::ALL
            .iter()
            .position(|&norm| norm == hidden_norm)
            .unwrap_or_default();
        self.hidden
            .get(&(pair.teacher, pair.student, index))
            .copied()
            .ok_or_else(|| {
                let mut present: Vec<String> = self
                    .hidden
                    .keys()
                    .map(|(teacher, ..)| teacher.to_string())
                    .collect();
                present.dedup();
                Error::MissingLayers {
                    missing: pair.teacher.to_string(),
                    present: present.join(", "),
                }
            })
    }

    fn scale_difference(&self, scaling: Scaling, norm: Normalization) -> f64 {
        let (scales, base) = match (scaling, norm) {
            // σ of the normalised logits times the norm's own scale is σ of the raw logits again.
            (Scaling::Sigma(base), _)
            | (Scaling::Temperature(base), Normalization::Standardize) => (self.sigma, base),
            (Scaling::Temperature(base), Normalization::MaxMin) => (self.range, base),
            (Scaling::Temperature(_), Normalization::None) => return 0.0,
        };
        (1.0 / (scales.teacher * base) - 1.0 / (scales.student * base)).abs()
    }
}

#[derive(Default)]
struct Sums {
    teacher_sigma: f64,
    student_sigma: f64,
    teacher_range: f64,
    student_range: f64,
    hidden: BTreeMap<(u32, u32, usize), f64>,
    targets: f64,
    positions: f64,
}
