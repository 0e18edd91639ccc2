//! Which sequences a run sees, and in which order: a pure function of (seed, epoch, rows), whatever
//! the threads do. The state of a run is therefore one integer, its step.

use caskd_formats::{DataInfo, RowInfo, in_fraction};
use caskd_models::SeededRng;

use crate::{Error, Result};

/// Batches among which sequences are sorted by length, to save padding.
const BATCHES_PER_WINDOW: usize = 16;

/// The rows of one run and how they are cut into steps.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    rows: Vec<RowInfo>,
    seed: u64,
    batch_size: usize,
    gradient_accumulation: usize,
}

impl Order {
    /// Takes the rows that have a target and whose hash falls into the fraction, but none of the validation split.
    pub(crate) fn new(
        rows: Vec<RowInfo>,
        data: &DataInfo,
        config: &crate::TrainConfig,
    ) -> Result<Order> {
        let total = rows.len();
        let rows: Vec<RowInfo> = rows
            .into_iter()
            .filter(|row| {
                row.targets > 0
                    && in_fraction(row.split_hash, config.fraction)
                    && !data.is_validation(row.split_hash)
            })
            .collect();
        if rows.is_empty() {
            let reason = format!(
                "none of {total} has a target and falls into the fraction {}",
                config.fraction
            );
            return Err(Error::NoSequences { reason });
        }
        Ok(Order {
            rows,
            seed: config.seed,
            batch_size: config.batch_size,
            gradient_accumulation: config.gradient_accumulation,
        })
    }

    /// Sequences per epoch.
    pub(crate) fn num_sequences(&self) -> usize {
        self.rows.len()
    }

    /// Optimizer steps per epoch.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.rows
            .len()
            .div_ceil(self.batch_size)
            .div_ceil(self.gradient_accumulation) as u64
    }

    /// Batches of each of the steps `from..to`; the last step of an epoch may have fewer.
    pub(crate) fn batches_per_step(&self, from: u64, to: u64) -> Vec<usize> {
        let batches = self.rows.len().div_ceil(self.batch_size);
        let first =
            |step: u64| (step % self.steps_per_epoch()) as usize * self.gradient_accumulation;
        (from..to)
            .map(|step| (batches - first(step)).min(self.gradient_accumulation))
            .collect()
    }

    /// The batches of every step from `step` on, without end: epoch after epoch.
    pub(crate) fn steps_from(self, step: u64) -> impl Iterator<Item = Vec<Vec<RowInfo>>> + Send {
        let per_epoch = self.steps_per_epoch();
        let mut current: Option<(u64, Vec<Vec<RowInfo>>)> = None;
        (step..).map(move |step| {
            let epoch = step / per_epoch;
            if current.as_ref().is_none_or(|(of, _)| *of != epoch) {
                current = Some((epoch, self.epoch(epoch)));
            }
            let batches = current.as_ref().map_or(&[][..], |(_, batches)| batches);
            let first = (step % per_epoch) as usize * self.gradient_accumulation;
            let last = (first + self.gradient_accumulation).min(batches.len());
            batches[first..last].to_vec()
        })
    }

    /// The batches of one epoch: a seeded shuffle; inside each window of batches sequences of like
    /// length come together; the batches of a window are shuffled again, so that length does not
    /// rise with the steps.
    pub(crate) fn epoch(&self, epoch: u64) -> Vec<Vec<RowInfo>> {
        let mut rng = SeededRng::named(self.seed, &format!("order of epoch {epoch}"));
        let mut shuffled: Vec<&RowInfo> = self.rows.iter().collect();
        rng.shuffle(&mut shuffled);
        let mut batches = Vec::new();
        for window in shuffled.chunks_mut(BATCHES_PER_WINDOW * self.batch_size) {
            window.sort_by_key(|row| row.positions);
            let mut of_window: Vec<Vec<RowInfo>> = window
                .chunks(self.batch_size)
                .map(|batch| batch.iter().map(|&row| row.clone()).collect())
                .collect();
            rng.shuffle(&mut of_window);
            batches.append(&mut of_window);
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::TrainConfig;

    fn rows(count: usize) -> Vec<RowInfo> {
        let mut rng = SeededRng::new(count as u64);
        (0..count as u32)
            .map(|row| RowInfo {
                shard: row / 7,
                row: row % 7,
                positions: 2 + rng.below(50) as u32,
                targets: 1,
                split_hash: rng.next_u64(),
                token_digest: [0; 32],
            })
            .collect()
    }

    proptest! {
        #[test]
        fn an_epoch_is_a_permutation_and_steps_resume_anywhere(
            count in 1usize..300,
            batch_size in 1usize..9,
            gradient_accumulation in 1usize..4,
            seed: u64,
            from in 0u64..40,
        ) {
            let config = TrainConfig { seed, batch_size, gradient_accumulation, ..TrainConfig::default() };
            let order = Order::new(rows(count), &DataInfo::default(), &config).unwrap();
            let epoch = order.epoch(1);
            let mut seen: Vec<(u32, u32)> = epoch.iter().flatten().map(|row| (row.shard, row.row)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, order.rows.iter().map(|row| (row.shard, row.row)).collect::<Vec<_>>());
            let short = epoch.iter().filter(|batch| batch.len() < batch_size).count();
            prop_assert!(short <= 1);

            let whole: Vec<_> = order.clone().steps_from(0).take(from as usize + 5).collect();
            let resumed: Vec<_> = order.clone().steps_from(from).take(5).collect();
            prop_assert_eq!(&whole[from as usize..], &resumed[..]);
            let sizes: Vec<usize> = whole.iter().map(Vec::len).collect();
            prop_assert_eq!(order.batches_per_step(0, from + 5), sizes);
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_lengths_come_together() {
        let order = |seed| {
            Order::new(
                rows(256),
                &DataInfo::default(),
                &TrainConfig {
                    seed,
                    ..TrainConfig::default()
                },
            )
            .unwrap()
        };
        assert_ne!(order(0).epoch(0), order(0).epoch(1));
        assert_ne!(order(0).epoch(0), order(1).epoch(0));
        let padded = |batch: &Vec<RowInfo>| {
            let longest = batch.iter().map(|row| row.positions).max().unwrap_or(0);
            u64::from(longest) * batch.len() as u64
        };
        let real: u64 = order(0)
            .rows
            .iter()
            .map(|row| u64::from(row.positions))
            .sum();
        let padded: u64 = order(0).epoch(0).iter().map(padded).sum();
        assert!(
            (padded as f64) < 1.1 * real as f64,
            "{padded} padded positions for {real}"
        );
    }

    #[test]
    fn a_fraction_lies_inside_a_larger_one() {
        let kept = |fraction| {
            let order = Order::new(
                rows(300),
                &DataInfo::default(),
                &TrainConfig {
                    fraction,
                    ..TrainConfig::default()
                },
            )
            .unwrap();
            order
                .rows
                .iter()
                .map(|row| (row.shard, row.row))
                .collect::<Vec<_>>()
        };
        let (small, large) = (kept(0.1), kept(0.5));
        assert!(small.iter().all(|row| large.contains(row)));
        assert!(
            (20..=40).contains(&small.len())
                && (120..=180).contains(&large.len())
                && kept(1.0).len() == 300
        );
        let none = Order::new(
            rows(3),
            &DataInfo::default(),
            &TrainConfig {
                fraction: 1e-9,
                ..TrainConfig::default()
            },
        );
        assert!(matches!(none, Err(Error::NoSequences { .. })));
    }

    #[test]
    fn the_validation_split_is_never_trained_on() {
        let mut data = DataInfo::default();
        data.preparation.validation_millionths = 200_000;
        let config = TrainConfig::default();
        let order = Order::new(rows(300), &data, &config).unwrap();
        let apart = rows(300)
            .iter()
            .filter(|row| row.split_hash >= u64::MAX / 5 * 4)
            .count();
        assert!((30..=90).contains(&apart), "{apart}");
        assert_eq!(order.num_sequences(), 300 - apart);
        assert!(order.rows.iter().all(|row| row.split_hash < u64::MAX / 5 * 4 + 5));
    }
}
