//! What a build does for one batch: the teacher's forward pass, then head and fused statistics over
//! 256 positions at a time. Prints the seconds of the fastest round as JSON, by the wall clock and
//! by the processor's (the sum over threads, on which other processes tell less).
//!
//! ```text
//! OMP_NUM_THREADS=2 cargo run --release -p caskd-cache-builder --example teacher_speed -- MODEL B T f32|bf16 ROUNDS
//! ```
//! `runs/teacher_speed.py` runs it beside Hugging Face transformers.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measuring program"
)]

use std::path::Path;
use std::time::Instant;

use caskd_cache_builder::summarize_logits;
use caskd_formats::{Statistics, TopK};
use caskd_models::{LoadOptions, Network, WideHead, load};
use tch::{Device, Kind, Tensor};

const HEAD_ROWS: i64 = 256;
const TOP_K: usize = 64;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| args[index].parse::<i64>().unwrap();
    let (batch, positions, rounds) = (number(1), number(2), number(4));
    let kind = match args[3].as_str() {
        "bf16" => Kind::BFloat16,
        _ => Kind::Float,
    };
    let options = LoadOptions {
        device: Device::Cpu,
        kind,
    };
    let network = load(Path::new(&args[0]), &options).unwrap().network;
    let vocabulary = network.vocab_size() as i64;
    let ids: Vec<i64> = (0..batch * positions)
        .map(|i| (i * 7919 + 13) % vocabulary)
        .collect();
    let ids = Tensor::from_slice(&ids).view([batch, positions]);
    let head = WideHead::new(network.head());
    let mut logits = Vec::new();
    let mut best = [f64::INFINITY; 3];
    let mut cpu = f64::INFINITY;
    for _ in 0..=rounds {
        let used = processor_seconds();
        let seconds = tch::no_grad(|| round(&network, &head, &ids, &mut logits));
        cpu = cpu.min(processor_seconds() - used);
        for (best, seconds) in best.iter_mut().zip(seconds) {
            *best = best.min(seconds);
        }
    }
    let [total, forward, products] = best;
    println!(
        "{{\"tokens\": {}, \"seconds\": {total}, \"forward\": {forward}, \"head\": {products}, \
         \"cpu\": {cpu}}}",
        batch * positions
    );
}

/// Seconds of the whole, of the forward pass and of the head's products.
fn round(network: &Network, head: &WideHead, ids: &Tensor, logits: &mut Vec<f32>) -> [f64; 3] {
    let started = Instant::now();
    let hidden = network.forward(ids, &[], false).last_hidden.flatten(0, 1);
    let forward = started.elapsed().as_secs_f64();
    let mut statistics = Statistics::default();
    let mut top_k = TopK {
        k: TOP_K,
        ids: Vec::new(),
        logits: Vec::new(),
    };
    let mut products = 0.0;
    let rows = hidden.size()[0];
    for first in (0..rows).step_by(HEAD_ROWS as usize) {
        let clock = Instant::now();
        head.logits_into(
            &hidden.narrow(0, first, HEAD_ROWS.min(rows - first)),
            logits,
        );
        products += clock.elapsed().as_secs_f64();
        summarize_logits(logits, network.vocab_size(), &mut statistics, &mut top_k).unwrap();
    }
    assert_eq!(statistics.mean.len() as i64, rows);
    [started.elapsed().as_secs_f64(), forward, products]
}

/// User and system time of this process, from Linux's /proc (in ticks of 10 ms).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
