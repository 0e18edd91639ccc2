//! Blobs and bases that nobody wrote.

use bytes::Bytes;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::basis::Basis;
use super::{BasisParts, SymbolCounts, coefficients, ranked};
use crate::frame::Encoder;
use crate::sequence::{Coefficients, TopK};

const POSITIONS: usize = 40;
const RANK: usize = 3;
const K: usize = 3;
const VOCABULARY: usize = 300;

fn levels() -> Coefficients {
    Coefficients {
        rank: RANK,
        levels: (0..(POSITIONS * RANK) as i32)
            .map(|index| {
                (index * index * 37 % 401 - 200) as i16 * [100, 1, 0][index as usize % RANK]
            })
            .collect(),
    }
}

fn top_k() -> TopK {
    TopK {
        k: K,
        ids: (0..(POSITIONS * K) as u32)
            .map(|index| index * 7 % VOCABULARY as u32)
            .collect(),
        logits: (0..POSITIONS)
            .flat_map(|t| [9.0, 8.5, 8.5 - t as f32])
            .collect(),
    }
}

fn basis() -> Basis {
    // Fitted on half, so that the rest makes exceptions.
    let counts = SymbolCounts::of(&levels().levels[..60], RANK, &top_k(), VOCABULARY);
    let parts = BasisParts {
        mean: vec![0.0; 5],
        analysis: vec![0.5; 5 * RANK],
        synthesis: vec![0.5; 5 * RANK],
    };
    Basis::new(parts, &counts).unwrap()
}

/// A sound blob of each codec.
fn sound(basis: &Basis, of_top_k: bool) -> Vec<u8> {
    let mut encoder = Encoder::new().unwrap();
    let mut blobs = if of_top_k {
        ranked::encode(&mut encoder, basis, &top_k())
    } else {
        coefficients::encode(&mut encoder, basis, &levels())
    };
    assert_eq!(blobs.len(), 1);
    blobs.remove(0)
}

/// Decodes with the checksum repaired, as if by an attacker.
fn decode(basis: &Basis, of_top_k: bool, mut blob: Vec<u8>) -> Option<usize> {
    if blob.len() >= 8 {
        let checksum = xxh3_64(&blob[8..]);
        blob[..8].copy_from_slice(&checksum.to_le_bytes());
    }
    let blobs = std::iter::once(blob.as_slice());
    if of_top_k {
        let found = ranked::decode(blobs, basis, &[9.0; POSITIONS]).ok()?;
        assert!(found.ids.iter().all(|id| (*id as usize) < VOCABULARY));
        Some(found.logits.len())
    } else {
        Some(
            coefficients::decode(blobs, basis, POSITIONS)
                .ok()?
                .levels
                .len(),
        )
    }
}

#[test]
fn blobs_come_back() {
    let basis = basis();
    let blob = sound(&basis, false);
    let found = coefficients::decode(std::iter::once(blob.as_slice()), &basis, POSITIONS).unwrap();
    assert_eq!(found, levels());
    let blob = sound(&basis, true);
    let found =
        ranked::decode(std::iter::once(blob.as_slice()), &basis, &[9.0; POSITIONS]).unwrap();
    assert_eq!(found, top_k());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn forged_blobs_never_panic(
        of_top_k in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let basis = basis();
        let mut blob = sound(&basis, of_top_k);
        for (at, byte) in edits {
            let at = at.index(blob.len());
            blob[at] = byte;
        }
        if let Some(cut) = cut {
            blob.truncate(cut.index(blob.len()));
        }
        if let Some(values) = decode(&basis, of_top_k, blob) {
            prop_assert_eq!(values, POSITIONS * RANK.max(K));
        }
    }

    #[test]
    fn forged_bases_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let (mut file, info) = basis().to_file();
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(basis) = Basis::parse(&info, &Bytes::from(file), 5, VOCABULARY, K) {
            // Whatever is accepted codes and decodes.
            let blob = sound(&basis, false);
            let found = coefficients::decode(std::iter::once(blob.as_slice()), &basis, POSITIONS);
            prop_assert_eq!(found.unwrap(), levels());
        }
    }
}
