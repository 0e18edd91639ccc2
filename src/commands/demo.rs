//! `caskd demo`: the main job end to end, on a real teacher and on our own data.
//!
//! Every stage leaves a small report in `stages/`, which is how a stopped demo goes on.

mod report;

use std::path::{Path, PathBuf};
use std::time::Instant;

use caskd_cache_builder::{BuildOptions, DataOptions, LayerChoice, Placement};
use caskd_formats::{Cache, CodeTarget, HiddenCodec, Io, Tier};
use caskd_models::{LoadOptions, Method, Parts, load};
use caskd_search::{Location, SamplerKind, Space, StudyConfig};
use caskd_trainer::{TrainConfig, load_run, teacher_perplexity};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use report::{DemoReport, as_text, table_rows};

use super::build::{BATCH_TOKENS, DEFAULT_RATE, build_with_progress};
use super::eval::score_cache;
use super::prune::{Calibration, Removal, Request, prune_to};
use super::search::{Plan, SearchPlan, search_with_progress};
use super::train::train_with_progress;
use super::{print_json, print_text, write_file};
use crate::cli::DemoArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::objective::Distillation;
use crate::terminal::{say, shell_word};

const FILES: [(&str, &str); 3] = [
    (
        "instructions.jsonl",
        include_str!("../../examples/data/instructions.jsonl"),
    ),
    (
        "heldout.jsonl",
        include_str!("../../examples/data/heldout.jsonl"),
    ),
    (
        "heldout.txt",
        include_str!("../../examples/data/heldout.txt"),
    ),
];

const STAGES: usize = 9;

/// Longest sequence; the longest of our records has about 190 tokens.
const MAX_LEN: usize = 256;

/// Trials of each search, and the share of the cache they train on.
const TRIALS: u64 = 6;
const FRACTION: f64 = 0.1;
const VALIDATION: f64 = 0.08;

/// Trials before SABO's first model; the rest of so short a search is the model's.
const STARTUP: u64 = 3;

/// Optimizer steps of the final trainings, about half a pass over the data.
const STEPS: u64 = 32;

/// Where things lie.
struct Places {
    out: PathBuf,
}

impl Places {
    fn join(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    fn data(&self, name: &str) -> PathBuf {
        self.out.join("data").join(name)
    }
}

/// What the build stage leaves for the account at the end.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct TeacherAccount {
    seconds: f64,
    positions: u64,
    tokens_per_second: f64,
}

/// What a training stage leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Trained {
    tokens: u64,
    tokens_per_second: f64,
    seconds: f64,
}

/// What a search stage leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Searched {
    tokens: u64,
    seconds: f64,
    settings: String,
}

/// Scores on the two held-out caches.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Scores {
    text_perplexity: f64,
    response_perplexity: f64,
    kl: f64,
    tokens_per_second: f64,
    seconds: f64,
}

/// Why the demo does not go on.
enum Halt {
    /// The user stopped it; it can be resumed.
    Stopped,
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for Halt {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

pub(crate) fn run(args: &DemoArgs) -> Outcome {
    let places = Places {
        out: args.out.clone(),
    };
    prepare(&places, args.resume)?;
    match demo(args, &places) {
        Ok(()) => Ok(Exit::Done),
        Err(Halt::Failed(failure)) => Err(failure),
        Err(Halt::Stopped) => {
            say(format!(
                "stopped; go on with: caskd demo --out {} --resume",
                shell_word(args.out.display())
            ));
            Ok(Exit::Stopped)
        }
    }
}

fn demo(args: &DemoArgs, places: &Places) -> Result<(), Halt> {
    let student = places.join("student");
    let base = base_config(args.seed);
    let with = |settings: &[(&str, &str)]| -> Result<TrainConfig, Failure> {
        let mut config = base.clone();
        for (key, value) in settings {
            config.set(key, value)?;
        }
        Ok(config)
    };

    let account = build_caches(args, places)?;
    stage(
        places,
        2,
        "prune",
        "prune a 25% sparse student from the dense model",
        |_| {
            let dense = teacher_path(args)?;
            let pruned = prune_to(&Request {
                model: dense,
                out: student.clone(),
                method: Some(Method::Wanda),
                scope: None,
                removal: Removal::Structured {
                    ratio: 0.25,
                    parts: Parts::Auto,
                },
                data: Calibration::Files(vec![places.data("instructions.jsonl")]),
                tokens: 8192,
            })?;
            Ok(pruned.parameters_after())
        },
    )?;
    let lora = train_stage(
        places,
        3,
        "lora",
        "train: LoRA fine-tuning, no teacher",
        &with(&[("soft_weight", "0")])?,
    )?;
    let kd = train_stage(
        places,
        4,
        "kd",
        "train: standard KD from the cache",
        &with(&[
            ("hard_weight", "1"),
            ("soft_weight", "1"),
            ("kd_type", "kl"),
            ("scaling_value", "2"),
        ])?,
    )?;
    let random = search_stage(args, places, 5, "search-random", SamplerKind::Random, &base)?;
    let bayes_random = train_stage(
        places,
        6,
        "bayeskd-random",
        "train: BayesKD, the random search's best",
        &best_config(places, "search-random", args.seed)?,
    )?;
    let sabo = search_stage(args, places, 7, "search-sabo", SamplerKind::Sabo, &base)?;
    let bayes_sabo = train_stage(
        places,
        8,
        "bayeskd-sabo",
        "train: BayesKD, SABO's best",
        &best_config(places, "search-sabo", args.seed)?,
    )?;

    let scores = evaluate_all(args, places)?;
    let teacher = teacher_scores(places)?;
    let search_seconds = [random.seconds, sabo.seconds];
    let rows = table_rows(
        places,
        args,
        &account,
        &teacher,
        &scores,
        [&lora, &kd, &bayes_random, &bayes_sabo],
        search_seconds,
    )?;

    let distilled =
        kd.tokens + bayes_random.tokens + bayes_sabo.tokens + random.tokens + sabo.tokens;
    let online = distilled as f64 / account.tokens_per_second.max(1e-9);
    let report = DemoReport {
        rows: &rows,
        teacher_seconds: account.seconds,
        online_teacher_seconds: online,
        seconds: stage_seconds(places),
    };
    let text =
        serde_json::to_vec_pretty(&report).map_err(|error| Failure::ours(error.to_string()))?;
    write_file(&places.join("demo.json"), |sink| sink.write_all(&text))?;
    if args.json {
        print_json(&report)?;
    } else {
        print_text(as_text(
            &report,
            &[("random", &random), ("SABO", &sabo)],
            &account,
            places,
        ));
    }
    Ok(())
}

/// One configuration for all students; the recipes differ in their losses only.
fn base_config(seed: u64) -> TrainConfig {
    TrainConfig {
        seed,
        batch_size: 4,
        learning_rate: 5e-4,
        max_steps: Some(STEPS),
        ..TrainConfig::default()
    }
}

fn best_config(places: &Places, study: &str, seed: u64) -> Result<TrainConfig, Failure> {
    let path = places.join(study).join("best.toml");
    let text =
        std::fs::read_to_string(&path).map_err(|error| Failure::file("read", &path, &error))?;
    let mut config = TrainConfig::from_toml(&text)?;
    config.seed = seed;
    config.fraction = 1.0;
    Ok(config)
}

/// Makes the folder, replacing an earlier demo but nothing else.
fn prepare(places: &Places, resume: bool) -> Result<(), Failure> {
    let marker = places.join(".caskd-demo");
    let occupied = places
        .out
        .read_dir()
        .is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !marker.exists() {
        return Err(Failure::user(
            format!(
                "`{}` holds something that is not a demo",
                places.out.display()
            ),
            "choose another --out",
        ));
    }
    if occupied && !resume {
        std::fs::remove_dir_all(&places.out)
            .map_err(|error| Failure::file("replace", &places.out, &error))?;
    }
    std::fs::create_dir_all(places.join("stages"))
        .map_err(|error| Failure::file("make", &places.out, &error))?;
    write_file(&marker, |sink| {
        sink.write_all(b"this folder belongs to `caskd demo`\n")
    })?;
    for (name, text) in FILES {
        write_file(&places.data(name), |sink| sink.write_all(text.as_bytes()))?;
    }
    Ok(())
}

/// The teacher that was given, or the one that `make demo` keeps in the user's cache folder.
fn teacher_path(args: &DemoArgs) -> Result<PathBuf, Failure> {
    if let Some(path) = &args.teacher {
        return Ok(path.clone());
    }
    let folder = std::env::var_os("CASKD_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|cache| Path::new(&cache).join("caskd")))
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/caskd")));
    let path = folder
        .map(|folder| folder.join("smollm2-135m-instruct-q4_1/SmolLM2-135M-Instruct.Q4_1.gguf"));
    path.filter(|path| path.exists()).ok_or_else(|| {
        Failure::user(
            "the demo's teacher is not in the cache folder",
            "run `make demo`, which fetches it, or give --teacher FILE.gguf",
        )
    })
}

/// A stage's report as it lies in `stages/`.
#[derive(Serialize, Deserialize)]
struct StageReport<R> {
    seconds: f64,
    report: R,
}

/// Runs a stage, or takes its report from an earlier, interrupted demo.
fn stage<R: Serialize + DeserializeOwned>(
    places: &Places,
    number: usize,
    name: &str,
    title: &str,
    work: impl FnOnce(&str) -> Result<R, Halt>,
) -> Result<R, Halt> {
    let path = places.join("stages").join(format!("{name}.json"));
    if let Ok(text) = std::fs::read(&path)
        && let Ok(StageReport { report, .. }) = serde_json::from_slice(&text)
    {
        say(format!("[{number}/{STAGES}] {title}: done before"));
        return Ok(report);
    }
    say(format!("[{number}/{STAGES}] {title}"));
    let started = Instant::now();
    let report = work(name)?;
    let report = StageReport {
        seconds: started.elapsed().as_secs_f64(),
        report,
    };
    let text =
        serde_json::to_vec_pretty(&report).map_err(|error| Failure::ours(error.to_string()))?;
    write_file(&path, |sink| sink.write_all(&text))?;
    Ok(report.report)
}

/// Seconds of all stages, of earlier, interrupted demos too.
fn stage_seconds(places: &Places) -> f64 {
    let folder = places.join("stages").read_dir().into_iter().flatten();
    let reports = folder.filter_map(|entry| std::fs::read(entry.ok()?.path()).ok());
    reports
        .filter_map(|text| serde_json::from_slice::<StageReport<serde_json::Value>>(&text).ok())
        .map(|report| report.seconds)
        .sum()
}

/// The only stage that loads the teacher: the training cache and two held-out ones.
fn build_caches(args: &DemoArgs, places: &Places) -> Result<TeacherAccount, Halt> {
    stage(
        places,
        1,
        "build",
        "build the teacher's caches (the teacher runs here, and never again)",
        |_| {
            let teacher = teacher_path(args)?;
            let mut account = TeacherAccount {
                seconds: 0.0,
                positions: 0,
                tokens_per_second: 0.0,
            };
            let caches = [
                ("cache", "instructions.jsonl", "last,middle"),
                ("heldout-text", "heldout.txt", "none"),
                ("heldout-responses", "heldout.jsonl", "none"),
            ];
            for (out, data, layers) in caches {
                let out = places.join(out);
                let options = BuildOptions {
                    teacher: teacher.clone(),
                    data: vec![places.data(data)],
                    preparation: DataOptions::default(),
                    tier: Tier::Exact,
                    top_k: Some(64),
                    code_target: CodeTarget::Rate(DEFAULT_RATE),
                    layers: layers.parse::<LayerChoice>().map_err(Failure::ours)?,
                    hidden_codec: HiddenCodec::Int8,
                    max_len: MAX_LEN,
                    kind: Kind::Float,
                    batch_tokens: BATCH_TOKENS,
                    resume: out.exists(),
                    fidelity: false,
                    out,
                    placement: Placement {
                        devices: vec![Device::Cpu],
                        memory_budget: None,
                        spill: None,
                    },
                };
                let report = build_with_progress(&options, data)?;
                if !report.completed {
                    return Err(Halt::Stopped);
                }
                account.seconds += report.teacher_seconds;
                account.positions += report.teacher_positions;
            }
            account.tokens_per_second = account.positions as f64 / account.seconds.max(1e-9);
            Ok(account)
        },
    )
}

fn train_stage(
    places: &Places,
    number: usize,
    name: &str,
    title: &str,
    config: &TrainConfig,
) -> Result<Trained, Halt> {
    stage(places, number, name, title, |name| {
        let out = places.join(name);
        let summary = train_with_progress(
            config,
            &places.join("student"),
            &[(places.join("cache"), 1.0)],
            &out,
            out.exists(),
            name,
        )?;
        if !summary.completed {
            return Err(Halt::Stopped);
        }
        Ok(Trained {
            tokens: summary.tokens,
            tokens_per_second: summary.tokens_per_second,
            seconds: summary.seconds,
        })
    })
}

fn search_stage(
    args: &DemoArgs,
    places: &Places,
    number: usize,
    name: &str,
    sampler: SamplerKind,
    base: &TrainConfig,
) -> Result<Searched, Halt> {
    let title = format!(
        "search: {TRIALS} trials with {sampler} on {:.0}% of the cache",
        100.0 * FRACTION
    );
    stage(places, number, name, &title, |name| {
        let out = places.join(name);
        let plan = SearchPlan {
            location: Location::from(&out),
            plan: Plan::Distillation(Distillation {
                cache: places.join("cache"),
                student: places.join("student"),
                base: base.clone(),
                validation: VALIDATION,
            }),
            space: Space::table2(),
            study: StudyConfig {
                sampler,
                seed: args.seed,
                trials: TRIALS,
                fraction: FRACTION,
                startup: STARTUP,
                ..StudyConfig::default()
            },
            resume: out.exists(),
        };
        let summary = search_with_progress(&plan)?;
        if !summary.completed {
            return Err(Halt::Stopped);
        }
        let view = caskd_search::read_study(&plan.location)?;
        let seconds = view.trials.iter().filter_map(|trial| trial.seconds).sum();
        let tokens = view
            .trials
            .iter()
            .filter_map(|trial| trained_tokens(&out, trial.number))
            .sum();
        let settings = summary
            .best
            .as_ref()
            .map(|best| best.params.to_json())
            .unwrap_or_default();
        Ok(Searched {
            tokens,
            seconds,
            settings,
        })
    })
}

/// Tokens that a trial trained on, from its run's own account.
fn trained_tokens(study: &Path, trial: u64) -> Option<u64> {
    let path = study.join(format!("trials/{trial:05}/run/run.json"));
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    run.pointer("/summary/tokens")?.as_u64()
}

/// The students' and the dense model's scores, each model loaded once.
fn evaluate_all(args: &DemoArgs, places: &Places) -> Result<Vec<Scores>, Halt> {
    let runs = ["lora", "kd", "bayeskd-random", "bayeskd-sabo"];
    let mut all = Vec::new();
    for name in ["dense", "sparse"].into_iter().chain(runs) {
        let scores = stage(
            places,
            9,
            &format!("eval-{name}"),
            &format!("evaluate {name} on held-out text and responses"),
            |_| {
                let options = LoadOptions::default();
                let model = match name {
                    "dense" => load(&teacher_path(args)?, &options)?,
                    "sparse" => load(&places.join("student"), &options)?,
                    run => load_run(&places.join(run), &options)?,
                };
                let text = score_cache(&model, &places.join("heldout-text"))?;
                let responses = score_cache(&model, &places.join("heldout-responses"))?;
                if crate::terminal::stopped() {
                    return Err(Halt::Stopped);
                }
                let seconds = text.seconds + responses.seconds;
                Ok(Scores {
                    text_perplexity: text.perplexity,
                    response_perplexity: responses.perplexity,
                    kl: responses.kl.unwrap_or(f64::NAN),
                    tokens_per_second: (text.tokens + responses.tokens) as f64 / seconds.max(1e-9),
                    seconds,
                })
            },
        )?;
        all.push(scores);
    }
    Ok(all)
}

/// The teacher's perplexities, from the caches alone.
fn teacher_scores(places: &Places) -> Result<[f64; 2], Halt> {
    let of = |name: &str| -> Result<f64, Halt> {
        Ok(teacher_perplexity(&Cache::open(
            &places.join(name),
            Io::Mmap,
        )?)?)
    };
    Ok([of("heldout-text")?, of("heldout-responses")?])
}
