//! Codec `topk-ranked`: the largest logits on a grid below their maximum, with ids by how often the sample had them.

use crate::frame::{Decoder, Encoder, Fault, Header, TOP_K_RANKED, damaged, positions_per_blob};
use crate::sequence::TopK;

use super::basis::{Basis, TOP_K_STEPS};
use super::bits::{BitReader, BitWriter};
use super::rans;

/// Gaps of this size and above are exceptions.
const LONG_GAP: u32 = 255;

fn bytes_per_position(k: usize) -> usize {
    8 * k
}

fn header(k: usize, first: usize, count: usize) -> Header {
    Header {
        codec: TOP_K_RANKED,
        layer: 0,
        first: first as u32,
        count: count as u32,
        width: k as u32,
    }
}

/// Logits of one position \[K\] as steps below the maximum: ascending, the first 0.
pub(crate) fn steps(logits: &[f32], max: f32) -> impl Iterator<Item = u32> + '_ {
    let mut before = 0;
    logits.iter().map(move |logit| {
        before = before.max(((max - logit) * TOP_K_STEPS).round() as u32);
        before
    })
}

/// Bucket 0 is rank 0, bucket b the ranks of b bits; the bits below the highest follow as they are.
pub(crate) fn bucket(rank: u32) -> u8 {
    (u32::BITS - rank.leading_zeros()) as u8
}

/// The blobs of one checked sequence whose logits are finite.
pub(crate) fn encode(encoder: &mut Encoder, basis: &Basis, top_k: &TopK) -> Vec<Vec<u8>> {
    let k = top_k.k;
    let positions = top_k.ids.len() / k;
    let step = positions_per_blob(bytes_per_position(k));
    let mut blobs = Vec::with_capacity(positions.div_ceil(step));
    for first in (0..positions).step_by(step) {
        let count = step.min(positions - first);
        let mut symbols = Vec::with_capacity(count * (2 * k - 1));
        let mut plain = BitWriter::default();
        let mut exceptions: Vec<u8> = Vec::new();
        for position in first..first + count {
            let entries = position * k..(position + 1) * k;
            for id in &top_k.ids[entries.clone()] {
                let rank = basis.rank_of_id[*id as usize];
                let bucket = bucket(rank);
                symbols.push(bucket);
                plain.push(rank, u32::from(bucket.saturating_sub(1)));
            }
            let logits = &top_k.logits[entries];
            let mut before = 0;
            for (index, steps) in steps(logits, logits[0]).enumerate().skip(1) {
                let gap = steps - before;
                before = steps;
                symbols.push(gap.min(LONG_GAP) as u8);
                if gap >= LONG_GAP {
                    let index = (position - first) * (k - 1) + index - 1;
                    exceptions.extend_from_slice(&(index as u32).to_le_bytes());
                    exceptions.extend_from_slice(&gap.to_le_bytes());
                }
            }
        }
        encoder.begin(header(k, first, count));
        let coded = rans::encode(&symbols, &basis.top_k_tables);
        encoder.plain(&(coded.len() as u32).to_le_bytes());
        encoder.plain(&coded);
        encoder.plain(&plain.finish());
        encoder.plain(&((exceptions.len() / 8) as u32).to_le_bytes());
        encoder.plain(&exceptions);
        blobs.push(encoder.finish().to_vec());
    }
    blobs
}

/// Decodes the blobs of one row into `out`, whose memory is used again; `max` is the row's statistic \[T\].
pub(crate) fn decode<'a>(
    decoder: &Decoder,
    blobs: impl Iterator<Item = &'a [u8]>,
    basis: &Basis,
    max: &[f32],
    out: &mut TopK,
) -> Result<(), Fault> {
    let k = basis.k();
    out.k = k;
    out.ids.clear();
    out.logits.clear();
    let (mut symbols, mut gaps) = (Vec::new(), Vec::new());
    let mut first = 0;
    for blob in blobs {
        let expected = header(k, first, 0);
        let (count, mut payload) =
            decoder.open(blob, expected, max.len() - first, bytes_per_position(k))?;
        rans::decode(
            rans::take(&mut payload)?,
            count,
            &basis.top_k_tables,
            &mut symbols,
        )?;
        gaps.clear();
        let mut plain_bits = 0;
        for row in symbols.chunks_exact(2 * k - 1) {
            plain_bits += row[..k]
                .iter()
                .map(|b| usize::from(b.saturating_sub(1)))
                .sum::<usize>();
            gaps.extend(row[k..].iter().map(|gap| u32::from(*gap)));
        }
        let mut plain = BitReader::new(payload.take(plain_bits.div_ceil(8))?);
        out.ids.reserve(count * k);
        for row in symbols.chunks_exact(2 * k - 1) {
            for bucket in &row[..k] {
                let rank = match u32::from(*bucket) {
                    0 => 0,
                    bits => 1 << (bits - 1) | plain.take(bits - 1)?,
                };
                match basis.id_order.get(rank as usize) {
                    Some(id) => out.ids.push(*id),
                    None => return damaged("a token's rank is beyond the vocabulary"),
                }
            }
        }
        plain.end()?;
        let exceptions = payload.word()? as usize;
        for pair in payload.take(exceptions.saturating_mul(8))?.chunks_exact(8) {
            let index = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]) as usize;
            let gap = u32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
            match gaps.get_mut(index) {
                // Sums stay exact in f32: a logit is at most 2²⁴ steps below the maximum.
                Some(place) if gap <= 1 << 24 => *place = gap,
                _ => return damaged("an exception lies outside the blob or is too large"),
            }
        }
        payload.end()?;
        out.logits.reserve(count * k);
        for (position, max) in max[first..first + count].iter().enumerate() {
            let mut steps = 0_u32;
            out.logits.push(*max);
            for gap in &gaps[position * (k - 1)..(position + 1) * (k - 1)] {
                steps = steps.saturating_add(*gap);
                out.logits.push(max - steps as f32 / TOP_K_STEPS);
            }
        }
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
