//! One batch: the decoded sequences of a forward pass as tensors.

use caskd_formats::{Columns, Sequence, Statistics};
use tch::{Device, Tensor};

use crate::losses::TopKRows;
use crate::{Error, Result};

/// Sequences padded to one length, with what the cache knows of them.
///
/// B sequences of at most T positions hold P real positions, of which N predict a target.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Where each sequence comes from.
    pub(crate) sources: Vec<String>,
    /// [B, T] i64, padded on the right with 0.
    pub(crate) input_ids: Tensor,
    /// Real positions as indices into B·T \[P\] i64, by sequence and position.
    pub(crate) positions: Tensor,
    /// Target positions as indices into B·T \[N\] i64.
    pub(crate) targets: Tensor,
    /// Target positions as indices into P \[N\] i64.
    pub(crate) targets_in_positions: Tensor,
    /// The tokens to predict \[N\] i64.
    pub(crate) labels: Tensor,
    /// Sequence of each target position \[N\] i64.
    pub(crate) sequence_of_target: Tensor,
    /// Whether the student wrote the response that a target position is in \[N\] bool.
    pub(crate) of_student: Tensor,
    /// Where the student has another tokenizer: 1 at target positions with a row of the teacher's, else 0 \[N\] f32.
    pub(crate) paired: Option<Tensor>,
    /// What tells target positions apart in whatever batch they come: a hash of the sequence's tokens
    /// and the position \[N\] i64.
    pub(crate) keys: Tensor,
    /// The teacher's hidden states by layer, each [P, D] f32.
    pub(crate) hidden: Vec<(u32, Tensor)>,
    /// The levels of the compact tier's code [P, R] f32.
    pub(crate) coefficients: Option<Tensor>,
    /// What rebuilding logits needs of the statistics, at the target positions.
    pub(crate) moments: Option<Moments>,
    /// log Σ exp of the teacher's logits at the target positions \[N\].
    pub(crate) log_sum_exp: Option<Tensor>,
    /// The teacher's largest logits at the target positions.
    pub(crate) top_k: Option<TopKRows>,
}

/// Statistics of the teacher's logits over the vocabulary at N positions, each [N, 1].
#[derive(Debug)]
pub(crate) struct Moments {
    pub(crate) mean: Tensor,
    /// The population's.
    pub(crate) std: Tensor,
    pub(crate) min: Tensor,
}

/// What a cache adds to the `source` of a sequence whose response the student wrote (a record's `response_by`).
pub(crate) const BY_STUDENT: &str = "#student";

impl Batch {
    /// Collates decoded sequences. Tokens at or above `vocabulary` are an error: no embedding has them.
    pub(crate) fn collate(
        sequences: &[Sequence],
        columns: &Columns,
        vocabulary: usize,
    ) -> Result<Batch> {
        let longest = sequences
            .iter()
            .map(|sequence| sequence.token_ids.len())
            .max()
            .unwrap_or(0);
        let mut input_ids = vec![0i64; sequences.len() * longest];
        let mut positions = Vec::new();
        let (mut targets, mut targets_in_positions) = (Vec::new(), Vec::new());
        let (mut labels, mut sequence_of_target) = (Vec::new(), Vec::new());
        let (mut keys, mut of_student) = (Vec::new(), Vec::new());
        for (b, sequence) in sequences.iter().enumerate() {
            let tokens = &sequence.token_ids;
            if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
                let sequence = sequence.source.clone();
                return Err(Error::TokenOutOfRange {
                    sequence,
                    token,
                    vocabulary,
                });
            }
            let of_sequence = hash_of_tokens(tokens);
            let by_student = sequence.source.ends_with(BY_STUDENT);
            for (t, &token) in tokens.iter().enumerate() {
                let flat = (b * longest + t) as i64;
                input_ids[flat as usize] = i64::from(token);
                if sequence.loss_mask.get(t + 1) == Some(&true) {
                    targets.push(flat);
                    targets_in_positions.push(positions.len() as i64);
                    labels.push(i64::from(tokens[t + 1]));
                    sequence_of_target.push(b as i64);
                    of_student.push(by_student);
                    keys.push(of_sequence.wrapping_add(t as i64));
                }
                positions.push(flat);
            }
        }
        let log_sum_exp = columns
            .statistics
            .then(|| statistic_rows(sequences, |statistics| &statistics.log_sum_exp))
            .flatten();
        let moments = columns.statistics.then(|| {
            let rows = |column: fn(&Statistics) -> &Vec<f32>| {
                Some(statistic_rows(sequences, column)?.unsqueeze(1))
            };
            Some(Moments {
                mean: rows(|statistics| &statistics.mean)?,
                std: rows(|statistics| &statistics.std)?,
                min: rows(|statistics| &statistics.min)?,
            })
        });
        Ok(Batch {
            top_k: log_sum_exp
                .as_ref()
                .filter(|_| columns.top_k)
                .and_then(|rows| top_k_rows(sequences, rows)),
            log_sum_exp,
            moments: moments.flatten(),
            coefficients: columns
                .coefficients
                .then(|| coefficient_rows(sequences))
                .flatten(),
            sources: sequences
                .iter()
                .map(|sequence| sequence.source.clone())
                .collect(),
            input_ids: Tensor::from_slice(&input_ids)
                .view([sequences.len() as i64, longest as i64]),
            positions: Tensor::from_slice(&positions),
            targets: Tensor::from_slice(&targets),
            targets_in_positions: Tensor::from_slice(&targets_in_positions),
            labels: Tensor::from_slice(&labels),
            sequence_of_target: Tensor::from_slice(&sequence_of_target),
            keys: Tensor::from_slice(&keys),
            of_student: Tensor::from_slice(&of_student),
            paired: None,
            hidden: columns
                .layers
                .iter()
                .filter_map(|&layer| hidden_rows(sequences, layer))
                .collect(),
        })
    }

    /// Says of every position of the collated sequences whether it has a row of the teacher's.
    pub(crate) fn with_pairs(self, sequences: &[Sequence], paired: &[Vec<bool>]) -> Batch {
        let flags: Vec<f32> = sequences
            .iter()
            .zip(paired)
            .flat_map(|(sequence, paired)| {
                target_positions(sequence).map(|t| f32::from(u8::from(paired[t])))
            })
            .collect();
        Batch {
            paired: Some(Tensor::from_slice(&flags)),
            ..self
        }
    }

    /// The same on another device.
    pub(crate) fn to_device(&self, device: Device) -> Batch {
        let to = |tensor: &Tensor| tensor.to_device(device);
        Batch {
            sources: self.sources.clone(),
            input_ids: to(&self.input_ids),
            positions: to(&self.positions),
            targets: to(&self.targets),
            targets_in_positions: to(&self.targets_in_positions),
            labels: to(&self.labels),
            sequence_of_target: to(&self.sequence_of_target),
            keys: to(&self.keys),
            of_student: to(&self.of_student),
            paired: self.paired.as_ref().map(to),
            hidden: self
                .hidden
                .iter()
                .map(|(layer, rows)| (*layer, to(rows)))
                .collect(),
            coefficients: self.coefficients.as_ref().map(to),
            moments: self.moments.as_ref().map(|of| Moments {
                mean: to(&of.mean),
                std: to(&of.std),
                min: to(&of.min),
            }),
            log_sum_exp: self.log_sum_exp.as_ref().map(to),
            top_k: self.top_k.as_ref().map(|top_k| TopKRows {
                ids: to(&top_k.ids),
                logits: to(&top_k.logits),
                log_sum_exp: to(&top_k.log_sum_exp),
            }),
        }
    }

    /// B.
    pub(crate) fn num_sequences(&self) -> usize {
        self.sources.len()
    }

    /// P.
    pub(crate) fn num_positions(&self) -> usize {
        self.positions.numel()
    }

    /// N.
    pub(crate) fn num_targets(&self) -> usize {
        self.targets.numel()
    }

    /// The teacher's hidden states of one layer [P, D].
    ///
    /// # Panics
    /// When the layer was not read; the plan of a run reads every layer it uses.
    pub(crate) fn teacher_hidden(&self, layer: u32) -> &Tensor {
        let found = self.hidden.iter().find(|(of, _)| *of == layer);
        &found
            .expect("every layer in use is among the columns read")
            .1
    }

    /// The sequence that a target row belongs to.
    pub(crate) fn source_of_target(&self, row: i64) -> &str {
        &self.sources[self.sequence_of_target.int64_value(&[row]) as usize]
    }
}

fn hash_of_tokens(tokens: &[u32]) -> i64 {
    let mut hasher = blake3::Hasher::new();
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    let mut word = [0u8; 8];
    word.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    i64::from_le_bytes(word)
}

fn hidden_rows(sequences: &[Sequence], layer: u32) -> Option<(u32, Tensor)> {
    let mut values = Vec::new();
    let mut width = 0;
    for sequence in sequences {
        let state = sequence.hidden.iter().find(|state| state.layer == layer)?;
        width = state.width;
        values.extend_from_slice(&state.values);
    }
    Some((layer, Tensor::from_slice(&values).view([-1, width as i64])))
}

/// Positions of a sequence that predict a target.
fn target_positions(sequence: &Sequence) -> impl Iterator<Item = usize> + '_ {
    (0..sequence.token_ids.len()).filter(|t| sequence.loss_mask.get(t + 1) == Some(&true))
}

fn statistic_rows(
    sequences: &[Sequence],
    column: impl Fn(&Statistics) -> &Vec<f32>,
) -> Option<Tensor> {
    let mut values = Vec::new();
    for sequence in sequences {
        let of_all = column(sequence.statistics.as_ref()?);
        values.extend(target_positions(sequence).map(|t| of_all[t]));
    }
    Some(Tensor::from_slice(&values))
}

fn coefficient_rows(sequences: &[Sequence]) -> Option<Tensor> {
    let mut values: Vec<f32> = Vec::new();
    let mut rank = 1;
    for sequence in sequences {
        let found = sequence.coefficients.as_ref()?;
        rank = found.rank;
        values.extend(found.levels.iter().map(|level| f32::from(*level)));
    }
    Some(Tensor::from_slice(&values).view([-1, rank as i64]))
}

fn top_k_rows(sequences: &[Sequence], log_sum_exp: &Tensor) -> Option<TopKRows> {
    let (mut ids, mut logits) = (Vec::new(), Vec::new());
    let mut k = 0;
    for sequence in sequences {
        let top_k = sequence.top_k.as_ref()?;
        k = top_k.k;
        for t in target_positions(sequence) {
            ids.extend(
                top_k.ids[t * k..(t + 1) * k]
                    .iter()
                    .map(|&id| i64::from(id)),
            );
            logits.extend_from_slice(&top_k.logits[t * k..(t + 1) * k]);
        }
    }
    Some(TopKRows {
        ids: Tensor::from_slice(&ids).view([-1, k as i64]),
        logits: Tensor::from_slice(&logits).view([-1, k as i64]),
        log_sum_exp: log_sum_exp.shallow_clone(),
    })
}
