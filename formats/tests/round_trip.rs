//! What goes in comes out, within what each codec promises.
#![allow(clippy::unwrap_used)]

mod sample;

use caskd_formats::{Cache, Columns, HiddenCodec, Io, Sequence, Tier, verify};
use proptest::prelude::*;
use sample::{NUM_LAYERS, Sample, Shape, sample, small};

fn check(sample: &Sample) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    let manifest = sample.write(&dir);
    for io in [Io::Mmap, Io::Read] {
        let cache = Cache::open(&dir, io).unwrap();
        assert_eq!(*cache.manifest(), manifest);
        let rows = cache.rows().unwrap();
        assert_eq!(rows.len(), sample.sequences.len());
        for (row, original) in rows.iter().zip(&sample.sequences) {
            assert_eq!(row.positions as usize, original.token_ids.len());
            assert_eq!(
                row.split_hash,
                caskd_formats::split_hash(&original.token_ids)
            );
        }
        let targets: u64 = rows.iter().map(|row| u64::from(row.targets)).sum();
        assert_eq!(targets, manifest.data.targets);
        for shard in 0..manifest.shards.len() {
            let originals = sample.shard(shard);
            let order: Vec<u32> = (0..originals.len() as u32).collect();
            let decoded = cache
                .read(shard as u32, &order, &Columns::all(&manifest))
                .unwrap();
            for (original, decoded) in originals.iter().zip(&decoded) {
                sample.assert_same(original, decoded);
            }
        }
        let by_column = cache.bytes_by_column().unwrap();
        assert_eq!(
            by_column.values().sum::<u64>(),
            manifest.shards.iter().map(|info| info.bytes).sum::<u64>()
        );
    }
    let report = verify(&dir, true).unwrap();
    assert!(report.ok, "{report:?}");
}

fn sparse(top_k: usize, vocab_size: usize, lengths: &[usize]) -> Shape {
    Shape {
        tier: Tier::Sparse,
        top_k,
        vocab_size,
        layers: vec![],
        lengths: lengths.to_vec(),
        per_shard: 4,
    }
}

fn with_layer(codec: HiddenCodec, width: usize, lengths: &[usize]) -> Shape {
    Shape {
        layers: vec![(1, width, codec)],
        ..sparse(2, 64, lengths)
    }
}

#[test]
fn every_column_in_three_shards() {
    check(&small());
}

#[test]
fn one_entry_and_the_whole_vocabulary() {
    check(&sample(&sparse(1, 50, &[3, 1, 9])));
    check(&sample(&sparse(50, 50, &[3, 1, 9])));
    check(&sample(&sparse(1, 1, &[4])));
    check(&sample(&sparse(1, 200_000, &[4])));
}

#[test]
fn vocabularies_beyond_sixteen_bits() {
    for vocab_size in [65_535, 65_536, 65_537, 131_072, 131_073, 262_144, 1_000_003] {
        check(&sample(&sparse(5, vocab_size, &[2, 30])));
    }
    // One position is longer than a blob should be.
    check(&sample(&sparse(1_100_000, 1_100_000, &[2])));
}

#[test]
fn padded_heads_have_more_rows_than_the_tokenizer_has_tokens() {
    for vocab_size in [64, 128, 65_536] {
        let mut padded = sample(&sparse(5, vocab_size, &[2, 30]));
        padded.spec.tokenizer.vocab_size = vocab_size - 7;
        // Rows of the padding may be among the largest logits.
        let top_k = padded.sequences[0].top_k.as_mut().unwrap();
        for (rank, id) in top_k.ids[..5].iter_mut().enumerate() {
            *id = (vocab_size - 1 - rank * 2) as u32;
        }
        check(&padded);
    }
}

#[test]
fn an_exact_cache_without_top_k() {
    let layers = vec![(NUM_LAYERS, 6, HiddenCodec::F16)];
    check(&sample(&Shape {
        tier: Tier::Exact,
        layers,
        ..sparse(0, 20, &[5, 6])
    }));
}

#[test]
fn long_sequences_span_blobs() {
    check(&sample(&Shape {
        layers: vec![(1, 96, HiddenCodec::Int8), (2, 96, HiddenCodec::F16)],
        ..sparse(64, 70_000, &[32_768])
    }));
    check(&sample(&with_layer(HiddenCodec::Int8, 576, &[32_768, 1])));
}

#[test]
fn wide_states() {
    for codec in [HiddenCodec::Int8, HiddenCodec::F16] {
        check(&sample(&with_layer(codec, 8192, &[1, 700])));
    }
}

#[test]
fn many_rows_are_read_in_any_order_and_number() {
    let lengths: Vec<usize> = (0..200).map(|index| 1 + index * 7 % 40).collect();
    let shape = Shape {
        layers: vec![(1, 8, HiddenCodec::F16)],
        per_shard: 200,
        ..sparse(4, 300, &lengths)
    };
    let sample = sample(&shape);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    let manifest = sample.write(&dir);
    for io in [Io::Mmap, Io::Read] {
        let cache = Cache::open(&dir, io).unwrap();
        for rows in [
            vec![],
            vec![199],
            vec![5, 4, 3],
            vec![7, 7, 0, 199, 7],
            (0..200).rev().collect(),
            (0..200).step_by(9).collect(),
        ] {
            let decoded = cache.read(0, &rows, &Columns::all(&manifest)).unwrap();
            assert_eq!(decoded.len(), rows.len());
            for (row, decoded) in rows.iter().zip(&decoded) {
                sample.assert_same(&sample.sequences[*row as usize], decoded);
            }
        }
        assert!(cache.read(0, &[200], &Columns::default()).is_err());
        assert!(cache.read(1, &[0], &Columns::default()).is_err());
    }
}

#[test]
fn only_what_was_asked_for_is_decoded() {
    let sample = small();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    sample.write(&dir);
    let cache = Cache::open(&dir, Io::Mmap).unwrap();
    let read = |columns: &Columns| cache.read(0, &[1], columns).unwrap().remove(0);
    let bare = read(&Columns::default());
    assert!(bare.statistics.is_none() && bare.top_k.is_none() && bare.hidden.is_empty());
    let top_k = read(&Columns {
        top_k: true,
        ..Columns::default()
    });
    assert!(top_k.statistics.is_none() && top_k.top_k.is_some());
    let layer = read(&Columns {
        layers: vec![NUM_LAYERS],
        ..Columns::default()
    });
    assert_eq!(
        layer
            .hidden
            .iter()
            .map(|state| state.layer)
            .collect::<Vec<_>>(),
        [NUM_LAYERS]
    );
    let error = cache
        .read(
            0,
            &[1],
            &Columns {
                layers: vec![3],
                ..Columns::default()
            },
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the cache has no column hidden.3, it has top_k, hidden.2, hidden.4, statistics"
    );
}

#[test]
fn many_threads_read_one_cache() {
    let sample = small();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    let manifest = sample.write(&dir);
    for io in [Io::Mmap, Io::Read] {
        let cache = Cache::open(&dir, io).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for shard in 0..50 {
                        let decoded = cache
                            .read(shard % 2, &[1, 0], &Columns::all(&manifest))
                            .unwrap();
                        sample.assert_same(&sample.shard(shard as usize % 2)[1], &decoded[0]);
                    }
                });
            }
        });
    }
}

#[test]
fn minus_infinity_ties_and_flat_rows_survive() {
    let mut sample = sample(&sparse(6, 9, &[3]));
    let sequence = &mut sample.sequences[0];
    let logits = &mut sequence.top_k.as_mut().unwrap().logits;
    // A one-hot row, a flat row, and ties with a distance beyond f16.
    logits[1..6].fill(f32::NEG_INFINITY);
    let flat = logits[6];
    logits[6..12].fill(flat);
    let max = logits[12];
    logits[13..18].copy_from_slice(&[max, max - 1.0, max - 1.0, max - 1e6, f32::NEG_INFINITY]);
    sample::sort_ties(sequence.top_k.as_mut().unwrap());
    let statistics = sequence.statistics.as_mut().unwrap();
    (statistics.min[0], statistics.mean[0], statistics.std[0]) =
        (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY);
    (statistics.min[1], statistics.mean[1], statistics.std[1]) = (flat, flat, 0.0);
    statistics.min[2] = f32::NEG_INFINITY;
    check(&sample);
}

#[test]
fn huge_activations_of_first_tokens_cost_the_others_nothing() {
    let mut sample = sample(&with_layer(HiddenCodec::Int8, 16, &[64; 8]));
    for sequence in &mut sample.sequences {
        sequence.hidden[0].values[3] = 5000.0;
        sequence.hidden[0].values[9] = -30.5;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    let manifest = sample.write(&dir);
    let cache = Cache::open(&dir, Io::Mmap).unwrap();
    let decoded = cache.read(0, &[0], &Columns::all(&manifest)).unwrap();
    let (original, decoded) = (
        &sample.sequences[0].hidden[0].values,
        &decoded[0].hidden[0].values,
    );
    assert_eq!(decoded[3], 5000.0);
    let worst = original
        .iter()
        .zip(decoded)
        .fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(worst < 0.15, "{worst}");
}

#[test]
fn a_silent_channel_and_tiny_values() {
    let mut sample = sample(&with_layer(HiddenCodec::Int8, 4, &[10]));
    for row in sample.sequences[0].hidden[0].values.chunks_exact_mut(4) {
        row[1] = 0.0;
        row[2] = 1e-44;
    }
    check(&sample);
}

#[test]
fn the_same_sequences_give_the_same_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    small().write(&a.path().join("cache"));
    small().write(&b.path().join("elsewhere"));
    assert_eq!(
        sample::tree(&a.path().join("cache")),
        sample::tree(&b.path().join("elsewhere"))
    );
}

#[test]
fn logits_are_rebuilt() {
    let sample = small();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("cache");
    let manifest = sample.write(&dir);
    let cache = Cache::open(&dir, Io::Mmap).unwrap();
    let head = cache.head().unwrap().unwrap();
    assert_eq!(head.bytes(), sample.head.as_deref().unwrap());
    assert_eq!(head.bytes().as_ptr() as usize % 64, 0);
    let weights = head.rows(0..head.vocab_size);
    let sequence = cache
        .read(0, &[1], &Columns::all(&manifest))
        .unwrap()
        .remove(0);
    let state = &sequence.hidden[1];
    let logits = cache.rebuild_logits(&head, &sequence).unwrap();
    let (means, top_k) = (
        &sequence.statistics.as_ref().unwrap().mean,
        sequence.top_k.as_ref().unwrap(),
    );
    for (t, row) in state.values.chunks(state.width).enumerate() {
        let product = |weights: &[f32]| -> f64 {
            let terms = row.iter().zip(weights);
            terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let products: Vec<f64> = weights.chunks(head.width).map(product).collect();
        let shift = f64::from(means[t]) - products.iter().sum::<f64>() / products.len() as f64;
        for (v, product) in products.iter().enumerate() {
            let entries = t * top_k.k..(t + 1) * top_k.k;
            let mut kept = entries.filter(|entry| top_k.ids[*entry] as usize == v);
            let expected = match kept.next() {
                Some(entry) => f64::from(top_k.logits[entry]),
                None => product + shift,
            };
            assert!((f64::from(logits[t * head.vocab_size + v]) - expected).abs() < 1e-4);
        }
    }
    let without = Sequence {
        hidden: vec![sequence.hidden[0].clone()],
        ..sequence.clone()
    };
    assert!(cache.rebuild_logits(&head, &without).is_err());
    let without = Sequence {
        statistics: None,
        ..sequence.clone()
    };
    assert!(cache.rebuild_logits(&head, &without).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(
        lengths in prop::collection::vec(1_usize..60, 1..12),
        per_shard in 1_usize..6,
        vocab_size in 2_usize..100_000,
        top_k in 1_usize..20,
        widths in prop::collection::vec((1_usize..40, any::<bool>()), 0..3),
    ) {
        let layers = widths.iter().enumerate().map(|(layer, (width, int8))| {
            (layer as u32, *width, if *int8 { HiddenCodec::Int8 } else { HiddenCodec::F16 })
        });
        check(&sample(&Shape {
            tier: Tier::Sparse,
            top_k: top_k.min(vocab_size),
            vocab_size,
            layers: layers.collect(),
            lengths,
            per_shard,
        }));
    }
}
