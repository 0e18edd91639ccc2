//! Reading ahead: threads plan, decode and collate batches while the network computes. Every batch
//! carries its number, so the order is that of the schedule whatever thread is faster.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use caskd_formats::{Cache, Columns, RowInfo, Sequence};
use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::batch::Batch;
use crate::order::Planned;
use crate::retokenize::Retokenizer;
use crate::{Error, Result};

/// Decoding one batch costs far less than a step; two threads hide it.
const MAX_THREADS: usize = 2;

/// What is read of one cache of a run.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) cache: Arc<Cache>,
    pub(crate) columns: Columns,
    /// Rows of the student's head that the cache's teacher has too.
    pub(crate) vocabulary: usize,
    /// Longest sequence that the cache was asked for.
    pub(crate) max_len: usize,
    /// For a student with another tokenizer.
    pub(crate) retokenizer: Option<Arc<Retokenizer>>,
}

/// A batch, and which cache of the run it is from.
pub(crate) struct Read {
    pub(crate) part: usize,
    pub(crate) batch: Batch,
}

/// A stream of collated batches in schedule order.
pub(crate) struct BatchReader {
    /// One for every batch that may be read; dropped to end the threads.
    permits: Option<Sender<()>>,
    results: Receiver<(u64, Result<Read>)>,
    /// Results that overtook the one that is due.
    early: BTreeMap<u64, Result<Read>>,
    delivered: u64,
    threads: Vec<JoinHandle<()>>,
}

/// What is to be read next; the threads take turns.
struct Schedule {
    planned: Box<dyn Iterator<Item = Result<Planned>> + Send>,
    number: u64,
}

impl BatchReader {
    /// Starts reading `schedule` from the run's caches, `prefetch` batches ahead.
    pub(crate) fn start(
        sources: Vec<Source>,
        schedule: impl Iterator<Item = Result<Planned>> + Send + 'static,
        prefetch: usize,
    ) -> BatchReader {
        let (permits, granted) = unbounded();
        let (outgoing, results) = unbounded();
        let schedule = Arc::new(Mutex::new(Schedule {
            planned: Box::new(schedule),
            number: 0,
        }));
        let sources = Arc::new(sources);
        let prefetch = prefetch.max(1);
        let threads = (0..prefetch.min(MAX_THREADS))
            .map(|_| {
                let (schedule, sources) = (Arc::clone(&schedule), Arc::clone(&sources));
                let (granted, outgoing) = (granted.clone(), outgoing.clone());
                std::thread::spawn(move || read_on(&granted, &schedule, &sources, &outgoing))
            })
            .collect();
        let reader = BatchReader {
            permits: Some(permits),
            results,
            early: BTreeMap::new(),
            delivered: 0,
            threads,
        };
        (0..prefetch).for_each(|_| reader.permit());
        reader
    }

    /// The next batch; `None` when the schedule has ended.
    pub(crate) fn next(&mut self) -> Option<Result<Read>> {
        let due = loop {
            if let Some(batch) = self.early.remove(&self.delivered) {
                break batch;
            }
            let (number, batch) = self.results.recv().ok()?;
            self.early.insert(number, batch);
        };
        self.delivered += 1;
        self.permit();
        Some(due)
    }

    /// Allows one batch more to be read.
    fn permit(&self) {
        if let Some(permits) = &self.permits {
            // Nobody listens any more once the schedule has ended.
            let _ = permits.send(());
        }
    }
}

impl Drop for BatchReader {
    fn drop(&mut self) {
        self.permits = None;
        // What was allowed and not yet begun is read by nobody: the threads end at their next result.
        self.results = crossbeam_channel::never();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// Reads one batch for every permit until the schedule or the run ends.
fn read_on(
    granted: &Receiver<()>,
    schedule: &Mutex<Schedule>,
    sources: &[Source],
    outgoing: &Sender<(u64, Result<Read>)>,
) {
    for () in granted {
        let (number, planned) = {
            let mut schedule = schedule.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(planned) = schedule.planned.next() else {
                return;
            };
            schedule.number += 1;
            (schedule.number - 1, planned)
        };
        let read = || -> Result<Read> {
            let Planned { part, rows } = planned?;
            let source = &sources[part];
            let places: Vec<(u32, u32)> = rows.iter().map(|row| (row.shard, row.row)).collect();
            let batch = source.read(&places)?;
            Ok(Read { part, batch })
        };
        // A number that never came would be waited for without end.
        let read = catch_unwind(AssertUnwindSafe(read)).unwrap_or(Err(Error::ReaderLost));
        if outgoing.send((number, read)).is_err() {
            return; // The run ended early.
        }
    }
}

impl Source {
    fn read(&self, places: &[(u32, u32)]) -> Result<Batch> {
        let Some(retokenizer) = &self.retokenizer else {
            return read_places(&self.cache, places, &self.columns, self.vocabulary);
        };
        let mut sequences = Vec::new();
        let mut paired = Vec::new();
        for sequence in read_sequences(&self.cache, places, &self.columns)? {
            let retokenized = retokenizer.retokenize(&sequence, self.max_len)?;
            sequences.push(retokenized.sequence);
            paired.push(retokenized.paired);
        }
        let batch = Batch::collate(&sequences, &self.columns, self.vocabulary)?;
        Ok(batch.with_pairs(&sequences, &paired))
    }
}

/// Reads and collates the rows of one batch, in their order.
pub(crate) fn read_batch(
    cache: &Cache,
    rows: &[RowInfo],
    columns: &Columns,
    vocabulary: usize,
) -> Result<Batch> {
    let places: Vec<(u32, u32)> = rows.iter().map(|row| (row.shard, row.row)).collect();
    read_places(cache, &places, columns, vocabulary)
}

/// The same by shard and row.
fn read_places(
    cache: &Cache,
    rows: &[(u32, u32)],
    columns: &Columns,
    vocabulary: usize,
) -> Result<Batch> {
    let sequences = read_sequences(cache, rows, columns)?;
    for sequence in &sequences {
        top_k_within(sequence, vocabulary)?;
    }
    Batch::collate(&sequences, columns, vocabulary)
}

/// A teacher's padded head can keep tokens that the student's head has no row for; the losses index by them.
fn top_k_within(sequence: &Sequence, vocabulary: usize) -> Result<()> {
    let ids = sequence.top_k.as_ref().map_or(&[][..], |top_k| &top_k.ids);
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(&token) => Err(Error::TokenOutOfRange {
            sequence: sequence.source.clone(),
            token,
            vocabulary,
        }),
    }
}

fn read_sequences(cache: &Cache, rows: &[(u32, u32)], columns: &Columns) -> Result<Vec<Sequence>> {
    let mut by_shard: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (place, (shard, _)) in rows.iter().enumerate() {
        by_shard.entry(*shard).or_default().push(place);
    }
    let mut sequences: Vec<Sequence> = vec![Sequence::default(); rows.len()];
    for (shard, mut places) in by_shard {
        places.sort_by_key(|&place| rows[place].1);
        let wanted: Vec<u32> = places.iter().map(|&place| rows[place].1).collect();
        for (place, sequence) in places.into_iter().zip(cache.read(shard, &wanted, columns)?) {
            sequences[place] = sequence;
        }
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use caskd_formats::TopK;

    use super::*;

    #[test]
    fn a_kept_token_without_a_row_is_refused() {
        let sequence = |id: u32| Sequence {
            source: "records.jsonl:3".into(),
            top_k: Some(TopK {
                k: 2,
                ids: vec![4, id],
                logits: vec![1.0, 0.5],
            }),
            ..Sequence::default()
        };
        assert!(top_k_within(&sequence(9), 10).is_ok());
        let error = top_k_within(&sequence(10), 10).unwrap_err();
        assert_eq!(
            error.to_string(),
            "records.jsonl:3: token 10 is outside the vocabulary of 10"
        );
    }
}
