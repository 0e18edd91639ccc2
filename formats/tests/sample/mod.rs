//! Made-up caches for tests: small, deterministic, with consistent statistics.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::path::Path;

use caskd_formats::{
    Basis, BasisParts, CacheSpec, CacheWriter, CodeSpec, CodeTarget, Coefficients, DataFile,
    DataInfo, HeadDtype, HeadWeights, HiddenCodec, HiddenState, LayerSpec, Manifest, Sequence,
    Statistics, SymbolCounts, TeacherInfo, Tier, TokenizerInfo, TopK,
};

/// SplitMix64.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Roughly normal.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() * 2.0 - 6.0 + 0.0
    }
}

#[derive(Clone, Debug)]
pub struct Shape {
    pub tier: Tier,
    pub top_k: usize,
    pub vocab_size: usize,
    pub layers: Vec<(u32, usize, HiddenCodec)>,
    pub lengths: Vec<usize>,
    pub per_shard: usize,
}

pub const NUM_LAYERS: u32 = 4;

pub struct Sample {
    pub spec: CacheSpec,
    pub sequences: Vec<Sequence>,
    pub head: Option<Vec<u8>>,
    pub basis: Option<Basis>,
}

/// A compact cache: levels small and large, gaps short and long, ids the tables know and others.
pub fn compact(vocab_size: usize, top_k: usize, lengths: Vec<usize>) -> Sample {
    let (width, rank) = (6, 4);
    let mut sample = sample(&Shape {
        tier: Tier::Sparse,
        top_k,
        vocab_size,
        layers: vec![(1, width, HiddenCodec::Int8)],
        lengths,
        per_shard: 2,
    });
    let mut noise = Noise(11);
    for sequence in &mut sample.sequences {
        let positions = sequence.token_ids.len();
        let levels = (0..positions * rank).map(|index| {
            let spread = [3000.0, 40.0, 2.0, 0.3][index % rank];
            (noise.normal() * spread).clamp(-32000.0, 32000.0) as i16
        });
        sequence.coefficients = Some(Coefficients {
            rank,
            levels: levels.collect(),
        });
        let (Some(statistics), Some(found)) = (&mut sequence.statistics, &mut sequence.top_k)
        else {
            continue;
        };
        for (row, max) in found.logits.chunks_mut(top_k).zip(&mut statistics.max) {
            *max = (*max * 512.0).round() / 512.0;
            let mut steps = 0.0;
            for (place, logit) in row.iter_mut().enumerate() {
                *logit = *max - steps / 32.0;
                steps += (noise.unit() * if place == 1 { 400.0 } else { 20.0 }).floor();
            }
        }
        for min in &mut statistics.min {
            *min -= 100.0;
        }
    }
    let fitted = &sample.sequences[..sample.sequences.len().div_ceil(2)];
    let levels: Vec<i16> = fitted
        .iter()
        .flat_map(|sequence| sequence.coefficients.as_ref().unwrap().levels.clone())
        .collect();
    let mut joined = TopK {
        k: top_k,
        ..TopK::default()
    };
    for found in fitted.iter().filter_map(|sequence| sequence.top_k.as_ref()) {
        joined.ids.extend(&found.ids);
        joined.logits.extend(&found.logits);
    }
    let counts = SymbolCounts::of(&levels, rank, &joined, vocab_size);
    let mut matrix = |size: usize| (0..size).map(|_| noise.normal()).collect::<Vec<f32>>();
    let parts = BasisParts {
        tail_shift: 0.25,
        mean: matrix(width),
        analysis: matrix(rank * width),
        synthesis: matrix(rank * width)
            .iter()
            .map(|value| value * 0.001)
            .collect(),
    };
    let basis = Basis::new(parts, &counts).unwrap();
    sample.head = Some(
        matrix(vocab_size * width)
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    );
    sample.spec.tier = Tier::Compact;
    sample.spec.code = Some(CodeSpec {
        target: CodeTarget::Rate(130),
        fitted_positions: 1,
        basis: basis.to_file().1,
    });
    sample.basis = Some(basis);
    sample
}

/// A cache of every column, three shards, a few kilobytes.
pub fn small() -> Sample {
    sample(&Shape {
        tier: Tier::Exact,
        top_k: 3,
        vocab_size: 11,
        layers: vec![(2, 5, HiddenCodec::F16), (NUM_LAYERS, 4, HiddenCodec::Int8)],
        lengths: vec![1, 7, 3, 5, 2],
        per_shard: 2,
    })
}

pub fn sample(shape: &Shape) -> Sample {
    let mut noise = Noise(7);
    let sequences: Vec<Sequence> = shape
        .lengths
        .iter()
        .enumerate()
        .map(|(index, length)| sequence(shape, index, *length, &mut noise))
        .collect();
    let targets = |sequence: &Sequence| {
        sequence
            .loss_mask
            .iter()
            .skip(1)
            .filter(|target| **target)
            .count() as u64
    };
    let spec = CacheSpec {
        tier: shape.tier,
        top_k: shape.top_k,
        vocab_size: shape.vocab_size,
        layers: shape
            .layers
            .iter()
            .map(|(layer, width, codec)| LayerSpec {
                layer: *layer,
                width: *width,
                codec: *codec,
            })
            .collect(),
        code: None,
        sequences_per_shard: shape.per_shard,
        max_len: 1 << 16,
        teacher: TeacherInfo {
            name: "sample".to_owned(),
            architecture: "llama".to_owned(),
            digest: "00".repeat(32),
            compute_dtype: "f32".to_owned(),
            num_layers: NUM_LAYERS,
            hidden_size: shape.layers.last().map_or(8, |layer| layer.1),
            num_parameters: 1234,
        },
        tokenizer: TokenizerInfo {
            fingerprint: "11".repeat(32),
            vocab_size: shape.vocab_size,
        },
        data: DataInfo {
            digest: "22".repeat(32),
            files: vec![DataFile {
                name: "data.jsonl".to_owned(),
                bytes: 99,
                digest: "33".repeat(32),
            }],
            sequences: sequences.len() as u64,
            positions: shape.lengths.iter().map(|length| *length as u64).sum(),
            targets: sequences.iter().map(targets).sum(),
            truncated: 0,
            skipped: 1,
            prompt_form: "alpaca".to_owned(),
            ..DataInfo::default()
        },
    };
    let head = (shape.tier == Tier::Exact).then(|| {
        let width = shape.layers.last().unwrap().1;
        (0..shape.vocab_size * width)
            .flat_map(|_| noise.normal().to_le_bytes())
            .collect()
    });
    Sample {
        spec,
        sequences,
        head,
        basis: None,
    }
}

fn sequence(shape: &Shape, index: usize, length: usize, noise: &mut Noise) -> Sequence {
    let (k, vocab) = (shape.top_k, shape.vocab_size);
    let mut statistics = Statistics::default();
    let mut top_k = TopK {
        k,
        ..TopK::default()
    };
    for _ in 0..length {
        let max = noise.normal() * 4.0 + 15.0;
        let mut logit = max;
        let first = noise.below(vocab);
        // A stride that is coprime to the vocabulary visits every id once.
        let stride = (1..=vocab)
            .find(|stride| gcd(*stride + vocab / 3, vocab) == 1)
            .unwrap()
            + vocab / 3;
        for rank in 0..k {
            top_k.ids.push(((first + rank * stride) % vocab) as u32);
            top_k.logits.push(logit);
            logit -= noise.unit() * noise.unit() * 0.7;
        }
        statistics.max.push(max);
        statistics.min.push(logit - 5.0);
        statistics.mean.push(f32::midpoint(max, logit - 5.0));
        statistics.std.push(noise.unit() + 0.5);
        statistics
            .log_sum_exp
            .push(max + noise.unit() * (vocab as f32).ln());
    }
    sort_ties(&mut top_k);
    let token_ids = (0..length).map(|_| noise.below(vocab) as u32).collect();
    let hidden = shape.layers.iter().map(|(layer, width, _)| HiddenState {
        layer: *layer,
        width: *width,
        values: (0..length * width).map(|_| noise.normal()).collect(),
    });
    Sequence {
        source: format!("data.jsonl:{}", index + 1),
        token_ids,
        loss_mask: (0..length).map(|position| position * 2 > length).collect(),
        statistics: Some(statistics),
        top_k: (k > 0).then_some(top_k),
        hidden: hidden.collect(),
        coefficients: None,
    }
}

/// Of equal logits the lower token id comes first.
pub fn sort_ties(top_k: &mut TopK) {
    let k = top_k.k.max(1);
    for (logits, ids) in top_k.logits.chunks(k).zip(top_k.ids.chunks_mut(k)) {
        let mut first = 0;
        for tie in logits.chunk_by(|a, b| a == b) {
            ids[first..first + tie.len()].sort_unstable();
            first += tie.len();
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Sample {
    pub fn shard(&self, shard: usize) -> &[Sequence] {
        let size = self.spec.sequences_per_shard;
        &self.sequences[shard * size..((shard + 1) * size).min(self.sequences.len())]
    }

    /// What a builder does, shards that are done left out.
    pub fn fill(&self, writer: &mut CacheWriter) -> caskd_formats::Result<()> {
        if let Some(basis) = &self.basis {
            writer.write_basis(basis.clone())?;
        }
        for shard in 0..self.spec.num_shards() {
            if !writer.is_done(shard) {
                writer.write_shard(shard, self.shard(shard))?;
            }
        }
        if let Some(bytes) = &self.head {
            let width = self.spec.teacher.hidden_size;
            let vocab_size = self.spec.vocab_size;
            writer.write_head(&HeadWeights {
                vocab_size,
                width,
                dtype: HeadDtype::F32,
                bytes,
            })?;
        }
        Ok(())
    }

    pub fn write(&self, dir: &Path) -> Manifest {
        let mut writer = CacheWriter::open(dir, &self.spec, false).unwrap();
        self.fill(&mut writer).unwrap();
        writer.finish().unwrap()
    }

    /// Compares a decoded sequence with the original, within what the codecs promise.
    pub fn assert_same(&self, original: &Sequence, decoded: &Sequence) {
        assert_eq!(original.source, decoded.source);
        assert_eq!(original.token_ids, decoded.token_ids);
        assert_eq!(original.loss_mask, decoded.loss_mask);
        assert_eq!(original.statistics, decoded.statistics);
        match (&original.top_k, &decoded.top_k) {
            (None, None) => {}
            (Some(a), Some(b)) => {
                assert_eq!((a.k, &a.ids, a.logits.len()), (b.k, &b.ids, b.logits.len()));
                for (a, b) in a.logits.chunks(a.k).zip(b.logits.chunks(b.k)) {
                    assert_eq!(a[0], b[0]);
                    for (x, y) in a.iter().zip(b) {
                        let distance = (a[0] - x).min(65504.0);
                        let close = (a[0] - y - distance).abs()
                            <= distance / 2048.0 + a[0].abs() * 1e-6 + 1e-7;
                        assert!(
                            close || *x == f32::NEG_INFINITY && *y == *x,
                            "{x} came back as {y}"
                        );
                    }
                }
            }
            _ => panic!("one has a top-k, the other has not"),
        }
        assert_eq!(original.hidden.len(), decoded.hidden.len());
        for ((a, b), layer) in original
            .hidden
            .iter()
            .zip(&decoded.hidden)
            .zip(&self.spec.layers)
        {
            assert_eq!(
                (a.layer, a.width, a.values.len()),
                (b.layer, b.width, b.values.len())
            );
            let absmax = a
                .values
                .iter()
                .fold(0.0_f32, |most, value| most.max(value.abs()));
            for (x, y) in a.values.iter().zip(&b.values) {
                let allowed = match layer.codec {
                    // The shard's largest value may lie in another sequence: sample values are below 7.
                    HiddenCodec::Int8 => absmax.max(7.0) / 127.0 * 0.51,
                    HiddenCodec::F16 => x.abs() / 2000.0 + 1e-7,
                };
                assert!((x - y).abs() <= allowed, "{x} came back as {y}");
            }
        }
    }
}

/// Every file below a folder with its bytes, in order.
pub fn tree(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(dir)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}
