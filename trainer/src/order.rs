//! Which sequences a run sees, and in which order: a pure function of the seed, the epoch and the
//! sizes of the shards, whatever the threads do. The state of a run is therefore one integer, its step.
//!
//! A pass over a cache goes through its shards in a seeded order, a window of them at a time: the
//! sequences of a window are shuffled together, so that at most two windows of shards are open and
//! known of at once, however large the cache is. Inside a window, sequences of like length come
//! together. Of a cache with weight w an epoch takes w passes' worth of sequences, and goes on in
//! the next epoch where it ended; batches of several caches are dealt evenly over the epoch.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use caskd_formats::{RowInfo, in_fraction};
use caskd_models::SeededRng;

use crate::{Error, Result, TrainConfig};

/// Reads what is known of a shard's sequences.
pub(crate) type ReadShard = Arc<dyn Fn(u32) -> Result<Vec<RowInfo>> + Send + Sync>;

/// A sequence of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) shard: u32,
    /// In the shard.
    pub(crate) row: u32,
    /// T.
    pub(crate) positions: u32,
}

/// A batch that is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    /// The cache, as its place among those of the run.
    pub(crate) part: usize,
    pub(crate) rows: Vec<Entry>,
}

/// One cache of a run.
#[derive(Clone)]
pub(crate) struct Part {
    read: ReadShard,
    fraction: f64,
    /// Sequences of each shard that are trained on.
    kept: Vec<u64>,
    /// Sequences of one epoch.
    per_epoch: u64,
}

impl Part {
    /// Counts the sequences of `shards` shards that have a target and whose hash falls into the
    /// fraction; nothing else of them stays in memory.
    pub(crate) fn new(shards: u32, read: ReadShard, weight: f64, fraction: f64) -> Result<Part> {
        let mut part = Part {
            read,
            fraction,
            kept: Vec::new(),
            per_epoch: 0,
        };
        let mut total = 0;
        for shard in 0..shards {
            let rows = (part.read)(shard)?;
            total += rows.len();
            part.kept.push(part.of_use(rows).count() as u64);
        }
        if part.size() == 0 {
            let reason =
                format!("none of {total} has a target and falls into the fraction {fraction}");
            return Err(Error::NoSequences { reason });
        }
        part.per_epoch = ((part.size() as f64 * weight).round() as u64).max(1);
        Ok(part)
    }

    /// Sequences of one pass.
    fn size(&self) -> u64 {
        self.kept.iter().sum()
    }

    fn sequences_of(&self, shards: &[u32]) -> u64 {
        shards.iter().map(|&shard| self.kept[shard as usize]).sum()
    }

    fn of_use(&self, rows: Vec<RowInfo>) -> impl Iterator<Item = Entry> + use<> {
        let fraction = self.fraction;
        let kept = move |row: &RowInfo| row.targets > 0 && in_fraction(row.split_hash, fraction);
        rows.into_iter().filter(kept).map(|row| Entry {
            shard: row.shard,
            row: row.row,
            positions: row.positions,
        })
    }
}

/// How the sequences of a run are cut into steps.
#[derive(Clone)]
pub(crate) struct Order {
    parts: Vec<Part>,
    seed: u64,
    batch_size: u64,
    gradient_accumulation: u64,
    shuffle_shards: usize,
    bucket_batches: usize,
}

impl Order {
    pub(crate) fn new(parts: Vec<Part>, config: &TrainConfig) -> Order {
        Order {
            parts,
            seed: config.seed,
            batch_size: config.batch_size as u64,
            gradient_accumulation: config.gradient_accumulation as u64,
            shuffle_shards: config.shuffle_shards,
            bucket_batches: config.bucket_batches,
        }
    }

    /// Sequences per epoch.
    pub(crate) fn num_sequences(&self) -> u64 {
        self.parts.iter().map(|part| part.per_epoch).sum()
    }

    /// Optimizer steps per epoch.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.batches_per_epoch()
            .div_ceil(self.gradient_accumulation)
    }

    /// Batches of a step; the last step of an epoch may have fewer.
    pub(crate) fn batches_of_step(&self, step: u64) -> u64 {
        let first = step % self.steps_per_epoch() * self.gradient_accumulation;
        (self.batches_per_epoch() - first).min(self.gradient_accumulation)
    }

    /// Every batch from the first of `step` on, without end: epoch after epoch.
    pub(crate) fn batches_from(self, step: u64) -> Batches {
        let streams = self.parts.iter().map(|_| Stream::default()).collect();
        let mut batches = Batches {
            epoch: step / self.steps_per_epoch(),
            dealt: 0,
            taken: vec![0; self.parts.len()],
            streams,
            order: self,
        };
        let per_epoch = batches.order.steps_per_epoch();
        for _ in 0..step % per_epoch * batches.order.gradient_accumulation {
            batches.deal();
        }
        batches
    }

    fn batches_per_epoch(&self) -> u64 {
        (0..self.parts.len())
            .map(|part| self.batches_of(part))
            .sum()
    }

    /// Batches of one cache in an epoch.
    fn batches_of(&self, part: usize) -> u64 {
        self.parts[part].per_epoch.div_ceil(self.batch_size)
    }

    /// The windows of a pass: shards by number. Their order is seeded.
    fn windows(&self, part: usize, pass: u64) -> Vec<Vec<u32>> {
        let kept = &self.parts[part].kept;
        let mut shards: Vec<u32> = (0..kept.len() as u32)
            .filter(|&shard| kept[shard as usize] > 0)
            .collect();
        let most = if self.shuffle_shards == 0 {
            shards.len()
        } else {
            self.shuffle_shards
        };
        if shards.len() > most {
            self.rng(part, pass, "order of shards").shuffle(&mut shards);
        }
        let mut windows: Vec<Vec<u32>> = shards.chunks(most).map(<[u32]>::to_vec).collect();
        for window in &mut windows {
            window.sort_unstable();
        }
        windows
    }

    fn rng(&self, part: usize, pass: u64, of: &str) -> SeededRng {
        SeededRng::named(self.seed, &format!("{of}, cache {part}, pass {pass}"))
    }
}

/// The batches of a run in their order; see [`Order::batches_from`].
pub(crate) struct Batches {
    order: Order,
    epoch: u64,
    /// Batches of the epoch that were dealt.
    dealt: u64,
    /// Of them, those of each cache.
    taken: Vec<u64>,
    streams: Vec<Stream>,
}

/// Where the reading of one cache is.
#[derive(Default)]
struct Stream {
    /// Windows that were read and shuffled, the latest last.
    windows: VecDeque<Window>,
    /// Batches that are cut: their first place in the epoch, and they themselves.
    cut: Option<Cut>,
}

struct Window {
    pass: u64,
    index: usize,
    rows: Arc<Vec<Entry>>,
}

struct Cut {
    epoch: u64,
    places: Range<u64>,
    batches: Vec<Vec<Entry>>,
}

impl Iterator for Batches {
    type Item = Result<Planned>;

    fn next(&mut self) -> Option<Self::Item> {
        let (part, place) = self.deal();
        // The last batch of an epoch moves on to the next one, so its epoch is told apart here.
        let epoch = if self.dealt == 0 {
            self.epoch - 1
        } else {
            self.epoch
        };
        let rows = self.batch(part, epoch, place);
        Some(rows.map(|rows| Planned { part, rows }))
    }
}

impl Batches {
    /// Which cache the next batch comes from, and its place among the cache's batches of the epoch:
    /// the one that lags furthest behind its share.
    fn deal(&mut self) -> (usize, u64) {
        let total = u128::from(self.order.batches_per_epoch());
        let lag = |part: usize| {
            let share = u128::from(self.dealt + 1) * u128::from(self.order.batches_of(part));
            share as i128 - (u128::from(self.taken[part]) * total) as i128
        };
        let part = (1..self.taken.len()).fold(
            0,
            |most, part| {
                if lag(part) > lag(most) { part } else { most }
            },
        );
        let place = self.taken[part];
        self.taken[part] += 1;
        self.dealt += 1;
        if u128::from(self.dealt) == total {
            self.dealt = 0;
            self.epoch += 1;
            self.taken.fill(0);
        }
        (part, place)
    }

    fn batch(&mut self, part: usize, epoch: u64, place: u64) -> Result<Vec<Entry>> {
        let stream = &self.streams[part];
        let at_hand = |cut: &Cut| cut.epoch == epoch && cut.places.contains(&place);
        if !stream.cut.as_ref().is_some_and(at_hand) {
            let cut = self.cut(part, epoch, place)?;
            self.streams[part].cut = Some(cut);
        }
        let cut = self.streams[part].cut.as_ref();
        Ok(cut.map_or_else(Vec::new, |cut| {
            cut.batches[(place - cut.places.start) as usize].clone()
        }))
    }

    /// Cuts the batches whose first sequence lies in the same window as that of the given one.
    fn cut(&mut self, part: usize, epoch: u64, place: u64) -> Result<Cut> {
        let size = self.order.batch_size;
        let (pass_size, per_epoch) = {
            let part = &self.order.parts[part];
            (part.size(), part.per_epoch)
        };
        // Sequences are counted from the first of the run.
        let begin = epoch * per_epoch;
        let first = begin + place * size;
        let pass = first / pass_size;
        let mut window_start = pass * pass_size;
        let mut window_end = window_start;
        for window in self.order.windows(part, pass) {
            window_start = window_end;
            window_end += self.order.parts[part].sequences_of(&window);
            if first < window_end {
                break;
            }
        }
        let places = window_start.saturating_sub(begin).div_ceil(size)
            ..(window_end - begin).min(per_epoch).div_ceil(size);
        let range = begin + places.start * size..begin + (places.end * size).min(per_epoch);
        let mut rows = self.rows(part, range)?;

        let label = format!("order of batches from {}", begin + places.start * size);
        let mut rng = self.order.rng(part, pass, &label);
        let mut batches = Vec::new();
        let size = size as usize;
        for bucket in rows.chunks_mut(self.order.bucket_batches * size) {
            bucket.sort_by_key(|row| row.positions);
            let mut of_bucket: Vec<Vec<Entry>> =
                bucket.chunks(size).map(<[Entry]>::to_vec).collect();
            // Length must not rise with the steps.
            rng.shuffle(&mut of_bucket);
            batches.append(&mut of_bucket);
        }
        Ok(Cut {
            epoch,
            places,
            batches,
        })
    }

    /// Sequences of a range counted from the first of the run, pass after pass.
    fn rows(&mut self, part: usize, range: Range<u64>) -> Result<Vec<Entry>> {
        let pass_size = self.order.parts[part].size();
        let mut rows = Vec::new();
        let mut pass = range.start / pass_size;
        while pass * pass_size < range.end {
            let mut start = pass * pass_size;
            for (index, window) in self.order.windows(part, pass).iter().enumerate() {
                let end = start + self.order.parts[part].sequences_of(window);
                let (from, to) = (range.start.max(start), range.end.min(end));
                if from < to {
                    let all = self.window(part, pass, index, window)?;
                    rows.extend_from_slice(&all[(from - start) as usize..(to - start) as usize]);
                }
                start = end;
            }
            pass += 1;
        }
        Ok(rows)
    }

    /// The sequences of a window, shuffled. Two windows are kept: a batch may begin in one and end in
    /// the next.
    fn window(
        &mut self,
        part: usize,
        pass: u64,
        index: usize,
        shards: &[u32],
    ) -> Result<Arc<Vec<Entry>>> {
        let windows = &self.streams[part].windows;
        let known = windows
            .iter()
            .find(|window| (window.pass, window.index) == (pass, index));
        if let Some(window) = known {
            return Ok(Arc::clone(&window.rows));
        }
        let of = &self.order.parts[part];
        let mut rows = Vec::new();
        for &shard in shards {
            rows.extend(of.of_use((of.read)(shard)?));
        }
        let label = format!("order of window {index}");
        self.order.rng(part, pass, &label).shuffle(&mut rows);
        let rows = Arc::new(rows);
        let windows = &mut self.streams[part].windows;
        if windows.len() == 2 {
            windows.pop_front();
        }
        windows.push_back(Window {
            pass,
            index,
            rows: Arc::clone(&rows),
        });
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    const PER_SHARD: usize = 7;

    fn rows(count: usize) -> Vec<RowInfo> {
        let mut rng = SeededRng::new(count as u64);
        (0..count)
            .map(|index| RowInfo {
                shard: (index / PER_SHARD) as u32,
                row: (index % PER_SHARD) as u32,
                positions: 2 + rng.below(50) as u32,
                targets: 1,
                split_hash: rng.next_u64(),
                token_digest: [0; 32],
            })
            .collect()
    }

    /// A cache of `count` sequences, and the shards that were read of it.
    fn cache(count: usize) -> (u32, ReadShard, Arc<Mutex<Vec<u32>>>) {
        let shards: Vec<Vec<RowInfo>> = rows(count).chunks(PER_SHARD).map(<[_]>::to_vec).collect();
        let number = shards.len() as u32;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let read: ReadShard = Arc::new(move |shard: u32| {
            log.lock().unwrap().push(shard);
            Ok(shards[shard as usize].clone())
        });
        (number, read, seen)
    }

    fn part(count: usize, weight: f64, fraction: f64) -> Result<Part> {
        let (shards, read, _) = cache(count);
        Part::new(shards, read, weight, fraction)
    }

    fn take(order: &Order, step: u64, batches: usize) -> Vec<Planned> {
        let batches = order.clone().batches_from(step).take(batches);
        batches.map(Result::unwrap).collect()
    }

    fn epoch(order: &Order, epoch: u64) -> Vec<Planned> {
        let step = epoch * order.steps_per_epoch();
        take(order, step, order.batches_per_epoch() as usize)
    }

    fn places(batches: &[Planned], part: usize) -> Vec<(u32, u32)> {
        let mut places: Vec<(u32, u32)> = batches
            .iter()
            .filter(|batch| batch.part == part)
            .flat_map(|batch| batch.rows.iter().map(|row| (row.shard, row.row)))
            .collect();
        places.sort_unstable();
        places
    }

    proptest! {
        #[test]
        fn an_epoch_is_a_permutation_and_steps_resume_anywhere(
            count in 1usize..300,
            batch_size in 1usize..9,
            gradient_accumulation in 1usize..4,
            shuffle_shards in 0usize..6,
            bucket_batches in 1usize..20,
            seed: u64,
            from in 0u64..40,
        ) {
            let config = TrainConfig {
                seed, batch_size, gradient_accumulation, shuffle_shards, bucket_batches, ..TrainConfig::default()
            };
            let order = Order::new(vec![part(count, 1.0, 1.0).unwrap()], &config);
            let first = epoch(&order, 1);
            let all: Vec<(u32, u32)> = rows(count).iter().map(|row| (row.shard, row.row)).collect();
            prop_assert_eq!(places(&first, 0), all);
            prop_assert!(first.iter().filter(|batch| batch.rows.len() < batch_size).count() <= 1);

            let before: u64 = (0..from).map(|step| order.batches_of_step(step)).sum();
            let whole = take(&order, 0, before as usize + 9);
            prop_assert_eq!(&whole[before as usize..], &take(&order, from, 9)[..]);
            let of_epoch: u64 = (0..order.steps_per_epoch()).map(|step| order.batches_of_step(step)).sum();
            prop_assert_eq!(of_epoch as usize, first.len());
        }

        /// Whatever the weights, an epoch has its share of every cache, every sequence comes again only
        /// after all others of its cache have, and any step can be the first.
        #[test]
        fn caches_are_mixed_by_their_weights(
            counts in proptest::collection::vec((1usize..120, 0.05f64..3.0), 1..4),
            batch_size in 1usize..9,
            gradient_accumulation in 1usize..4,
            shuffle_shards in 0usize..4,
            from in 0u64..60,
        ) {
            let config = TrainConfig { batch_size, gradient_accumulation, shuffle_shards, ..TrainConfig::default() };
            let parts = counts.iter().map(|&(count, weight)| part(count, weight, 1.0).unwrap()).collect();
            let order = Order::new(parts, &config);
            let epochs: Vec<Vec<Planned>> = (0..3).map(|number| epoch(&order, number)).collect();
            for (part, &(count, weight)) in counts.iter().enumerate() {
                let expected = ((count as f64 * weight).round() as usize).max(1);
                for of_epoch in &epochs {
                    prop_assert_eq!(places(of_epoch, part).len(), expected);
                    // Dealt evenly: at any point its batches are within one of their share.
                    let total = of_epoch.iter().filter(|batch| batch.part == part).count() as f64;
                    let mut dealt = 0.0;
                    for (index, batch) in of_epoch.iter().enumerate() {
                        dealt += f64::from(u8::from(batch.part == part));
                        let share = total * (index + 1) as f64 / of_epoch.len() as f64;
                        prop_assert!((dealt - share).abs() < counts.len() as f64, "{dealt} of {share}");
                    }
                }
                let together = epochs.concat();
                let mut times = std::collections::BTreeMap::new();
                for place in places(&together, part) {
                    *times.entry(place).or_insert(0usize) += 1;
                }
                let (least, most) = (3 * expected / count, (3 * expected).div_ceil(count));
                prop_assert!(least == 0 || times.len() == count);
                prop_assert!(times.values().all(|n| (least..=most).contains(n)), "{times:?}");
            }
            let before: u64 = (0..from).map(|step| order.batches_of_step(step)).sum();
            let whole = take(&order, 0, before as usize + 7);
            prop_assert_eq!(&whole[before as usize..], &take(&order, from, 7)[..]);
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_lengths_come_together() {
        let order = |seed, bucket_batches| {
            let config = TrainConfig {
                seed,
                bucket_batches,
                ..TrainConfig::default()
            };
            Order::new(vec![part(256, 1.0, 1.0).unwrap()], &config)
        };
        assert_ne!(epoch(&order(0, 16), 0), epoch(&order(0, 16), 1));
        assert_ne!(epoch(&order(0, 16), 0), epoch(&order(1, 16), 0));
        let padded = |order: &Order| -> u64 {
            let padded = |batch: &Planned| {
                let longest = batch.rows.iter().map(|row| row.positions).max();
                u64::from(longest.unwrap_or(0)) * batch.rows.len() as u64
            };
            epoch(order, 0).iter().map(padded).sum()
        };
        let real: u64 = rows(256).iter().map(|row| u64::from(row.positions)).sum();
        let (bucketed, plain) = (padded(&order(0, 16)), padded(&order(0, 1)));
        assert!(
            (bucketed as f64) < 1.1 * real as f64 && (plain as f64) > 1.5 * real as f64,
            "{real} positions, {bucketed} with padding, {plain} without buckets"
        );
    }

    /// Between one window and the next only a window's shards are read, and batches mix all of them.
    #[test]
    fn a_window_touches_a_bounded_number_of_shards() {
        let (shards, read, seen) = cache(700);
        let config = TrainConfig {
            batch_size: 5,
            shuffle_shards: 4,
            ..TrainConfig::default()
        };
        let order = Order::new(vec![Part::new(shards, read, 1.0, 1.0).unwrap()], &config);
        assert_eq!(seen.lock().unwrap().len(), 100);
        seen.lock().unwrap().clear();
        let mut batches = order.clone().batches_from(0);
        let mut read_before = 0;
        let mut touched: Vec<u32> = Vec::new();
        for _ in 0..140 {
            let batch = batches.next().unwrap().unwrap();
            touched.extend(batch.rows.iter().map(|row| row.shard));
            let read_now = seen.lock().unwrap().len();
            assert!(read_now - read_before <= 8, "{read_before} to {read_now}");
            read_before = read_now;
        }
        // Every shard was read once, and 28 sequences in a row come from few shards.
        assert_eq!(seen.lock().unwrap().len(), 100);
        for stretch in touched.windows(28) {
            let distinct: BTreeSet<&u32> = stretch.iter().collect();
            assert!((2..=12).contains(&distinct.len()), "{distinct:?}");
        }
        // A resumed run reads the window of its step (and the head of the next) alone.
        seen.lock().unwrap().clear();
        order.batches_from(77).next().unwrap().unwrap();
        assert!(seen.lock().unwrap().len() <= 8);
    }

    #[test]
    fn a_fraction_lies_inside_a_larger_one() {
        let kept = |fraction| {
            let order = Order::new(
                vec![part(300, 1.0, fraction).unwrap()],
                &TrainConfig::default(),
            );
            places(&epoch(&order, 0), 0)
        };
        let (small, large) = (kept(0.1), kept(0.5));
        assert!(small.iter().all(|row| large.contains(row)));
        assert!(
            (20..=40).contains(&small.len())
                && (120..=180).contains(&large.len())
                && kept(1.0).len() == 300
        );
        assert!(matches!(part(3, 1.0, 1e-9), Err(Error::NoSequences { .. })));
    }
}
