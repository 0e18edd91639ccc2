//! Part by part, across devices, and packed: the same values as the whole network at once.
#![allow(clippy::unwrap_used)]

mod support;

use caskd_models::{LoadOptions, ModelFiles, Network, linear, load_across};
use support::{f32_on_cpu, golden, ids, max_difference, teacher, tiny};
use tch::{Device, Kind, Tensor};

const ARCHITECTURES: [&str; 4] = [
    "gqa_untied",
    "qwen2_window",
    "mistral_window",
    "bloom_5_post_norm",
];

/// Hidden layers 0..=L and the logits, part by part, each part dropped after its use.
fn part_by_part(
    files: &ModelFiles,
    input: &Tensor,
    options: &LoadOptions,
) -> (Vec<Tensor>, Tensor) {
    let shape = (input.size()[0], input.size()[1]);
    let context = files.context(shape, options);
    let mut x = files.load_embedding(options).unwrap().forward(input);
    let mut hidden = vec![x.shallow_clone()];
    let layers = files.config().num_layers();
    for index in 0..layers {
        x = files
            .load_block(index, options)
            .unwrap()
            .forward(&x, &context);
        hidden.push(x.shallow_clone());
    }
    hidden[layers] = files.load_norm(options).unwrap().forward(&x);
    let vocabulary = files.config().vocab_size();
    let chunks: Vec<Tensor> = [0..vocabulary / 3, vocabulary / 3..vocabulary]
        .into_iter()
        .map(|rows| {
            linear(
                &hidden[layers],
                &files.load_head(rows, options).unwrap(),
                None,
            )
        })
        .collect();
    (hidden, Tensor::cat(&chunks, 1))
}

fn check(path: &std::path::Path, kind: Kind, input: &Tensor) {
    let options = LoadOptions {
        kind,
        ..f32_on_cpu()
    };
    let files = ModelFiles::open(path).unwrap();
    let (hidden, logits) = tch::no_grad(|| part_by_part(&files, input, &options));
    let bytes = files.part_bytes(kind);
    let model = files.load(kind, &[Device::Cpu]).unwrap();
    let layers: Vec<u32> = (0..=model.network.num_layers() as u32).collect();
    let forward = tch::no_grad(|| model.network.forward(input, &layers, false));
    for (layer, whole) in &forward.hidden {
        assert_eq!(
            whole.flatten(0, 1),
            hidden[*layer as usize],
            "{}, layer {layer}",
            path.display()
        );
    }
    // The head in chunks is a product of another shape.
    let whole = model.network.logits(&forward.last_hidden).flatten(0, 1);
    let scale = whole.abs().max().double_value(&[]);
    let bound = if kind == Kind::Float { 1e-5 } else { 1e-2 };
    assert!(
        max_difference(&whole, &logits) <= bound * scale,
        "{}",
        path.display()
    );

    let counted: i64 = model
        .network
        .parameters()
        .iter()
        .map(|(_, t)| t.numel() as i64)
        .sum();
    assert_eq!(counted as u64, model.network.num_parameters());
    let tied = model.network.config().tie_word_embeddings();
    let parts = bytes.blocks.iter().sum::<u64>()
        + bytes.embedding
        + bytes.norm
        + if tied { 0 } else { bytes.head };
    assert_eq!(parts, counted as u64 * kind.elt_size_in_bytes() as u64);
}

#[test]
fn part_by_part_gives_the_same_bytes() {
    for name in ARCHITECTURES {
        let path = golden(name);
        check(&path, Kind::Float, &ids(3, 7, 41));
        check(&path, Kind::BFloat16, &ids(3, 7, 41));
    }
}

#[test]
fn part_by_part_gives_the_same_bytes_from_gguf() {
    let Some(path) = teacher() else { return };
    check(&path, Kind::BFloat16, &ids(2, 33, 49_152));
}

/// Parts can be loaded on one thread while another computes.
#[test]
fn files_are_shared_between_threads() {
    let options = f32_on_cpu();
    let files = ModelFiles::open(&golden("gqa_untied")).unwrap();
    let blocks = std::thread::scope(|scope| {
        let loading =
            scope.spawn(|| [0, 1].map(|index| files.load_block(index, &options).unwrap()));
        loading.join().unwrap()
    });
    let context = files.context((1, 5), &options);
    let x = files
        .load_embedding(&options)
        .unwrap()
        .forward(&ids(1, 5, 41));
    let last = blocks[1].forward(&blocks[0].forward(&x, &context), &context);
    let network = tiny("gqa_untied").network;
    let expected = network.forward(&ids(1, 5, 41), &[], false).last_hidden;
    let normed = files.load_norm(&options).unwrap().forward(&last);
    assert_eq!(expected.squeeze_dim(0), normed);
}

#[test]
fn layers_across_devices_give_the_same_bytes() {
    let two = [Device::Cpu, Device::Cpu];
    for name in ARCHITECTURES {
        let across = load_across(&golden(name), Kind::Float, &two).unwrap();
        let run = |network: &Network| network.forward(&ids(2, 9, 41), &[0, 1], false);
        let (expected, found) = (run(&tiny(name).network), run(&across.network));
        assert_eq!(expected.last_hidden, found.last_hidden, "{name}");
    }
    let none = load_across(&golden("gqa_untied"), Kind::Float, &[]).unwrap_err();
    assert!(none.to_string().contains("devices"), "{none}");
    let many = load_across(&golden("gqa_untied"), Kind::Float, &[Device::Cpu; 3]).unwrap_err();
    assert!(many.to_string().contains("devices"), "{many}");
}

/// Two continuations of one context, packed beside it with a sequence of their own before them, against each sequence alone.
#[test]
fn packed_continuations_are_those_of_each_sequence() {
    let (context, a, b) = ([5i64, 9, 2, 7, 11, 3], [8i64, 1], [4i64, 6]);
    let before = [3i64, 12, 7];
    let packed: Vec<i64> = before
        .iter()
        .chain(&context)
        .chain(&a)
        .chain(&b)
        .copied()
        .collect();
    let positions: Vec<f32> = [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 6, 7]
        .map(|p: i32| p as f32)
        .to_vec();
    let of_another = |i: i32, j: i32| (i < 3) != (j < 3) || (i >= 11 && (9..11).contains(&j));
    let visible: Vec<bool> = (0..13)
        .flat_map(|i| (0..13).map(move |j| j <= i && !of_another(i, j)))
        .collect();
    for name in ARCHITECTURES {
        let network = tiny(name).network;
        let all: Vec<i64> = (0..13).collect();
        let found = network.forward_packed(&packed, &positions, &visible, &all);
        let with = |tokens: [i64; 2]| context.iter().chain(&tokens).copied().collect();
        for (whole, skipped, first) in [(before.to_vec(), 0, 0), (with(a), 6, 9), (with(b), 6, 11)]
        {
            let alone = network.forward(&Tensor::from_slice(&whole).unsqueeze(0), &[], false);
            let count = whole.len() as i64 - skipped;
            let expected = alone.last_hidden.squeeze_dim(0).narrow(0, skipped, count);
            let difference = max_difference(&expected, &found.narrow(0, first, count));
            assert!(difference < 1e-4, "{name}: {difference}");
        }
        // Some of the tokens, in any order and twice, none of the first sequence.
        let rows = [12i64, 4, 8, 4];
        let some = network.forward_packed(&packed, &positions, &visible, &rows);
        let expected = found.index_select(0, &Tensor::from_slice(&rows));
        let difference = max_difference(&expected, &some);
        assert!(difference < 1e-5, "{name}: {difference}");
        // On a thread of its own, by the kernels for that.
        caskd_models::side_by_side(
            &network,
            &[&all[..], &rows],
            |network, rows| network.forward_packed(&packed, &positions, &visible, rows),
            |index, states| {
                let difference = max_difference([&found, &expected][index], &states);
                assert!(difference < 1e-4, "{name}, alone: {difference}");
            },
        );
    }
}
