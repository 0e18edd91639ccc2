//! What is kept of positions whose whole vocabulary is at hand.

use caskd_formats::{Statistics, TopK};

use crate::statistics::summarize_logits;

/// What is kept of rows of a whole vocabulary.
pub(crate) struct Whole {
    pub(crate) statistics: Statistics,
    pub(crate) top_k: TopK,
    /// The largest |ln Σ exp| of the rows looked at, as they were given.
    pub(crate) log_mass: f32,
}

impl Whole {
    pub(crate) fn new(k: usize) -> Self {
        Self {
            statistics: Statistics::default(),
            top_k: TopK {
                k,
                ..TopK::default()
            },
            log_mass: 0.0,
        }
    }

    /// Adds rows [N, V] that were given at `temperature`; on failure the row and what is wrong with it. The first
    /// `looked_at` rows tell whether they are log-probabilities.
    pub(crate) fn add(
        &mut self,
        values: &mut [f32],
        vocab_size: usize,
        temperature: f32,
        looked_at: usize,
    ) -> std::result::Result<(), (usize, String)> {
        for row in values.chunks_exact(vocab_size).take(looked_at) {
            self.log_mass = self.log_mass.max(log_sum_exp(row).abs());
        }
        if temperature != 1.0 {
            for value in &mut *values {
                *value *= temperature;
            }
        }
        let before = self.statistics.mean.len();
        if summarize_logits(values, vocab_size, &mut self.statistics, &mut self.top_k).is_ok() {
            return Ok(());
        }
        // Some row is not finite: go through them one by one.
        cut_back(&mut self.statistics, &mut self.top_k, before);
        for (index, row) in values.chunks_exact_mut(vocab_size).enumerate() {
            self.add_row(row).map_err(|problem| (index, problem))?;
        }
        Ok(())
    }

    /// A row that may hold −inf: models give it to tokens that they never say.
    fn add_row(&mut self, row: &mut [f32]) -> std::result::Result<(), String> {
        if let Some(id) = row
            .iter()
            .position(|value| value.is_nan() || *value == f32::INFINITY)
        {
            return Err(format!("the value of token {id} is {}", row[id]));
        }
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            return Err("every value is -inf".to_owned());
        }
        let mut without = 0;
        for value in row.iter_mut().filter(|value| **value == f32::NEG_INFINITY) {
            // Far enough below for a probability of exactly 0.
            *value = max - 1e6;
            without += 1;
        }
        let at = self.statistics.mean.len();
        summarize_logits(row, row.len(), &mut self.statistics, &mut self.top_k)
            .map_err(|_| "a value is not finite".to_owned())?;
        if without > 0 {
            self.statistics.mean[at] = f32::NEG_INFINITY;
            self.statistics.std[at] = f32::INFINITY;
            self.statistics.min[at] = f32::NEG_INFINITY;
            let entries = &mut self.top_k.logits[at * self.top_k.k..];
            for logit in entries.iter_mut().filter(|logit| **logit < max - 9e5) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}

fn cut_back(statistics: &mut Statistics, top_k: &mut TopK, rows: usize) {
    statistics.mean.truncate(rows);
    statistics.std.truncate(rows);
    statistics.min.truncate(rows);
    statistics.max.truncate(rows);
    statistics.log_sum_exp.truncate(rows);
    top_k.ids.truncate(rows * top_k.k);
    top_k.logits.truncate(rows * top_k.k);
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|value| f64::from(value - max).exp()).sum();
    (f64::from(max) + sum.ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minus_infinity_is_kept_and_nan_refused() {
        let mut whole = Whole::new(3);
        let mut rows = [
            1.0,
            f32::NEG_INFINITY,
            0.0,
            f32::NEG_INFINITY,
            2.0,
            1.0,
            0.5,
            0.0,
        ];
        whole.add(&mut rows, 4, 1.0, 2).unwrap();
        assert_eq!(whole.top_k.ids[..2], [0, 2]);
        assert_eq!(whole.top_k.logits[2], f32::NEG_INFINITY);
        assert_eq!(
            (whole.statistics.min[0], whole.statistics.mean[1]),
            (f32::NEG_INFINITY, 0.875)
        );
        let expected = (1f64.exp() + 1.0).ln() as f32;
        assert!((whole.statistics.log_sum_exp[0] - expected).abs() < 1e-6);
        let mut bad = [0.0, 1.0, f32::NAN, 1.0];
        assert_eq!(
            Whole::new(1).add(&mut bad, 4, 1.0, 0).unwrap_err(),
            (0, "the value of token 2 is NaN".to_owned())
        );
        assert!(
            Whole::new(1)
                .add(&mut [f32::NEG_INFINITY; 4], 4, 1.0, 0)
                .is_err()
        );
    }

    #[test]
    fn another_temperature_gives_logits_up_to_a_constant() {
        let logits = [2.0f32, 0.5, -1.0, 0.0];
        let at_two: Vec<f32> = logits.iter().map(|logit| logit / 2.0).collect();
        let shift = log_sum_exp(&at_two);
        let mut given: Vec<f32> = at_two.iter().map(|logit| logit - shift).collect();
        let mut whole = Whole::new(4);
        whole.add(&mut given, 4, 2.0, 1).unwrap();
        assert!(whole.log_mass < 1e-6, "they were log-probabilities");
        for (logit, rank) in whole.top_k.logits.iter().zip([0, 1, 3, 2]) {
            let log_p = logit - whole.statistics.log_sum_exp[0];
            assert!((log_p - (logits[rank] - log_sum_exp(&logits))).abs() < 1e-5);
        }
    }
}
