//! Adapters: start, gradients, dropout, merging, files.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use caskd_models::{LoraConfig, Network, load_adapters, save_adapters};
use support::{ids, max_difference, random, small_config};
use tch::{Kind, Tensor};

fn attached(lora: &LoraConfig, seed: u64) -> Network {
    let mut network = random(&small_config(2, 4, 2), 5);
    network.attach_lora(lora, seed).unwrap();
    network
}

fn run(network: &Network) -> Tensor {
    tch::no_grad(|| network.forward(&ids(2, 7, 50), &[], false)).last_hidden
}

/// Gives B values, as training would.
fn disturb(network: &Network) {
    tch::no_grad(|| {
        for (name, mut tensor) in network.trainable() {
            let step =
                Tensor::arange(tensor.numel() as i64, (Kind::Float, tch::Device::Cpu)).sin() * 0.1;
            let _ = tensor.g_add_(&step.view_as(&tensor));
            assert!(tensor.requires_grad(), "{name}");
        }
    });
}

#[test]
fn fresh_adapters_change_nothing_and_are_reproducible() {
    let plain = random(&small_config(2, 4, 2), 5);
    let (one, same, other) = (
        attached(&LoraConfig::default(), 1),
        attached(&LoraConfig::default(), 1),
        attached(&LoraConfig::default(), 2),
    );
    assert_eq!(max_difference(&run(&plain), &run(&one)), 0.0);
    assert_eq!(one.trainable().len(), 2 * 7 * 2);
    let mut differs = false;
    for (((name, a), (_, b)), (_, c)) in one
        .trainable()
        .iter()
        .zip(&same.trainable())
        .zip(&other.trainable())
    {
        assert_eq!(a, b, "{name}");
        differs |= a != c;
        let bound = 1.0 / (a.size()[1] as f64).sqrt();
        assert!(a.abs().max().double_value(&[]) <= bound, "{name}");
    }
    assert!(differs);
    assert_eq!(plain.num_parameters(), one.num_parameters());
}

#[test]
fn gradients_reach_every_adapter_and_nothing_else() {
    let network = attached(&LoraConfig::default(), 1);
    disturb(&network);
    let loss = network
        .forward(&ids(2, 7, 50), &[], true)
        .last_hidden
        .square()
        .mean(Kind::Float);
    loss.backward();
    for (name, tensor) in network.trainable() {
        let gradient = tensor.grad();
        assert!(gradient.defined(), "{name}");
        assert!(gradient.abs().max().double_value(&[]) > 0.0, "{name}");
    }
    for (name, tensor) in network.parameters() {
        assert!(
            !tensor.requires_grad() && !tensor.grad().defined(),
            "{name}"
        );
    }
    let without = random(&small_config(2, 4, 2), 5).forward(&ids(2, 7, 50), &[], true);
    assert!(!without.last_hidden.requires_grad());
}

/// d loss / d one element against (loss(+h) − loss(−h)) / 2h.
#[test]
fn gradients_agree_with_finite_differences() {
    let network = attached(&LoraConfig::default(), 1);
    disturb(&network);
    let weights = Tensor::arange(16, (Kind::Float, tch::Device::Cpu)).cos();
    let loss =
        || (network.forward(&ids(1, 6, 50), &[], true).last_hidden * &weights).sum(Kind::Double);
    loss().backward();
    for (name, tensor) in network.trainable().iter().step_by(3) {
        let analytic = tensor.grad().double_value(&[0, 1]);
        let nudge = |by: f64| {
            tch::no_grad(|| {
                let mut element = tensor.get(0).get(1);
                let _ = element.g_add_scalar_(by);
                loss().double_value(&[])
            })
        };
        let (up, down) = (nudge(1e-2), nudge(-2e-2));
        nudge(1e-2);
        let numeric = (up - down) / 2e-2;
        assert!(
            (analytic - numeric).abs() < 2e-2 * analytic.abs().max(0.05),
            "{name}: gradient {analytic}, differences {numeric}"
        );
    }
}

#[test]
fn merged_equals_unmerged() {
    let mut network = attached(&LoraConfig::default(), 1);
    disturb(&network);
    let before = run(&network);
    assert!(max_difference(&before, &run(&random(&small_config(2, 4, 2), 5))) > 1e-2);
    network.merge_lora();
    assert!(network.trainable().is_empty() && network.lora().is_none());
    let difference = max_difference(&before, &run(&network));
    assert!(difference < 1e-5, "{difference}");
    network.attach_lora(&LoraConfig::default(), 2).unwrap();
}

#[test]
fn files_carry_every_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let lora = LoraConfig {
        rank: 3,
        alpha: 5.0,
        targets: vec!["v_proj".into(), "up_proj".into()],
        ..Default::default()
    };
    let network = attached(&lora, 1);
    disturb(&network);
    save_adapters(&network, folder.path()).unwrap();
    save_adapters(&network, folder.path()).unwrap();

    let mut fresh = random(&small_config(2, 4, 2), 5);
    load_adapters(&mut fresh, folder.path()).unwrap();
    assert_eq!(fresh.lora(), Some(&lora));
    assert_eq!(max_difference(&run(&network), &run(&fresh)), 0.0);
    assert_eq!(
        network.trainable()[0].0,
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    );
    let names: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");

    let mut other = random(&small_config(3, 4, 2), 5);
    let error = load_adapters(&mut other, folder.path()).unwrap_err();
    assert!(error.is_user(), "{error}");
}

#[test]
fn peft_options_that_change_the_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    save_adapters(&attached(&LoraConfig::default(), 1), folder.path()).unwrap();
    let path = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"r\"", "\"use_dora\": true, \"r\"")).unwrap();
    let mut network = random(&small_config(2, 4, 2), 5);
    let error = load_adapters(&mut network, folder.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("use_dora"), "{error}");
    assert!(network.lora().is_none());
}

#[test]
fn dropout_follows_the_seed() {
    let lora = LoraConfig {
        dropout: 0.5,
        ..Default::default()
    };
    let mut network = attached(&lora, 1);
    disturb(&network);
    let mut train = |seed: u64| {
        network.set_dropout_seed(seed);
        tch::no_grad(|| network.forward(&ids(2, 7, 50), &[], true)).last_hidden
    };
    let (one, again, two) = (train(1), train(1), train(2));
    assert_eq!(one, again);
    assert_ne!(one, two);
}

#[test]
fn adapters_stay_f32_on_a_bf16_network() {
    let options = caskd_models::LoadOptions {
        kind: Kind::BFloat16,
        ..Default::default()
    };
    let mut network = Network::random(small_config(2, 4, 2), 5, &options).unwrap();
    network.attach_lora(&LoraConfig::default(), 1).unwrap();
    disturb(&network);
    let forward = network.forward(&ids(2, 7, 50), &[], true);
    assert_eq!(forward.last_hidden.kind(), Kind::BFloat16);
    forward
        .last_hidden
        .to_kind(Kind::Float)
        .square()
        .mean(Kind::Float)
        .backward();
    for (name, tensor) in network.trainable() {
        assert_eq!(tensor.kind(), Kind::Float, "{name}");
        assert_eq!(tensor.grad().kind(), Kind::Float, "{name}");
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let mut network = random(&small_config(2, 4, 2), 5);
    for (lora, expected) in [
        (
            LoraConfig {
                rank: 0,
                ..Default::default()
            },
            "rank",
        ),
        (
            LoraConfig {
                dropout: 1.0,
                ..Default::default()
            },
            "dropout",
        ),
        (
            LoraConfig {
                alpha: f64::NAN,
                ..Default::default()
            },
            "alpha",
        ),
        (
            LoraConfig {
                targets: vec![],
                ..Default::default()
            },
            "no target",
        ),
        (
            LoraConfig {
                targets: vec!["qkv".into()],
                ..Default::default()
            },
            "`qkv`",
        ),
    ] {
        let error = network.attach_lora(&lora, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    network.attach_lora(&LoraConfig::default(), 0).unwrap();
    let names = network.lora().unwrap().targets.join(" ");
    assert_eq!(
        names,
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    );
    assert!(network.attach_lora(&LoraConfig::default(), 0).is_err());
}
