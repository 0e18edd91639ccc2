//! Which sequences a run sees, and in which order: a pure function of (seed, epoch, rows), whatever
//! the threads do. The state of a run is therefore one integer, its step.

use caskd_formats::RowInfo;
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
    /// Takes the rows that have a target and whose hash falls into the fraction.
    pub(crate) fn new(
        rows: Vec<RowInfo>,
        config: &crate::TrainConfig,
    ) -> Result<Order> {
        let total = rows.len();
        let limit = (config.fraction * 2f64.powi(64)) as u128;
        let rows: Vec<RowInfo> =
            rows.into_iter().filter(|row| u128::from(row.split_hash) < limit && row.targets > 0).collect();
        if rows.is_empty() {
            let reason = format!("none of {total} has a target and falls into the fraction {}", config.fraction);
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
        self.rows.len().div_ceil(self.batch_size).div_ceil(self.gradient_accumulation) as u64
    }

    /// Batches of each of the steps `from..to`; the last step of an epoch may have fewer.
    pub(crate) fn batches_per_step(&self, from: u64, to: u64) -> Vec<usize> {
        let batches = self.rows.len().div_ceil(self.batch_size);
        let first = |step: u64| (step % self.steps_per_epoch()) as usize * self.gradient_accumulation;
        (from..to).map(|step| (batches - first(step)).min(self.gradient_accumulation)).collect()
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
