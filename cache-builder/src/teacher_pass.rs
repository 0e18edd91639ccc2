//! The teacher's pass over the sequences of a shard, and what is kept of it.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use caskd_formats::{CacheSpec, HiddenState, Sequence, Statistics, TopK};
use caskd_models::Forward;
use tch::{Device, Kind, Tensor};

use crate::data::TokenizedSequence;
use crate::device_statistics::summarize_on_device;
use crate::layers::Event;
use crate::statistics::{round_statistics, snap_top_k, summarize_logits};
use crate::teacher::{StatisticsHead, Teacher};
use crate::transform_fit::Coder;
use crate::{Error, Result};

/// Positions whose logits exist at one time: V of them take 50 MB at V = 49,152.
pub(crate) const HEAD_ROWS: i64 = 256;

/// Bytes of the head in f32 that one product reads: wider vocabularies go in slices, which a head that is kept in bf16
/// needs, and which give the same values either way.
pub(crate) const HEAD_SLICE_BYTES: usize = 256 << 20;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PassTotals {
    pub(crate) positions: u64,
    /// Positions whose way through the layers is behind them in part, as whole ones.
    pub(crate) under_way: u64,
    pub(crate) teacher_seconds: f64,
    /// Of these, until weights were read from disk.
    pub(crate) waiting_seconds: f64,
    pub(crate) statistics_seconds: f64,
}

impl PassTotals {
    pub(crate) fn tokens_per_second(&self) -> f64 {
        (self.positions + self.under_way) as f64 / self.teacher_seconds.max(1e-9)
    }
}

/// The teacher and what is to be kept of it.
pub(crate) struct TeacherPass<'a> {
    teacher: &'a Teacher,
    /// `[V, D]`, products in f32: statistics of bf16-rounded logits would be off by up to 2⁻⁹ of a logit. Layer by layer it
    /// is in memory only while no block is.
    head: Option<StatisticsHead>,
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

/// Sequences of one shard that go through the teacher together.
struct Batch {
    shard: usize,
    members: Vec<usize>,
}

/// A shard on its way.
struct Pending {
    done: Vec<Option<Sequence>>,
    left: usize,
}

impl<'a> TeacherPass<'a> {
    pub(crate) fn new(
        teacher: &'a Teacher,
        spec: &CacheSpec,
        batch_tokens: usize,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            teacher,
            head: None,
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

    /// Positions that are worth giving to [`TeacherPass::run`] at one time.
    pub(crate) fn block_positions(&self) -> usize {
        self.teacher.block_positions
    }

    /// The teacher's values for one shard, in the order of `sequences`; `None` when stopped.
    pub(crate) fn run_one(
        &mut self,
        sequences: Vec<TokenizedSequence>,
        on_batch: &mut dyn FnMut(&PassTotals),
    ) -> Result<Option<Vec<Sequence>>> {
        let mut found = None;
        let completed = self.run(&[sequences], on_batch, &mut |_, sequences| {
            found = Some(sequences);
            Ok(true)
        })?;
        Ok(found.filter(|_| completed))
    }

    /// Hands the teacher's values for each shard, in the order of its sequences, to `emit` as soon as they are known. False
    /// when stopped, or when `emit` says so.
    pub(crate) fn run(
        &mut self,
        shards: &[Vec<TokenizedSequence>],
        on_batch: &mut dyn FnMut(&PassTotals),
        emit: &mut dyn FnMut(usize, Vec<Sequence>) -> Result<bool>,
    ) -> Result<bool> {
        let mut pending: Vec<Pending> = shards
            .iter()
            .map(|sequences| Pending {
                done: sequences.iter().map(|_| None).collect(),
                left: sequences.len(),
            })
            .collect();
        let batches: Vec<Batch> = shards
            .iter()
            .enumerate()
            .flat_map(|(shard, sequences)| {
                batches_by_length(sequences, self.batch_tokens)
                    .into_iter()
                    .map(move |members| Batch { shard, members })
            })
            .collect();
        for block in self.blocks(shards, &batches) {
            if !tch::no_grad(|| self.run_block(shards, block, &mut pending, on_batch, emit))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Cuts batches into blocks that go through the layers together.
    fn blocks<'b>(
        &self,
        shards: &[Vec<TokenizedSequence>],
        batches: &'b [Batch],
    ) -> Vec<&'b [Batch]> {
        if !self.teacher.is_layered() {
            return vec![batches];
        }
        let mut blocks = Vec::new();
        let (mut start, mut positions) = (0, 0);
        for (index, batch) in batches.iter().enumerate() {
            let of_batch = batch.members.len() * longest(&members(shards, batch));
            if index > start && positions + of_batch > self.teacher.block_positions {
                blocks.push(&batches[start..index]);
                (start, positions) = (index, 0);
            }
            positions += of_batch;
        }
        blocks.push(&batches[start..]);
        blocks
    }

    fn run_block(
        &mut self,
        shards: &[Vec<TokenizedSequence>],
        block: &[Batch],
        pending: &mut [Pending],
        on_batch: &mut dyn FnMut(&PassTotals),
        emit: &mut dyn FnMut(usize, Vec<Sequence>) -> Result<bool>,
    ) -> Result<bool> {
        let ids: Vec<Tensor> = block
            .iter()
            .map(|batch| padded_ids(&members(shards, batch)))
            .collect();
        let block_positions: usize = block
            .iter()
            .flat_map(|batch| members(shards, batch))
            .map(|member| member.token_ids.len())
            .sum();
        let before = self.totals;
        let (teacher, stop, layers) = (self.teacher, self.stop, self.layers.clone());
        let mut clock = Instant::now();
        let mut wanted = true;
        let mut share_done = 0.0;
        let times = teacher.run(&ids, &layers, stop, &mut |event| {
            let mut finished = None;
            match event {
                Event::Step(share) => share_done = share,
                Event::Done(index, forward) => {
                    let Batch {
                        shard,
                        members: indices,
                    } = &block[index];
                    let members = members(shards, &block[index]);
                    let results = self.keep_of(&members, &forward)?;
                    let shard_pending = &mut pending[*shard];
                    for (&index, result) in indices.iter().zip(results) {
                        self.totals.positions += result.token_ids.len() as u64;
                        shard_pending.done[index] = Some(result);
                        shard_pending.left -= 1;
                    }
                    if shard_pending.left == 0 {
                        finished = Some(*shard);
                    }
                }
            }
            let left = before.positions + block_positions as u64 - self.totals.positions;
            self.totals.under_way = (share_done * left as f64) as u64;
            self.totals.teacher_seconds += clock.elapsed().as_secs_f64();
            on_batch(&self.totals);
            if let Some(shard) = finished {
                let done = std::mem::take(&mut pending[shard].done);
                wanted &= emit(shard, done.into_iter().flatten().collect())?;
            }
            clock = Instant::now();
            Ok(())
        })?;
        self.totals.under_way = 0;
        self.totals.waiting_seconds += times.waiting_seconds;
        if teacher.is_layered() {
            self.head = None;
        }
        Ok(times.completed && wanted)
    }

    /// What the cache is to hold of a batch.
    fn keep_of(
        &mut self,
        members: &[&TokenizedSequence],
        forward: &Forward,
    ) -> Result<Vec<Sequence>> {
        let longest = longest(members);
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
            .summarize(&last_hidden)?
            .map_err(|position| not_finite("logits", members, position))?;
        let mut coefficients = Vec::new();
        if let Some(coder) = &self.coder {
            let started = Instant::now();
            round_statistics(&mut statistics);
            snap_top_k(&mut top_k, &statistics.max);
            let masks: Vec<&[bool]> = members
                .iter()
                .map(|member| member.loss_mask.as_slice())
                .collect();
            coefficients = coder.code(&last_hidden, &masks)?;
            self.totals.statistics_seconds += started.elapsed().as_secs_f64();
        }
        let mut coefficients = coefficients.into_iter();

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
                coefficients: coefficients.next(),
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

    /// Statistics and top-k of the logits of `last_hidden` `[N, D]`; the index of a bad row as inner error.
    fn summarize(
        &mut self,
        last_hidden: &Tensor,
    ) -> Result<std::result::Result<(Statistics, TopK), usize>> {
        let head = match self.head.take() {
            Some(head) => head,
            None => self.teacher.head_for_statistics()?,
        };
        let mut statistics = Statistics::default();
        let mut top_k = TopK {
            k: self.top_k,
            ids: Vec::new(),
            logits: Vec::new(),
        };
        let rows = last_hidden.size()[0];
        let mut first = 0;
        let mut bad = None;
        while first < rows && bad.is_none() {
            let count = HEAD_ROWS.min(rows - first);
            let hidden = last_hidden.narrow(0, first, count);
            let (summarized, seconds) = match &head {
                StatisticsHead::Plain(head) if head.device() != Device::Cpu => {
                    let logits = logits_on_device(&hidden.to_kind(Kind::Float), head);
                    let started = Instant::now();
                    let summarized = summarize_on_device(&logits, &mut statistics, &mut top_k)?;
                    (summarized, started.elapsed().as_secs_f64())
                }
                head => {
                    let moving = match head {
                        StatisticsHead::Plain(head) => {
                            fill_logits(&hidden.to_kind(Kind::Float), head, &mut self.logits)
                        }
                        StatisticsHead::Packed(head) => {
                            head.logits_into(&hidden, &mut self.logits);
                            0.0
                        }
                    };
                    let started = Instant::now();
                    let logits = &self.logits;
                    let summarized =
                        summarize_logits(logits, self.vocab_size, &mut statistics, &mut top_k);
                    (summarized, moving + started.elapsed().as_secs_f64())
                }
            };
            bad = summarized.err().map(|row| first as usize + row);
            self.totals.statistics_seconds += seconds;
            first += count;
        }
        self.head = Some(head);
        Ok(match bad {
            Some(row) => Err(row),
            None => Ok((statistics, top_k)),
        })
    }
}

/// Rows of the head in one product.
fn slice_rows(head: &Tensor) -> usize {
    let (vocab_size, width) = (head.size()[0] as usize, head.size()[1] as usize);
    (HEAD_SLICE_BYTES / 4 / width.max(1)).clamp(1, vocab_size)
}

/// Logits [N, V] of hidden states [N, D] in f32, which stay where the head is.
fn logits_on_device(hidden: &Tensor, head: &Tensor) -> Tensor {
    let columns = slice_rows(head) as i64;
    let vocab_size = head.size()[0];
    let slices: Vec<Tensor> = (0..vocab_size)
        .step_by(columns as usize)
        .map(|first| {
            let weights = head.narrow(0, first, columns.min(vocab_size - first));
            caskd_models::linear(hidden, &weights.to_kind(Kind::Float), None)
        })
        .collect();
    Tensor::cat(&slices, 1)
}

/// Logits [N, V] of hidden states [N, D] in f32, as one flat row after the other; the seconds spent on moving them.
fn fill_logits(hidden: &Tensor, head: &Tensor, logits: &mut Vec<f32>) -> f64 {
    let (rows, vocab_size) = (hidden.size()[0] as usize, head.size()[0] as usize);
    let columns = slice_rows(head);
    logits.resize(rows * vocab_size, 0.0);
    let mut slice = Vec::new();
    let mut seconds = 0.0;
    for first in (0..vocab_size).step_by(columns) {
        let count = columns.min(vocab_size - first);
        let weights = head
            .narrow(0, first as i64, count as i64)
            .to_kind(Kind::Float);
        let product = caskd_models::linear(hidden, &weights, None)
            .to_device(Device::Cpu)
            .contiguous();
        let started = Instant::now();
        if count == vocab_size {
            product.copy_data(logits, rows * count);
        } else {
            slice.resize(rows * count, 0.0);
            product.copy_data(&mut slice, rows * count);
            for (row, values) in logits
                .chunks_exact_mut(vocab_size)
                .zip(slice.chunks_exact(count))
            {
                row[first..first + count].copy_from_slice(values);
            }
        }
        seconds += started.elapsed().as_secs_f64();
    }
    seconds
}

fn members<'b>(shards: &'b [Vec<TokenizedSequence>], batch: &Batch) -> Vec<&'b TokenizedSequence> {
    let of_shard = &shards[batch.shard];
    batch
        .members
        .iter()
        .map(|&index| &of_shard[index])
        .collect()
}

fn longest(members: &[&TokenizedSequence]) -> usize {
    let lengths = members.iter().map(|member| member.token_ids.len());
    lengths.max().unwrap_or(0)
}

/// [B, T] ids, padded on the right with 0.
fn padded_ids(members: &[&TokenizedSequence]) -> Tensor {
    let longest = longest(members);
    let mut padded = vec![0i64; members.len() * longest];
    for (row, member) in padded.chunks_exact_mut(longest.max(1)).zip(members) {
        for (slot, &id) in row.iter_mut().zip(&member.token_ids) {
            *slot = i64::from(id);
        }
    }
    Tensor::from_slice(&padded).view([members.len() as i64, longest as i64])
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

/// Rows and positions of the batches that these sequences make.
pub(crate) fn padded_shapes(
    sequences: &[TokenizedSequence],
    batch_tokens: usize,
) -> Vec<(usize, usize)> {
    let batches = batches_by_length(sequences, batch_tokens).into_iter();
    batches
        .map(|batch| {
            let lengths = batch.iter().map(|&index| sequences[index].token_ids.len());
            (batch.len(), lengths.max().unwrap_or(0))
        })
        .collect()
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
