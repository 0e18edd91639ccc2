//! What memory a build takes, from its sizes alone; whether the teacher fits; how many positions go through a layer at once.

use caskd_formats::{CacheSpec, Tier};
use caskd_models::ModelFiles;
use serde::Serialize;
use tch::{Device, Kind};

use crate::teacher::Placement;
use crate::teacher_pass::{HEAD_ROWS, HEAD_SLICE_BYTES};
use crate::transform_fit::{FIT_POSITIONS, HELD_OUT_POSITIONS};
use crate::{Error, Result, fidelity};

/// libtorch and this program before they hold anything.
const PROGRAM: u64 = 400 << 20;

/// Positions up to which attention holds all scores; beyond, the fused kernel holds none.
const PRODUCT_POSITIONS: u64 = 1024;

/// More positions in a block hide no more reading.
const MOST_BLOCK_POSITIONS: u64 = 131_072;

/// Shards in memory at one time: one being computed, one waiting, one being encoded, and its bytes.
const SHARDS_IN_MEMORY: u64 = 4;

/// Copies of the sample's hidden states in a fit, as f32; matrices [D, D] in f64.
const FIT_COPIES: u64 = 8;
const FIT_MATRICES: u64 = 10;

/// Bytes that the parts of a build take.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Footprint {
    /// Weights of the whole teacher, in the compute type.
    pub weights: u64,
    /// The largest block.
    pub block: u64,
    /// The LM head, in the compute type.
    pub head: u64,
    /// The LM head in f32, as statistics are computed with it; nothing where the compute type is f32.
    pub wide_head: u64,
    /// The embedding.
    pub embedding: u64,
    /// What the layers need beside weights while one batch is in them.
    pub batch: u64,
    /// Logits of a chunk of positions, and a slice of the head.
    pub chunk: u64,
    /// Decoded sequences on their way to the disk.
    pub shards: u64,
    /// The fit of the compact tier's code, weights apart; nothing in other tiers.
    pub fitting: u64,
    /// The comparison of the cache with the teacher, weights apart.
    pub measuring: u64,
    /// Activations of one position between two layers, kept hidden states included.
    pub position: u64,
    /// Positions of one batch.
    pub batch_positions: u64,
}

/// What follows for one budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The weights are read layer by layer.
    pub layered: bool,
    /// Positions that go through a layer while its weights are in memory; 0 where all weights are.
    pub block_positions: usize,
    /// The head is kept in f32.
    pub wide_head: bool,
    /// Bytes that the build will take.
    pub bytes: u64,
}

impl Footprint {
    pub(crate) fn new(
        files: &ModelFiles,
        kind: Kind,
        spec: &CacheSpec,
        batch_tokens: usize,
    ) -> Footprint {
        let parts = files.part_bytes(kind);
        let element = kind.elt_size_in_bytes() as u64;
        let (width, vocab) = (spec.teacher.hidden_size as u64, spec.vocab_size as u64);
        let block = parts.blocks.iter().copied().max().unwrap_or(0);
        let tokens = batch_tokens.max(spec.max_len) as u64;
        let longest = spec.max_len as u64;
        let head_dim = files.config().head_dim().max(1) as u64;
        // A block of p parameters computes p / D values a token; attention by products adds T scores a head, twice.
        let batch = tokens * (block / width.max(1)) * 2
            + 2 * tokens * longest.min(PRODUCT_POSITIONS) * (width / head_dim) * element;
        let kept_width: u64 = spec.layers.iter().map(|layer| layer.width as u64).sum();
        let inner = spec
            .layers
            .iter()
            .filter(|layer| layer.layer < spec.teacher.num_layers)
            .count() as u64;
        let parts_of_head = HostParts {
            vocab,
            width,
            wide_head: if kind == Kind::Float {
                0
            } else {
                vocab * width * 4
            },
        };
        let shard_positions = spec
            .data
            .positions
            .min(spec.sequences_per_shard as u64 * longest);
        Footprint {
            weights: files.num_parameters() * element,
            block,
            head: parts.head,
            wide_head: parts_of_head.wide_head,
            embedding: parts.embedding,
            batch,
            chunk: 2 * HEAD_ROWS as u64 * vocab * 4
                + (HEAD_SLICE_BYTES as u64).min(vocab * width * 4),
            shards: SHARDS_IN_MEMORY
                * shard_positions
                * (kept_width * 4 + spec.top_k as u64 * 8 + 48),
            // A code that is there already needs no fit.
            fitting: if spec.tier == Tier::Compact && spec.code.is_none() {
                parts_of_head.fitting(spec.data.positions)
            } else {
                0
            },
            measuring: parts_of_head
                .comparing(spec.tier)
                .max(parts_of_head.wide_head + 3 * block + batch.max(parts.embedding)),
            position: width * element * (1 + inner),
            batch_positions: tokens,
        }
    }

    /// Bytes of a build with the whole teacher in memory.
    pub fn in_memory(&self) -> u64 {
        let building = self.wide_head + self.batch.max(self.chunk) + self.shards;
        PROGRAM + self.weights + building.max(self.fitting).max(self.measuring)
    }

    /// Bytes of a build layer by layer, activations apart.
    fn layered(&self, wide_head: bool) -> u64 {
        let head = self.head + if wide_head { self.wide_head } else { 0 } + self.chunk;
        // One block computes, one is ready.
        let blocks = 2 * self.block + self.batch.max(self.embedding);
        PROGRAM + self.shards + head.max(blocks)
    }

    /// Bytes of what comes before and after the pass, on a CPU.
    fn beside_the_pass(&self) -> u64 {
        PROGRAM + self.head + self.fitting.max(self.measuring)
    }

    /// The least that a build layer by layer takes: one batch in a block of positions.
    pub fn least(&self) -> u64 {
        (self.layered(false) + self.position * self.batch_positions).max(self.beside_the_pass())
    }

    /// Bytes before the first position.
    pub(crate) fn loaded(&self, plan: &MemoryPlan) -> u64 {
        PROGRAM + if plan.layered { 0 } else { self.weights }
    }

    /// Bytes of the fit and of the comparison, where the pass goes as `plan` says.
    pub(crate) fn of_phases(&self, plan: &MemoryPlan) -> (u64, u64) {
        let weights = if plan.layered {
            self.head
        } else {
            self.weights
        };
        (
            PROGRAM + weights + self.fitting,
            PROGRAM + weights + self.measuring,
        )
    }

    /// How the build goes within the budget of a placement.
    ///
    /// # Errors
    /// Not even one batch fits.
    pub fn plan(&self, placement: &Placement) -> Result<MemoryPlan> {
        let Some(budget) = placement
            .memory_budget
            .filter(|budget| *budget < self.in_memory())
        else {
            return Ok(MemoryPlan {
                layered: false,
                block_positions: 0,
                wide_head: true,
                bytes: self.in_memory(),
            });
        };
        if placement.devices.len() > 1 {
            return Err(Error::Option {
                problem: "layers are placed across devices only where all of them fit".into(),
                hint: "give one --device with --memory-budget, or several without".into(),
            });
        }
        let on_device = placement
            .devices
            .iter()
            .any(|device| *device != Device::Cpu);
        let wide_head = self.layered(true) + self.position * self.batch_positions <= budget;
        let fixed = self.layered(wide_head);
        // Activations in a file leave one batch in memory.
        let waiting = if placement.spill.is_some() && !on_device {
            self.position * self.batch_positions
        } else {
            budget.saturating_sub(fixed)
        };
        // On a GPU neither happens in its memory.
        let beside = if on_device { 0 } else { self.beside_the_pass() };
        if (fixed + self.position * self.batch_positions).max(beside) > budget {
            return Err(Error::Option {
                problem: format!(
                    "{} MiB of memory are too little: even layer by layer the build takes {} MiB",
                    budget >> 20,
                    self.least().div_ceil(1 << 20)
                ),
                hint: "give more with --memory-budget, a smaller --max-len, or fewer --layers"
                    .into(),
            });
        }
        let block_positions = if placement.spill.is_some() {
            MOST_BLOCK_POSITIONS
        } else {
            (waiting / self.position.max(1)).min(MOST_BLOCK_POSITIONS)
        };
        Ok(MemoryPlan {
            layered: true,
            block_positions: block_positions as usize,
            wide_head,
            bytes: beside.max(
                fixed
                    + if placement.spill.is_some() {
                        waiting
                    } else {
                        self.position * block_positions
                    },
            ),
        })
    }
}

/// Sizes that fit and comparison follow from.
struct HostParts {
    vocab: u64,
    width: u64,
    wide_head: u64,
}

impl HostParts {
    /// Hidden states of the sample in f64 and f32, the head twice more for the metric, matrices [D, D].
    fn fitting(&self, positions: u64) -> u64 {
        let sample = positions.min((FIT_POSITIONS + HELD_OUT_POSITIONS) as u64);
        self.wide_head
            + 2 * self.vocab * self.width * 4
            + sample * self.width * 4 * FIT_COPIES
            + self.width * self.width * 8 * FIT_MATRICES
    }

    /// Logits of some positions of three kinds with what is made of them, gradients by temperature.
    fn comparing(&self, tier: Tier) -> u64 {
        // The head centred, or times the basis.
        let centred = if tier == Tier::Sparse {
            0
        } else {
            self.vocab * self.width * 4
        };
        self.wide_head + centred + fidelity::bytes(self.vocab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn footprint() -> Footprint {
        Footprint {
            weights: 13_000 * MIB,
            block: 400 * MIB,
            head: 250 * MIB,
            wide_head: 500 * MIB,
            embedding: 250 * MIB,
            batch: 300 * MIB,
            chunk: 320 * MIB,
            shards: 600 * MIB,
            fitting: 0,
            measuring: 700 * MIB,
            position: 8192,
            batch_positions: 2048,
        }
    }

    fn plan(budget: Option<u64>, spill: bool) -> Result<MemoryPlan> {
        footprint().plan(&Placement {
            devices: vec![Device::Cpu],
            memory_budget: budget.map(|mib| mib * MIB),
            spill: spill.then(|| "/spill".into()),
        })
    }

    #[test]
    fn the_budget_decides_how_the_teacher_is_read() {
        assert!(!plan(None, false).unwrap().layered);
        assert!(!plan(Some(20_000), false).unwrap().layered);
        let four_gib = plan(Some(4096), false).unwrap();
        assert!(four_gib.layered && four_gib.wide_head);
        assert!(four_gib.bytes <= 4096 * MIB);
        assert_eq!(four_gib.block_positions, MOST_BLOCK_POSITIONS as usize);
        let tight = plan(Some(2200), false).unwrap();
        assert!(
            tight.block_positions >= 2048 && tight.block_positions < 20_000,
            "{tight:?}"
        );
        assert!(tight.bytes <= 2200 * MIB);
        let spilled = plan(Some(2200), true).unwrap();
        assert_eq!(spilled.block_positions, MOST_BLOCK_POSITIONS as usize);
        assert!(spilled.bytes <= 2200 * MIB);
    }

    #[test]
    fn too_little_is_refused_with_what_is_needed() {
        let error = plan(Some(1000), false).unwrap_err();
        let least = footprint().least().div_ceil(MIB);
        assert!(
            error.to_string().contains(&format!("takes {least} MiB")),
            "{error}"
        );
        assert!(plan(Some(least), false).unwrap().layered);
    }
}
