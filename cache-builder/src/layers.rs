//! A network that is larger than memory: every block in turn is read from disk and run over many batches, while a second
//! thread reads the next one.
//!
//! The batches are those of a network in memory, and so are the products' shapes: the values are the same, byte for byte.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::Instant;

use caskd_models::{Block, Context, Forward, LoadOptions, ModelFiles};
use crossbeam_channel::{Receiver, bounded};
use tch::Tensor;

use crate::Result;
use crate::activations::Activations;

/// Contexts that are kept for batches of the same shape; a mask may take some megabytes.
const CONTEXTS: usize = 32;

/// What a pass tells while it runs.
pub(crate) enum Event {
    /// This share of the way through the network and its head is done for all batches.
    Step(f64),
    /// A batch has come through.
    Done(usize, Forward),
}

/// The blocks of a network in their order, each read while the one before it is in use.
pub(crate) struct ReadAhead(Receiver<caskd_models::Result<Block>>);

impl ReadAhead {
    pub(crate) fn new<'scope>(
        scope: &'scope Scope<'scope, '_>,
        files: &'scope ModelFiles,
        options: LoadOptions,
    ) -> ReadAhead {
        // No room in the channel: one block is computed with, one is waiting, none is further ahead.
        let (sender, receiver) = bounded(0);
        scope.spawn(move || {
            for index in 0..files.config().num_layers() {
                let block = files.load_block(index, &options);
                let failed = block.is_err();
                if sender.send(block).is_err() || failed {
                    break;
                }
            }
        });
        ReadAhead(receiver)
    }

    /// The next block, asked for as often as there are some.
    pub(crate) fn next(&self) -> Result<Block> {
        let Ok(block) = self.0.recv() else {
            unreachable!("the reading thread sends every block, or an error");
        };
        Ok(block?)
    }
}

/// One pass over some batches.
pub(crate) struct LayerPass<'a> {
    pub(crate) files: &'a ModelFiles,
    pub(crate) options: LoadOptions,
    /// Hidden layers to return, ascending.
    pub(crate) keep: &'a [u32],
    /// Folder for activations; in memory where there is none.
    pub(crate) spill: Option<&'a Path>,
    pub(crate) stop: &'a AtomicBool,
}

/// How a pass went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LayerTimes {
    /// False where a stop was asked for.
    pub(crate) completed: bool,
    /// Seconds that the computing thread waited for weights.
    pub(crate) waiting_seconds: f64,
}

impl LayerPass<'_> {
    /// Runs `batches`, each [B, T] ids, through the network.
    pub(crate) fn run(
        &self,
        batches: &[Tensor],
        on_event: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<LayerTimes> {
        let num_layers = self.files.config().num_layers();
        // What is computed with the last hidden states, ahead of `Done`, takes its time too: about as its weights.
        let parts = self.files.part_bytes(self.options.kind);
        let in_blocks = parts.blocks.iter().sum::<u64>() as f64;
        let all_steps = (num_layers * batches.len()) as f64 * (1.0 + parts.head as f64 / in_blocks);
        let shapes: Vec<(i64, i64)> = batches
            .iter()
            .map(Tensor::size2)
            .collect::<std::result::Result<_, _>>()
            .map_err(crate::error::torch("reading the shape of a batch"))?;
        let mut times = LayerTimes::default();
        let mut states = Activations::new(batches.len(), self.spill)?;
        let mut kept: Vec<(u32, Activations)> = self
            .keep
            .iter()
            .filter(|&&layer| (layer as usize) < num_layers)
            .map(|&layer| Ok((layer, Activations::new(batches.len(), self.spill)?)))
            .collect::<Result<_>>()?;
        let mut keep = |layer: usize, batch: usize, x: &Tensor| -> Result<()> {
            for (wanted, store) in &mut kept {
                if *wanted as usize == layer {
                    store.put(batch, x)?;
                }
            }
            Ok(())
        };

        let embedding = self.files.load_embedding(&self.options)?;
        for (batch, ids) in batches.iter().enumerate() {
            let x = embedding.forward(ids);
            keep(0, batch, &x)?;
            states.put(batch, &x)?;
        }
        drop(embedding);

        let mut contexts: BTreeMap<(i64, i64), Context> = BTreeMap::new();
        let through = std::thread::scope(|scope| -> Result<bool> {
            let blocks = ReadAhead::new(scope, self.files, self.options);
            for index in 0..num_layers {
                let waiting = Instant::now();
                let block = blocks.next()?;
                times.waiting_seconds += waiting.elapsed().as_secs_f64();
                for (batch, &shape) in shapes.iter().enumerate() {
                    if self.stop.load(Ordering::Relaxed) {
                        return Ok(false);
                    }
                    if contexts.len() >= CONTEXTS && !contexts.contains_key(&shape) {
                        contexts.clear();
                    }
                    let context = contexts
                        .entry(shape)
                        .or_insert_with(|| self.files.context(shape, &self.options));
                    let x = states.take(batch, self.options.device)?;
                    let y = block.forward(&x, context);
                    drop(x);
                    keep(index + 1, batch, &y)?;
                    states.put(batch, &y)?;
                    let steps = (index * batches.len() + batch + 1) as f64;
                    on_event(Event::Step(steps / all_steps))?;
                }
            }
            Ok(true)
        })?;
        if !through {
            return Ok(times);
        }

        let norm = self.files.load_norm(&self.options)?;
        for (batch, &(rows, positions)) in shapes.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(times);
            }
            let shape = [rows, positions, -1];
            let last_hidden = norm
                .forward(&states.take(batch, self.options.device)?)
                .view(shape);
            let mut hidden = Vec::with_capacity(self.keep.len());
            for (layer, store) in &mut kept {
                let x = store.take(batch, self.options.device)?;
                hidden.push((*layer, x.view(shape)));
            }
            if self.keep.contains(&(num_layers as u32)) {
                hidden.push((num_layers as u32, last_hidden.shallow_clone()));
            }
            on_event(Event::Done(
                batch,
                Forward {
                    last_hidden,
                    hidden,
                },
            ))?;
        }
        times.completed = true;
        Ok(times)
    }
}
