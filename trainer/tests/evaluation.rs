//! Scores against plain sums over the network's own logits.

#![allow(clippy::unwrap_used)]

mod tiny;

use caskd_formats::{Cache, Tier};
use caskd_models::LoadedModel;
use caskd_trainer::losses::Normalization;
use caskd_trainer::{
    Layers, Request, Rolling, Task, TrainConfig, evaluate_cache, evaluate_task, evaluate_text,
    loglikelihoods, probe, teacher_perplexity,
};
use tch::{Kind, Tensor};
use tiny::{CacheForm, TEACHER_LAYERS, Tiny, load_student, sequences};
use tokenizers::processors::template::TemplateProcessing;

/// log softmax of the logits at every position of one sequence, row by row.
fn log_probabilities(model: &LoadedModel, tokens: &[u32]) -> Vec<Vec<f64>> {
    let input: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let hidden = tch::no_grad(|| {
        model
            .network
            .forward(&Tensor::from_slice(&input).unsqueeze(0), &[], false)
            .last_hidden
    });
    let logits = tch::no_grad(|| model.network.logits(&hidden))
        .squeeze_dim(0)
        .to_kind(Kind::Double);
    Vec::<Vec<f64>>::try_from(logits.log_softmax(-1, Kind::Double)).unwrap()
}

fn close(got: f64, expected: f64, tolerance: f64) {
    assert!(
        (got - expected).abs() <= tolerance * expected.abs(),
        "{got} and {expected}"
    );
}

#[test]
fn text_is_scored_by_rolling_windows() {
    let tiny = Tiny::new();
    let mut model = load_student(&tiny.student());
    let tokens: Vec<u32> = (0..29).map(|i| (i * 7) % 40).collect();
    let words: Vec<String> = tokens.iter().map(|token| format!("w{token}")).collect();
    let text = words.join(" ");
    (model.bos, model.eos) = (None, None);
    for prefix in [None, Some(3)] {
        model.eos = prefix;
        let row: Vec<u32> = prefix.into_iter().chain(tokens.iter().copied()).collect();
        for (max_len, stride) in [(8, 8), (8, 3), (64, 64)] {
            // Token t is scored by the first window that reaches it.
            let mut nats = 0.0;
            let (mut end, mut t) = (max_len.min(row.len() - 1), 1);
            while t < row.len() {
                if t > end {
                    end = (end + stride).min(row.len() - 1);
                }
                let start = end.saturating_sub(max_len);
                let log_p = log_probabilities(&model, &row[start..end]);
                nats -= log_p[t - 1 - start][row[t] as usize];
                t += 1;
            }
            let scored = row.len() as u64 - 1;
            let mut heard = Vec::new();
            let score = evaluate_text(
                &model,
                &text,
                Rolling { max_len, stride },
                &mut |done, all| {
                    heard.push((done, all));
                },
            )
            .unwrap();
            close(score.nats, nats, 1e-5);
            assert_eq!(
                (score.tokens, score.words, score.bytes),
                (scored, 29, text.len() as u64)
            );
            close(score.perplexity, (nats / scored as f64).exp(), 1e-5);
            close(
                score.bits_per_byte,
                nats / text.len() as f64 / 2f64.ln(),
                1e-5,
            );
            close(score.word_perplexity, (nats / 29.0).exp(), 1e-4);
            assert_eq!(heard.last(), Some(&(scored, scored)));
        }
    }
    for (text, stride) in [(" ", 8), (text.as_str(), 0), (text.as_str(), 9)] {
        let error = evaluate_text(&model, text, Rolling { max_len: 8, stride }, &mut |_, _| {})
            .unwrap_err();
        assert!(error.is_user(), "{error}");
    }
}

/// A tokenizer that begins every text with its BOS does so behind the one that stands for the first context, and not
/// where the text has it already.
#[test]
fn a_bos_of_the_tokenizer_is_scored_as_the_harness_does_it() {
    let tiny = Tiny::new();
    let mut model = load_student(&tiny.student());
    model.bos = Some(3);
    let begin = TemplateProcessing::builder()
        .try_single("w3 $A")
        .unwrap()
        .special_tokens(vec![("w3", 3)])
        .build()
        .unwrap();
    model.tokenizer.with_post_processor(Some(begin));
    let rolling = Rolling {
        max_len: 8,
        stride: 8,
    };
    for (text, row) in [
        ("w5 w6", vec![3, 3, 5, 6]),
        ("w3 w5 w6", vec![3, 3, 5, 6]),
        ("w35", vec![3, 35]),
    ] {
        let log_p = log_probabilities(&model, &row);
        let nats: f64 = (1..row.len()).map(|t| -log_p[t - 1][row[t] as usize]).sum();
        let score = evaluate_text(&model, text, rolling, &mut |_, _| {}).unwrap();
        close(score.nats, nats, 1e-5);
        assert_eq!(score.tokens as usize, row.len() - 1, "{text}");
    }
}

/// Packed side by side with shared contexts, requests get what each gets alone.
#[test]
fn packed_requests_score_as_each_alone() {
    const MAX_LEN: usize = 12;
    let tiny = Tiny::new();
    let model = load_student(&tiny.student());
    let tokens =
        |first: u32, n: u32| -> Vec<u32> { (0..n).map(|i| (first + 7 * i) % 40).collect() };
    let mut requests = Vec::new();
    for item in 0..40 {
        let context = tokens(item, 1 + item % 13);
        for choice in 0..=(item % 4) {
            requests.push(Request {
                context: context.clone(),
                continuation: tokens(item + 3 * choice, 1 + (item + choice) % 5),
            });
        }
    }
    let scores = loglikelihoods(&model, &requests, MAX_LEN, &mut |_, _| {}).unwrap();
    assert_eq!(scores.len(), requests.len());
    let mut greedy = 0;
    for (request, score) in requests.iter().zip(&scores) {
        let whole = [request.context.clone(), request.continuation.clone()].concat();
        let cut = whole.len().saturating_sub(MAX_LEN + 1);
        let whole = &whole[cut..];
        let log_p = log_probabilities(&model, &whole[..whole.len() - 1]);
        let of = whole.len() - request.continuation.len();
        let gold = |t: usize| log_p[t - 1][whole[t] as usize];
        let sum: f64 = (of..whole.len()).map(gold).sum();
        close(score.sum, sum, 1e-5);
        let likeliest = |t: usize| log_p[t - 1].iter().copied().fold(f64::MIN, f64::max) == gold(t);
        assert_eq!(score.greedy, (of..whole.len()).all(likeliest));
        greedy += usize::from(score.greedy);
    }
    assert!(greedy < scores.len());
    let empty = Request {
        context: vec![1],
        continuation: vec![],
    };
    assert!(loglikelihoods(&model, &[empty], MAX_LEN, &mut |_, _| {}).is_err());
}

#[test]
fn task_files_are_scored_and_bad_lines_named() {
    let tiny = Tiny::new();
    let model = load_student(&tiny.student());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("piqa.jsonl");
    let good = r#"{"query": "w1 w2", "choices": ["w3", "w4 w5"], "gold": 1}"#;
    std::fs::write(&path, format!("{good}\n\n{good}\n")).unwrap();
    let (score, items) = evaluate_task(&model, Task::Piqa, &path, None, &mut |_, _| {}).unwrap();
    assert_eq!((score.items, items.len(), items[1].index), (2, 2, 1));
    assert_eq!(items[0].loglikelihoods, items[1].loglikelihoods);
    let log_p = log_probabilities(&model, &[1, 2]);
    close(items[0].loglikelihoods[0], log_p[1][3], 1e-5);
    std::fs::write(&path, format!("{good}\n{{\"goal\": 3}}\n")).unwrap();
    let error = evaluate_task(&model, Task::Piqa, &path, None, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
    let long = vec!["w1"; 200].join(" ");
    let long = format!(r#"{{"query": "w1", "choices": ["w2", "{long}"], "gold": 0}}"#);
    std::fs::write(&path, format!("{good}\n\n{long}\n")).unwrap();
    let error = evaluate_task(&model, Task::Piqa, &path, None, &mut |_, _| {}).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("line 3") && said.contains("200 tokens"),
        "{said}"
    );
    std::fs::write(&path, format!("{good}\n{good}\n")).unwrap();
    let limited = evaluate_task(&model, Task::Piqa, &path, Some(1), &mut |_, _| {}).unwrap();
    assert_eq!(limited.0.items, 1);
}

struct Expected {
    nats: f64,
    teacher_nats: f64,
    kl: f64,
    agree: f64,
    targets: f64,
}

fn expected(teacher: &LoadedModel, student: &LoadedModel, form: &CacheForm) -> Expected {
    let mut sums = Expected {
        nats: 0.0,
        teacher_nats: 0.0,
        kl: 0.0,
        agree: 0.0,
        targets: 0.0,
    };
    for sequence in sequences(teacher, form) {
        let (p, q) = (
            log_probabilities(teacher, &sequence.token_ids),
            log_probabilities(student, &sequence.token_ids),
        );
        for t in 0..sequence.token_ids.len() - 1 {
            if sequence.loss_mask[t + 1] {
                let gold = sequence.token_ids[t + 1] as usize;
                let first = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
                sums.nats -= q[t][gold];
                sums.teacher_nats -= p[t][gold];
                sums.kl += p[t]
                    .iter()
                    .zip(&q[t])
                    .map(|(p, q)| p.exp() * (p - q))
                    .sum::<f64>();
                sums.agree += f64::from(u8::from(first(&p[t]) == first(&q[t])));
                sums.targets += 1.0;
            }
        }
    }
    sums
}

#[test]
fn a_cache_is_scored_on_its_targets() {
    let tiny = Tiny::new();
    let student = load_student(&tiny.student());
    for (name, top_k) in [("with", 5), ("without", 0)] {
        let form = CacheForm {
            top_k,
            ..CacheForm::default()
        };
        let cache = tiny.cache(name, &form);
        let expected = expected(&tiny.teacher, &student, &form);
        for batch_tokens in [16, 500] {
            let score =
                evaluate_cache(&student, &cache, None, batch_tokens, &mut |_, _| {}).unwrap();
            assert_eq!(score.targets as f64, expected.targets);
            close(
                score.perplexity,
                (expected.nats / expected.targets).exp(),
                1e-5,
            );
            close(
                score.teacher_perplexity.unwrap(),
                (expected.teacher_nats / expected.targets).exp(),
                1e-3,
            );
            close(score.kl.unwrap(), expected.kl / expected.targets, 2e-2);
            close(
                score.top1_agreement,
                expected.agree / expected.targets,
                1e-2,
            );
        }
        close(
            teacher_perplexity(&cache).unwrap(),
            (expected.teacher_nats / expected.targets).exp(),
            1e-3,
        );
        let rows: Vec<_> = cache.rows().unwrap().into_iter().take(3).collect();
        let targets: u32 = rows.iter().map(|row| row.targets).sum();
        let part = evaluate_cache(&student, &cache, Some(&rows), 64, &mut |_, _| {}).unwrap();
        assert_eq!(part.targets, u64::from(targets));
    }
    // A sparse cache knows the teacher's perplexity where every target is among its top K, and else does not guess.
    for (name, top_k) in [("few", 5), ("all", tiny.teacher.network.vocab_size())] {
        let form = CacheForm {
            tier: Tier::Sparse,
            layers: vec![],
            top_k,
            ..CacheForm::default()
        };
        let sparse = tiny.cache(name, &form);
        let score = evaluate_cache(&student, &sparse, None, 64, &mut |_, _| {}).unwrap();
        assert!(score.kl.is_none());
        let expected = expected(&tiny.teacher, &student, &form);
        let missing = outside_top_k(&tiny.teacher, &form);
        assert_eq!(score.missing_teacher_logits, missing);
        match (missing, score.teacher_perplexity) {
            (0, Some(found)) => {
                close(
                    found,
                    (expected.teacher_nats / expected.targets).exp(),
                    1e-3,
                );
                assert_eq!(name, "all");
            }
            (_, found) => {
                assert_eq!((name, found), ("few", None));
                let error = teacher_perplexity(&sparse).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("{missing} of the cache's targets")),
                    "{error}"
                );
            }
        }
    }
}

/// Targets that are not among the teacher's first k.
fn outside_top_k(teacher: &LoadedModel, form: &CacheForm) -> u64 {
    let mut outside = 0;
    for sequence in sequences(teacher, form) {
        let p = log_probabilities(teacher, &sequence.token_ids);
        for t in (0..sequence.token_ids.len() - 1).filter(|t| sequence.loss_mask[t + 1]) {
            let gold = p[t][sequence.token_ids[t + 1] as usize];
            let above = p[t].iter().filter(|&&other| other > gold).count();
            outside += u64::from(above >= form.top_k);
        }
    }
    outside
}

#[test]
fn the_probe_knows_every_configuration() {
    let tiny = Tiny::new();
    let cache: &Cache = &tiny.cache("cache", &CacheForm::default());
    let student = load_student(&tiny.student());
    let probe = probe(&student, cache, 6).unwrap();
    let of = |settings: &[(&str, &str)]| {
        let mut config = TrainConfig::default();
        for (key, value) in settings {
            config.set(key, value).unwrap();
        }
        probe.discrepancy(&config)
    };
    let (teacher, student) = (probe.sigma.teacher, probe.sigma.student);
    assert!(teacher > 0.0 && student > 0.0 && probe.targets > 0);
    let gap = (1.0 / teacher - 1.0 / student).abs();
    assert_eq!(of(&[]).unwrap(), (0.0, 0.0));
    assert_eq!(
        of(&[("soft_weight", "0"), ("layers", "last")]).unwrap(),
        (0.0, 0.0)
    );
    close(
        of(&[("kd_type", "dual-scaling"), ("scaling_value", "4")])
            .unwrap()
            .0,
        gap / 4.0,
        1e-9,
    );
    close(
        of(&[("logits_norm", "standardize"), ("scaling_value", "4")])
            .unwrap()
            .0,
        gap / 4.0,
        1e-9,
    );
    assert!(of(&[("logits_norm", "max-min")]).unwrap().0 > 0.0);
    let last = of(&[("layers", "last")]).unwrap().1;
    let both = of(&[("layers", "last-middle")]).unwrap().1;
    let normal = of(&[("layers", "last"), ("hidden_norm", "max-min")])
        .unwrap()
        .1;
    assert!(
        0.0 < normal && normal < last && last < both,
        "{normal} {last} {both}"
    );
    let pair = Layers::Last.pairs(TEACHER_LAYERS as u32, 2)[0];
    assert_eq!(probe.alignment(pair, Normalization::None).unwrap(), last);
    assert!(
        of(&[("layers", "[1]")])
            .unwrap_err()
            .to_string()
            .contains("no teacher layer 1; it has 2, 4")
    );
}
