//! The one random generator of the crate: counter-based, so that the n-th value of a stream is a
//! pure function of (seed, stream, n) and a resumed run needs no generator state.

/// SplitMix64 (Steele, Lea, Flood 2014) over a counter.
///
/// ```
/// let mut a = caskd_models::SeededRng::new(7);
/// let mut b = caskd_models::SeededRng::new(7);
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
#[derive(Debug, Clone)]
pub struct SeededRng {
    key: u64,
    counter: u64,
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl SeededRng {
    /// The main stream of `seed`.
    pub fn new(seed: u64) -> SeededRng {
        SeededRng {
            key: mix(seed.wrapping_add(GOLDEN_GAMMA)),
            counter: 0,
        }
    }

    /// An independent stream of `seed` for a name: what is drawn for one tensor does not depend on
    /// how many were drawn before.
    pub fn named(seed: u64, name: &str) -> SeededRng {
        let digest = blake3::hash(name.as_bytes());
        let mut word = [0u8; 8];
        word.copy_from_slice(&digest.as_bytes()[..8]);
        SeededRng {
            key: mix(mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ u64::from_le_bytes(word)),
            counter: 0,
        }
    }

    /// 64 uniform bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        mix(self
            .key
            .wrapping_add(self.counter.wrapping_mul(GOLDEN_GAMMA)))
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform integer below `n` (`n` > 0), by multiplication (bias below n / 2⁶⁴).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal value (Box–Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Fisher–Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

/// The finaliser of SplitMix64: a bijection of 64-bit words.
#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_differ() {
        let draw = |mut rng: SeededRng| (0..4).map(|_| rng.next_u64()).collect::<Vec<_>>();
        assert_eq!(
            draw(SeededRng::named(1, "a")),
            draw(SeededRng::named(1, "a"))
        );
        assert_ne!(
            draw(SeededRng::named(1, "a")),
            draw(SeededRng::named(1, "b"))
        );
        assert_ne!(
            draw(SeededRng::named(1, "a")),
            draw(SeededRng::named(2, "a"))
        );
        assert_ne!(draw(SeededRng::new(1)), draw(SeededRng::new(2)));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut rng = SeededRng::new(3);
        let n = 100_000;
        let uniform: f64 = (0..n).map(|_| rng.uniform()).sum::<f64>() / f64::from(n);
        let square: f64 = (0..n).map(|_| rng.normal().powi(2)).sum::<f64>() / f64::from(n);
        assert!((uniform - 0.5).abs() < 5e-3, "{uniform}");
        assert!((square - 1.0).abs() < 2e-2, "{square}");
    }

    #[test]
    fn shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..50).collect();
        SeededRng::new(9).shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
