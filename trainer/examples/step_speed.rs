//! Tokens per second of a training step: SmolLM2 (or another model) teaching itself with LoRA and
//! full-vocabulary KL, batches of 8 sequences of 128 tokens, every position a target.
//!
//! `cargo run --release -p caskd-trainer --example step_speed -- MODEL TEXT f32|bf16 STEPS [KEY=VALUE ...]`

#![allow(clippy::print_stdout, reason = "a program for people")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use caskd_formats::{
    Cache, CacheSpec, CacheWriter, DataInfo, HeadDtype, HeadWeights, HiddenCodec, HiddenState, Io,
    LayerSpec, Sequence, Statistics, TeacherInfo, Tier, TokenizerInfo, TopK,
};
use caskd_models::{LoadOptions, LoadedModel, load};
use caskd_trainer::{Control, StepReport, TrainConfig, train};
use tch::{Kind, Tensor};

const BATCH: usize = 8;
const POSITIONS: usize = 128;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, dtype, steps, settings @ ..] = arguments.as_slice() else {
        return Err("usage: step_speed MODEL TEXT f32|bf16 STEPS [KEY=VALUE ...]".into());
    };
    let steps: usize = steps.parse()?;
    let mut config = TrainConfig {
        hard_weight: 0.0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    config.set("dtype", dtype)?;
    for setting in settings {
        let (key, value) = setting.split_once('=').ok_or("KEY=VALUE")?;
        config.set(key, value)?;
    }
    let folder = std::env::temp_dir().join(format!("caskd-step-speed-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let outcome = measure(Path::new(model), Path::new(text), &config, steps, &folder);
    std::fs::remove_dir_all(&folder)?;
    outcome
}

fn measure(
    model: &Path,
    text: &Path,
    config: &TrainConfig,
    steps: usize,
    folder: &Path,
) -> Outcome<()> {
    let options = LoadOptions {
        kind: config.kind(),
        ..LoadOptions::default()
    };
    let student = load(model, &options)?;
    write_cache(
        &student,
        &std::fs::read_to_string(text)?,
        steps,
        &folder.join("cache"),
    )?;
    let cache = Arc::new(Cache::open(&folder.join("cache"), Io::Mmap)?);
    let stop = AtomicBool::new(false);
    let mut rates = Vec::new();
    let mut cpu = cpu_seconds();
    let mut progress = |report: &StepReport| {
        let used = cpu_seconds() - cpu;
        cpu += used;
        println!(
            "step {}: {:.2} s, {:.1} tokens/s, {:.1} tokens/CPU-s, data wait {:.4} s, loss {:.5}",
            report.step,
            report.seconds,
            report.tokens_per_second,
            report.tokens as f64 / used,
            report.data_wait_seconds,
            report.loss
        );
        rates.push(report.tokens_per_second);
    };
    let mut control = Control {
        resume: false,
        stop: &stop,
        progress: &mut progress,
    };
    train(
        config,
        student,
        model,
        cache,
        &folder.join("run"),
        &mut control,
    )?;
    rates.sort_by(f64::total_cmp);
    println!(
        "median {:.1} tokens/s with {} threads; peak {} MB",
        rates[rates.len() / 2],
        tch::get_num_threads(),
        peak_mb()
    );
    Ok(())
}

fn write_cache(teacher: &LoadedModel, text: &str, steps: usize, path: &Path) -> Outcome<()> {
    let encoding = teacher
        .tokenizer
        .encode(text, false)
        .map_err(|error| error.to_string())?;
    let count = steps * BATCH;
    let network = &teacher.network;
    let (last, width) = (network.num_layers() as u32, network.config().hidden_size());
    let tokens: Vec<u32> = encoding
        .get_ids()
        .iter()
        .copied()
        .cycle()
        .take(count * POSITIONS)
        .collect();
    let sequences: Vec<Sequence> = tokens
        .chunks(POSITIONS)
        .enumerate()
        .map(|(index, tokens)| {
            let input: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
            let input = Tensor::from_slice(&input).unsqueeze(0);
            let hidden = tch::no_grad(|| network.forward(&input, &[], false).last_hidden);
            let values = Vec::try_from(hidden.to_kind(Kind::Float).view(-1)).unwrap_or_default();
            let zeros = || vec![0.0; POSITIONS];
            Sequence {
                source: format!("text:{index}"),
                token_ids: tokens.to_vec(),
                loss_mask: vec![true; POSITIONS],
                statistics: Some(Statistics {
                    mean: zeros(),
                    std: zeros(),
                    min: zeros(),
                    max: zeros(),
                    log_sum_exp: zeros(),
                }),
                top_k: Some(TopK {
                    k: 1,
                    ids: vec![0; POSITIONS],
                    logits: zeros(),
                }),
                hidden: vec![HiddenState {
                    layer: last,
                    width,
                    values,
                }],
                coefficients: None,
            }
        })
        .collect();
    let vocab_size = network.config().vocab_size();
    let spec = CacheSpec {
        tier: Tier::Exact,
        top_k: 1,
        vocab_size,
        code: None,
        layers: vec![LayerSpec {
            layer: last,
            width,
            codec: HiddenCodec::Int8,
        }],
        sequences_per_shard: 64,
        max_len: POSITIONS,
        teacher: TeacherInfo {
            name: teacher.name.clone(),
            architecture: "llama".to_owned(),
            digest: teacher.digest.clone(),
            compute_dtype: "f32".to_owned(),
            num_layers: last,
            hidden_size: width,
            num_parameters: network.num_parameters(),
        },
        tokenizer: TokenizerInfo {
            fingerprint: teacher.fingerprint.clone(),
            vocab_size,
        },
        data: DataInfo {
            digest: String::new(),
            files: vec![],
            sequences: count as u64,
            positions: (count * POSITIONS) as u64,
            targets: (count * (POSITIONS - 1)) as u64,
            truncated: 0,
            skipped: 0,
            prompt_form: "none".to_owned(),
            ..DataInfo::default()
        },
    };
    let mut writer = CacheWriter::open(path, &spec, false)?;
    for (shard, sequences) in sequences.chunks(64).enumerate() {
        writer.write_shard(shard, sequences)?;
    }
    let head = network.head().to_kind(Kind::BFloat16).contiguous();
    let mut bytes = vec![0u8; head.numel() * 2];
    head.copy_data_u8(&mut bytes, head.numel());
    writer.write_head(&HeadWeights {
        vocab_size,
        width,
        dtype: HeadDtype::Bf16,
        bytes: &bytes,
    })?;
    writer.finish()?;
    Ok(())
}

/// Processor time of this process so far: what counts on a machine that others use too.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted from behind the command's name.
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    fields
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum::<f64>()
        / TICKS_PER_SECOND
}

/// Peak resident memory of this process.
fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|kb| kb.parse::<u64>().ok())
        .unwrap_or_default()
        / 1024
}
