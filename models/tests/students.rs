//! What students are made of beside plain pruning: importance by gradients, masks, padding, all weights
//! training, a base in 8 bits.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use caskd_models::{
    Config, Criterion, LoadedModel, LoraConfig, MaskOptions, Parts, Pattern, PruneOptions,
    activation_norms, load, mask, pad_to_dense, prune, saliencies, save_model,
};
use support::{f32_on_cpu, ids, max_difference, random, small_config, tiny};
use tch::{Kind, Tensor};

fn model() -> LoadedModel {
    let tokenizer = tiny("mha_tied").tokenizer;
    LoadedModel::new(random(&small_config(3, 4, 2), 5), tokenizer, "test")
}

fn run(model: &LoadedModel) -> Tensor {
    tch::no_grad(|| model.network.forward(&ids(2, 7, 41), &[], false)).last_hidden
}

fn parameter(model: &LoadedModel, name: &str) -> Tensor {
    let found = model
        .network
        .parameters()
        .into_iter()
        .find(|(of, _)| of == name);
    found.unwrap().1
}

/// Mean cross-entropy of the sequences, each predicted token counted once.
fn loss(model: &LoadedModel, sequences: &[Vec<u32>]) -> f64 {
    let (mut nats, mut tokens) = (0.0, 0);
    for sequence in sequences {
        let ids: Vec<i64> = sequence.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids);
        let last = ids.size()[0] - 1;
        if last == 0 {
            continue;
        }
        let logits = tch::no_grad(|| {
            let inputs = ids.narrow(0, 0, last).unsqueeze(0);
            let hidden = model.network.forward(&inputs, &[], false).last_hidden;
            model.network.logits(&hidden.squeeze_dim(0))
        });
        let log_p = logits.log_softmax(-1, Kind::Double);
        let gold = log_p.gather(1, &ids.narrow(0, 1, last).unsqueeze(1), false);
        nats -= gold.sum(Kind::Double).double_value(&[]);
        tokens += last;
    }
    nats / tokens as f64
}

fn forget_adapters(model: &mut LoadedModel) {
    model.network = model.network.share();
}

/// Gives adapters something to say: B starts at zero.
fn stir_adapters(model: &LoadedModel) {
    tch::no_grad(|| {
        for (index, (_, mut tensor)) in model.network.trainable().into_iter().enumerate() {
            let values = Tensor::arange(tensor.numel() as i64, (Kind::Float, tch::Device::Cpu));
            let values = ((values + index as f64).sin() * 0.05).view_as(&tensor);
            tensor.copy_(&values);
        }
    });
}

/// The channels that first-order saliency ranks lowest are those whose |w · ∂L/∂w|, by finite differences, is lowest:
/// the pruned network is the one with these channels taken out.
#[test]
fn taylor_removes_what_finite_differences_say() {
    let sequences = vec![vec![1, 5, 9, 2, 30, 7], vec![8, 8, 3, 40], vec![4]];
    let mut dense = model();
    let name = |part: &str| format!("model.layers.1.mlp.{part}_proj.weight");
    // The loss's gradient is not small beside f32's rounding once the weights are larger.
    tch::no_grad(|| {
        for part in ["gate", "up", "down"] {
            let _ = parameter(&dense, &name(part)).g_mul_scalar_(20.0);
        }
    });
    let mut importance = [0.0; 20];
    let step = 2e-2;
    for part in ["gate", "up", "down"] {
        let weight = parameter(&dense, &name(part));
        let (rows, columns) = (weight.size()[0], weight.size()[1]);
        for row in 0..rows {
            for column in 0..columns {
                let cell = weight.narrow(0, row, 1).narrow(1, column, 1);
                let was = cell.double_value(&[0, 0]);
                let at = |value: f64| {
                    let _ = tch::no_grad(|| cell.shallow_clone().fill_(value));
                    loss(&dense, &sequences)
                };
                let slope = (at(was + step) - at(was - step)) / (2.0 * step);
                let _ = tch::no_grad(|| cell.shallow_clone().fill_(was));
                let channel = if part == "down" { column } else { row };
                importance[channel as usize] += (was * slope).abs();
            }
        }
    }
    let mut order: Vec<usize> = (0..20).collect();
    order.sort_by(|&a, &b| importance[a].total_cmp(&importance[b]));
    let mut kept: Vec<i64> = order[5..].iter().map(|&channel| channel as i64).collect();
    kept.sort_unstable();
    let gap = importance[order[5]] / importance[order[4]];
    assert!(gap > 1.01, "the example does not decide: {gap}");

    let before = run(&dense);
    let measured = saliencies(&mut dense.network, &sequences, 1..2, &mut |_, _| {}).unwrap();
    assert_eq!(run(&dense), before);
    let full = parameter(&dense, &name("gate"));
    let options = PruneOptions {
        ratio: 0.25,
        scope: Some(1..2),
        parts: Parts::Ffn,
        criterion: Criterion::Taylor(measured),
    };
    prune(&mut dense, &options).unwrap();
    let expected = full.index_select(0, &Tensor::from_slice(&kept));
    assert_eq!(parameter(&dense, &name("gate")), expected);
    assert_eq!(dense.network.config().layers()[1].kv_heads, 2);
}

#[test]
fn parts_choose_what_goes() {
    let sizes = |parts: Parts| {
        let mut model = model();
        let options = PruneOptions {
            ratio: 0.5,
            scope: Some(1..2),
            parts,
            ..PruneOptions::default()
        };
        prune(&mut model, &options).unwrap();
        let shape = model.network.config().layers()[1];
        (shape.heads, shape.kv_heads, shape.intermediate_size)
    };
    assert_eq!(sizes(Parts::All), (2, 1, 10));
    assert_eq!(sizes(Parts::Heads), (2, 1, 20));
    assert_eq!(sizes(Parts::Ffn), (4, 2, 10));
}

/// BLOOM's heads have position biases by their places. Those that stay keep theirs: the network is the dense one with the
/// other heads' outputs multiplied by nothing, also after a folder, a second pruning and filling up.
#[test]
fn heads_keep_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let mut moved = false;
    let first = Vec::<i64>::try_from(ids(2, 7, 41).select(0, 0)).unwrap();
    let (positions, rows): (Vec<f32>, Vec<i64>) = (0..7).map(|i| (i as f32, i)).unzip();
    let causal: Vec<bool> = (0..49).map(|pair| pair % 7 <= pair / 7).collect();
    for (name, kept) in [("bloom_4", [2, 1]), ("bloom_7_bare", [4, 2])] {
        let mut bloom = tiny(name);
        let dense = bloom.network.config().layers()[0];
        let (head_dim, width) = (
            bloom.network.config().head_dim(),
            bloom.network.hidden_size(),
        );
        let options = |parts, ratio| PruneOptions {
            ratio,
            scope: Some(0..1),
            parts,
            ..PruneOptions::default()
        };
        let report = prune(&mut tiny(name), &options(Parts::Auto, 0.5)).unwrap();
        assert_eq!(report.layers[0].heads_after, dense.heads);
        assert!(
            report.notes[0].contains("--parts all"),
            "{:?}",
            report.notes
        );

        for (time, &heads) in kept.iter().enumerate() {
            let report = prune(&mut bloom, &options(Parts::Heads, 0.5)).unwrap();
            assert_eq!(report.layers[0].heads_after, heads);
            let parameters: usize = bloom
                .network
                .parameters()
                .iter()
                .map(|(_, tensor)| tensor.numel())
                .sum();
            assert_eq!(report.parameters_after, parameters as u64);
            let path = folder.path().join(format!("{name}-{time}"));
            save_model(&bloom, &path).unwrap();
            let loaded = load(&path, &f32_on_cpu()).unwrap();
            assert_eq!(run(&loaded), run(&bloom));
            bloom = loaded;

            let Config::Bloom(config) = bloom.network.config() else {
                panic!("{name} is a BLOOM");
            };
            let places = config.head_places[0].clone();
            assert_eq!(places.len(), heads);
            moved |= places != (0..heads).collect::<Vec<_>>();
            let mut expected = tiny(name);
            // Those of the file can't be written to.
            expected.network.train_all().unwrap();
            let mut alive = vec![0f32; width];
            for place in places {
                alive[place * head_dim..(place + 1) * head_dim].fill(1.0);
            }
            tch::no_grad(|| {
                let mut o = parameter(&expected, "transformer.h.0.self_attention.dense.weight");
                let _ = o.g_mul_(&Tensor::from_slice(&alive));
            });
            assert!(max_difference(&run(&bloom), &run(&expected)) < 1e-5);
            let packed = bloom
                .network
                .forward_packed(&first, &positions, &causal, &rows);
            let whole = run(&bloom).select(0, 0);
            assert!(max_difference(&packed, &whole) < 1e-5);
            let mut filled = load(&path, &f32_on_cpu()).unwrap();
            pad_to_dense(&mut filled);
            assert!(!filled.network.config().is_pruned());
            assert!(max_difference(&run(&filled), &run(&expected)) < 1e-5);
        }
    }
    assert!(moved, "the first heads stayed everywhere");
}

/// Two of four inputs are zero, those of the lowest |w|·‖x‖; the zeros stay through a folder, through adapters and
/// through merging, and merging changes no number.
#[test]
fn masks_survive_training_and_merging() {
    let folder = tempfile::tempdir().unwrap();
    let mut masked = model();
    let norms = activation_norms(&masked.network, &[vec![1, 2, 3, 4]]).unwrap();
    let options = MaskOptions {
        pattern: Pattern::Blocks { keep: 2, of: 4 },
        ratio: 0.5,
        scope: Some(1..3),
        criterion: Criterion::Wanda(norms.clone()),
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let scores = parameter(&masked, name).abs() * Tensor::from_slice(&norms.ffn_input[1]);
    let report = mask(&mut masked, &options).unwrap();
    assert_eq!(report.zeros * 2, report.weights);
    let weight = parameter(&masked, name);
    let zeros = weight.eq(0).view([-1, 4]);
    let ranks = scores.view([-1, 4]).argsort(-1, false).argsort(-1, false);
    assert_eq!(zeros, ranks.lt(2));

    let path = folder.path().join("masked");
    save_model(&masked, &path).unwrap();
    let mut loaded = load(&path, &f32_on_cpu()).unwrap();
    assert_eq!(loaded.network.sparsity().unwrap().pattern, "2:4");
    assert_eq!(run(&loaded), run(&masked));
    let lora = LoraConfig {
        rank: 3,
        ..LoraConfig::default()
    };
    let dropped = LoraConfig {
        dropout: 0.1,
        ..lora.clone()
    };
    assert!(loaded.network.attach_lora(&dropped, 1).is_err());
    loaded.network.attach_lora(&lora, 1).unwrap();
    stir_adapters(&loaded);
    let with_adapters = run(&loaded);
    assert!(max_difference(&with_adapters, &run(&masked)) > 1e-3);
    // Adapters get gradients through the mask.
    let hidden = loaded
        .network
        .forward(&ids(2, 7, 41), &[], true)
        .last_hidden;
    hidden.square().sum(Kind::Float).backward();
    assert!(
        loaded
            .network
            .trainable()
            .iter()
            .all(|(_, tensor)| tensor.grad().defined())
    );
    loaded.network.merge_lora();
    assert!(max_difference(&run(&loaded), &with_adapters) < 1e-5);
    assert_eq!(parameter(&loaded, name).eq(0).view([-1, 4]), zeros);
    // Layer 0 was not masked: its merged weights are dense.
    let free = parameter(&loaded, "model.layers.0.mlp.up_proj.weight");
    assert_eq!(free.eq(0).sum(Kind::Int64).int64_value(&[]), 0);
    assert!(mask(&mut loaded, &options).is_err());
}

/// A pruned student with adapters gives the same numbers in the dense sizes, before and after merging.
#[test]
fn padding_changes_no_number() {
    let mut pruned = model();
    let options = PruneOptions {
        ratio: 0.5,
        scope: Some(1..2),
        ..PruneOptions::default()
    };
    prune(&mut pruned, &options).unwrap();
    pruned
        .network
        .attach_lora(&LoraConfig::default(), 1)
        .unwrap();
    stir_adapters(&pruned);
    let expected = run(&pruned);
    assert!(pruned.network.config().is_pruned());
    pad_to_dense(&mut pruned);
    assert!(!pruned.network.config().is_pruned());
    let dense = model();
    for ((name, padded), (_, full)) in pruned
        .network
        .parameters()
        .iter()
        .zip(dense.network.parameters())
    {
        assert_eq!(padded.size(), full.size(), "{name}");
    }
    assert!(max_difference(&run(&pruned), &expected) < 1e-5);
    pruned.network.merge_lora();
    assert!(max_difference(&run(&pruned), &expected) < 1e-5);
}

/// Gradients of every adapter by a way back that runs each block again, against those of one graph: with dropout,
/// from the last and a middle hidden layer.
#[test]
fn a_taped_pass_has_the_gradients_of_a_graph() {
    let lora = LoraConfig {
        rank: 2,
        dropout: 0.2,
        ..LoraConfig::default()
    };
    let gradients = |taped: bool| -> Vec<Tensor> {
        let mut model = model();
        model.network.attach_lora(&lora, 3).unwrap();
        stir_adapters(&model);
        model.network.set_dropout_seed(11);
        let ids = ids(2, 7, 41);
        if taped {
            let (forward, tape) = model.network.forward_taped(&ids, &[2, 3]);
            let seeds: Vec<(u32, Tensor)> = forward
                .hidden
                .iter()
                .map(|(layer, hidden)| (*layer, hidden * f64::from(*layer)))
                .collect();
            model.network.backward(&tape, &seeds);
        } else {
            let forward = model.network.forward(&ids, &[2, 3], true);
            let total: Tensor = forward
                .hidden
                .iter()
                .map(|(layer, hidden)| hidden.square().sum(Kind::Float) * (f64::from(*layer) / 2.0))
                .sum();
            total.backward();
        }
        let of = model.network.trainable();
        of.iter().map(|(_, tensor)| tensor.grad()).collect()
    };
    for (taped, graph) in gradients(true).iter().zip(gradients(false)) {
        let largest = graph.abs().max().double_value(&[]);
        assert!(max_difference(taped, &graph) <= 1e-5 * largest.max(1e-6));
    }
}

/// Every weight is within half a step of what it was, the network is near, and its adapters train.
#[test]
fn eight_bits_are_near() {
    let mut quantized = model();
    let expected = run(&quantized);
    let name = "model.layers.1.mlp.down_proj.weight";
    let weight = parameter(&quantized, name);
    quantized.network.quantize().unwrap();
    assert!(quantized.network.is_quantized());
    let integers = parameter(&quantized, name);
    assert_eq!(integers.kind(), Kind::Int8);
    let step = weight.abs().amax([1], true) / 127.0;
    let error = (integers.to_kind(Kind::Float) * &step - weight).abs();
    assert!(bool::try_from((error - step * 0.501).le(0).all()).unwrap());
    let error = max_difference(&run(&quantized), &expected);
    assert!(error > 0.0 && error < 0.05, "{error}");
    assert!(quantized.network.quantize().is_err());

    quantized
        .network
        .attach_lora(&LoraConfig::default(), 1)
        .unwrap();
    stir_adapters(&quantized);
    let with_adapters = run(&quantized);
    quantized.network.merge_lora();
    assert!(max_difference(&run(&quantized), &with_adapters) < 1e-5);
    forget_adapters(&mut quantized);
}

/// All weights get gradients, tied ones as one; passes compute as before; freezing ends it.
#[test]
fn all_weights_can_train() {
    for (name, kind) in [("mha_tied", Kind::Float), ("bloom_4", Kind::BFloat16)] {
        let options = caskd_models::LoadOptions {
            kind,
            ..f32_on_cpu()
        };
        let mut whole = load(&support::golden(name), &options).unwrap();
        let expected = run(&whole);
        let shared = whole.network.share();
        whole.network.train_all().unwrap();
        assert!(whole.network.trains_all());
        assert_eq!(whole.network.kind(), kind);
        assert_eq!(run(&whole), expected, "{name}");
        let hidden = whole.network.forward(&ids(2, 7, 41), &[], true).last_hidden;
        assert_eq!(hidden.kind(), kind);
        hidden
            .to_kind(Kind::Float)
            .square()
            .sum(Kind::Float)
            .backward();
        let trainable = whole.network.trainable();
        for (of, tensor) in &trainable {
            assert_eq!(tensor.kind(), Kind::Float);
            assert!(
                tensor.grad().defined() || of == "lm_head.weight",
                "{name}: {of}"
            );
        }
        tch::no_grad(|| {
            for (_, tensor) in trainable {
                let _ = tensor.shallow_clone().g_mul_scalar_(0.5);
            }
        });
        assert_ne!(run(&whole), expected);
        // Nothing of that reaches networks on the loaded weights.
        let untouched = LoadedModel::new(shared, whole.tokenizer.clone(), "shared");
        assert_eq!(run(&untouched), expected);
        whole.network.freeze();
        assert!(!whole.network.trains_all());
        assert_eq!(whole.network.kind(), Kind::Float);
        assert!(whole.network.attach_lora(&LoraConfig::default(), 0).is_ok());
        assert!(whole.network.train_all().is_err());
    }
}
