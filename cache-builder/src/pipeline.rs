//! Shards through the teacher, each encoded and written by a second thread while the teacher reads the next one.

use std::time::Instant;

use caskd_formats::Sequence;
use crossbeam_channel::bounded;

use crate::Result;
use crate::teacher_pass::{PassTotals, TeacherPass};
use crate::tokenize::TokenizedSequence;

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
            for &shard in shards {
                let Some(tokens) = load(shard)? else {
                    continue;
                };
                let Some(sequences) = pass.run(&tokens, on_batch)? else {
                    return Ok(false);
                };
                if sender.send((shard, sequences)).is_err() {
                    return Ok(false); // the writing thread failed; its error follows below
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
