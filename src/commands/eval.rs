//! `caskd eval`

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use caskd_formats::{Cache, Io, RowInfo};
use caskd_models::{LoadOptions, LoadedModel, load};
use caskd_trainer::{
    CacheScore, ItemScore, Rolling, Task, TaskScore, TextScore, check_fit, evaluate_cache,
    evaluate_task, evaluate_text, evaluate_wikitext, is_run, load_run, run_caches,
};
use serde::Serialize;

use super::{kind_of, open_cache, parse_device, print_json, print_text, write_file};
use crate::cli::{EvalArgs, SplitArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{Progress, duration, say};

/// Padded tokens of an evaluation batch.
pub(crate) const EVAL_TOKENS: usize = 2048;

/// The task that is scored by perplexity.
const WIKITEXT: &str = "wikitext";

#[derive(Serialize)]
struct Scores {
    model: PathBuf,
    text: Vec<Scored<TextScore>>,
    cache: Vec<ScoredCache>,
    tasks: Vec<Scored<AnyTaskScore>>,
}

/// What a task reports.
#[derive(Serialize)]
#[serde(untagged)]
enum AnyTaskScore {
    Choices(TaskScore),
    Pages(WikitextScore),
}

/// Wikitext: perplexities over its pages.
#[derive(Serialize)]
struct WikitextScore {
    task: &'static str,
    items: usize,
    #[serde(flatten)]
    score: TextScore,
}

/// A task of `--task`.
#[derive(Clone, Copy)]
enum AnyTask {
    Choices(Task),
    Wikitext,
}

#[derive(Serialize)]
struct Scored<S> {
    path: PathBuf,
    #[serde(flatten)]
    score: S,
}

#[derive(Serialize)]
struct ScoredCache {
    path: PathBuf,
    /// The sequences that were scored: `validation`, `train` or `all`.
    split: &'static str,
    sequences: usize,
    #[serde(flatten)]
    score: CacheScore,
}

/// Tokens of a window over running text, unless --max-len says otherwise.
const TEXT_WINDOW: usize = 512;

pub(crate) fn run(args: &EvalArgs) -> Outcome {
    let options = LoadOptions {
        device: parse_device(&args.device)?,
        kind: kind_of(args.dtype),
    };
    let any_text = !args.text.is_empty();
    if any_text {
        windows(args, TEXT_WINDOW)?;
    }
    let limit = args.limit.map(NonZeroUsize::get);
    let tasks: Vec<(AnyTask, PathBuf)> = args
        .task
        .iter()
        .map(|text| parse_task(text))
        .collect::<Result<_, Failure>>()?;
    let any_choices = tasks
        .iter()
        .any(|(task, _)| matches!(task, AnyTask::Choices(_)));
    if args.per_item.is_some() && !any_choices {
        return Err(Failure::user(
            "--per-item needs a task with choices",
            "give --task NAME=FILE.jsonl",
        ));
    }
    let any_pages = tasks
        .iter()
        .any(|(task, _)| matches!(task, AnyTask::Wikitext));
    let given = [("--stride", args.stride), ("--max-len", args.max_len)];
    if let Some((option, _)) = given.iter().find(|(_, value)| value.is_some())
        && !(any_text || any_pages)
    {
        return Err(Failure::user(
            format!("{option} says how a text is scored, and there is none"),
            "leave it out, or give --text FILE or --task wikitext=FILE",
        ));
    }
    let of_run = is_run(&args.model);
    let mut caches = args.cache.clone();
    let mut shards = args.elsewhere.shards.clone();
    if caches.is_empty() && args.text.is_empty() && tasks.is_empty() {
        if !of_run {
            return Err(Failure::user(
                "there is nothing to evaluate on",
                "give --task NAME=FILE, --text FILE for perplexity, or --cache CACHE for KL to the teacher",
            ));
        }
        let (of_run, elsewhere) = run_caches(&args.model)?;
        caches.extend(of_run);
        shards.extend(elsewhere);
    }
    let model = load_any(&args.model, &options)?;
    let config = model.network.config();
    // The harness takes the whole of what the model takes.
    let page_window = config.max_position_embeddings();
    if any_pages {
        windows(args, page_window)?;
    }
    let longest = args.max_len.or(any_text.then_some(TEXT_WINDOW));
    if let Some((longest, context)) = longest.zip(config.last_position())
        && longest > context
    {
        say(format!(
            "warning: windows of {longest} tokens are longer than the {context} positions that the model was made for \
             (--max-len {context} cuts them)"
        ));
    }
    let mut scores = Scores {
        model: args.model.clone(),
        text: Vec::new(),
        cache: Vec::new(),
        tasks: Vec::new(),
    };
    for path in &args.text {
        let score = score_text(&model, path, windows(args, TEXT_WINDOW)?)?;
        if !args.json {
            print_text(format!(
                "{}: perplexity {:.3} a token, {:.2} a word, {:.4} bits a byte; {} tokens in {} ({:.0} tokens/s)",
                path.display(),
                score.perplexity,
                score.word_perplexity,
                score.bits_per_byte,
                score.tokens,
                duration(score.seconds),
                score.tokens_per_second
            ));
        }
        scores.text.push(Scored {
            path: path.clone(),
            score,
        });
    }
    for path in &caches {
        let cache = open_cache(path, &shards, Io::Mmap)?;
        let scored = score_split(&model, &cache, args.split)?;
        let score = &scored.score;
        if !args.json {
            let kl = score
                .kl
                .map_or("needs a compact or exact cache".to_string(), |kl| {
                    format!("{kl:.4} nats")
                });
            let known = |value: Option<f64>, digits: usize| {
                value.map_or("not known".to_string(), |value| format!("{value:.digits$}"))
            };
            let teacher = match score.missing_teacher_logits {
                0 => known(score.teacher_perplexity, 3),
                missing => format!("not known: {missing} targets are outside its top k"),
            };
            let teacher_ece = known(score.teacher_ece, 4);
            print_text(format!(
                "{}{}: perplexity {:.3} (teacher {teacher}), KL to the teacher {kl}, same first choice at {:.1}% of {} targets, calibration error {:.4} (teacher {teacher_ece})",
                path.display(),
                match scored.split {
                    "all" => String::new(),
                    split => format!(" ({split} split)"),
                },
                score.perplexity,
                100.0 * score.top1_agreement,
                score.targets,
                score.ece,
            ));
        }
        scores.cache.push(scored);
    }
    let mut per_item = Vec::new();
    for (task, path) in tasks {
        let (line, score) = match task {
            AnyTask::Choices(task) => {
                let (score, items) = score_task(&model, task, &path, limit)?;
                per_item.extend(items);
                (task_line(&score), AnyTaskScore::Choices(score))
            }
            AnyTask::Wikitext => {
                let score = score_wikitext(&model, &path, limit, windows(args, page_window)?)?;
                (wikitext_line(&score), AnyTaskScore::Pages(score))
            }
        };
        if !args.json {
            print_text(line);
        }
        scores.tasks.push(Scored { path, score });
    }
    if let Some(path) = &args.per_item {
        write_file(path, |sink| {
            per_item.iter().try_for_each(|item| {
                serde_json::to_writer(&mut *sink, item)?;
                sink.write_all(b"\n")
            })
        })?;
    }
    if args.json {
        print_json(&scores)?;
    }
    Ok(Exit::Done)
}

/// `NAME=FILE`, or a file that is called after its task.
fn parse_task(text: &str) -> Result<(AnyTask, PathBuf), Failure> {
    let path = Path::new(text.split_once('=').map_or(text, |(_, path)| path));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = text.split_once('=').map_or(&*stem, |(name, _)| name);
    if name.eq_ignore_ascii_case(WIKITEXT) {
        return Ok((AnyTask::Wikitext, path.to_owned()));
    }
    match Task::by_name(name) {
        Some(task) => Ok((AnyTask::Choices(task), path.to_owned())),
        None => Err(Failure::user(
            format!("unknown task `{name}`"),
            format!(
                "--task NAME=FILE.jsonl, with one of {}, {WIKITEXT}",
                Task::ALL.map(Task::name).join(", ")
            ),
        )),
    }
}

/// Windows as asked for, else of `max_len` tokens.
fn windows(args: &EvalArgs, max_len: usize) -> Result<Rolling, Failure> {
    let max_len = args.max_len.unwrap_or(max_len);
    let stride = args.stride.unwrap_or(max_len);
    if max_len == 0 {
        return Err(Failure::user(
            "--max-len 0 is no window",
            "give the tokens of a window, for instance 512",
        ));
    }
    if !(1..=max_len).contains(&stride) {
        return Err(Failure::user(
            format!("--stride {stride} does not fit a window of {max_len} tokens"),
            "give a --stride from 1 to --max-len",
        ));
    }
    Ok(Rolling { max_len, stride })
}

fn score_task(
    model: &LoadedModel,
    task: Task,
    path: &Path,
    limit: Option<usize>,
) -> Result<(TaskScore, Vec<ItemScore>), Failure> {
    let mut bar = Progress::new(task.name());
    let started = Instant::now();
    let scored = evaluate_task(model, task, path, limit, &mut |done, total| {
        let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
        bar.update(done, total, &format!("{rate:.1} choices/s"));
    })?;
    bar.finish();
    Ok(scored)
}

fn score_wikitext(
    model: &LoadedModel,
    path: &Path,
    limit: Option<usize>,
    rolling: Rolling,
) -> Result<WikitextScore, Failure> {
    let mut bar = Progress::new(WIKITEXT);
    let started = Instant::now();
    let (score, items) = evaluate_wikitext(model, path, limit, rolling, &mut |done, total| {
        let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
        bar.update(done, total, &format!("{rate:.2} pages/s"));
    })?;
    bar.finish();
    Ok(WikitextScore {
        task: WIKITEXT,
        items,
        score,
    })
}

fn wikitext_line(WikitextScore { items, score, .. }: &WikitextScore) -> String {
    format!(
        "wikitext: word_perplexity {:.4}, byte_perplexity {:.4}, bits_per_byte {:.4}, perplexity {:.3} a token; {items} pages in {} ({:.0} tokens/s)",
        score.word_perplexity,
        score.byte_perplexity,
        score.bits_per_byte,
        score.perplexity,
        duration(score.seconds),
        score.tokens_per_second
    )
}

fn task_line(score: &TaskScore) -> String {
    let mut line = format!(
        "{}: acc {:.4} ± {:.4}",
        score.task, score.acc, score.acc_stderr
    );
    let mut add = |part: String| line.push_str(&part);
    if let Some((acc, error)) = score.acc_norm.zip(score.acc_norm_stderr) {
        add(format!(", acc_norm {acc:.4} ± {error:.4}"));
    }
    if let Some(f1) = score.f1 {
        add(format!(", f1 {f1:.4}"));
    }
    if let Some(perplexity) = score.perplexity {
        add(format!(", perplexity {perplexity:.3}"));
    }
    add(format!(
        "; {} items in {} ({:.1} items/s)",
        score.items,
        duration(score.seconds),
        score.items_per_second
    ));
    line
}

/// A run's student with its adapters, or a model.
pub(crate) fn load_any(path: &Path, options: &LoadOptions) -> Result<LoadedModel, Failure> {
    Ok(if is_run(path) {
        load_run(path, options)?
    } else {
        load(path, options)?
    })
}

pub(crate) fn score_text(
    model: &LoadedModel,
    path: &Path,
    rolling: Rolling,
) -> Result<TextScore, Failure> {
    let text =
        std::fs::read_to_string(path).map_err(|error| Failure::file("read", path, &error))?;
    let mut bar = Progress::new("evaluating on text");
    let score = evaluate_text(model, &text, rolling, &mut with_rate(&mut bar))?;
    bar.finish();
    Ok(score)
}

/// Shows tokens done with their rate.
fn with_rate(bar: &mut Progress) -> impl FnMut(u64, u64) {
    let started = Instant::now();
    move |done, total| {
        bar.update(
            done,
            total,
            &format!(
                "{:.0} tokens/s",
                done as f64 / started.elapsed().as_secs_f64().max(1e-9)
            ),
        );
    }
}

pub(crate) fn score_cache(model: &LoadedModel, path: &Path) -> Result<CacheScore, Failure> {
    let cache = open_cache(path, &[], Io::Mmap)?;
    Ok(score_split(model, &cache, Some(SplitArg::All))?.score)
}

/// Scores a model on one split of a cache: where none is named on the validation split, if there is one, for the rest
/// may be what the model was trained on.
fn score_split(
    model: &LoadedModel,
    cache: &Cache,
    split: Option<SplitArg>,
) -> Result<ScoredCache, Failure> {
    check_fit(model, cache)?;
    let data = &cache.manifest().data;
    let has_split = data.preparation.validation_millionths > 0;
    let split = split.unwrap_or(if has_split {
        SplitArg::Validation
    } else {
        SplitArg::All
    });
    if split != SplitArg::All && !has_split {
        return Err(Failure::user(
            format!("cache `{}` has no validation split", cache.dir().display()),
            "build it with --validation 0.05, or leave --split out",
        ));
    }
    let rows: Vec<RowInfo> = cache
        .rows()?
        .into_iter()
        .filter(|row| match split {
            SplitArg::All => true,
            SplitArg::Validation => data.is_validation(row.split_hash),
            SplitArg::Train => !data.is_validation(row.split_hash),
        })
        .collect();
    let mut bar = Progress::new("evaluating on the cache");
    let score = evaluate_cache(
        model,
        cache,
        Some(&rows),
        EVAL_TOKENS,
        &mut with_rate(&mut bar),
    )?;
    bar.finish();
    Ok(ScoredCache {
        path: cache.dir().to_owned(),
        split: match split {
            SplitArg::All => "all",
            SplitArg::Validation => "validation",
            SplitArg::Train => "train",
        },
        sequences: rows.len(),
        score,
    })
}
