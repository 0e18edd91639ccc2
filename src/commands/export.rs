//! `caskd export`: a cache decoded, for people and for other tools.

use std::collections::BTreeMap;
use std::io::Write;

use caskd_formats::{Cache, Columns, Head, Io, Manifest, RowInfo, Sequence, Statistic, Tier, TopK};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{open_cache, print_json, refuse_existing, write_file};
use crate::cli::{ExportArgs, ExportFormat};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{Progress, bytes, say, stopped};

#[derive(Serialize)]
struct Exported<'a> {
    out: &'a std::path::Path,
    sequences: usize,
    bytes: u64,
}

pub(crate) fn run(args: &ExportArgs) -> Outcome {
    refuse_existing(&args.out)?;
    let cache = open_cache(&args.cache, &args.elsewhere.shards, Io::Mmap)?;
    let head = if args.logits {
        Some(head_for_logits(&cache)?)
    } else {
        None
    };
    let mut rows = cache.rows()?;
    rows.truncate(args.limit.unwrap_or(usize::MAX));
    if rows.is_empty() {
        return Err(Failure::user(
            "no sequence is left to export",
            "give --limit 1 or more",
        ));
    }
    let jsonl = jsonl_form(args, cache.manifest())?;
    let source = Source {
        cache: &cache,
        head,
        rows,
    };
    // An error of the cache inside the writer must reach the user as itself, not as an I/O error.
    let mut failure = None;
    let written = write_file(&args.out, |sink| {
        let exported = match args.to {
            ExportFormat::Safetensors => write_safetensors(&source, sink),
            ExportFormat::Jsonl => write_jsonl(&source, &jsonl, sink),
        };
        exported.map_err(|error| match error {
            ExportError::Io(error) => error,
            ExportError::Cache(error) => {
                failure = Some(error);
                std::io::Error::other("the cache can't be read")
            }
        })
    });
    if let Some(error) = failure {
        return Err(error.into());
    }
    if stopped() {
        say("stopped; nothing was written");
        return Ok(Exit::Stopped);
    }
    written?;
    let size = std::fs::metadata(&args.out).map_or(0, |data| data.len());
    say(format!(
        "`{}`: {} sequences, {}",
        args.out.display(),
        source.rows.len(),
        bytes(size)
    ));
    if args.json {
        print_json(&Exported {
            out: &args.out,
            sequences: source.rows.len(),
            bytes: size,
        })?;
    }
    Ok(Exit::Done)
}

fn head_for_logits(cache: &Cache) -> Result<Head, Failure> {
    if cache.manifest().tier != Tier::Sparse
        && let Some(head) = cache.head()?
    {
        return Ok(head);
    }
    Err(Failure::user(
        "a sparse cache can't give the logits of the whole vocabulary",
        "build it with --tier exact or compact, or export without --logits",
    ))
}

enum ExportError {
    Io(std::io::Error),
    Cache(caskd_formats::Error),
}

impl From<std::io::Error> for ExportError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<caskd_formats::Error> for ExportError {
    fn from(error: caskd_formats::Error) -> Self {
        Self::Cache(error)
    }
}

type Written = Result<(), ExportError>;

struct Source<'a> {
    cache: &'a Cache,
    head: Option<Head>,
    rows: Vec<RowInfo>,
}

impl Source<'_> {
    fn read(&self, row: &RowInfo, columns: &Columns) -> Result<Sequence, ExportError> {
        if stopped() {
            return Err(std::io::Error::from(std::io::ErrorKind::Interrupted).into());
        }
        let mut sequences = self.cache.read(row.shard, &[row.row], columns)?;
        sequences
            .pop()
            .ok_or_else(|| std::io::Error::other("the cache gave no row").into())
    }

    /// Logits `[T·V]` of a sequence that was read with its last layer; none where they were not asked for.
    fn logits(&self, sequence: &Sequence) -> Result<Option<Vec<f32>>, ExportError> {
        match &self.head {
            Some(head) => Ok(Some(self.cache.rebuild_logits(head, sequence)?)),
            None => Ok(None),
        }
    }
}

/// A tensor of the file: its shape, and how a sequence fills its row.
struct Plan {
    name: String,
    dtype: &'static str,
    element: usize,
    /// Beyond the row's positions: K, D or V; empty for `[B, T]`, and `None` for `[B]`.
    inner: Option<Vec<usize>>,
    columns: Columns,
    fill: Fill,
}

enum Fill {
    InputIds,
    LossMask,
    Lengths,
    Statistic(&'static str),
    TopKIds,
    TopKLogits,
    Hidden(u32),
    Logits,
}

/// Writes tensor by tensor and row by row: the logits of a cache are far larger than memory, which
/// is why the header is written here and not by a library that wants every tensor whole.
fn write_safetensors(source: &Source<'_>, sink: &mut dyn Write) -> Written {
    let manifest = source.cache.manifest();
    let batch = source.rows.len();
    let longest = source
        .rows
        .iter()
        .map(|row| row.positions as usize)
        .max()
        .unwrap_or(0);
    let plans = plan_tensors(source);
    let shape_of = |plan: &Plan| match &plan.inner {
        None => vec![batch],
        Some(inner) => [&[batch, longest], inner.as_slice()].concat(),
    };

    let mut header = Map::new();
    header.insert(
        "__metadata__".into(),
        json!({"format": "pt", "written_by": concat!("caskd ", env!("CARGO_PKG_VERSION")), "teacher": manifest.teacher.name, "tier": format!("{:?}", manifest.tier).to_lowercase()}),
    );
    let mut offset = 0;
    for plan in &plans {
        let shape = shape_of(plan);
        let size = shape.iter().product::<usize>() * plan.element;
        header.insert(
            plan.name.clone(),
            json!({"dtype": plan.dtype, "shape": shape, "data_offsets": [offset, offset + size]}),
        );
        offset += size;
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    sink.write_all(&(text.len() as u64).to_le_bytes())?;
    sink.write_all(text.as_bytes())?;

    let mut bar = Progress::new("exporting");
    let started = std::time::Instant::now();
    let mut done = 0u64;
    for plan in &plans {
        let row_bytes = shape_of(plan).iter().skip(1).product::<usize>() * plan.element;
        for row in &source.rows {
            let sequence = source.read(row, &plan.columns)?;
            let values = row_values(source, plan, &sequence)?;
            sink.write_all(&values)?;
            std::io::copy(
                &mut std::io::Read::take(std::io::repeat(0), (row_bytes - values.len()) as u64),
                sink,
            )?;
            done += row_bytes as u64;
            let rate = bytes((done as f64 / started.elapsed().as_secs_f64().max(1e-9)) as u64);
            bar.update(done, offset as u64, &format!("{} {rate}/s", plan.name));
        }
    }
    bar.finish();
    Ok(())
}

fn plan_tensors(source: &Source<'_>) -> Vec<Plan> {
    let manifest = source.cache.manifest();
    let only = |statistics, top_k, layers: &[u32]| Columns {
        statistics,
        top_k,
        layers: layers.to_vec(),
        coefficients: false,
    };
    let none = only(false, false, &[]);
    let plan = |name: &str, dtype, element, inner, columns: &Columns, fill| Plan {
        name: name.into(),
        dtype,
        element,
        inner,
        columns: columns.clone(),
        fill,
    };
    let mut plans = vec![
        plan("input_ids", "I64", 8, Some(vec![]), &none, Fill::InputIds),
        plan("lengths", "I64", 8, None, &none, Fill::Lengths),
        plan("loss_mask", "U8", 1, Some(vec![]), &none, Fill::LossMask),
    ];
    let statistics = only(true, false, &[]);
    for name in ["log_sum_exp", "max", "mean", "min", "std"] {
        plans.push(plan(
            &format!("statistics.{name}"),
            "F32",
            4,
            Some(vec![]),
            &statistics,
            Fill::Statistic(name),
        ));
    }
    if manifest.top_k > 0 {
        let top_k = only(false, true, &[]);
        plans.push(plan(
            "top_k.ids",
            "I64",
            8,
            Some(vec![manifest.top_k]),
            &top_k,
            Fill::TopKIds,
        ));
        plans.push(plan(
            "top_k.logits",
            "F32",
            4,
            Some(vec![manifest.top_k]),
            &top_k,
            Fill::TopKLogits,
        ));
    }
    for layer in &manifest.layers {
        let columns = only(false, false, &[layer.layer]);
        plans.push(plan(
            &format!("hidden.{}", layer.layer),
            "F32",
            4,
            Some(vec![layer.width]),
            &columns,
            Fill::Hidden(layer.layer),
        ));
    }
    if let (true, Some(columns)) = (source.head.is_some(), Columns::for_logits(manifest)) {
        plans.push(plan(
            "logits",
            "F32",
            4,
            Some(vec![manifest.vocab_size]),
            &columns,
            Fill::Logits,
        ));
    }
    plans
}

/// The row's values without padding, little-endian.
fn row_values(
    source: &Source<'_>,
    plan: &Plan,
    sequence: &Sequence,
) -> Result<Vec<u8>, ExportError> {
    let floats = |values: &[f32]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let integers = |values: &[u32]| {
        values
            .iter()
            .flat_map(|&value| i64::from(value).to_le_bytes())
            .collect::<Vec<u8>>()
    };
    Ok(match plan.fill {
        Fill::InputIds => integers(&sequence.token_ids),
        Fill::LossMask => sequence
            .loss_mask
            .iter()
            .map(|&target| u8::from(target))
            .collect(),
        Fill::Lengths => (sequence.token_ids.len() as i64).to_le_bytes().to_vec(),
        Fill::Statistic(name) => sequence.statistics.as_ref().map_or_else(Vec::new, |all| {
            floats(match name {
                "mean" => &all.mean,
                "std" => &all.std,
                "min" => &all.min,
                "max" => &all.max,
                _ => &all.log_sum_exp,
            })
        }),
        Fill::TopKIds => sequence
            .top_k
            .as_ref()
            .map_or_else(Vec::new, |top_k| integers(&top_k.ids)),
        Fill::TopKLogits => sequence
            .top_k
            .as_ref()
            .map_or_else(Vec::new, |top_k| floats(&top_k.logits)),
        Fill::Hidden(layer) => sequence
            .hidden
            .iter()
            .find(|state| state.layer == layer)
            .map_or_else(Vec::new, |state| floats(&state.values)),
        Fill::Logits => source
            .logits(sequence)?
            .map_or_else(Vec::new, |logits| floats(&logits)),
    })
}

/// What a line of JSON holds beside the tokens.
struct JsonlForm {
    /// Statistics, top-k logits and hidden states too.
    everything: bool,
    targets: TargetForm,
}

/// How the teacher's log-probabilities are written.
#[derive(Clone, Copy)]
enum TargetForm {
    /// Over the whole vocabulary, at temperature 1.
    WholeVocabulary,
    /// Over the kept tokens, at some temperature.
    KeptTokens { temperature: f32 },
}

fn jsonl_form(args: &ExportArgs, manifest: &Manifest) -> Result<JsonlForm, Failure> {
    let temperature = args.temperature.unwrap_or(1.0);
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Failure::user(
            format!("--temperature {temperature} is not a positive number"),
            "give the temperature that the student will train at",
        ));
    }
    let wants_form = args.temperature.is_some() || args.renormalize || args.training_only;
    if wants_form && args.to != ExportFormat::Jsonl {
        return Err(Failure::user(
            "--temperature, --renormalize and --training-only are for jsonl",
            "add --to jsonl, or leave them out",
        ));
    }
    let has_mass = manifest.knows(Statistic::LogSumExp);
    if args.to == ExportFormat::Jsonl && manifest.top_k == 0 {
        say(
            "warning: the cache keeps no top-k, so the lines have no target_logprobs for other trainers",
        );
    } else if args.to == ExportFormat::Jsonl && !has_mass && !args.renormalize {
        say(
            "what the kept tokens weigh among all is not known: target_logprobs are normalised over the kept ones",
        );
    }
    // At another temperature than 1 the mass of the other tokens is unknown, as everywhere with top-k.
    let kept = args.renormalize || temperature != 1.0 || !has_mass;
    Ok(JsonlForm {
        everything: !args.training_only,
        targets: if kept {
            TargetForm::KeptTokens {
                temperature: temperature as f32,
            }
        } else {
            TargetForm::WholeVocabulary
        },
    })
}

/// A line a sequence.
fn write_jsonl(source: &Source<'_>, form: &JsonlForm, sink: &mut dyn Write) -> Written {
    let manifest = source.cache.manifest();
    let columns = if form.everything || source.head.is_some() {
        Columns::all(manifest)
    } else {
        Columns {
            statistics: true,
            top_k: manifest.top_k > 0,
            ..Columns::default()
        }
    };
    let mut bar = Progress::new("exporting");
    let started = std::time::Instant::now();
    for (index, row) in source.rows.iter().enumerate() {
        let sequence = source.read(row, &columns)?;
        let logits = source.logits(&sequence)?;
        let mut line = json_line(&sequence, form.targets);
        if form.everything {
            add_values(&mut line, &sequence);
        }
        if let Some(logits) = logits {
            line["logits"] = json!(logits.chunks(manifest.vocab_size).collect::<Vec<_>>());
        }
        line["split"] = if manifest.data.is_validation(row.split_hash) {
            "validation"
        } else {
            "train"
        }
        .into();
        serde_json::to_writer(&mut *sink, &line).map_err(std::io::Error::from)?;
        sink.write_all(b"\n")?;
        let rate = (index + 1) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        bar.update(
            index as u64 + 1,
            source.rows.len() as u64,
            &format!("{rate:.0} sequences/s"),
        );
    }
    bar.finish();
    Ok(())
}

/// Stands for a probability of 0, as in the collators of other trainers; JSON has no infinity.
const NO_PROBABILITY: f32 = -1e9;

/// A sequence as Axolotl's KD plugin takes prepared ones: row t of the targets is about token t + 1.
fn json_line(sequence: &Sequence, targets: TargetForm) -> Value {
    let tokens = &sequence.token_ids;
    let is_target = |position: usize| sequence.loss_mask.get(position).copied().unwrap_or(false);
    let labels = tokens.iter().enumerate().map(|(position, &id)| {
        if is_target(position) {
            i64::from(id)
        } else {
            -100
        }
    });
    let mut line = json!({
        "source": sequence.source,
        "input_ids": tokens,
        "attention_mask": vec![1; tokens.len()],
        "labels": labels.collect::<Vec<_>>(),
        "loss_mask": sequence.loss_mask.iter().map(|&target| u8::from(target)).collect::<Vec<_>>(),
    });
    if let (Some(top_k), Some(statistics)) = (&sequence.top_k, &sequence.statistics) {
        let rows = top_k.logits.chunks(top_k.k).zip(&statistics.log_sum_exp);
        let values: Vec<Vec<f32>> = rows
            .map(|(row, log_sum_exp)| log_probabilities(row, *log_sum_exp, targets))
            .collect();
        let mask: Vec<Vec<u8>> = (1..=tokens.len())
            .map(|next| vec![u8::from(is_target(next)); top_k.k])
            .collect();
        line["target_token_ids"] = json!(rows_of_ids(top_k));
        line["target_logprobs"] = json!(values);
        line["target_mask"] = json!(mask);
    }
    line
}

fn rows_of_ids(top_k: &TopK) -> Vec<&[u32]> {
    top_k.ids.chunks(top_k.k).collect()
}

/// ln p of a position's kept logits \[K\].
fn log_probabilities(row: &[f32], log_sum_exp: f32, targets: TargetForm) -> Vec<f32> {
    let (temperature, normaliser) = match targets {
        TargetForm::WholeVocabulary => (1.0, log_sum_exp),
        TargetForm::KeptTokens { temperature } => {
            let max = row.first().copied().unwrap_or(0.0);
            let sum: f64 = row
                .iter()
                .map(|logit| f64::from((logit - max) / temperature).exp())
                .sum();
            (
                temperature,
                (f64::from(max / temperature) + sum.ln()) as f32,
            )
        }
    };
    row.iter()
        .map(|logit| (logit / temperature - normaliser).max(NO_PROBABILITY))
        .collect()
}

/// Everything else that the cache holds of a sequence.
fn add_values(line: &mut Value, sequence: &Sequence) {
    if let Some(all) = &sequence.statistics {
        line["statistics"] = json!({"mean": all.mean, "std": all.std, "min": all.min, "max": all.max, "log_sum_exp": all.log_sum_exp});
    }
    if let Some(top_k) = &sequence.top_k {
        line["top_k"] = json!({
            "ids": rows_of_ids(top_k),
            "logits": top_k.logits.chunks(top_k.k).collect::<Vec<_>>(),
        });
    }
    let hidden: BTreeMap<String, Vec<&[f32]>> = sequence
        .hidden
        .iter()
        .map(|state| {
            (
                state.layer.to_string(),
                state.values.chunks(state.width).collect(),
            )
        })
        .collect();
    if !hidden.is_empty() {
        line["hidden"] = json!(hidden);
    }
}
