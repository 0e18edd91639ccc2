//! Codec `topk-f16-steps`: the distance to the largest logit in f16, stored as steps from rank to rank.
//!
//! Near the maximum, where the probability is, f16 distances are finest. Logits descend, so the patterns ascend and
//! their steps mostly fit in a byte: measured on a real teacher with K = 64 the steps cost 0.8 bytes an entry, plain f16
//! planes 1.1.

use half::f16;

use crate::frame::{
    Decoder, Encoder, Fault, Header, Payload, TOP_K_F16_STEPS, damaged, positions_per_blob,
};
use crate::sequence::TopK;

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

/// The blobs of one checked sequence.
pub(crate) fn encode(
    encoder: &mut Encoder,
    top_k: &TopK,
    vocab_size: usize,
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
            encoder.planes(&steps(logits, k))?;
        }
        let low: Vec<u16> = ids.iter().map(|id| *id as u16).collect();
        encoder.planes(&low)?;
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

/// Decodes the blobs of one row; `max` is the row's statistic \[T\].
pub(crate) fn decode<'a>(
    decoder: &mut Decoder,
    blobs: impl Iterator<Item = &'a [u8]>,
    max: &[f32],
    k: usize,
    vocab_size: usize,
) -> Result<TopK, Fault> {
    let mut out = TopK {
        k,
        ids: Vec::new(),
        logits: Vec::new(),
    };
    let mut patterns = Vec::new();
    let mut first = 0;
    for blob in blobs {
        let expected = header(k, first, 0);
        let (count, mut payload) = Decoder::open(
            blob,
            expected,
            max.len() - first,
            bytes_per_position(k, vocab_size),
        )?;
        decode_logits(
            decoder,
            &mut payload,
            &max[first..first + count],
            k,
            &mut patterns,
            &mut out.logits,
        )?;
        patterns.clear();
        decoder.planes(&mut payload, count * k, &mut patterns)?;
        let start = out.ids.len();
        out.ids.extend(patterns.iter().map(|low| u32::from(*low)));
        let ids = &mut out.ids[start..];
        for bit in 16..16 + high_bits(vocab_size) {
            // A section of its own scope: the plane borrows the decoder's buffer.
            let plane = decoder.section(&mut payload, (count * k).div_ceil(8))?;
            for (eight, byte) in ids.chunks_mut(8).zip(plane) {
                for (j, id) in eight.iter_mut().enumerate() {
                    *id |= u32::from(byte >> j & 1) << bit;
                }
            }
        }
        if ids.iter().copied().max().unwrap_or(0) as usize >= vocab_size {
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
    Ok(out)
}

fn decode_logits(
    decoder: &mut Decoder,
    payload: &mut Payload<'_>,
    max: &[f32],
    k: usize,
    patterns: &mut Vec<u16>,
    logits: &mut Vec<f32>,
) -> Result<(), Fault> {
    let start = logits.len();
    if k == 1 {
        logits.extend_from_slice(max);
        return Ok(());
    }
    patterns.clear();
    decoder.planes(payload, max.len() * (k - 1), patterns)?;
    logits.resize(start + max.len() * k, 0.0);
    let mut row_patterns = vec![0; k];
    for ((row, steps), max) in logits[start..]
        .chunks_exact_mut(k)
        .zip(patterns.chunks_exact(k - 1))
        .zip(max)
    {
        let mut pattern = 0;
        for (sum, step) in row_patterns[1..].iter_mut().zip(steps) {
            pattern += u32::from(*step);
            *sum = pattern as u16;
        }
        if pattern > INFINITY {
            return damaged("the steps of a position add up to no number");
        }
        crate::frame::widen(&row_patterns, row);
        for logit in row {
            *logit = max - *logit;
        }
    }
    Ok(())
}
