//! The entropy coder of the compact tier: range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) with static
//! 12-bit frequencies, 32-bit states and 16-bit words, interleaved over positions (Giesen 2014, arXiv 1402.3392).
//!
//! A matrix of symbols \[n·C\] is coded with one table a column. Lane j codes the positions j, j + J, j + 2J, …; all
//! lanes meet the same table at the same time, so a decoder works on a whole vector of lanes, in Rust and in numpy.

use crate::frame::{Fault, Payload, damaged};

/// Frequencies of a table add up to 2¹².
pub(crate) const FREQUENCY_BITS: u32 = 12;
pub(crate) const FREQUENCY_SUM: u32 = 1 << FREQUENCY_BITS;

/// Symbols of one table at most.
pub(crate) const MAX_SYMBOLS: usize = 256;

/// States stay in 2¹⁶ … 2³² − 1, and begin (in the encoder) and end (in the decoder) at this.
const LOWEST: u32 = 1 << 16;

const MAX_LANES: usize = 32;

/// Each lane costs four bytes: at most a quarter byte a position.
const POSITIONS_PER_LANE: usize = 16;

/// The frequencies of one column, and what is faster to look up.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// Per symbol: where its interval begins, and its frequency.
    intervals: Vec<(u16, u16)>,
    /// Per slot of the 2¹²: symbol · 2²⁴ + (frequency − 1) · 2¹² + the slot's place in the interval.
    slots: Vec<u32>,
}

impl Table {
    /// A table of 1 to 256 frequencies that add up to 2¹²; symbols of frequency 0 cannot be coded.
    pub(crate) fn new(frequencies: &[u16]) -> Option<Table> {
        let sum: u32 = frequencies.iter().map(|f| u32::from(*f)).sum();
        if frequencies.is_empty() || frequencies.len() > MAX_SYMBOLS || sum != FREQUENCY_SUM {
            return None;
        }
        let mut intervals = Vec::with_capacity(frequencies.len());
        let mut slots = Vec::with_capacity(FREQUENCY_SUM as usize);
        for (symbol, frequency) in frequencies.iter().enumerate() {
            intervals.push((slots.len() as u16, *frequency));
            let entry = (symbol as u32) << 24 | u32::from(frequency.saturating_sub(1)) << 12;
            slots.extend((0..u32::from(*frequency)).map(|place| entry | place));
        }
        Some(Table { intervals, slots })
    }

    /// Whether a symbol can be coded.
    pub(crate) fn has(&self, symbol: usize) -> bool {
        self.intervals
            .get(symbol)
            .is_some_and(|(_, frequency)| *frequency > 0)
    }

    /// The most frequent symbol: what stands in the stream where an exception replaces it.
    pub(crate) fn likeliest(&self) -> u8 {
        let mut best = 0;
        for (symbol, (_, frequency)) in self.intervals.iter().enumerate() {
            if *frequency > self.intervals[best].1 {
                best = symbol;
            }
        }
        best as u8
    }
}

/// J: the largest power of two that gives every lane sixteen positions, between 1 and 32.
pub(crate) fn lanes(positions: usize) -> usize {
    let most = (positions / POSITIONS_PER_LANE).clamp(1, MAX_LANES);
    1 << most.ilog2()
}

/// Codes symbols \[n·C\], row-major, all of which have a frequency: the states of the lanes (u32 each), then words (u16).
pub(crate) fn encode(symbols: &[u8], tables: &[Table]) -> Vec<u8> {
    let columns = tables.len();
    let positions = symbols.len() / columns.max(1);
    let lanes = lanes(positions);
    let mut states = [LOWEST; MAX_LANES];
    let mut words: Vec<u16> = Vec::with_capacity(symbols.len() / 4);
    // The decoder's way backwards.
    for block in (0..positions.div_ceil(lanes)).rev() {
        let first = block * lanes;
        let here = lanes.min(positions - first);
        for column in (0..columns).rev() {
            let intervals = &tables[column].intervals;
            for lane in (0..here).rev() {
                let symbol = symbols[(first + lane) * columns + column];
                let (start, frequency) = intervals[usize::from(symbol)];
                let (start, frequency) = (u32::from(start), u32::from(frequency));
                let state = &mut states[lane];
                if u64::from(*state) >= u64::from(frequency) << (32 - FREQUENCY_BITS) {
                    words.push(*state as u16);
                    *state >>= 16;
                }
                *state = (*state / frequency) << FREQUENCY_BITS | (*state % frequency + start);
            }
        }
    }
    let mut bytes: Vec<u8> = states[..lanes]
        .iter()
        .flat_map(|state| state.to_le_bytes())
        .collect();
    bytes.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    bytes
}

/// Decodes n positions from the whole of `bytes` into `symbols` \[n·C\].
pub(crate) fn decode(
    bytes: &[u8],
    positions: usize,
    tables: &[Table],
    symbols: &mut Vec<u8>,
) -> Result<(), Fault> {
    let columns = tables.len();
    let lanes = lanes(positions);
    let Some((starts, words)) = bytes.split_at_checked(4 * lanes) else {
        return damaged("the coded symbols are shorter than the states of their lanes");
    };
    let mut states = [LOWEST; MAX_LANES];
    for (state, start) in states.iter_mut().zip(starts.chunks_exact(4)) {
        *state = u32::from_le_bytes([start[0], start[1], start[2], start[3]]);
    }
    let (words, odd) = words.as_chunks::<2>();
    if !odd.is_empty() {
        return damaged("the coded symbols end within a word");
    }
    let mut words = words.iter();
    symbols.clear();
    symbols.resize(positions * columns, 0);
    for (block, rows) in symbols.chunks_mut((lanes * columns).max(1)).enumerate() {
        let here = lanes.min(positions - block * lanes);
        for (column, table) in tables.iter().enumerate() {
            let slots = &table.slots[..FREQUENCY_SUM as usize];
            for (lane, state) in states[..here].iter_mut().enumerate() {
                let slot = slots[(*state & (FREQUENCY_SUM - 1)) as usize];
                rows[lane * columns + column] = (slot >> 24) as u8;
                let frequency = (slot >> 12 & (FREQUENCY_SUM - 1)) + 1;
                // At most 2¹² · (2²⁰ − 1) + 2¹² − 1, so no overflow whatever the bytes say.
                let next = frequency * (*state >> FREQUENCY_BITS) + (slot & (FREQUENCY_SUM - 1));
                *state = if next < LOWEST {
                    match words.next() {
                        Some(word) => next << 16 | u32::from(u16::from_le_bytes(*word)),
                        None => return damaged("the coded symbols end early"),
                    }
                } else {
                    next
                };
            }
        }
    }
    if states[..lanes].iter().any(|state| *state != LOWEST) || words.next().is_some() {
        return damaged("the coded symbols do not end where they should");
    }
    Ok(())
}

/// One coded stream of a payload: its length (u32), then its bytes.
pub(crate) fn take<'a>(payload: &mut Payload<'a>) -> Result<&'a [u8], Fault> {
    let length = payload.word()? as usize;
    payload.take(length)
}

/// Frequencies for counted symbols: proportional, at least 1 wherever `keep` says so, the sum exactly 2¹². What rounding
/// leaves over goes to the symbols that gain most by it.
pub(crate) fn frequencies(counts: &[f64]) -> Vec<u16> {
    let total: f64 = counts.iter().sum();
    let share = |count: f64| count / total * f64::from(FREQUENCY_SUM);
    let mut whole: Vec<u16> = counts
        .iter()
        .map(|count| {
            if *count > 0.0 {
                share(*count).round().max(1.0) as u16
            } else {
                0
            }
        })
        .collect();
    loop {
        let sum: i64 = whole.iter().map(|f| i64::from(*f)).sum();
        let missing = i64::from(FREQUENCY_SUM) - sum;
        if missing == 0 {
            return whole;
        }
        // The change of Σ count · log₂ frequency by one step up or down.
        let gain = |index: usize| {
            let frequency = f64::from(whole[index]);
            let next = if missing > 0 {
                frequency + 1.0
            } else {
                frequency - 1.0
            };
            counts[index] * (next / frequency).ln()
        };
        let best = (0..whole.len())
            .filter(|index| whole[*index] > u16::from(missing < 0))
            .max_by(|a, b| gain(*a).total_cmp(&gain(*b)).then(b.cmp(a)));
        match best {
            Some(index) if missing > 0 => whole[index] += 1,
            Some(index) => whole[index] -= 1,
            None => return whole,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(state: &mut u64) -> u64 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *state >> 33
    }

    fn tables() -> Vec<Table> {
        let counts: [&[f64]; 4] = [
            &[1.0],
            &[1e6, 1.0, 1.0],
            &[3.0, 1.0, 0.0, 4.0, 1.0, 5.0, 9.0],
            &[1.0; 256],
        ];
        counts
            .iter()
            .map(|counts| Table::new(&frequencies(counts)).unwrap())
            .collect()
    }

    fn symbols(positions: usize, tables: &[Table], seed: u64) -> Vec<u8> {
        let mut state = seed;
        (0..positions)
            .flat_map(|_| {
                tables
                    .iter()
                    .map(|table| (table.slots[(noise(&mut state) & 4095) as usize] >> 24) as u8)
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn symbols_come_back_whatever_their_number() {
        let tables = tables();
        for positions in [1, 2, 15, 16, 31, 32, 33, 100, 511, 512, 1000] {
            let original = symbols(positions, &tables, positions as u64);
            let bytes = encode(&original, &tables);
            let mut decoded = Vec::new();
            decode(&bytes, positions, &tables, &mut decoded).unwrap();
            assert_eq!(original, decoded, "{positions}");
        }
    }

    #[test]
    fn a_coded_stream_costs_its_entropy() {
        let tables = tables();
        let original = symbols(4096, &tables, 5);
        let ideal: f64 = original
            .chunks_exact(4)
            .flat_map(|row| row.iter().zip(&tables))
            .map(|(symbol, table)| 12.0 - f64::from(table.intervals[usize::from(*symbol)].1).log2())
            .sum::<f64>()
            / 8.0;
        let bytes = encode(&original, &tables).len() as f64;
        assert!(bytes < ideal * 1.002 + 4.0 * 32.0, "{bytes} for {ideal}");
    }

    #[test]
    fn damaged_streams_are_refused() {
        let tables = tables();
        let bytes = encode(&symbols(200, &tables, 9), &tables);
        let mut decoded = Vec::new();
        for at in 0..bytes.len() {
            assert!(decode(&bytes[..at], 200, &tables, &mut decoded).is_err());
            // A flipped bit may end well with other symbols: that is for the blob's checksum to find.
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            let _ = decode(&bad, 200, &tables, &mut decoded);
        }
        let longer = [bytes.as_slice(), &[0, 0]].concat();
        assert!(decode(&longer, 200, &tables, &mut decoded).is_err());
    }

    #[test]
    fn frequencies_add_up() {
        for counts in [
            vec![1.0; 7],
            vec![1e9, 1e-3, 0.0, 5.0],
            vec![0.5],
            (1..=256).map(f64::from).collect(),
        ] {
            let whole = frequencies(&counts);
            assert_eq!(
                whole.iter().map(|f| u32::from(*f)).sum::<u32>(),
                FREQUENCY_SUM
            );
            assert!(
                whole
                    .iter()
                    .zip(&counts)
                    .all(|(f, c)| (*f > 0) == (*c > 0.0))
            );
        }
        assert!(
            Table::new(&[]).is_none()
                && Table::new(&[4095]).is_none()
                && Table::new(&[16; 257]).is_none()
        );
    }
}
