//! Many passes at one time, each on one thread of its own.
//!
//! Threads that share every product wait for each other several hundred times a pass, and for the one that works
//! through what is too small to be shared. Passes that have nothing to do with each other need not wait.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use tch::Device;

use crate::block::Block;
use crate::norm::Norm;
use crate::{Network, row_kernels};

/// What passes go through: a network, one block of it, or the final norm.
pub trait Shared: Send {
    /// The same for another thread, adapters included: weights are shared, not copied.
    #[must_use]
    fn replica(&self) -> Self;

    /// Whether all of it is on the CPU.
    fn on_cpu(&self) -> bool;
}

impl Shared for Network {
    fn replica(&self) -> Network {
        Network::replica(self)
    }

    fn on_cpu(&self) -> bool {
        self.blocks.iter().all(Shared::on_cpu)
    }
}

impl Shared for Block {
    fn replica(&self) -> Block {
        Block::replica(self)
    }

    fn on_cpu(&self) -> bool {
        self.device() == Device::Cpu
    }
}

impl Shared for Norm {
    fn replica(&self) -> Norm {
        self.share()
    }

    fn on_cpu(&self) -> bool {
        self.weight.device() == Device::Cpu
    }
}

/// How many passes over `network` run at one time.
pub fn passes_at_once(network: &impl Shared) -> usize {
    if network.on_cpu() {
        tch::get_num_threads().max(1) as usize
    } else {
        1
    }
}

/// Runs `work` on every item, items of about the same size, as many at one time as libtorch has threads on the CPU; `done`
/// hears each item's index and result on the calling thread, in any order. Each thread has the network's weights, not a copy of
/// them, and one thread of libtorch. Items that are left over when each thread has had as many have all threads, one after
/// the other. No graph is kept.
pub fn side_by_side<N: Shared, T: Sync, R: Send>(
    network: &N,
    items: &[T],
    work: impl Fn(&N, &T) -> R + Sync,
    mut done: impl FnMut(usize, R),
) {
    let threads = passes_at_once(network);
    let shared = if threads > 1 {
        items.len() / threads * threads
    } else {
        0
    };
    let next = AtomicUsize::new(0);
    let (sender, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads.min(shared) {
            let (network, sender) = (network.replica(), sender.clone());
            let (items, next, work) = (&items[..shared], &next, &work);
            scope.spawn(move || {
                tch::set_num_threads(1);
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = row_kernels::alone(|| work(&network, item));
                    if sender.send((index, result)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (index, result) in results {
            done(index, result);
        }
    });
    if shared > 0 {
        // Threads that begin later take the number that was set last, wherever it was set.
        tch::set_num_threads(threads as i32);
    }
    let alone = tch::get_num_threads() == 1;
    for (index, item) in items.iter().enumerate().skip(shared) {
        let work = || work(network, item);
        let result = if alone {
            row_kernels::alone(work)
        } else {
            tch::no_grad(work)
        };
        done(index, result);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::{LayerShape, LlamaConfig, LoadOptions, LoraConfig};

    /// Two threads find what one finds, adapters included, and leave libtorch's threads as they were.
    #[test]
    fn threads_find_the_same() {
        tch::set_num_threads(1);
        let dense = LayerShape {
            heads: 4,
            kv_heads: 2,
            intermediate_size: 24,
        };
        let config = LlamaConfig {
            vocab_size: 40,
            hidden_size: 32,
            head_dim: 8,
            dense,
            layers: vec![dense; 3],
            ..LlamaConfig::default()
        };
        let mut network = Network::random(config, 1, &LoadOptions::default()).unwrap();
        network.attach_lora(&LoraConfig::default(), 1).unwrap();
        let plain = |network: &Network, ids: &Vec<i64>| {
            let ids = Tensor::from_slice(ids).unsqueeze(0);
            network.forward(&ids, &[], false).last_hidden.detach()
        };
        let items: Vec<Vec<i64>> = (1..8)
            .map(|n| (0..n).map(|i| i * 7 % 40).collect())
            .collect();
        let bare = plain(&network, &items[6]);
        tch::no_grad(|| {
            for (name, tensor) in network.trainable() {
                if name.contains("lora_B") {
                    let _ = tensor.shallow_clone().fill_(0.3);
                }
            }
        });
        let expected: Vec<Tensor> = items.iter().map(|ids| plain(&network, ids)).collect();
        assert!((&bare - &expected[6]).abs().max().double_value(&[]) > 1e-3);
        for threads in [1, 2] {
            tch::set_num_threads(threads);
            let mut heard = [0; 7];
            side_by_side(&network, &items, plain, |index, found| {
                heard[index] += 1;
                let difference = (&expected[index] - found).abs().max().double_value(&[]);
                assert!(
                    difference < 1e-5,
                    "{threads} threads, {index}: {difference}"
                );
            });
            assert_eq!(heard, [1; 7]);
            assert_eq!(tch::get_num_threads(), threads);
        }
    }
}
