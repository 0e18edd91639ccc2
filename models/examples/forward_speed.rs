//! Tokens per second of the forward pass (without the LM head, and with it) and of a LoRA step.
//!
//! ```text
//! OMP_NUM_THREADS=2 cargo run --release -p caskd-models --example forward_speed -- MODEL [B T] [f32|bf16] [rounds]
//! ```
//! `forward_speed.py` beside it measures Hugging Face transformers in the same way. Times are the
//! best of the rounds, by the wall clock and by the processor's (the sum over threads), so that
//! another process on the machine counts little.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measuring program"
)]

use std::path::Path;
use std::time::Instant;

use caskd_models::{LoadOptions, LoraConfig, load};
use tch::{Device, Kind, Tensor};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: i64| {
        args.get(index)
            .map_or(default, |text| text.parse().unwrap())
    };
    let (batch, positions, rounds) = (number(1, 8), number(2, 128), number(4, 5));
    let kind = if args.get(3).is_some_and(|text| text == "bf16") {
        Kind::BFloat16
    } else {
        Kind::Float
    };

    let started = Instant::now();
    let mut model = load(
        Path::new(&args[0]),
        &LoadOptions {
            device: Device::Cpu,
            kind,
        },
    )
    .unwrap();
    println!(
        "load {:.2} s, {} threads",
        started.elapsed().as_secs_f64(),
        tch::get_num_threads()
    );
    let vocabulary = model.network.vocab_size() as i64;
    let ids: Vec<i64> = (0..batch * positions)
        .map(|i| (i * 7919 + 13) % vocabulary)
        .collect();
    let ids = Tensor::from_slice(&ids).view([batch, positions]);
    let report = |name: &str, run: &mut dyn FnMut()| {
        run();
        let (mut wall, mut cpu) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..rounds {
            let (started, used) = (Instant::now(), processor_seconds());
            run();
            wall = wall.min(started.elapsed().as_secs_f64());
            cpu = cpu.min(processor_seconds() - used);
        }
        let tokens = (batch * positions) as f64;
        println!(
            "caskd {name:14} [{batch},{positions}] {kind:?}: {:.0} tokens/s, {:.0} per CPU second",
            tokens / wall,
            tokens / cpu
        );
    };

    tch::no_grad(|| {
        let network = &model.network;
        report("blocks", &mut || drop(network.forward(&ids, &[], false)));
        report("blocks+head", &mut || {
            drop(network.logits(&network.forward(&ids, &[], false).last_hidden));
        });
    });
    model
        .network
        .attach_lora(&LoraConfig::default(), 0)
        .unwrap();
    let network = &model.network;
    report("lora fwd+bwd", &mut || {
        network
            .forward(&ids, &[], true)
            .last_hidden
            .mean(Kind::Float)
            .backward();
        for (_, mut tensor) in network.trainable() {
            tensor.zero_grad();
        }
    });
}

/// User and system time of this process, from Linux's /proc (in ticks of 10 ms).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
