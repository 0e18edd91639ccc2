//! Codec `topk-f16-steps`: the distance to the largest logit in f16, stored as steps from rank to rank.
//!
//! Near the maximum, where the probability is, f16 distances are finest. Logits descend, so the patterns ascend and
//! their steps mostly fit in a byte: measured on a real teacher with K = 64 the steps cost 0.8 bytes an entry, plain f16
//! planes 1.1.

use half::f16;

use crate::frame::{
    Decoder, Encoder, Fault, Favour, Header, TOP_K_F16_STEPS, damaged, positions_per_blob,
};
use crate::sequence::TopK;
use crate::spec::{CacheSpec, HiddenCodec};
use crate::widen::subtract_from;

const INFINITY: u32 = 0x7C00;

/// Bits of a token id beyond the sixteenth.
fn high_bits(vocab_size: usize) -> usize {
    let bits = usize::BITS - (vocab_size - 1).leading_zeros();
    (bits as usize).saturating_sub(16)
}

fn bytes_per_position(k: usize, vocab_size: usize) -> usize {
    4 * k + (k * high_bits(vocab_size)).div_ceil(8)
}

fn header(k: usize, first: usize, count: usize) -> Header {
    Header {
        codec: TOP_K_F16_STEPS,
        layer: 0,
        first: first as u32,
        count: count as u32,
        width: k as u32,
    }
}

/// Checks one sequence's top-k against the whole vocabulary's maximum; says what is wrong.
pub(crate) fn check(top_k: &TopK, max: &[f32], k: usize, vocab_size: usize) -> Result<(), String> {
    let entries = max.len() * k;
    if top_k.k != k || top_k.ids.len() != entries || top_k.logits.len() != entries {
        return Err(format!(
            "k = {} with {} ids and {} logits, expected k = {k} with {entries}",
            top_k.k,
            top_k.ids.len(),
            top_k.logits.len()
        ));
    }
    for (position, (row, max)) in top_k.logits.chunks_exact(k).zip(max).enumerate() {
        if row.iter().any(|logit| logit.is_nan()) {
            return Err(format!("NaN at position {position}"));
        }
        if row[0] != *max {
            return Err(format!(
                "position {position}: the first logit is {}, the maximum is {max}",
                row[0]
            ));
        }
        if let Some(rank) = row.windows(2).position(|pair| pair[0] < pair[1]) {
            return Err(format!(
                "position {position}: the logits ascend at rank {}",
                rank + 1
            ));
        }
    }
    if let Some(id) = top_k.ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(format!(
            "token id {id} is beyond the vocabulary of {vocab_size}"
        ));
    }
    Ok(())
}

/// Checks the order of equal largest logits in a sequence that [`check`] has passed.
pub(crate) fn check_ties(top_k: &TopK) -> Result<(), String> {
    let mut rows = top_k.logits.chunks(top_k.k).zip(top_k.ids.chunks(top_k.k));
    match rows.position(|(logits, ids)| !is_argmax_first(logits, ids)) {
        None => Ok(()),
        Some(position) => Err(format!(
            "position {position}: of equal largest logits the lower token id must come first"
        )),
    }
}

/// Whether, of the logits that are equal to the largest, the lower token id comes first, as argmax has it. Other ties mean
/// nothing: distances that were different may have been rounded to the same. So may be a distance to a maximum below 1.
pub(crate) fn is_argmax_first(logits: &[f32], ids: &[u32]) -> bool {
    let largest = logits.iter().take_while(|logit| **logit == logits[0]);
    logits[0].abs() < 1.0 || ids[..largest.count()].is_sorted()
}

/// What a cache's top-k is written for. Where layers in f16, which are written for speed, outweigh it four times, its few
/// bytes would take as long to unpack as all of theirs to read.
pub(crate) fn favour(spec: &CacheSpec) -> Favour {
    let of_layers: usize = spec
        .layers
        .iter()
        .filter(|layer| layer.codec == HiddenCodec::F16)
        .map(|layer| layer.width * layer.codec.bytes())
        .sum();
    if of_layers >= 4 * bytes_per_position(spec.top_k, spec.vocab_size) {
        Favour::Speed
    } else {
        Favour::Size
    }
}

/// The blobs of one checked sequence.
pub(crate) fn encode(
    encoder: &mut Encoder,
    top_k: &TopK,
    vocab_size: usize,
    favour: Favour,
) -> std::io::Result<Vec<Vec<u8>>> {
    let k = top_k.k;
    let positions = top_k.ids.len() / k;
    let step = positions_per_blob(bytes_per_position(k, vocab_size));
    let mut blobs = Vec::with_capacity(positions.div_ceil(step));
    for first in (0..positions).step_by(step) {
        let count = step.min(positions - first);
        let logits = &top_k.logits[first * k..(first + count) * k];
        let ids = &top_k.ids[first * k..(first + count) * k];
        encoder.begin(header(k, first, count));
        if k > 1 {
            encoder.planes(&steps(logits, k), favour)?;
        }
        let low: Vec<u16> = ids.iter().map(|id| *id as u16).collect();
        encoder.planes(&low, favour)?;
        for bit in 16..16 + high_bits(vocab_size) {
            encoder.section(&bit_plane(ids, bit))?;
        }
        blobs.push(encoder.finish().to_vec());
    }
    Ok(blobs)
}

fn steps(logits: &[f32], k: usize) -> Vec<u16> {
    let mut steps = Vec::with_capacity(logits.len() / k * (k - 1));
    for row in logits.chunks_exact(k) {
        let mut before = 0;
        for logit in &row[1..] {
            let distance = if *logit == f32::NEG_INFINITY {
                f16::INFINITY
            } else {
                f16::from_f32((row[0] - logit).min(f16::MAX.to_f32()))
            };
            steps.push(distance.to_bits() - before);
            before = distance.to_bits();
        }
    }
    steps
}

fn bit_plane(ids: &[u32], bit: usize) -> Vec<u8> {
    ids.chunks(8)
        .map(|eight| {
            eight
                .iter()
                .enumerate()
                .fold(0, |byte, (j, id)| byte | ((id >> bit & 1) as u8) << j)
        })
        .collect()
}

/// Decodes the blobs of one row into `out`, whose memory is used again; `max` is the row's statistic \[T\].
pub(crate) fn decode<'a>(
    decoder: &mut Decoder,
    blobs: impl Iterator<Item = &'a [u8]>,
    max: &[f32],
    k: usize,
    vocab_size: usize,
    out: &mut TopK,
) -> Result<(), Fault> {
    out.k = k;
    out.ids.clear();
    out.logits.clear();
    let mut first = 0;
    for blob in blobs {
        let (count, mut payload) = decoder.open(
            blob,
            header(k, first, 0),
            max.len() - first,
            bytes_per_position(k, vocab_size),
        )?;
        let max = &max[first..first + count];
        if k == 1 {
            out.logits.extend_from_slice(max);
        } else {
            let (low, high) = decoder.planes(&mut payload, count * (k - 1))?;
            decode_logits(low, high, max, k, &mut out.logits)?;
        }
        let (low, high) = decoder.planes(&mut payload, count * k)?;
        let start = out.ids.len();
        out.ids.extend(
            low.iter()
                .zip(high)
                .map(|(low, high)| u32::from(*low) | u32::from(*high) << 8),
        );
        let ids = &mut out.ids[start..];
        for bit in 16..16 + high_bits(vocab_size) {
            let plane = decoder.section(&mut payload, (count * k).div_ceil(8))?;
            for (eight, byte) in ids.chunks_mut(8).zip(plane) {
                for (j, id) in eight.iter_mut().enumerate() {
                    *id |= u32::from(byte >> j & 1) << bit;
                }
            }
        }
        // A fold, because the compiler makes no vectors of `max`, which may stop early.
        if ids.iter().fold(0, |most, id| most.max(*id)) as usize >= vocab_size {
            return damaged("a token id is beyond the vocabulary");
        }
        payload.end()?;
        first += count;
    }
    if first != max.len() {
        return damaged(format!(
            "the blobs cover {first} of {} positions",
            max.len()
        ));
    }
    Ok(())
}

/// Appends the logits of the positions of `max` from the planes of their steps.
fn decode_logits(
    low: &[u8],
    high: &[u8],
    max: &[f32],
    k: usize,
    logits: &mut Vec<f32>,
) -> Result<(), Fault> {
    logits.reserve(max.len() * k);
    let (mut patterns, mut row) = (vec![0; k], vec![0.0; k]);
    let steps = low.chunks_exact(k - 1).zip(high.chunks_exact(k - 1));
    for ((low, high), max) in steps.zip(max) {
        let mut pattern = 0;
        for ((sum, low), high) in patterns[1..].iter_mut().zip(low).zip(high) {
            pattern += u32::from(*low) | u32::from(*high) << 8;
            *sum = pattern as u16;
        }
        if pattern > INFINITY {
            return damaged("the steps of a position add up to no number");
        }
        subtract_from(*max, &patterns, &mut row);
        logits.extend_from_slice(&row);
    }
    Ok(())
}
