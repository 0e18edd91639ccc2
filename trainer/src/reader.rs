//! Reading ahead: threads decode and collate batches while the network computes. Every batch
//! carries its number, so the order is that of the schedule whatever thread is faster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use caskd_formats::{Cache, Columns, RowInfo, Sequence};
use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::batch::Batch;
use crate::{Error, Result};

/// Decoding one batch costs far less than a step; two threads hide it.
const MAX_THREADS: usize = 2;

/// A stream of collated batches in schedule order.
pub(crate) struct BatchReader {
    schedule: Box<dyn Iterator<Item = Vec<RowInfo>> + Send>,
    requests: Option<Sender<(u64, Vec<RowInfo>)>>,
    results: Receiver<(u64, Result<Batch>)>,
    /// Results that overtook the one that is due.
    early: BTreeMap<u64, Result<Batch>>,
    requested: u64,
    delivered: u64,
    prefetch: u64,
    threads: Vec<JoinHandle<()>>,
}

impl BatchReader {
    /// Starts reading `schedule` from `cache`, `prefetch` batches ahead.
    pub(crate) fn start(
        cache: &Arc<Cache>,
        schedule: impl Iterator<Item = Vec<RowInfo>> + Send + 'static,
        columns: &Columns,
        vocabulary: usize,
        prefetch: usize,
    ) -> BatchReader {
        let (requests, incoming) = unbounded::<(u64, Vec<RowInfo>)>();
        let (outgoing, results) = unbounded();
        let threads = (0..prefetch.clamp(1, MAX_THREADS))
            .map(|_| {
                let (cache, columns) = (Arc::clone(cache), columns.clone());
                let (incoming, outgoing) = (incoming.clone(), outgoing.clone());
                std::thread::spawn(move || {
                    for (number, rows) in incoming {
                        let batch = read_batch(&cache, &rows, &columns, vocabulary);
                        if outgoing.send((number, batch)).is_err() {
                            break; // The run ended early.
                        }
                    }
                })
            })
            .collect();
        BatchReader {
            schedule: Box::new(schedule),
            requests: Some(requests),
            results,
            early: BTreeMap::new(),
            requested: 0,
            delivered: 0,
            prefetch: prefetch.max(1) as u64,
            threads,
        }
    }

    /// The next batch; `None` when the schedule has ended.
    pub(crate) fn next(&mut self) -> Option<Result<Batch>> {
        self.request_ahead();
        if self.delivered == self.requested {
            return None;
        }
        let due = loop {
            if let Some(batch) = self.early.remove(&self.delivered) {
                break batch;
            }
            match self.results.recv() {
                Ok((number, batch)) => drop(self.early.insert(number, batch)),
                Err(_) => break Err(Error::ReaderLost),
            }
        };
        self.delivered += 1;
        self.request_ahead();
        Some(due)
    }

    fn request_ahead(&mut self) {
        while self.requested < self.delivered + self.prefetch {
            let (Some(requests), Some(rows)) = (&self.requests, self.schedule.next()) else {
                return;
            };
            if requests.send((self.requested, rows)).is_err() {
                return;
            }
            self.requested += 1;
        }
    }
}

impl Drop for BatchReader {
    fn drop(&mut self) {
        self.requests = None;
        // What was asked for and not yet begun is read by nobody: take it away from the threads.
        self.results = crossbeam_channel::never();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// Reads and collates the rows of one batch, in their order.
pub(crate) fn read_batch(
    cache: &Cache,
    rows: &[RowInfo],
    columns: &Columns,
    vocabulary: usize,
) -> Result<Batch> {
    let mut by_shard: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (place, row) in rows.iter().enumerate() {
        by_shard.entry(row.shard).or_default().push(place);
    }
    let mut sequences: Vec<Sequence> = vec![Sequence::default(); rows.len()];
    for (shard, mut places) in by_shard {
        places.sort_by_key(|&place| rows[place].row);
        let wanted: Vec<u32> = places.iter().map(|&place| rows[place].row).collect();
        for (place, sequence) in places.into_iter().zip(cache.read(shard, &wanted, columns)?) {
            sequences[place] = sequence;
        }
    }
    Batch::collate(&sequences, columns, vocabulary)
}
