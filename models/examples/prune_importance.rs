//! Perplexity of a network pruned by magnitude and by activation-weighted magnitude.
//!
//! ```text
//! cargo run --release -p caskd-models --example prune_importance -- MODEL CALIBRATION.txt EVALUATION.txt [ratio] [tokens]
//! ```
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measuring program"
)]

use std::path::Path;

use caskd_models::{
    Criterion, LoadOptions, LoadedModel, PruneOptions, activation_norms, load, prune,
};
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 256;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ratio: f64 = args.get(3).map_or(0.25, |text| text.parse().unwrap());
    let tokens: usize = args.get(4).map_or(8192, |text| text.parse().unwrap());
    let options = LoadOptions {
        device: Device::Cpu,
        kind: Kind::BFloat16,
    };
    let open = || load(Path::new(&args[0]), &options).unwrap();

    let dense = open();
    let calibration = windows(&dense, &args[1], 16 * WINDOW);
    let evaluation = windows(&dense, &args[2], tokens);
    println!("dense: perplexity {:.2}", perplexity(&dense, &evaluation));
    let norms = activation_norms(&dense.network, &calibration).unwrap();
    for (name, criterion) in [
        ("magnitude", Criterion::Magnitude),
        ("wanda", Criterion::Wanda(norms)),
    ] {
        let mut model = open();
        let report = prune(
            &mut model,
            &PruneOptions {
                ratio,
                criterion,
                ..PruneOptions::default()
            },
        )
        .unwrap();
        println!(
            "{name}, ratio {ratio}: perplexity {:.2}, parameters {} -> {}",
            perplexity(&model, &evaluation),
            report.parameters_before,
            report.parameters_after
        );
        for note in report.notes {
            println!("  {note}");
        }
    }
}

/// The first tokens of a text in whole windows.
fn windows(model: &LoadedModel, path: &str, tokens: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(path).unwrap();
    let ids = model.tokenizer.encode(text, false).unwrap();
    ids.get_ids()[..tokens]
        .chunks_exact(WINDOW)
        .map(<[u32]>::to_vec)
        .collect()
}

fn perplexity(model: &LoadedModel, windows: &[Vec<u32>]) -> f64 {
    let mut nats = 0.0;
    for batch in windows.chunks(4) {
        let ids: Vec<i64> = batch.iter().flatten().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).view([batch.len() as i64, WINDOW as i64]);
        nats += tch::no_grad(|| {
            let hidden = model.network.forward(&ids, &[], false).last_hidden;
            let logits = model
                .network
                .logits(&hidden.narrow(1, 0, WINDOW as i64 - 1))
                .to_kind(Kind::Float);
            let gold = logits
                .gather(2, &ids.narrow(1, 1, WINDOW as i64 - 1).unsqueeze(-1), false)
                .squeeze_dim(-1);
            (logits.logsumexp([-1i64].as_slice(), false) - gold)
                .sum(Kind::Double)
                .double_value(&[])
        });
    }
    (nats / (windows.len() * (WINDOW - 1)) as f64).exp()
}
