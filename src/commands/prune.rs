//! `caskd prune`

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use caskd_cache_builder::{DataOptions, tokenize};
use caskd_formats::{Cache, Columns, Io};
use caskd_models::{
    Criterion, LoadOptions, LoadedModel, MaskOptions, MaskReport, Method, Parts, Pattern,
    PruneOptions, PruneReport, activation_norms, default_scope, load, mask, prune, saliencies,
    save_model,
};
use caskd_trainer::check_fit;
use serde::Serialize;

use super::{open_cache, print_json, refuse_existing};
use crate::cli::{MethodArg, PartsArg, PruneArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{Progress, STOP, say};

/// Longest piece of a calibration file, in tokens.
const CALIBRATION_LENGTH: usize = 512;

/// What `caskd prune` is asked to do.
pub(crate) struct Request {
    pub(crate) model: PathBuf,
    pub(crate) out: PathBuf,
    /// By default Wanda where there is data to calibrate on, else magnitude.
    pub(crate) method: Option<Method>,
    pub(crate) scope: Option<Range<usize>>,
    pub(crate) removal: Removal,
    pub(crate) data: Calibration,
    pub(crate) tokens: usize,
}

/// What goes.
pub(crate) enum Removal {
    /// Whole groups and channels.
    Structured { ratio: f64, parts: Parts },
    /// Single weights.
    Masked { ratio: f64, pattern: Pattern },
}

/// What importance is measured on.
pub(crate) enum Calibration {
    Nothing,
    Files(Vec<PathBuf>),
    Cache {
        folder: PathBuf,
        /// Further folders of its shards.
        shards: Vec<PathBuf>,
    },
}

/// What was done.
#[derive(Serialize)]
pub(crate) struct Pruned {
    out: PathBuf,
    method: Method,
    /// "structured", "unstructured" or "N:M".
    sparsity: String,
    ratio: f64,
    /// Layers pruned: the first, and the one after the last.
    scope: [usize; 2],
    calibration_tokens: usize,
    final_ratio: f64,
    #[serde(flatten)]
    report: Report,
    #[serde(skip)]
    after: u64,
}

impl Pruned {
    /// Parameters that are left.
    pub(crate) fn parameters_after(&self) -> u64 {
        self.after
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Report {
    Structured(PruneReport),
    Masked(MaskReport),
}

pub(crate) fn run(args: &PruneArgs) -> Outcome {
    let pruned = prune_to(&request(args)?)?;
    if args.json {
        print_json(&pruned)?;
    }
    Ok(Exit::Done)
}

fn request(args: &PruneArgs) -> Result<Request, Failure> {
    refuse_existing(&args.out)?;
    let ratio = |default: f64| {
        let ratio = args.ratio.unwrap_or(default);
        if ratio > 0.0 && ratio < 1.0 {
            return Ok(ratio);
        }
        Err(Failure::user(
            format!("--ratio {ratio} is not between 0 and 1"),
            "0.25 removes a quarter of each pruned layer",
        ))
    };
    let parts = match args.parts {
        PartsArg::Auto => Parts::Auto,
        PartsArg::All => Parts::All,
        PartsArg::Heads => Parts::Heads,
        PartsArg::Ffn => Parts::Ffn,
    };
    let removal = if args.sparsity == "structured" {
        Removal::Structured {
            ratio: ratio(0.25)?,
            parts,
        }
    } else {
        let pattern: Pattern = args.sparsity.parse().map_err(|message: String| {
            Failure::user(
                message,
                "--sparsity structured, unstructured or N:M, for instance 2:4",
            )
        })?;
        if parts != Parts::Auto {
            return Err(Failure::user(
                "--parts chooses what structured pruning removes, and masks take every projection",
                "leave out --parts, or --sparsity",
            ));
        }
        let ratio = match pattern {
            Pattern::Unstructured => ratio(0.5)?,
            Pattern::Blocks { keep, of } if args.ratio.is_none() => 1.0 - keep as f64 / of as f64,
            Pattern::Blocks { .. } => {
                return Err(Failure::user(
                    format!("--sparsity {pattern} has its own ratio"),
                    "leave out --ratio",
                ));
            }
        };
        Removal::Masked { ratio, pattern }
    };
    Ok(Request {
        model: args.model.clone(),
        out: args.out.clone(),
        method: args.method.map(|method| match method {
            MethodArg::Magnitude => Method::Magnitude,
            MethodArg::Wanda => Method::Wanda,
            MethodArg::Taylor => Method::Taylor,
        }),
        scope: args.scope.as_deref().map(parse_scope).transpose()?,
        removal,
        data: match (&args.cache, args.calibration.as_slice()) {
            (Some(cache), _) => Calibration::Cache {
                folder: cache.clone(),
                shards: args.elsewhere.shards.clone(),
            },
            (None, []) => Calibration::Nothing,
            (None, files) => Calibration::Files(files.to_vec()),
        },
        tokens: args.calibration_tokens,
    })
}

/// Prunes a model into a new folder.
pub(crate) fn prune_to(request: &Request) -> Result<Pruned, Failure> {
    let method = match (request.method, &request.data) {
        (Some(method), _) => method,
        (None, Calibration::Nothing) => Method::Magnitude,
        (None, _) => Method::Wanda,
    };
    if method != Method::Magnitude && matches!(request.data, Calibration::Nothing) {
        return Err(Failure::user(
            format!("--method {} needs data to measure on", name(method)),
            "give --cache CACHE or --calibration FILE",
        ));
    }
    let mut model = load(&request.model, &LoadOptions::default())?;
    if let Some(sparsity) = model.network.sparsity() {
        // Columns that go would leave blocks that hold the pattern no more.
        return Err(Failure::user(
            format!("the model is masked already ({})", sparsity.pattern),
            "prune the model that was masked, then mask what is left",
        ));
    }
    let layers = model.network.num_layers();
    let scope = request
        .scope
        .clone()
        .unwrap_or_else(|| default_scope(layers));
    if scope.is_empty() || scope.end > layers {
        return Err(Failure::user(
            format!(
                "layers {} to {} of a network with {layers}",
                scope.start,
                scope.end.saturating_sub(1)
            ),
            "--scope FIRST-END counts from 0 and leaves END out",
        ));
    }
    let (criterion, calibration_tokens) = measure(&mut model, method, &scope, request)?;
    let (report, before, after, sparsity, ratio) = match request.removal {
        Removal::Structured { ratio, parts } => {
            let options = PruneOptions {
                ratio,
                scope: Some(scope.clone()),
                parts,
                criterion,
            };
            let report = prune(&mut model, &options)?;
            let (before, after) = (report.parameters_before, report.parameters_after);
            if after == before {
                return Err(Failure::user(
                    format!("a share of {ratio} of the groups and channels rounds down to none"),
                    "give a larger --ratio, or --parts all",
                ));
            }
            let structured = "structured".to_owned();
            (Report::Structured(report), before, after, structured, ratio)
        }
        Removal::Masked { ratio, pattern } => {
            let options = MaskOptions {
                pattern,
                ratio,
                scope: Some(scope.clone()),
                criterion,
            };
            let report = mask(&mut model, &options)?;
            let (all, zeros) = (report.parameters, report.zeros);
            let pattern = pattern.to_string();
            (Report::Masked(report), all, all - zeros, pattern, ratio)
        }
    };
    save_model(&model, &request.out)?;
    if let Report::Structured(report) = &report {
        for note in &report.notes {
            say(format!("note: {note}"));
        }
    }
    say(format!(
        "student `{}`: {:.1} M of {:.1} M parameters{} ({:.1}%), layers {} to {} pruned by {}",
        request.out.display(),
        after as f64 / 1e6,
        before as f64 / 1e6,
        if matches!(report, Report::Masked(_)) {
            " are not zero"
        } else {
            ""
        },
        100.0 * after as f64 / before as f64,
        scope.start,
        scope.end - 1,
        name(method),
    ));
    Ok(Pruned {
        out: request.out.clone(),
        method,
        sparsity,
        ratio,
        scope: [scope.start, scope.end],
        calibration_tokens,
        final_ratio: after as f64 / before as f64,
        report,
        after,
    })
}

fn name(method: Method) -> &'static str {
    match method {
        Method::Magnitude => "magnitude",
        Method::Wanda => "wanda",
        Method::Taylor => "taylor",
    }
}

/// The criterion with what it has to be measured on, and the tokens that were spent.
fn measure(
    model: &mut LoadedModel,
    method: Method,
    scope: &Range<usize>,
    request: &Request,
) -> Result<(Criterion, usize), Failure> {
    if method == Method::Magnitude {
        say(
            "warning: pruning by the weights' magnitude alone, which can ruin a model; --method wanda or taylor with --cache CACHE or --calibration FILE does far better",
        );
        return Ok((Criterion::Magnitude, 0));
    }
    let (sequences, from) = match &request.data {
        Calibration::Nothing => (Vec::new(), String::new()),
        Calibration::Files(files) => {
            let opened = caskd_models::ModelFiles::open(&request.model)?;
            let data = tokenize(
                &opened,
                files,
                CALIBRATION_LENGTH,
                &DataOptions::default(),
                &STOP,
                &mut |_| {},
            )?
            .ok_or_else(|| {
                Failure::user(
                    "stopped while the calibration data were read",
                    "nothing was written; run the command again",
                )
            })?;
            let sequences = data.sequences.into_iter().map(|of| of.token_ids);
            let names: Vec<String> = files
                .iter()
                .map(|file| format!("`{}`", file.display()))
                .collect();
            (some_of(sequences, request.tokens), names.join(", "))
        }
        Calibration::Cache { folder, shards } => (
            from_cache(
                model,
                &open_cache(folder, shards, Io::Mmap)?,
                request.tokens,
            )?,
            format!("`{}`", folder.display()),
        ),
    };
    let tokens = sequences.iter().map(Vec::len).sum();
    say(format!("calibrating on {tokens} tokens of {from}"));
    let criterion = if method == Method::Wanda {
        Criterion::Wanda(activation_norms(&model.network, &sequences)?)
    } else {
        let mut bar = Progress::new("gradients");
        let started = Instant::now();
        let measured = saliencies(
            &mut model.network,
            &sequences,
            scope.clone(),
            &mut |done, total| {
                let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
                bar.update(done, total, &format!("{rate:.1} sequences/s"));
            },
        )?;
        bar.finish();
        Criterion::Taylor(measured)
    };
    Ok((criterion, tokens))
}

/// The first sequences that hold so many tokens together.
fn some_of(sequences: impl Iterator<Item = Vec<u32>>, tokens: usize) -> Vec<Vec<u32>> {
    let mut taken = 0;
    sequences
        .take_while(|sequence| {
            let more = taken < tokens;
            taken += sequence.len();
            more
        })
        .collect()
}

/// Sequences of a cache, by their split hash: a fair sample, the same in every cache of the same data.
fn from_cache(model: &LoadedModel, cache: &Cache, tokens: usize) -> Result<Vec<Vec<u32>>, Failure> {
    check_fit(model, cache)?;
    let mut rows = cache.rows()?;
    rows.sort_by_key(|row| (row.split_hash, row.shard, row.row));
    let mut sequences = Vec::new();
    let mut taken = 0;
    for row in rows {
        if taken >= tokens {
            break;
        }
        for sequence in cache.read(row.shard, &[row.row], &Columns::default())? {
            taken += sequence.token_ids.len();
            sequences.push(sequence.token_ids);
        }
    }
    Ok(sequences)
}

/// `4-30` → layers 4 to 29.
fn parse_scope(text: &str) -> Result<Range<usize>, Failure> {
    let parsed = text
        .split_once('-')
        .and_then(|(first, end)| Some((first.trim().parse().ok()?, end.trim().parse().ok()?)));
    match parsed {
        Some((first, end)) if first < end => Ok(first..end),
        _ => Err(Failure::user(
            format!("`{text}` is no range of layers"),
            "give the first layer to prune and the one after the last: --scope 4-30 prunes layers 4 to 29",
        )),
    }
}
