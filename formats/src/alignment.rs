//! Whether logits and labels belong together: the commonest mistake of a teacher cache is an offset of one.
//!
//! Logits at position t predict token t + 1. If they do, the log-probability of that token is larger on average than
//! that of the token one before or behind. Importers run this over what they read; `verify` runs it in its deep form.

use serde::Serialize;

use crate::sequence::Sequence;

/// Tried offsets of the label beside the right one, 0: the logits at position t are scored against token t + 1 + offset.
pub const OFFSETS: [i64; 4] = [0, -1, 1, 2];

/// Fewer positions than this say nothing.
const FEWEST: u64 = 64;

/// A difference below this many standard errors says nothing.
const STANDARD_ERRORS: f64 = 5.0;

/// What the offsets score.
#[derive(Serialize, Clone, Debug, PartialEq)]
pub struct Alignment {
    /// Positions that were scored.
    pub positions: u64,
    /// Mean log-probability of the label at each of [`OFFSETS`], in nats; a label that the top-k does not hold counts
    /// as its last entry.
    pub mean_log_probability: [f64; 4],
    /// The offset that is clearly better than 0; 0 if none is.
    pub best_offset: i64,
}

/// Sums up log-probabilities of labels at several offsets.
#[derive(Clone, Debug, Default)]
pub struct AlignmentCheck {
    positions: u64,
    sums: [f64; 4],
    /// Of the differences to offset 0.
    squares: [f64; 4],
}

impl AlignmentCheck {
    /// Adds the positions of a sequence whose label exists at every offset; needs its statistics and top-k.
    pub fn add(&mut self, sequence: &Sequence) {
        let (Some(statistics), Some(top_k)) = (&sequence.statistics, &sequence.top_k) else {
            return;
        };
        let tokens = &sequence.token_ids;
        for position in 0..tokens.len().saturating_sub(3) {
            let entries = position * top_k.k..(position + 1) * top_k.k;
            let (Some(ids), Some(logits), Some(log_sum_exp)) = (
                top_k.ids.get(entries.clone()),
                top_k.logits.get(entries),
                statistics.log_sum_exp.get(position),
            ) else {
                return;
            };
            // A flat row ranks no label; importers fill positions with one where they know nothing.
            if logits.len() > 1 && logits.first() == logits.last() {
                continue;
            }
            let scores = OFFSETS.map(|offset| {
                let label = tokens[(position as i64 + 1 + offset) as usize];
                let rank = ids.iter().position(|id| *id == label);
                let logit = logits[rank.unwrap_or(logits.len() - 1)];
                f64::from((logit - log_sum_exp).max(-1e4))
            });
            for ((sum, square), score) in self.sums.iter_mut().zip(&mut self.squares).zip(scores) {
                *sum += score;
                *square += (score - scores[0]) * (score - scores[0]);
            }
            self.positions += 1;
        }
    }

    /// Positions scored so far.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// The verdict; `None` where there is too little to judge by.
    pub fn finish(&self) -> Option<Alignment> {
        if self.positions < FEWEST {
            return None;
        }
        let count = self.positions as f64;
        let mean_log_probability = self.sums.map(|sum| sum / count);
        let gain = |at: usize| mean_log_probability[at] - mean_log_probability[0];
        let is_clear = |at: &usize| {
            let variance = (self.squares[*at] / count - gain(*at) * gain(*at)).max(0.0);
            gain(*at) > STANDARD_ERRORS * (variance / count).sqrt() && gain(*at) > 1e-6
        };
        let best = (1..OFFSETS.len())
            .filter(is_clear)
            .max_by(|a, b| gain(*a).total_cmp(&gain(*b)));
        Some(Alignment {
            positions: self.positions,
            mean_log_probability,
            best_offset: best.map_or(0, |at| OFFSETS[at]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::Noise;
    use crate::sequence::{Statistics, TopK};

    /// A teacher that mostly knows the token at `position + 1 + offset`, and often repeats itself.
    fn taught(offset: i64, noise: &mut Noise) -> Sequence {
        let tokens: Vec<u32> = (0..50).map(|_| noise.below(9) as u32).collect();
        let (mut ids, mut logits) = (Vec::new(), Vec::new());
        for position in 0..50_i64 {
            let known = tokens.get((position + 1 + offset) as usize).copied();
            let first = match known {
                Some(token) if noise.below(3) > 0 => token,
                _ => noise.below(9) as u32,
            };
            ids.extend([first, (first + 1) % 9, (first + 4) % 9]);
            logits.extend([3.0, 1.0, 0.5]);
        }
        Sequence {
            token_ids: tokens,
            statistics: Some(Statistics {
                log_sum_exp: vec![3.4; 50],
                ..Statistics::default()
            }),
            top_k: Some(TopK { k: 3, ids, logits }),
            ..Sequence::default()
        }
    }

    #[test]
    fn labels_off_by_some_tokens_are_noticed() {
        let mut noise = Noise(3);
        for offset in OFFSETS {
            let mut check = AlignmentCheck::default();
            check.add(&taught(offset, &mut noise));
            assert_eq!(check.finish(), None, "47 positions are too few");
            for _ in 0..20 {
                check.add(&taught(offset, &mut noise));
            }
            let verdict = check.finish().unwrap();
            assert_eq!(verdict.best_offset, offset, "{verdict:?}");
        }
    }

    #[test]
    fn a_teacher_that_knows_nothing_is_not_accused() {
        let mut noise = Noise(4);
        let mut check = AlignmentCheck::default();
        for _ in 0..40 {
            let mut sequence = taught(0, &mut noise);
            for token in &mut sequence.token_ids {
                *token = noise.below(9) as u32;
            }
            check.add(&sequence);
        }
        assert_eq!(check.finish().unwrap().best_offset, 0);
    }
}
