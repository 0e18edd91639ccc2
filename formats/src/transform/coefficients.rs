//! Codec `transform-rans`: the quantised coefficients of a position.

use crate::frame::{Decoder, Encoder, Fault, Header, TRANSFORM_RANS, damaged, positions_per_blob};
use crate::sequence::Coefficients;

use super::basis::Basis;
use super::bits::{BitReader, BitWriter};
use super::rans;

fn bytes_per_position(rank: usize) -> usize {
    2 * rank
}

fn header(rank: usize, first: usize, count: usize) -> Header {
    Header {
        codec: TRANSFORM_RANS,
        layer: 0,
        first: first as u32,
        count: count as u32,
        width: rank as u32,
    }
}

/// Checks one sequence's coefficients; says what is wrong.
pub(crate) fn check(
    coefficients: &Coefficients,
    rank: usize,
    positions: usize,
) -> Result<(), String> {
    if coefficients.rank == rank && coefficients.levels.len() == positions * rank {
        return Ok(());
    }
    Err(format!(
        "rank {} with {} levels, expected rank {rank} with {}",
        coefficients.rank,
        coefficients.levels.len(),
        positions * rank
    ))
}

/// The blobs of one checked sequence.
pub(crate) fn encode(
    encoder: &mut Encoder,
    basis: &Basis,
    coefficients: &Coefficients,
) -> Vec<Vec<u8>> {
    let rank = basis.rank();
    let positions = coefficients.levels.len() / rank;
    let step = positions_per_blob(bytes_per_position(rank));
    let mut blobs = Vec::with_capacity(positions.div_ceil(step));
    for first in (0..positions).step_by(step) {
        let count = step.min(positions - first);
        let levels = &coefficients.levels[first * rank..(first + count) * rank];
        let mut symbols = Vec::with_capacity(levels.len());
        let mut low = BitWriter::default();
        let mut exceptions: Vec<u8> = Vec::new();
        for (index, level) in levels.iter().enumerate() {
            let channel = &basis.channels[index % rank];
            let symbol = (i32::from(*level) >> channel.shift) - i32::from(channel.lowest);
            let fits = usize::try_from(symbol)
                .ok()
                .filter(|symbol| channel.table.has(*symbol));
            symbols.push(fits.map_or(channel.table.likeliest(), |symbol| symbol as u8));
            low.push(u32::from(*level as u16), u32::from(channel.shift));
            if fits.is_none() {
                exceptions.extend_from_slice(&(index as u32).to_le_bytes());
                exceptions.extend_from_slice(&i32::from(*level).to_le_bytes());
            }
        }
        encoder.begin(header(rank, first, count));
        let coded = rans::encode(&symbols, &basis.level_tables);
        encoder.plain(&(coded.len() as u32).to_le_bytes());
        encoder.plain(&coded);
        encoder.plain(&low.finish());
        encoder.plain(&((exceptions.len() / 8) as u32).to_le_bytes());
        encoder.plain(&exceptions);
        blobs.push(encoder.finish().to_vec());
    }
    blobs
}

/// Decodes the blobs of one row of `positions` positions.
pub(crate) fn decode<'a>(
    decoder: &Decoder,
    blobs: impl Iterator<Item = &'a [u8]>,
    basis: &Basis,
    positions: usize,
) -> Result<Coefficients, Fault> {
    let rank = basis.rank();
    let mut levels: Vec<i16> = Vec::new();
    let mut symbols = Vec::new();
    let mut first = 0;
    for blob in blobs {
        let expected = header(rank, first, 0);
        let (count, mut payload) =
            decoder.open(blob, expected, positions - first, bytes_per_position(rank))?;
        rans::decode(
            rans::take(&mut payload)?,
            count,
            &basis.level_tables,
            &mut symbols,
        )?;
        let start = levels.len();
        levels.reserve_exact(symbols.len());
        let low_bits: usize = basis
            .channels
            .iter()
            .map(|channel| usize::from(channel.shift))
            .sum();
        let mut low = BitReader::new(payload.take((count * low_bits).div_ceil(8))?);
        for row in symbols.chunks_exact(rank) {
            for (symbol, channel) in row.iter().zip(&basis.channels) {
                let upper = i32::from(*symbol) + i32::from(channel.lowest);
                let lower = if channel.shift == 0 {
                    0
                } else {
                    low.take(u32::from(channel.shift))?
                };
                // The basis bounds symbols and shifts so that this fits.
                levels.push((upper << channel.shift | lower as i32) as i16);
            }
        }
        low.end()?;
        let exceptions = payload.word()? as usize;
        for pair in payload.take(exceptions.saturating_mul(8))?.chunks_exact(8) {
            let index = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]) as usize;
            let level = i32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
            match (levels[start..].get_mut(index), i16::try_from(level)) {
                (Some(place), Ok(level)) => *place = level,
                _ => return damaged("an exception lies outside the blob or is too large"),
            }
        }
        payload.end()?;
        first += count;
    }
    if first != positions {
        return damaged(format!("the blobs cover {first} of {positions} positions"));
    }
    Ok(Coefficients { rank, levels })
}
