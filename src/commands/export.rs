//! `caskd export`: a cache decoded, for people and for other tools.

use std::collections::BTreeMap;
use std::io::Write;

use caskd_formats::{Cache, Columns, Head, Io, RowInfo, Sequence, Tier};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{print_json, refuse_existing, write_file};
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
    let cache = Cache::open(&args.cache, Io::Mmap)?;
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
            ExportFormat::Jsonl => write_jsonl(&source, sink),
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

/// A line a sequence.
fn write_jsonl(source: &Source<'_>, sink: &mut dyn Write) -> Written {
    let manifest = source.cache.manifest();
    let columns = Columns::all(manifest);
    let mut bar = Progress::new("exporting");
    let started = std::time::Instant::now();
    for (index, row) in source.rows.iter().enumerate() {
        let sequence = source.read(row, &columns)?;
        let logits = source.logits(&sequence)?;
        let mut line = json_line(&sequence, logits.as_deref(), manifest.vocab_size);
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

fn json_line(sequence: &Sequence, logits: Option<&[f32]>, vocab_size: usize) -> Value {
    let mut line = json!({
        "source": sequence.source,
        "input_ids": sequence.token_ids,
        "loss_mask": sequence.loss_mask.iter().map(|&target| u8::from(target)).collect::<Vec<_>>(),
    });
    if let Some(all) = &sequence.statistics {
        line["statistics"] = json!({"mean": all.mean, "std": all.std, "min": all.min, "max": all.max, "log_sum_exp": all.log_sum_exp});
    }
    if let Some(top_k) = &sequence.top_k {
        line["top_k"] = json!({
            "ids": top_k.ids.chunks(top_k.k).collect::<Vec<_>>(),
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
    if let Some(logits) = logits {
        line["logits"] = json!(logits.chunks(vocab_size).collect::<Vec<_>>());
    }
    line
}
