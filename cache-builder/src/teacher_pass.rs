//! The teacher's pass over the sequences of a shard, and what is kept of it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::{CacheSpec, Coefficients, HiddenState, Sequence, Statistics, TopK};
use caskd_models::LoadedModel;
use tch::{Device, Kind, Tensor};

use crate::statistics::{round_statistics, snap_top_k, summarize_logits};
use crate::tokenize::TokenizedSequence;
use crate::transform_fit::Coder;
use crate::{Error, Result};

/// Positions whose logits exist at one time: V of them take 50 MB at V = 49,152.
const HEAD_ROWS: i64 = 256;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PassTotals {
    pub(crate) positions: u64,
    pub(crate) teacher_seconds: f64,
    pub(crate) statistics_seconds: f64,
}

impl PassTotals {
    pub(crate) fn tokens_per_second(&self) -> f64 {
        self.positions as f64 / self.teacher_seconds.max(1e-9)
    }
}

/// The teacher and what is to be kept of it.
pub(crate) struct TeacherPass<'a> {
    teacher: &'a LoadedModel,
    /// `[V, D]` in f32: statistics of bf16-rounded logits would be off by up to 2⁻⁹ of a logit.
    head: Tensor,
    vocab_size: usize,
    pub(crate) top_k: usize,
    pub(crate) layers: Vec<u32>,
    /// Of the compact tier.
    pub(crate) coder: Option<Coder>,
    batch_tokens: usize,
    stop: &'a AtomicBool,
    logits: Vec<f32>,
    pub(crate) totals: PassTotals,
}

impl<'a> TeacherPass<'a> {
    pub(crate) fn new(
        teacher: &'a LoadedModel,
        spec: &CacheSpec,
        batch_tokens: usize,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            teacher,
            head: teacher
                .network
                .head()
                .detach()
                .to_kind(Kind::Float)
                .contiguous(),
            vocab_size: spec.vocab_size,
            top_k: spec.top_k,
            layers: spec.layers.iter().map(|layer| layer.layer).collect(),
            coder: None,
            batch_tokens,
            stop,
            logits: Vec::new(),
            totals: PassTotals::default(),
        }
    }

    /// The teacher's values for one shard, in the order of `sequences`; `None` when stopped.
    pub(crate) fn run(
        &mut self,
        sequences: &[TokenizedSequence],
        on_batch: &mut dyn FnMut(&PassTotals),
    ) -> Result<Option<Vec<Sequence>>> {
        let mut done: Vec<Option<Sequence>> = sequences.iter().map(|_| None).collect();
        for batch in batches_by_length(sequences, self.batch_tokens) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let started = Instant::now();
            let members: Vec<&TokenizedSequence> =
                batch.iter().map(|&index| &sequences[index]).collect();
            let results = tch::no_grad(|| self.run_batch(&members))?;
            for (&index, result) in batch.iter().zip(results) {
                self.totals.positions += result.token_ids.len() as u64;
                done[index] = Some(result);
            }
            self.totals.teacher_seconds += started.elapsed().as_secs_f64();
            on_batch(&self.totals);
        }
        Ok(Some(done.into_iter().flatten().collect()))
    }

    fn run_batch(&mut self, members: &[&TokenizedSequence]) -> Result<Vec<Sequence>> {
        let longest = members
            .iter()
            .map(|member| member.token_ids.len())
            .max()
            .unwrap_or(0);
        let mut padded = vec![0i64; members.len() * longest];
        for (row, member) in padded.chunks_exact_mut(longest).zip(members) {
            for (slot, &id) in row.iter_mut().zip(&member.token_ids) {
                *slot = i64::from(id);
            }
        }
        let input_ids = Tensor::from_slice(&padded)
            .view([members.len() as i64, longest as i64])
            .to_device(self.teacher.network.device());
        let forward = self
            .teacher
            .network
            .forward(&input_ids, &self.layers, false);

        let real = real_positions(members, longest);
        let gather = |states: &Tensor| {
            states
                .flatten(0, 1)
                .index_select(0, &real.to_device(states.device()))
        };
        let mut kept = Vec::new();
        for (layer, states) in &forward.hidden {
            kept.push((
                *layer,
                to_f32_vec(&gather(states)),
                states.size()[2] as usize,
            ));
        }
        let last_hidden = gather(&forward.last_hidden);
        let (mut statistics, mut top_k) = self
            .summarize(&last_hidden)
            .map_err(|position| not_finite("logits", members, position))?;
        let coefficients = self.coder.as_ref().map(|coder| {
            let started = Instant::now();
            round_statistics(&mut statistics);
            snap_top_k(&mut top_k, &statistics.max);
            let coefficients = coder.code(&last_hidden);
            self.totals.statistics_seconds += started.elapsed().as_secs_f64();
            coefficients
        });

        let mut results = Vec::with_capacity(members.len());
        let mut first = 0;
        for member in members {
            let rows = first..first + member.token_ids.len();
            first = rows.end;
            results.push(Sequence {
                source: member.source.clone(),
                token_ids: member.token_ids.clone(),
                loss_mask: member.loss_mask.clone(),
                statistics: Some(slice_statistics(&statistics, rows.clone())),
                top_k: Some(TopK {
                    k: self.top_k,
                    ids: top_k.ids[rows.start * self.top_k..rows.end * self.top_k].to_vec(),
                    logits: top_k.logits[rows.start * self.top_k..rows.end * self.top_k].to_vec(),
                }),
                hidden: kept
                    .iter()
                    .map(|(layer, values, width)| HiddenState {
                        layer: *layer,
                        width: *width,
                        values: values[rows.start * width..rows.end * width].to_vec(),
                    })
                    .collect(),
                coefficients: coefficients.as_ref().map(|all| Coefficients {
                    rank: all.rank,
                    levels: all.levels[rows.start * all.rank..rows.end * all.rank].to_vec(),
                }),
            });
        }
        for (layer, values, width) in &kept {
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(not_finite(
                    &format!("hidden state of layer {layer}"),
                    members,
                    at / width,
                ));
            }
        }
        Ok(results)
    }

    /// Statistics and top-k of the logits of `last_hidden` `[N, D]`; the index of a bad row as error.
    fn summarize(
        &mut self,
        last_hidden: &Tensor,
    ) -> std::result::Result<(Statistics, TopK), usize> {
        let mut statistics = Statistics::default();
        let mut top_k = TopK {
            k: self.top_k,
            ids: Vec::new(),
            logits: Vec::new(),
        };
        let rows = last_hidden.size()[0];
        let mut first = 0;
        while first < rows {
            let count = HEAD_ROWS.min(rows - first);
            let hidden = last_hidden.narrow(0, first, count).to_kind(Kind::Float);
            let logits = caskd_models::linear(&hidden, &self.head, None)
                .to_device(Device::Cpu)
                .contiguous();
            let started = Instant::now();
            let length = count as usize * self.vocab_size;
            self.logits.resize(length, 0.0);
            logits.copy_data(&mut self.logits, length);
            summarize_logits(&self.logits, self.vocab_size, &mut statistics, &mut top_k)
                .map_err(|row| first as usize + row)?;
            self.totals.statistics_seconds += started.elapsed().as_secs_f64();
            first += count;
        }
        Ok((statistics, top_k))
    }
}

/// Indices into `sequences`, sorted by length so that little is padded, cut into batches of at
/// most `batch_tokens` padded tokens.
fn batches_by_length(sequences: &[TokenizedSequence], batch_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&index| sequences[index].token_ids.len());
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let length = sequences[index].token_ids.len();
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * length <= batch_tokens => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

/// The flat indices of the positions that are not padding, sequence by sequence.
fn real_positions(members: &[&TokenizedSequence], longest: usize) -> Tensor {
    let indices: Vec<i64> = members
        .iter()
        .enumerate()
        .flat_map(|(row, member)| {
            (0..member.token_ids.len()).map(move |position| (row * longest + position) as i64)
        })
        .collect();
    Tensor::from_slice(&indices)
}

/// Names the sequence that the flat `position` of a batch falls into.
fn not_finite(what: &str, members: &[&TokenizedSequence], position: usize) -> Error {
    let mut rest = position;
    for member in members {
        if rest < member.token_ids.len() {
            return Error::NotFinite {
                what: what.into(),
                source_name: member.source.clone(),
                position: rest,
            };
        }
        rest -= member.token_ids.len();
    }
    Error::NotFinite {
        what: what.into(),
        source_name: "a padded batch".into(),
        position: rest,
    }
}

fn slice_statistics(all: &Statistics, rows: Range<usize>) -> Statistics {
    Statistics {
        mean: all.mean[rows.clone()].to_vec(),
        std: all.std[rows.clone()].to_vec(),
        min: all.min[rows.clone()].to_vec(),
        max: all.max[rows.clone()].to_vec(),
        log_sum_exp: all.log_sum_exp[rows].to_vec(),
    }
}

pub(crate) fn to_f32_vec(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor
        .to_kind(Kind::Float)
        .to_device(Device::Cpu)
        .contiguous();
    let mut values = vec![0.0; tensor.numel()];
    let length = values.len();
    tensor.copy_data(&mut values, length);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lengths: &[usize]) -> Vec<TokenizedSequence> {
        lengths
            .iter()
            .map(|&length| TokenizedSequence {
                source: format!("s{length}"),
                token_ids: vec![1; length],
                loss_mask: vec![true; length],
            })
            .collect()
    }

    #[test]
    fn batches_hold_every_sequence_once_within_the_limit() {
        let all = sequences(&[5, 300, 7, 7, 2, 90, 41, 8, 64]);
        let batches = batches_by_length(&all, 100);
        let mut seen: Vec<usize> = batches.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..all.len()).collect::<Vec<_>>());
        for batch in &batches {
            let longest = batch
                .iter()
                .map(|&index| all[index].token_ids.len())
                .max()
                .unwrap();
            assert!(batch.len() == 1 || batch.len() * longest <= 100);
        }
    }

    #[test]
    fn a_bad_position_is_named_by_its_sequence() {
        let all = sequences(&[3, 4]);
        let members: Vec<&TokenizedSequence> = all.iter().collect();
        let error = not_finite("logits", &members, 5);
        assert_eq!(
            error.to_string(),
            "not finite: the teacher's logits of s4 at position 2"
        );
    }
}
