//! A Sobol sequence with Owen scrambling (Sobol 1967; Joe and Kuo 2008; Laine and Karras 2011).

use super::{Sampler, Suggestion, Tried};
use crate::config::StudyConfig;
use crate::error::Result;
use crate::rng::{Rng, Stream, splitmix64};
use crate::view::Why;

/// Points of the sequence that may be passed over because they were tried or are forbidden.
const MAX_SKIPPED: u64 = 1 << 14;

/// Dimensions beyond this are filled with independent random numbers.
pub(super) const MAX_DIMENSIONS: usize = 32;

impl Sampler {
    /// The first point of the study's scrambled sequence that was not tried yet.
    pub(super) fn sobol(
        &self,
        config: &StudyConfig,
        number: u64,
        tried: &Tried,
        by: &str,
    ) -> Result<Suggestion> {
        let dimensions = self.space.parameters().len();
        for index in 0..number + MAX_SKIPPED {
            let unit = scrambled(index, dimensions, config.seed, Stream::Sobol, 0);
            let point = self.space.point_at(&unit);
            if !self.space.is_forbidden(&point) && !tried.contains(&point) {
                return Ok(Suggestion {
                    point,
                    why: Why {
                        by: by.to_owned(),
                        ..Why::default()
                    },
                });
            }
        }
        self.random(config, number, tried)
    }
}

/// Point `index` of the sequence scrambled for (seed, stream, number), in `[0, 1)^dimensions`.
pub(crate) fn scrambled(
    index: u64,
    dimensions: usize,
    seed: u64,
    stream: Stream,
    number: u64,
) -> Vec<f64> {
    let mut keys = Rng::new(seed, stream, number);
    (0..dimensions)
        .map(|dimension| {
            let key = keys.next_u64();
            let bits = if dimension < MAX_DIMENSIONS {
                owen(sobol(index as u32, dimension), key as u32)
            } else {
                (splitmix64(key ^ index) >> 32) as u32
            };
            f64::from(bits) / 2f64.powi(32)
        })
        .collect()
}

/// Nested uniform scrambling of one coordinate, by Laine and Karras's hash on the reversed bits.
fn owen(bits: u32, key: u32) -> u32 {
    let mut x = bits.reverse_bits();
    x = x.wrapping_add(key);
    x ^= x.wrapping_mul(0x6c50_b47c);
    x ^= x.wrapping_mul(0xb82f_1e52);
    x ^= x.wrapping_mul(0xc7af_e638);
    x ^= x.wrapping_mul(0x8d22_f6e6);
    x.reverse_bits()
}

/// One coordinate of the unscrambled sequence in Gray-code order, as a 32-bit fraction.
fn sobol(index: u32, dimension: usize) -> u32 {
    let mut gray = index ^ (index >> 1);
    let mut bits = 0;
    let directions = directions(dimension);
    for direction in directions {
        if gray == 0 {
            break;
        }
        if gray & 1 == 1 {
            bits ^= direction;
        }
        gray >>= 1;
    }
    bits
}

fn directions(dimension: usize) -> [u32; 32] {
    let mut v = [0u32; 32];
    if dimension == 0 {
        for (i, direction) in v.iter_mut().enumerate() {
            *direction = 1 << (31 - i);
        }
        return v;
    }
    let (polynomial, initial) = PRIMITIVE[dimension - 1];
    let degree = initial.len();
    for i in 0..32 {
        v[i] = if i < degree {
            initial[i] << (31 - i)
        } else {
            let mut next = v[i - degree] ^ (v[i - degree] >> degree);
            for k in 1..degree {
                if (polynomial >> (degree - k)) & 1 == 1 {
                    next ^= v[i - k];
                }
            }
            next
        };
    }
    v
}

/// Primitive polynomials (all coefficients as bits) and initial direction numbers of dimensions 1…31: Joe and Kuo's
/// `new-joe-kuo-6` set.
const PRIMITIVE: [(u32, &[u32]); MAX_DIMENSIONS - 1] = [
    (3, &[1]),
    (7, &[1, 3]),
    (11, &[1, 3, 1]),
    (13, &[1, 1, 1]),
    (19, &[1, 1, 3, 3]),
    (25, &[1, 3, 5, 13]),
    (37, &[1, 1, 5, 5, 17]),
    (41, &[1, 1, 5, 5, 5]),
    (47, &[1, 1, 7, 11, 19]),
    (55, &[1, 1, 5, 1, 1]),
    (59, &[1, 1, 1, 3, 11]),
    (61, &[1, 3, 5, 5, 31]),
    (67, &[1, 3, 3, 9, 7, 49]),
    (91, &[1, 1, 1, 15, 21, 21]),
    (97, &[1, 3, 1, 13, 27, 49]),
    (103, &[1, 1, 1, 15, 7, 5]),
    (109, &[1, 3, 1, 15, 13, 25]),
    (115, &[1, 1, 5, 5, 19, 61]),
    (131, &[1, 3, 7, 11, 23, 15, 103]),
    (137, &[1, 3, 7, 13, 13, 15, 69]),
    (143, &[1, 1, 3, 13, 7, 35, 63]),
    (145, &[1, 3, 5, 9, 1, 25, 53]),
    (157, &[1, 3, 1, 13, 9, 35, 107]),
    (167, &[1, 3, 1, 5, 27, 61, 31]),
    (171, &[1, 1, 5, 11, 19, 41, 61]),
    (185, &[1, 3, 5, 3, 3, 13, 69]),
    (191, &[1, 1, 7, 13, 1, 19, 1]),
    (193, &[1, 3, 7, 5, 13, 19, 59]),
    (203, &[1, 1, 3, 9, 25, 29, 41]),
    (211, &[1, 3, 5, 13, 23, 1, 55]),
    (213, &[1, 3, 7, 3, 13, 59, 17]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_scipy() {
        // scipy.stats.qmc.Sobol(32, scramble=False, bits=30).random(1024)[777]
        // In units of 1/1024.
        let expected = [
            709, 959, 167, 281, 651, 365, 195, 781, 357, 331, 763, 713, 393, 485, 583, 527, 413,
            885, 379, 771, 243, 279, 969, 493, 353, 149, 61, 799, 65, 113, 555, 921,
        ];
        for (dimension, want) in expected.into_iter().enumerate() {
            assert_eq!(
                f64::from(sobol(777, dimension)) / 2f64.powi(32),
                f64::from(want) / 1024.0,
                "dimension {dimension}"
            );
        }
    }

    #[test]
    fn scrambling_keeps_the_stratification() {
        for dimensions in [1, 7, 20] {
            for dimension in 0..dimensions {
                let mut cells = [0; 64];
                for index in 0..64 {
                    let unit = scrambled(index, dimensions, 5, Stream::Sobol, 3);
                    cells[(unit[dimension] * 64.0) as usize] += 1;
                }
                assert_eq!(cells, [1; 64]);
            }
        }
    }
}
