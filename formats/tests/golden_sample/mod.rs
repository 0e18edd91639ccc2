//! The content of the golden caches: made from integers, so that it is the same everywhere and for ever. To change it is
//! to lose what the golden caches are for; a new format version gets a new folder instead.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::Path;

use caskd_formats::{
    Basis, BasisParts, CacheSpec, CacheWriter, CodeSpec, CodeTarget, Coefficients, DataFile,
    DataInfo, HeadDtype, HeadWeights, HiddenCodec, HiddenState, LayerSpec, Sequence, Statistics,
    SymbolCounts, TeacherInfo, Tier, TokenizerInfo, TopK,
};

/// Beyond 16 bits, so that token ids have a bit plane.
pub const VOCABULARY: usize = 70_000;
const EXACT_VOCABULARY: usize = 40;
const COMPACT_VOCABULARY: usize = 300;
const COMPACT_RANK: usize = 3;
const TOP_K: usize = 5;
const LENGTHS: [usize; 5] = [1, 9, 4, 17, 2];
const PER_SHARD: usize = 3;
const NUM_LAYERS: u32 = 4;

pub struct Golden {
    pub spec: CacheSpec,
    pub sequences: Vec<Sequence>,
    pub head: Option<Vec<u8>>,
    pub basis: Option<Basis>,
}

/// A number in 0..bound from some others.
fn mixed(a: usize, b: usize, c: usize, bound: usize) -> usize {
    let mut value = (a as u64) << 40 ^ (b as u64) << 20 ^ c as u64;
    for _ in 0..3 {
        value = value
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        value ^= value >> 29;
    }
    (value % bound as u64) as usize
}

pub fn golden(tier: &str) -> Golden {
    let (tier, vocab_size, layers) = match tier {
        "sparse" => (
            Tier::Sparse,
            VOCABULARY,
            vec![(1, 6, HiddenCodec::Int8), (3, 5, HiddenCodec::F16)],
        ),
        "exact" => (
            Tier::Exact,
            EXACT_VOCABULARY,
            vec![(2, 6, HiddenCodec::F16), (NUM_LAYERS, 8, HiddenCodec::Int8)],
        ),
        "compact" => (
            Tier::Compact,
            COMPACT_VOCABULARY,
            vec![(2, 6, HiddenCodec::Int8)],
        ),
        other => panic!("no golden cache of tier {other}"),
    };
    let layers: Vec<LayerSpec> = layers
        .into_iter()
        .map(|(layer, width, codec)| LayerSpec {
            layer,
            width,
            codec,
        })
        .collect();
    let mut sequences: Vec<Sequence> = LENGTHS
        .iter()
        .enumerate()
        .map(|(index, length)| sequence(index, *length, vocab_size, &layers))
        .collect();
    if tier == Tier::Compact {
        sequences.iter_mut().enumerate().for_each(make_compact);
    }
    let targets = sequences
        .iter()
        .flat_map(|sequence| sequence.loss_mask.iter().skip(1));
    let mut spec = CacheSpec {
        tier,
        top_k: TOP_K,
        vocab_size,
        code: None,
        sequences_per_shard: PER_SHARD,
        max_len: 32,
        teacher: TeacherInfo {
            name: "golden".to_owned(),
            architecture: "llama".to_owned(),
            digest: "00".repeat(32),
            compute_dtype: "f32".to_owned(),
            num_layers: NUM_LAYERS,
            hidden_size: layers.last().unwrap().width,
            num_parameters: 1,
        },
        tokenizer: TokenizerInfo {
            fingerprint: "11".repeat(32),
            vocab_size: vocab_size - 3,
        },
        data: DataInfo {
            digest: "22".repeat(32),
            files: vec![DataFile {
                name: "gold.jsonl".to_owned(),
                bytes: 100,
                digest: "33".repeat(32),
            }],
            sequences: LENGTHS.len() as u64,
            positions: LENGTHS.iter().map(|length| *length as u64).sum(),
            targets: targets.filter(|target| **target).count() as u64,
            truncated: 1,
            skipped: 2,
            prompt_form: "alpaca-v1".to_owned(),
            ..DataInfo::default()
        },
        layers,
    };
    let basis = (tier == Tier::Compact).then(|| basis(&sequences[3..], spec.teacher.hidden_size));
    spec.code = basis.as_ref().map(|basis| CodeSpec {
        target: CodeTarget::Rate(130),
        fitted_positions: 19,
        basis: basis.to_file().1,
    });
    let head = (tier != Tier::Sparse).then(|| {
        let weights = 0..vocab_size * spec.teacher.hidden_size;
        let weights = weights.map(|index| mixed(index, 9, 9, 129) as f32 / 64.0 - 1.0);
        weights.flat_map(f32::to_le_bytes).collect()
    });
    Golden {
        spec,
        sequences,
        head,
        basis,
    }
}

/// Coefficients of three sizes, gaps on the grid (one of them long), everything finite.
fn make_compact((index, sequence): (usize, &mut Sequence)) {
    let positions = sequence.token_ids.len();
    let levels = (0..positions * COMPACT_RANK).map(|at| {
        let bound = [3001, 41, 3][at % COMPACT_RANK];
        mixed(index, at, 4, bound) as i16 - bound as i16 / 2
    });
    sequence.coefficients = Some(Coefficients {
        rank: COMPACT_RANK,
        levels: levels.collect(),
    });
    let (Some(statistics), Some(top_k)) = (&mut sequence.statistics, &mut sequence.top_k) else {
        return;
    };
    for position in 0..positions {
        let max = statistics.max[position];
        statistics.min[position] = max - 400.0;
        statistics.mean[position] = max - 20.0;
        statistics.std[position] = 2.5;
        for rank in 1..TOP_K {
            let steps = if position == 1 {
                3000
            } else {
                mixed(index, position, 5, 9)
            };
            top_k.logits[position * TOP_K + rank] = max - (steps * rank) as f32 / 32.0;
        }
    }
}

/// Tables that know the later sequences only, so that the earlier ones have exceptions.
fn basis(fitted: &[Sequence], width: usize) -> Basis {
    let mut levels = Vec::new();
    let mut top_k = TopK {
        k: TOP_K,
        ..TopK::default()
    };
    for sequence in fitted {
        levels.extend_from_slice(&sequence.coefficients.as_ref().unwrap().levels);
        let own = sequence.top_k.as_ref().unwrap();
        top_k.ids.extend_from_slice(&own.ids);
        top_k.logits.extend_from_slice(&own.logits);
    }
    let counts = SymbolCounts::of(&levels, COMPACT_RANK, &top_k, COMPACT_VOCABULARY);
    let matrix = |size: usize, seed: usize| -> Vec<f32> {
        let values = (0..size).map(|index| mixed(index, seed, 7, 129) as f32 / 64.0 - 1.0);
        values.collect()
    };
    let parts = BasisParts {
        mean: matrix(width, 1),
        analysis: matrix(COMPACT_RANK * width, 2),
        synthesis: matrix(COMPACT_RANK * width, 3),
        tail_shift: 0.125,
    };
    Basis::new(parts, &counts).unwrap()
}

fn sequence(index: usize, length: usize, vocab_size: usize, layers: &[LayerSpec]) -> Sequence {
    let mut statistics = Statistics::default();
    let mut top_k = TopK {
        k: TOP_K,
        ..TopK::default()
    };
    for position in 0..length {
        let max = 4.0 + mixed(index, position, 1, 640) as f32 / 64.0;
        // Position 1 is one-hot, position 2 flat, position 3 has a tie: lower token ids first.
        let steps = match position {
            1 => [f32::INFINITY; TOP_K],
            2 => [0.0; TOP_K],
            3 => [0.0, 1.0, 1.0, 1.5, 2.25],
            _ => [0.0, 0.5, 0.75, 2.0, 6.0 + position as f32],
        };
        let first = mixed(index, position, 2, vocab_size - 7 * TOP_K);
        for (rank, step) in steps.into_iter().enumerate() {
            top_k.ids.push((first + 7 * rank) as u32);
            top_k.logits.push(if rank == 0 { max } else { max - step });
        }
        let (min, mean, std) = match position {
            1 => (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY),
            2 => (max, max, 0.0),
            _ => (max - 60.0, max - 9.0, 2.5),
        };
        statistics.max.push(max);
        statistics.min.push(min);
        statistics.mean.push(mean);
        statistics.std.push(std);
        statistics
            .log_sum_exp
            .push(max + 0.25 * position.min(8) as f32);
    }
    let hidden = layers.iter().map(|layer| HiddenState {
        layer: layer.layer,
        width: layer.width,
        values: (0..length * layer.width)
            .map(|at| mixed(index, at, layer.layer as usize, 257) as f32 / 64.0 - 2.0)
            .collect(),
    });
    Sequence {
        source: format!("gold.jsonl:{}", index + 1),
        token_ids: (0..length)
            .map(|position| mixed(index, position, 3, vocab_size - 3) as u32)
            .collect(),
        loss_mask: (0..length).map(|position| position % 3 != 0).collect(),
        statistics: Some(statistics),
        top_k: Some(top_k),
        hidden: hidden.collect(),
        coefficients: None,
    }
}

pub fn write(tier: &str, folder: &Path) {
    let golden = golden(tier);
    let mut writer = CacheWriter::open(folder, &golden.spec, false).unwrap();
    if let Some(basis) = golden.basis {
        writer.write_basis(basis).unwrap();
    }
    for (shard, sequences) in golden.sequences.chunks(PER_SHARD).enumerate() {
        writer.write_shard(shard, sequences).unwrap();
    }
    if let Some(bytes) = &golden.head {
        writer
            .write_head(&HeadWeights {
                vocab_size: golden.spec.vocab_size,
                width: golden.spec.teacher.hidden_size,
                dtype: HeadDtype::F32,
                bytes,
            })
            .unwrap();
    }
    writer.finish().unwrap();
}
