//! The content of the golden caches: made from integers, so that it is the same everywhere and for ever. To change it is
//! to lose what the golden caches are for; a new format version gets a new folder instead.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::Path;

use caskd_formats::{
    CacheSpec, CacheWriter, DataFile, DataInfo, HeadDtype, HeadWeights, HiddenCodec, HiddenState,
    LayerSpec, Sequence, Statistics, TeacherInfo, Tier, TokenizerInfo, TopK,
};

/// Beyond 16 bits, so that token ids have a bit plane.
pub const VOCABULARY: usize = 70_000;
const EXACT_VOCABULARY: usize = 40;
const TOP_K: usize = 5;
const LENGTHS: [usize; 5] = [1, 9, 4, 17, 2];
const PER_SHARD: usize = 3;
const NUM_LAYERS: u32 = 4;

pub struct Golden {
    pub spec: CacheSpec,
    pub sequences: Vec<Sequence>,
    pub head: Option<Vec<u8>>,
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
    let is_exact = match tier {
        "sparse" => false,
        "exact" => true,
        other => panic!("no golden cache of tier {other}"),
    };
    let vocab_size = if is_exact {
        EXACT_VOCABULARY
    } else {
        VOCABULARY
    };
    let layers = if is_exact {
        vec![(2, 6, HiddenCodec::F16), (NUM_LAYERS, 8, HiddenCodec::Int8)]
    } else {
        vec![(1, 6, HiddenCodec::Int8), (3, 5, HiddenCodec::F16)]
    };
    let layers: Vec<LayerSpec> = layers
        .into_iter()
        .map(|(layer, width, codec)| LayerSpec {
            layer,
            width,
            codec,
        })
        .collect();
    let sequences: Vec<Sequence> = LENGTHS
        .iter()
        .enumerate()
        .map(|(index, length)| sequence(index, *length, vocab_size, &layers))
        .collect();
    let targets = sequences
        .iter()
        .flat_map(|sequence| sequence.loss_mask.iter().skip(1));
    let spec = CacheSpec {
        tier: if is_exact { Tier::Exact } else { Tier::Sparse },
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
    let head = is_exact.then(|| {
        let weights = 0..vocab_size * spec.teacher.hidden_size;
        let weights = weights.map(|index| mixed(index, 9, 9, 129) as f32 / 64.0 - 1.0);
        weights.flat_map(f32::to_le_bytes).collect()
    });
    Golden {
        spec,
        sequences,
        head,
    }
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
