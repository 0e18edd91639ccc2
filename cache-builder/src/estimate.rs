//! What a build will take, before it begins: bytes by tier from sizes and measured constants, memory from the sizes of its
//! parts, time from a short measurement of one layer and of the head.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use caskd_formats::{CacheSpec, CodeTarget, HiddenCodec, Tier};
use caskd_models::{LoadOptions, ModelFiles, linear};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::build::{Progress, Stage};
use crate::fidelity::{ROWS, SAMPLE_POSITIONS, rehearse};
use crate::footprint::{Footprint, MemoryPlan};
use crate::options::{BuildOptions, USUAL_TOP_K};
use crate::prepare::{cache_spec, check_options, read_data, warn_beyond_context};
use crate::statistics::summarize_logits;
use crate::teacher_pass::{HEAD_ROWS, padded_shapes};
use crate::transform_fit::{FIT_POSITIONS, HELD_OUT_POSITIONS};

/// Bytes a position that every tier takes: ids, mask, five statistics, keys, checksums. Measured on SmolLM2-135M and
/// instruction records (docs/lab-log.md), as are the constants that follow.
const NATIVE_BYTES: f64 = 16.8;

/// More, where an id needs more than 16 bits.
const WIDE_ID_BYTES: f64 = 0.6;

/// Bytes of one top-k entry.
const TOP_K_BYTES: f64 = 2.56;

/// Bytes of one value of a hidden state.
const INT8_BYTES: f64 = 0.87;
const F16_BYTES: f64 = 2.0;

/// Seconds that the fit of a code takes beside its pass at width 576, vocabulary 49,152 and 18,432 positions, on two cores
/// of an EPYC: of the trials of steps and K, which grow with positions and width; of the head's products, with its size and
/// the width; of the decompositions, with the cube of the width.
const FIT_TRIAL_SECONDS: f64 = 12.0;
const FIT_HEAD_SECONDS: f64 = 4.0;
const FIT_CUBE_SECONDS: f64 = 0.5;

/// How much longer positions take in sequences that go through the layers one by one, each on a thread.
const SINGLY: f64 = 1.1;

/// Positions that are measured, at most.
const MEASURED_POSITIONS: usize = 2048;

/// Bytes of a cache of one tier.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TierEstimate {
    /// Bytes a position, LM head and basis apart.
    pub bytes_per_position: f64,
    /// Bytes of all positions.
    pub shard_bytes: u64,
    /// Bytes of LM head and basis, once a cache.
    pub shared_bytes: u64,
}

/// How fast one layer and the head were.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Measurement {
    /// Positions that were measured, padding included.
    pub positions: usize,
    /// Seconds of these positions in the layer that was measured.
    pub layer_seconds: f64,
    /// Layers of the teacher.
    pub layers: usize,
    /// Seconds of these positions in LM head and statistics.
    pub head_seconds: f64,
    /// Seconds until the layer's weights were read.
    pub read_seconds: f64,
    /// Seconds of these positions in the comparison of a cache with the teacher, passes apart.
    pub comparison_seconds: f64,
}

/// What one stage of a build is expected to take.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PhaseEstimate {
    /// The stage; reading includes the loading of the teacher.
    pub phase: Stage,
    /// Seconds, one machine.
    pub seconds: f64,
    /// Bytes of memory, the teacher's included.
    pub memory_bytes: u64,
}

/// What a build is expected to take.
#[derive(Debug, Clone, Serialize)]
pub struct Estimate {
    /// Sequences of the data.
    pub sequences: u64,
    /// Their positions.
    pub positions: u64,
    /// Positions that a loss may ask for.
    pub targets: u64,
    /// Positions that the teacher computes beside them, to fill batches.
    pub padding: u64,
    /// The tier that the options ask for.
    pub tier: Tier,
    /// Bytes by tier, with the options' K and layers.
    pub tiers: BTreeMap<&'static str, TierEstimate>,
    /// Bytes of memory by part.
    pub footprint: Footprint,
    /// Bytes of memory with the whole teacher in it.
    pub in_memory_bytes: u64,
    /// The least that a build layer by layer takes.
    pub least_bytes: u64,
    /// How the build goes within the budget.
    pub memory: MemoryPlan,
    /// What the time follows from.
    pub measurement: Measurement,
    /// Positions a second.
    pub tokens_per_second: f64,
    /// The stages that the build will go through.
    pub phases: Vec<PhaseEstimate>,
    /// Seconds of all of them.
    pub seconds: f64,
}

/// Estimates the build that `options` ask for; `None` when stopped. Reads the data and one layer of the teacher; writes nothing.
///
/// # Errors
/// Bad data, options that don't fit the teacher, a budget that is too small.
pub fn estimate(
    options: &BuildOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Option<Estimate>> {
    check_options(options)?;
    let files = ModelFiles::open(&options.teacher)?;
    let started = Instant::now();
    let Some(data) = read_data(options, &files, stop, progress)? else {
        return Ok(None);
    };
    let reading_seconds = started.elapsed().as_secs_f64();
    warn_beyond_context(&files, &data.sequences);
    let shapes = padded_shapes(&data.sequences, options.batch_tokens);
    let mut spec = cache_spec(options, &files, String::new(), data.info)?;
    if options.tier == Tier::Compact && options.top_k.is_none() {
        spec.top_k = USUAL_CODE_K.min(spec.vocab_size);
    }
    let mut footprint = Footprint::new(&files, options.kind, &spec, options.batch_tokens);
    if !options.fidelity {
        footprint.measuring = 0;
    }
    let memory = footprint.plan(&options.placement)?;
    let measurement = tch::no_grad(|| measure(&files, options, &shapes))?;

    let padded: u64 = shapes
        .iter()
        .map(|(rows, longest)| (rows * longest) as u64)
        .sum();
    let positions = spec.data.positions;
    let building = measurement.pass_seconds(padded, &memory);
    let tokens_per_second = positions as f64 / building.max(1e-9);
    let (fitting_bytes, measuring_bytes) = footprint.of_phases(&memory);
    let mut phases = vec![PhaseEstimate {
        phase: Stage::Reading,
        // Weights are read once for their digest.
        seconds: reading_seconds
            + measurement.reading_seconds() * if memory.layered { 1.0 } else { 2.0 },
        memory_bytes: footprint.loaded(&memory),
    }];
    if options.tier == Tier::Compact {
        let sample = positions.min((FIT_POSITIONS + HELD_OUT_POSITIONS) as u64);
        phases.push(PhaseEstimate {
            phase: Stage::Fitting,
            seconds: sample as f64 / tokens_per_second + fit_seconds(&spec, sample),
            memory_bytes: fitting_bytes,
        });
    }
    phases.push(PhaseEstimate {
        phase: Stage::Building,
        seconds: building,
        memory_bytes: memory.bytes,
    });
    if options.fidelity {
        let sample = positions.min(SAMPLE_POSITIONS as u64) as f64;
        let computing = measurement.layer_seconds * measurement.layers as f64;
        let passes = 2.0 * SINGLY * sample / measurement.positions as f64 * computing;
        let reading = if memory.layered {
            measurement.reading_seconds()
        } else {
            0.0
        };
        let share = sample / measurement.positions as f64;
        phases.push(PhaseEstimate {
            phase: Stage::Measuring,
            seconds: passes + reading + share * measurement.comparison_seconds,
            memory_bytes: measuring_bytes,
        });
    }
    Ok(Some(Estimate {
        sequences: spec.data.sequences,
        positions,
        targets: spec.data.targets,
        padding: padded - positions,
        tier: options.tier,
        tiers: tiers(options, &spec)?,
        footprint,
        in_memory_bytes: footprint.in_memory(),
        least_bytes: footprint.least(),
        memory,
        measurement,
        tokens_per_second,
        seconds: phases.iter().map(|phase| phase.seconds).sum(),
        phases,
    }))
}

/// Seconds of a fit beside its pass.
fn fit_seconds(spec: &CacheSpec, sample: u64) -> f64 {
    let width = spec.teacher.hidden_size as f64 / 576.0;
    let positions = sample as f64 / (FIT_POSITIONS + HELD_OUT_POSITIONS) as f64;
    let vocab = spec.vocab_size as f64 / 49_152.0;
    FIT_TRIAL_SECONDS * positions * width
        + FIT_HEAD_SECONDS * vocab * width * width
        + FIT_CUBE_SECONDS * width.powi(3)
}

impl Measurement {
    /// Seconds until all weights are read once.
    fn reading_seconds(&self) -> f64 {
        self.read_seconds * self.layers as f64
    }

    /// Seconds of the teacher for so many positions.
    fn pass_seconds(&self, positions: u64, memory: &MemoryPlan) -> f64 {
        let passes = positions as f64 / self.positions as f64;
        let computing = passes * self.layer_seconds * self.layers as f64;
        let mut seconds = computing + passes * self.head_seconds;
        if memory.layered {
            // Reading hides behind computing where a block of positions is large enough.
            let blocks = (positions as f64 / memory.block_positions.max(1) as f64).ceil();
            seconds += blocks * (self.reading_seconds() - computing / blocks.max(1.0)).max(0.0);
        }
        seconds
    }
}

/// K of the compact tier, which the fit chooses among 4, 8 and 16.
const USUAL_CODE_K: usize = 8;

fn tiers(options: &BuildOptions, spec: &CacheSpec) -> Result<BTreeMap<&'static str, TierEstimate>> {
    let width = spec.teacher.hidden_size as f64;
    let wide = if spec.vocab_size > 1 << 16 {
        WIDE_ID_BYTES
    } else {
        0.0
    };
    // The usual layers are not the same in all tiers.
    let layers = |tier| -> Result<f64> {
        let layers = options.layers.resolve(
            spec.teacher.num_layers,
            spec.teacher.hidden_size,
            tier,
            options.hidden_codec,
        )?;
        let bytes = layers.iter().map(|layer| {
            let value = match layer.codec {
                HiddenCodec::Int8 => INT8_BYTES,
                HiddenCodec::F16 => F16_BYTES,
            };
            layer.width as f64 * value
        });
        Ok(bytes.sum())
    };
    let top_k = options.top_k.unwrap_or(USUAL_TOP_K.min(spec.vocab_size)) as f64;
    let entries = NATIVE_BYTES + wide + top_k * (TOP_K_BYTES + wide);
    let sparse = entries + layers(Tier::Sparse)?;
    let exact = entries + layers(Tier::Exact)?;
    let compact = layers(Tier::Compact)?
        + match options.code_target {
            CodeTarget::Rate(bytes) => f64::from(bytes),
            // Measured at two points: 202 bytes at 0.014 nats, 114 at 0.076; a bit a coefficient for a factor of four.
            CodeTarget::DistortionMicronats(nats) => {
                (202.0 - 52.0 * (f64::from(nats) * 1e-6 / 0.014).ln()).max(40.0)
            }
        };
    let head = (spec.vocab_size as f64 * width * 2.0) as u64;
    // Mean, analysis and synthesis in f32; the rank is at most the width.
    let basis = (width * (2.0 * width + 1.0) * 4.0) as u64;
    let of = |bytes_per_position: f64, shared_bytes: u64| TierEstimate {
        bytes_per_position,
        shard_bytes: (bytes_per_position * spec.data.positions as f64) as u64,
        shared_bytes,
    };
    Ok(BTreeMap::from([
        ("sparse", of(sparse, 0)),
        ("compact", of(compact, head + basis)),
        ("exact", of(exact, head)),
    ]))
}

/// Runs one layer, and the head, over the batch shape in the middle of the data's.
fn measure(
    files: &ModelFiles,
    options: &BuildOptions,
    shapes: &[(usize, usize)],
) -> Result<Measurement> {
    let device = options
        .placement
        .devices
        .first()
        .copied()
        .unwrap_or(Device::Cpu);
    let load = LoadOptions {
        device,
        kind: options.kind,
    };
    let config = files.config();
    let layers = config.num_layers();
    let (rows, longest) = shapes[shapes.len() / 2];
    let rows = rows.min((MEASURED_POSITIONS / longest.max(1)).max(1));
    let positions = rows * longest;
    let shape = (rows as i64, longest as i64);

    let reading = Instant::now();
    let block = files.load_block(layers / 2, &load)?;
    let read_seconds = reading.elapsed().as_secs_f64();
    let context = files.context(shape, &load);
    // Small values of no meaning: a layer's time does not depend on them.
    let width = config.hidden_size() as i64;
    let x = (Tensor::arange(positions as i64 * width, (Kind::Float, device)).sin() * 0.1)
        .view([positions as i64, width])
        .to_kind(options.kind);
    let layer_seconds = best_of(3, device, || {
        let _ = block.forward(&x, &context);
    });
    drop(block);

    let vocab = config.vocab_size();
    let head = files.load_head(0..vocab, &load)?;
    let hidden = x
        .narrow(0, 0, HEAD_ROWS.min(positions as i64))
        .to_kind(Kind::Float);
    let mut logits = Vec::new();
    // A part of the head is enough: both product and statistics grow with its rows.
    let part = vocab.min(1 << 16);
    let weights = head.narrow(0, 0, part as i64).to_kind(Kind::Float);
    let measured_rows = hidden.size()[0] as usize;
    let top_k = options.top_k.unwrap_or(USUAL_TOP_K).min(part);
    let chunk_seconds = best_of(2, device, || {
        let product = linear(&hidden, &weights, None)
            .to_device(Device::Cpu)
            .contiguous();
        logits.resize(measured_rows * part, 0.0);
        product.copy_data(&mut logits, measured_rows * part);
        let mut kept = caskd_formats::TopK {
            k: top_k,
            ..caskd_formats::TopK::default()
        };
        // Random weights or not, these logits are finite; the outcome is not used.
        let _ = summarize_logits(
            &logits,
            part,
            &mut caskd_formats::Statistics::default(),
            &mut kept,
        );
    });
    let of_vocab = vocab as f64 / part as f64;
    let compared = hidden
        .narrow(0, 0, ROWS.min(hidden.size()[0]))
        .to_device(Device::Cpu);
    let comparison = rehearse(&compared, &weights.to_device(Device::Cpu))?;
    let share = positions as f64 / measured_rows as f64 * of_vocab;
    Ok(Measurement {
        positions,
        layer_seconds,
        layers,
        head_seconds: chunk_seconds * share,
        read_seconds,
        comparison_seconds: comparison * of_vocab * positions as f64 / compared.size()[0] as f64,
    })
}

/// The shortest of some runs after a first one; a GPU is waited for.
fn best_of(runs: usize, device: Device, mut run: impl FnMut()) -> f64 {
    let wait = || {
        if let Device::Cuda(index) = device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    run();
    wait();
    (0..runs)
        .map(|_| {
            let started = Instant::now();
            run();
            wait();
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
