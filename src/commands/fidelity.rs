//! `caskd fidelity`: how near the logits that a cache gives back are to its teacher's.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use caskd_cache_builder::{measure_cache, pruned_teacher};
use caskd_formats::{Cache, Fidelity, Io, Manifest, Tier};
use caskd_models::{LoadOptions, load};
use serde::Serialize;
use tch::Kind;

use super::{open_cache, parse_device, print_json, print_text};
use crate::cli::FidelityArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::say;

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    tier: Tier,
    /// Of everything that a logit loss reads.
    bytes_per_position: f64,
    /// The same by column.
    bytes_by_column: BTreeMap<String, f64>,
    #[serde(flatten)]
    fidelity: &'a Fidelity,
}

pub(crate) fn run(args: &FidelityArgs) -> Outcome {
    let cache = open_cache(&args.cache, &args.elsewhere.shards, Io::Mmap)?;
    let measured = match &args.teacher {
        None => None,
        Some(path) => {
            let kind = match cache.manifest().teacher.compute_dtype.as_str() {
                "bf16" => Kind::BFloat16,
                _ => Kind::Float,
            };
            let options = LoadOptions {
                device: parse_device(&args.device)?,
                kind,
            };
            say("loading teacher and student");
            let teacher = load(path, &options)?;
            let student = match &args.student {
                Some(path) => load(path, &options)?,
                None => pruned_teacher(path, &options)?,
            };
            Some(measure_cache(
                &cache,
                &teacher,
                &student,
                args.positions.get(),
            )?)
        }
    };
    let stored = cache.manifest().fidelity.as_ref();
    let Some(fidelity) = measured.as_ref().or(stored) else {
        return Err(Failure::user(
            "the cache holds no fidelity report",
            "measure it with --teacher, or build it again without --no-fidelity",
        ));
    };
    let bytes_by_column = logit_bytes(&cache)?;
    let report = Report {
        tier: cache.manifest().tier,
        bytes_per_position: bytes_by_column.values().sum(),
        bytes_by_column,
        fidelity,
    };
    if args.json {
        print_json(&report)?;
    } else {
        print_text(as_text(&report));
    }
    Ok(Exit::Done)
}

/// Bytes a position by column, without the hidden states that no logit loss reads.
fn logit_bytes(cache: &Cache) -> Result<BTreeMap<String, f64>, Failure> {
    let manifest = cache.manifest();
    let positions = manifest.data.positions.max(1) as f64;
    Ok(cache
        .bytes_by_column()?
        .into_iter()
        .filter(|(name, _)| is_for_logits(name, manifest))
        .map(|(name, bytes)| (name, bytes as f64 / positions))
        .collect())
}

fn is_for_logits(column: &str, manifest: &Manifest) -> bool {
    match column.strip_prefix("hidden.") {
        None => true,
        Some(layer) => {
            manifest.tier == Tier::Exact && layer == manifest.teacher.num_layers.to_string()
        }
    }
}

fn as_text(report: &Report<'_>) -> String {
    let fidelity = report.fidelity;
    let mut text = format!(
        "tier {}, {:.1} bytes a position for a logit loss\n{} positions in batches of {}; student: {}\n",
        format!("{:?}", report.tier).to_lowercase(),
        report.bytes_per_position,
        fidelity.positions,
        fidelity.batch_positions,
        fidelity.student,
    );
    if let Some(tail) = &fidelity.tail {
        let _ = writeln!(text, "logits outside the top k: {tail} tail");
    }
    text.push_str(&table(fidelity));
    let _ = writeln!(text, "\n{:<20} {:>12}", "column", "a position");
    for (name, bytes) in &report.bytes_by_column {
        let _ = writeln!(text, "{name:<20} {bytes:>12.2}");
    }
    text.trim_end().to_owned()
}

/// The figures by temperature.
pub(crate) fn table(fidelity: &Fidelity) -> String {
    let mut text = format!(
        "\n{:<14} {:>12} {:>15}\n",
        "temperature", "KL", "gradient error"
    );
    for key in Fidelity::keys() {
        let kl = fidelity.kl.get(&key).copied().unwrap_or(f64::NAN);
        let error = fidelity
            .gradient_error
            .get(&key)
            .copied()
            .unwrap_or(f64::NAN);
        let _ = writeln!(text, "{key:<14} {kl:>12.6} {:>14.2}%", 100.0 * error);
    }
    text
}
