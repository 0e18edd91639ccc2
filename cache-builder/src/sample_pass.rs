//! The sample of a fidelity report on its way through the teacher and through the teacher pruned, block after block: the
//! pruned one never is in memory whole. Sequences go side by side, each on a thread of its own.

use std::sync::{Mutex, PoisonError};

use caskd_models::{
    Block, Context, Embedding, LoadOptions, Network, Norm, PruneOptions, prune_block, side_by_side,
};
use tch::{Device, Tensor};

use crate::Result;
use crate::layers::ReadAhead;
use crate::teacher::Teacher;

/// Last hidden states of some sequences, each [1, T, D], in the compute type.
pub(crate) struct SampleStates {
    pub(crate) teacher: Vec<Tensor>,
    pub(crate) pruned: Vec<Tensor>,
}

/// One sequence between two blocks.
struct Waiting {
    positions: i64,
    /// What the blocks on a device share.
    context: (Device, Context),
    /// [T, D] each.
    teacher: Tensor,
    pruned: Tensor,
}

/// Where the teacher's blocks come from.
enum Blocks<'a> {
    InMemory(&'a Network),
    Read(ReadAhead),
}

/// Runs sequences of ids through the teacher, and through the teacher without a share of `ratio` of its FFN channels (and
/// KV groups), by magnitude.
pub(crate) fn through_teacher_and_pruned(
    teacher: &Teacher,
    sequences: &[Vec<i64>],
    ratio: f64,
) -> Result<SampleStates> {
    let files = teacher.files();
    let options = teacher.options();
    let network = teacher.network();
    let context = |positions, device| {
        let on = LoadOptions { device, ..options };
        (device, files.context((1, positions), &on))
    };
    let waiting = {
        let loaded;
        let embedding: &Embedding = if let Some(network) = network {
            network.embedding()
        } else {
            loaded = files.load_embedding(&options)?;
            &loaded
        };
        let waiting = sequences.iter().map(|ids| {
            let positions = ids.len() as i64;
            let x = embedding
                .forward(&Tensor::from_slice(ids))
                .to_kind(options.kind);
            Mutex::new(Waiting {
                positions,
                context: context(positions, x.device()),
                pruned: x.shallow_clone(),
                teacher: x,
            })
        });
        waiting.collect::<Vec<_>>()
    };
    let order = longest_first(sequences);
    let run = |block: &Block, states: fn(&mut Waiting) -> &mut Tensor| {
        let work = |block: &Block, index: &usize| {
            let mut one = waiting[*index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let device = block.device();
            if one.context.0 != device {
                one.context = context(one.positions, device);
            }
            let x = states(&mut one).to_device(device);
            *states(&mut one) = block.forward(&x, &one.context.1);
        };
        side_by_side(block, &order, work, |_, ()| {});
    };
    let prune = PruneOptions {
        ratio,
        ..PruneOptions::default()
    };
    let layers = files.config().num_layers();
    std::thread::scope(|scope| -> Result<()> {
        let blocks = match network {
            Some(network) => Blocks::InMemory(network),
            None => Blocks::Read(ReadAhead::new(scope, files, options)),
        };
        for index in 0..layers {
            let mut block = match &blocks {
                Blocks::InMemory(network) => network.block(index),
                Blocks::Read(blocks) => blocks.next()?,
            };
            run(&block, |one| &mut one.teacher);
            prune_block(files.config(), index, &mut block, &prune)?;
            run(&block, |one| &mut one.pruned);
        }
        Ok(())
    })?;
    let mut last: Vec<Option<(Tensor, Tensor)>> = sequences.iter().map(|_| None).collect();
    let work = |norm: &Norm, index: &usize| {
        let one = waiting[*index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let of = |x: &Tensor| norm.forward(&x.to_device(options.device)).unsqueeze(0);
        (of(&one.teacher), of(&one.pruned))
    };
    side_by_side(&files.load_norm(&options)?, &order, work, |at, states| {
        last[order[at]] = Some(states);
    });
    let (teacher, pruned) = last.into_iter().flatten().unzip();
    Ok(SampleStates { teacher, pruned })
}

/// Indices of sequences, the longest first: so threads that take one after the other end at about the same time.
pub(crate) fn longest_first(sequences: &[Vec<i64>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sequences[index].len()));
    order
}
