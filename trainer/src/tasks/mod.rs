//! Multiple-choice and last-word tasks, scored as lm-evaluation-harness 0.4.13 scores them.
//!
//! A task file is JSONL. A line is an item: the harness's own dataset fields, or a prepared form:
//! `query`, `choices`, `gold`; `contexts`, `continuation`, `gold` (one continuation after each
//! context); or `context`, `continuation` (the last word).

mod fields;

use std::path::Path;
use std::time::Instant;

use caskd_models::LoadedModel;
use serde::Serialize;

use crate::loglikelihood::{Loglikelihood, loglikelihoods, request};
use crate::{Error, Result};

/// The tasks of the BayesKD paper, and LAMBADA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// OpenBookQA (Mihaylov et al. 2018).
    OpenBookQa,
    /// HellaSwag (Zellers et al. 2019).
    HellaSwag,
    /// WinoGrande (Sakaguchi et al. 2019).
    WinoGrande,
    /// PIQA (Bisk et al. 2019).
    Piqa,
    /// ARC, the easy set (Clark et al. 2018).
    ArcEasy,
    /// ARC, the challenge set.
    ArcChallenge,
    /// BoolQ (Clark et al. 2019).
    BoolQ,
    /// QNLI of GLUE (Wang et al. 2018).
    Qnli,
    /// Quora question pairs of GLUE.
    Qqp,
    /// SST-2 of GLUE (Socher et al. 2013).
    Sst2,
    /// LAMBADA (Paperno et al. 2016).
    Lambada,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 11] = [
        Task::OpenBookQa,
        Task::HellaSwag,
        Task::WinoGrande,
        Task::Piqa,
        Task::ArcEasy,
        Task::ArcChallenge,
        Task::BoolQ,
        Task::Qnli,
        Task::Qqp,
        Task::Sst2,
        Task::Lambada,
    ];

    /// The harness's name.
    pub fn name(self) -> &'static str {
        match self {
            Task::OpenBookQa => "openbookqa",
            Task::HellaSwag => "hellaswag",
            Task::WinoGrande => "winogrande",
            Task::Piqa => "piqa",
            Task::ArcEasy => "arc_easy",
            Task::ArcChallenge => "arc_challenge",
            Task::BoolQ => "boolq",
            Task::Qnli => "qnli",
            Task::Qqp => "qqp",
            Task::Sst2 => "sst2",
            Task::Lambada => "lambada",
        }
    }

    /// By the harness's name, or a common other spelling.
    pub fn by_name(name: &str) -> Option<Task> {
        let plain: String = name
            .to_lowercase()
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .collect();
        Task::ALL.into_iter().find(|task| {
            let own = task.name().replace('_', "");
            own == plain
                || match task {
                    Task::ArcEasy => plain == "arce",
                    Task::ArcChallenge => plain == "arcc",
                    Task::Lambada => plain == "lambadaopenai",
                    _ => false,
                }
        })
    }

    /// Whether the harness reports the accuracy by log-likelihood per character too.
    fn is_normalized(self) -> bool {
        matches!(
            self,
            Task::OpenBookQa | Task::HellaSwag | Task::Piqa | Task::ArcEasy | Task::ArcChallenge
        )
    }
}

/// One item: continuations to compare, or one to foresee.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// (context, continuation) of each choice, the continuation with its leading space.
    pub(crate) requests: Vec<(String, String)>,
    /// Characters of each choice without that space.
    pub(crate) lengths: Vec<usize>,
    /// Index of the right choice.
    pub(crate) gold: usize,
}

/// A model's score on a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskScore {
    /// The harness's name of the task.
    pub task: &'static str,
    /// Items scored.
    pub items: usize,
    /// Share of items whose right choice has the largest log-likelihood; for LAMBADA, whose last word
    /// is what greedy decoding gives.
    pub acc: f64,
    /// Its standard error.
    pub acc_stderr: f64,
    /// The same by log-likelihood per character, where the harness reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// F1 of choice 1 (QQP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    /// exp of the mean negative log-likelihood of the last word (LAMBADA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Wall time, tokenizing included.
    pub seconds: f64,
    /// items / seconds.
    pub items_per_second: f64,
}

/// What a model made of one item.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ItemScore {
    /// The task.
    pub task: &'static str,
    /// Place in the file, from 0.
    pub index: usize,
    /// Σ ln p of each choice, not normalised.
    pub loglikelihoods: Vec<f64>,
    /// Index of the right choice.
    pub gold: usize,
    /// Index of the choice with the largest log-likelihood.
    pub prediction: usize,
    /// 1 or 0.
    pub acc: f64,
    /// 1 or 0, by log-likelihood per character.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
}

/// Scores a model on the items of a task file, the first `limit` of them where given. `progress` hears
/// (choices done, all choices).
///
/// # Errors
/// A file that cannot be read, a line that is no item of the task (named), an empty file.
pub fn evaluate_task(
    model: &LoadedModel,
    task: Task,
    path: &Path,
    limit: Option<usize>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(TaskScore, Vec<ItemScore>)> {
    let started = Instant::now();
    let items = read_items(task, path, limit)?;
    let mut requests = Vec::new();
    for (_, item) in &items {
        for (context, continuation) in &item.requests {
            requests.push(request(model, context, continuation)?);
        }
    }
    let max_len = model.network.config().max_position_embeddings();
    let mut scores = loglikelihoods(model, &requests, max_len, progress)
        .map_err(|error| at_its_line(error, path, &items))?
        .into_iter();
    let per_item: Vec<ItemScore> = items
        .iter()
        .enumerate()
        .map(|(index, (_, item))| {
            let scores: Vec<Loglikelihood> = scores.by_ref().take(item.requests.len()).collect();
            score_item(task, index, item, &scores)
        })
        .collect();
    let score = summarize(task, &per_item, started.elapsed().as_secs_f64());
    Ok((score, per_item))
}

/// What is wrong with a request, said of the line that it comes from.
fn at_its_line(error: Error, path: &Path, items: &[(usize, Item)]) -> Error {
    let line_of = |request: usize| {
        let mut seen = 0;
        items
            .iter()
            .find(|(_, item)| {
                seen += item.requests.len();
                request < seen
            })
            .map_or(0, |(line, _)| *line)
    };
    match error {
        Error::BadRequest { request, message } => Error::UnscorableItem {
            path: path.to_owned(),
            line: line_of(request),
            message,
        },
        Error::RequestNotANumber { request } => Error::ScoreNotFinite {
            what: format!("`{}` line {}", path.display(), line_of(request)),
        },
        other => other,
    }
}

/// Items, each with its line in the file, from 1.
fn read_items(task: Task, path: &Path, limit: Option<usize>) -> Result<Vec<(usize, Item)>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let lines = text
        .trim_start_matches('\u{feff}')
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let items = lines
        .take(limit.unwrap_or(usize::MAX))
        .map(|(number, line)| {
            let bad = |message: String| Error::BadItem {
                path: path.to_owned(),
                line: number + 1,
                task: task.name(),
                message,
            };
            let value: serde_json::Value =
                serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
            let item = fields::item(task, &value).map_err(bad)?;
            Ok((number + 1, item))
        })
        .collect::<Result<Vec<_>>>()?;
    if items.is_empty() {
        return Err(Error::NoItems {
            path: path.to_owned(),
        });
    }
    Ok(items)
}

fn score_item(task: Task, index: usize, item: &Item, scores: &[Loglikelihood]) -> ItemScore {
    let sums: Vec<f64> = scores.iter().map(|score| score.sum).collect();
    let normalized: Vec<f64> = sums
        .iter()
        .zip(&item.lengths)
        .map(|(sum, &length)| sum / length.max(1) as f64)
        .collect();
    let right = |holds: bool| f64::from(u8::from(holds));
    let prediction = first_largest(&sums);
    ItemScore {
        task: task.name(),
        index,
        gold: item.gold,
        prediction,
        acc: right(if task == Task::Lambada {
            scores.iter().all(|score| score.greedy)
        } else {
            prediction == item.gold
        }),
        acc_norm: task
            .is_normalized()
            .then(|| right(first_largest(&normalized) == item.gold)),
        loglikelihoods: sums,
    }
}

fn summarize(task: Task, items: &[ItemScore], seconds: f64) -> TaskScore {
    let acc: Vec<f64> = items.iter().map(|item| item.acc).collect();
    let acc_norm: Option<Vec<f64>> = items.iter().map(|item| item.acc_norm).collect();
    let nats: f64 = items
        .iter()
        .filter_map(|item| item.loglikelihoods.first())
        .sum();
    TaskScore {
        task: task.name(),
        items: items.len(),
        acc: mean(&acc),
        acc_stderr: standard_error(&acc),
        acc_norm: acc_norm.as_deref().map(mean),
        acc_norm_stderr: acc_norm.as_deref().map(standard_error),
        f1: (task == Task::Qqp).then(|| f1(items)),
        perplexity: (task == Task::Lambada).then(|| (-nats / items.len() as f64).exp()),
        seconds,
        items_per_second: items.len() as f64 / seconds,
    }
}

fn first_largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The sample's standard deviation (n − 1) over √n; 0 of one value.
fn standard_error(values: &[f64]) -> f64 {
    let (n, centre) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|value| (value - centre).powi(2)).sum();
    (squares / (n - 1.0).max(1.0) / n).sqrt()
}

/// 2 · true positives / (positives + predicted positives), positive being choice 1.
fn f1(items: &[ItemScore]) -> f64 {
    let count =
        |holds: &dyn Fn(&ItemScore) -> bool| items.iter().filter(|item| holds(item)).count();
    let both = count(&|item| item.gold == 1 && item.prediction == 1);
    let either = count(&|item| item.gold == 1) + count(&|item| item.prediction == 1);
    if either == 0 {
        0.0
    } else {
        2.0 * both as f64 / either as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(sums: &[f64], lengths: &[usize], gold: usize) -> ItemScore {
        let item = Item {
            requests: vec![],
            lengths: lengths.to_vec(),
            gold,
        };
        let scores: Vec<_> = sums
            .iter()
            .map(|&sum| Loglikelihood { sum, greedy: true })
            .collect();
        score_item(Task::Piqa, 0, &item, &scores)
    }

    /// The shorter choice wins by the sum, the longer by the mean over characters; ties go to the first.
    #[test]
    fn accuracy_and_its_normalised_form() {
        let item = scored(&[-4.0, -6.0], &[2, 6], 1);
        assert_eq!((item.acc, item.acc_norm), (0.0, Some(1.0)));
        assert_eq!(scored(&[-4.0, -4.0], &[2, 2], 1).prediction, 0);
    }

    #[test]
    fn standard_errors_and_f1() {
        // Two of four right: sample variance 1/3, standard error √(1/12).
        assert!((standard_error(&[1.0, 0.0, 1.0, 0.0]) - (1.0f64 / 12.0).sqrt()).abs() < 1e-12);
        assert_eq!(standard_error(&[1.0]), 0.0);
        let items = [
            scored(&[-1.0, 0.0], &[1, 1], 1),
            scored(&[0.0, -1.0], &[1, 1], 1),
            scored(&[-1.0, 0.0], &[1, 1], 0),
        ];
        assert!((f1(&items) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn tasks_go_by_the_harness_names() {
        for task in Task::ALL {
            assert_eq!(Task::by_name(task.name()), Some(task));
        }
        assert_eq!(Task::by_name("ARC-e"), Some(Task::ArcEasy));
        assert_eq!(Task::by_name("mmlu"), None);
    }
}
