//! Shards through the teacher, each encoded and written by a second thread while the teacher reads the next one.

use std::time::Instant;

use caskd_formats::Sequence;
use crossbeam_channel::bounded;

use crate::Result;
use crate::data::TokenizedSequence;
use crate::teacher_pass::{PassTotals, TeacherPass};

/// What became of the shards.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Written {
    /// False where a stop was asked for.
    pub(crate) completed: bool,
    /// Shards that were handed to the writer.
    pub(crate) shards: usize,
    /// Of the writing thread: encoding, the disk.
    pub(crate) encoding_seconds: f64,
    /// From the first batch to the last shard on disk.
    pub(crate) seconds: f64,
}

/// Runs the teacher over `shards` and writes them. `load` gives the sequences of a shard, or `None` where it need not be
/// computed after all.
pub(crate) fn compute_and_write(
    pass: &mut TeacherPass<'_>,
    shards: &[usize],
    load: &mut dyn FnMut(usize) -> Result<Option<Vec<TokenizedSequence>>>,
    mut write: impl FnMut(usize, &[Sequence]) -> Result<()> + Send,
    on_batch: &mut dyn FnMut(&PassTotals),
) -> Result<Written> {
    let started = Instant::now();
    std::thread::scope(|scope| {
        let (sender, receiver) = bounded::<(usize, Vec<Sequence>)>(1);
        let writing = scope.spawn(move || -> Result<(usize, f64)> {
            let (mut shards, mut seconds) = (0, 0.0);
            for (shard, sequences) in receiver {
                let started = Instant::now();
                write(shard, &sequences)?;
                seconds += started.elapsed().as_secs_f64();
                shards += 1;
            }
            Ok((shards, seconds))
        });
        let computed: Result<bool> = (|| {
            let mut waiting = shards.iter().copied().peekable();
            while waiting.peek().is_some() {
                // As many shards as go through the teacher together: one, unless it is read layer by layer.
                let (mut numbers, mut group, mut positions) = (Vec::new(), Vec::new(), 0);
                for shard in waiting.by_ref() {
                    if let Some(tokens) = load(shard)? {
                        let lengths = tokens.iter().map(|sequence| sequence.token_ids.len());
                        positions += lengths.sum::<usize>();
                        numbers.push(shard);
                        group.push(tokens);
                    }
                    if positions >= pass.block_positions().max(1) {
                        break;
                    }
                }
                if group.is_empty() {
                    break;
                }
                let completed = pass.run(&group, on_batch, &mut |index, sequences| {
                    // An error of the writing thread closes the channel, and follows below.
                    Ok(sender.send((numbers[index], sequences)).is_ok())
                })?;
                if !completed {
                    return Ok(false);
                }
            }
            Ok(true)
        })();
        drop(sender);
        let (shards, encoding_seconds) = writing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(Written {
            completed: computed?,
            shards,
            encoding_seconds,
            seconds: started.elapsed().as_secs_f64(),
        })
    })
}
