//! Blobs and bases that nobody wrote.

use bytes::Bytes;
use twox_hash::XxHash3_64;

use super::basis::Basis;
use super::{BasisParts, SymbolCounts, coefficients, ranked};
use crate::frame::{Decoder, Encoder};
use crate::fuzz::{Noise, mutate};
use crate::sequence::{Coefficients, TopK};
use crate::spec::BasisInfo;

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

pub(crate) fn basis() -> Basis {
    // Fitted on half, so that the rest makes exceptions.
    let counts = SymbolCounts::of(&levels().levels[..60], RANK, &top_k(), VOCABULARY);
    let parts = BasisParts {
        tail_shift: 0.0,
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
        let checksum = XxHash3_64::oneshot(&blob[8..]);
        blob[..8].copy_from_slice(&checksum.to_le_bytes());
    }
    let blobs = std::iter::once(blob.as_slice());
    let decoder = Decoder::new().unwrap();
    if of_top_k {
        let mut found = TopK::default();
        ranked::decode(&decoder, blobs, basis, &[9.0; POSITIONS], &mut found).ok()?;
        assert!(found.ids.iter().all(|id| (*id as usize) < VOCABULARY));
        Some(found.logits.len())
    } else {
        Some(
            coefficients::decode(&decoder, blobs, basis, POSITIONS)
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
    let decoder = Decoder::new().unwrap();
    let blobs = std::iter::once(blob.as_slice());
    let found = coefficients::decode(&decoder, blobs, &basis, POSITIONS).unwrap();
    assert_eq!(found, levels());
    let blob = sound(&basis, true);
    let blobs = std::iter::once(blob.as_slice());
    let mut found = TopK::default();
    ranked::decode(&decoder, blobs, &basis, &[9.0; POSITIONS], &mut found).unwrap();
    assert_eq!(found, top_k());
}

/// Changes the blob that `of_top_k` chooses and decodes it; the bytes it had.
pub(crate) fn forge_blob(basis: &Basis, noise: &mut Noise) -> usize {
    let of_top_k = noise.below(2) == 0;
    let mut blob = sound(basis, of_top_k);
    mutate(&mut blob, noise);
    let given = blob.len();
    if let Some(values) = decode(basis, of_top_k, blob) {
        assert_eq!(values, POSITIONS * RANK.max(K));
    }
    given
}

/// Changes a basis's file; what is accepted codes and decodes.
pub(crate) fn forge_basis(file: &[u8], info: &BasisInfo, noise: &mut Noise) -> usize {
    let mut file = file.to_vec();
    mutate(&mut file, noise);
    let given = file.len();
    if let Ok(basis) = Basis::parse(info, &Bytes::from(file), 5, VOCABULARY, K) {
        let blob = sound(&basis, false);
        let blobs = std::iter::once(blob.as_slice());
        let found = coefficients::decode(&Decoder::new().unwrap(), blobs, &basis, POSITIONS);
        assert_eq!(found.unwrap(), levels());
    }
    given
}
