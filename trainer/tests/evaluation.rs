//! Scores against plain sums over the network's own logits.

#![allow(clippy::unwrap_used)]

mod tiny;

use caskd_formats::{Cache, Tier};
use caskd_models::LoadedModel;
use caskd_trainer::losses::Normalization;
use caskd_trainer::{
    Layers, TrainConfig, evaluate_cache, evaluate_text, probe, teacher_perplexity,
};
use tch::{Kind, Tensor};
use tiny::{CacheForm, TEACHER_LAYERS, Tiny, load_student, sequences};

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
fn text_is_scored_window_by_window() {
    let tiny = Tiny::new();
    let mut model = load_student(&tiny.student());
    let tokens: Vec<u32> = (0..29).map(|i| (i * 7) % 40).collect();
    let words: Vec<String> = tokens.iter().map(|token| format!("w{token}")).collect();
    let text = words.join(" ");
    for bos in [None, Some(3)] {
        model.bos = bos;
        for max_len in [8, 64] {
            let mut nats = 0.0;
            let mut scored = 0;
            for window in tokens.chunks(max_len) {
                let with_bos: Vec<u32> = bos.into_iter().chain(window.iter().copied()).collect();
                let log_p = log_probabilities(&model, &with_bos);
                for t in 1..with_bos.len() {
                    nats -= log_p[t - 1][with_bos[t] as usize];
                    scored += 1;
                }
            }
            let mut heard = Vec::new();
            let score = evaluate_text(&model, &text, max_len, &mut |done, all| {
                heard.push((done, all));
            })
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
            assert_eq!(heard.last(), Some(&(29, 29)));
        }
    }
    assert!(
        evaluate_text(&model, " ", 8, &mut |_, _| {})
            .unwrap_err()
            .is_user()
    );
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
                score.teacher_perplexity,
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
    let sparse = tiny.cache(
        "sparse",
        &CacheForm {
            tier: Tier::Sparse,
            layers: vec![],
            ..CacheForm::default()
        },
    );
    let score = evaluate_cache(&student, &sparse, None, 64, &mut |_, _| {}).unwrap();
    assert!(score.kl.is_none() && score.teacher_perplexity.is_finite());
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
