//! Cross-entropy, the divergences, and losses of several temperatures or sampled tokens.

use super::*;

#[test]
fn cross_entropy() {
    check("cross-entropy", &plain(&CrossEntropy {}), &|inputs, row| {
        -softmax(&inputs.student[row], 1.0)[inputs.labels[row]].ln()
    });
}

#[test]
fn kl_at_every_temperature_and_normalisation() {
    for temperature in [0.5, 1.0, 3.0, 20.0] {
        for norm in Normalization::ALL {
            for temperature_squared in [false, true] {
                let loss = Kl {
                    temperature,
                    temperature_squared,
                    ..Kl::default()
                };
                let factor = if temperature_squared {
                    temperature * temperature
                } else {
                    1.0
                };
                let case = Case {
                    norm,
                    ..plain(&loss)
                };
                check(&format!("{loss:?} {norm:?}"), &case, &|inputs, row| {
                    let p = softmax(&normalized(norm, &inputs.teacher[row]), temperature);
                    let q = softmax(&normalized(norm, &inputs.student[row]), temperature);
                    factor * kl(&p, &q)
                });
            }
        }
    }
}

#[test]
fn divergences_of_two_distributions() {
    let temperature = 2.0;
    let both = |inputs: &Inputs, row: usize| {
        (
            softmax(&inputs.teacher[row], temperature),
            softmax(&inputs.student[row], temperature),
        )
    };
    let mixed = |a: &[f64], b: &[f64], share: f64| -> Vec<f64> {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| share * a + (1.0 - share) * b).collect()
    };
    let reverse = ReverseKl {
        temperature,
        temperature_squared: true,
        single_precision: false,
    };
    check("reverse-kl", &plain(&reverse), &|inputs, row| {
        let (p, q) = both(inputs, row);
        4.0 * kl(&q, &p)
    });
    let jensen_shannon = JensenShannon {
        beta: 0.3,
        temperature,
        temperature_squared: false,
    };
    check("jensen-shannon", &plain(&jensen_shannon), &|inputs, row| {
        let (p, q) = both(inputs, row);
        let m = mixed(&p, &q, 0.3);
        0.3 * kl(&p, &m) + 0.7 * kl(&q, &m)
    });
    let skew = SkewKl {
        temperature,
        ..SkewKl::default()
    };
    check("skew-kl", &plain(&skew), &|inputs, row| {
        let (p, q) = both(inputs, row);
        kl(&p, &mixed(&p, &q, 0.1))
    });
    let skew_reverse = SkewReverseKl {
        temperature,
        ..SkewReverseKl::default()
    };
    check("skew-reverse-kl", &plain(&skew_reverse), &|inputs, row| {
        let (p, q) = both(inputs, row);
        kl(&q, &mixed(&q, &p, 0.1))
    });
    let pair = Distillm2 {
        alpha: 0.2,
        beta: 0.3,
        temperature,
        temperature_squared: true,
    };
    check("distillm-2", &plain(&pair), &|inputs, row| {
        let (p, q) = both(inputs, row);
        if row % 2 == 1 {
            4.0 * 0.6 * kl(&q, &mixed(&q, &p, 0.2))
        } else {
            4.0 * 1.4 * kl(&p, &mixed(&p, &q, 0.2))
        }
    });
    let distance =
        |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| (p - q).abs()).sum() };
    let variation = TotalVariation { temperature };
    check("total-variation", &plain(&variation), &|inputs, row| {
        let (p, q) = both(inputs, row);
        0.5 * distance(&p, &q)
    });
    check("uld", &plain(&Uld { temperature }), &|inputs, row| {
        let (mut p, mut q) = both(inputs, row);
        p.sort_by(|a, b| b.total_cmp(a));
        q.sort_by(|a, b| b.total_cmp(a));
        distance(&p, &q)
    });
}

#[test]
fn multi_level_sums_temperatures_and_compares_positions() {
    let loss = MultiLevel {
        temperatures: vec![1.0, 4.0],
        batch_weight: 0.7,
    };
    check("multi-level", &plain(&loss), &|inputs, row| {
        let at = |temperature: f64| {
            let p: Vec<_> = inputs
                .teacher
                .iter()
                .map(|x| softmax(x, temperature))
                .collect();
            let q: Vec<_> = inputs
                .student
                .iter()
                .map(|x| softmax(x, temperature))
                .collect();
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let batch: f64 = (0..ROWS)
                .map(|other| (dot(&p[row], &p[other]) - dot(&q[row], &q[other])).powi(2))
                .sum();
            temperature * temperature * kl(&p[row], &q[row]) + 0.7 * batch
        };
        at(1.0) + at(4.0)
    });
}

#[test]
fn random_sampling_is_a_function_of_seed_and_row_and_unbiased() {
    const SEEDS: u64 = 300;
    let inputs = Inputs::new(5);
    let teacher = tensor(&inputs.teacher);
    let gradient = |loss: &RandomSamplingKd, keys: &[i64]| {
        let student = tensor(&inputs.student).set_requires_grad(true);
        let value = loss.value(&LogitRows {
            student: &student,
            teacher: Some(&teacher),
            teacher_sigma: None,
            top_k: None,
            labels: &Tensor::from_slice(keys),
            keys: &Tensor::from_slice(keys),
            sample_sigma: None,
            of_student: Some(&of_student(keys.len() as i64)),
            lookups: &Lookups::default(),
        });
        let of = Tensor::run_backward(&[value.sum(Kind::Double)], &[&student], false, false);
        values(&of[0])
    };
    let loss = RandomSamplingKd::default();
    let keys = [7i64, -3, 11, 12, i64::MIN];
    assert_eq!(gradient(&loss, &keys), gradient(&loss, &keys));
    assert_ne!(
        gradient(&loss, &keys),
        gradient(&loss, &[7, -3, 11, 12, 13])
    );
    let other = RandomSamplingKd { seed: 1, ..loss };
    assert_ne!(gradient(&loss, &keys), gradient(&other, &keys));

    // The few draws of many seeds; and of one seed so many that anything that grows with their square is too much.
    for (proposal_exponent, seeds, draws) in [(1.0, SEEDS, 50), (0.8, SEEDS, 50), (1.0, 1, 200_000)]
    {
        let mut mean = vec![0.0; ROWS * VOCABULARY];
        for seed in 0..seeds {
            let loss = RandomSamplingKd {
                draws,
                proposal_exponent,
                seed,
            };
            for (mean, value) in mean.iter_mut().zip(gradient(&loss, &keys)) {
                *mean += value / seeds as f64;
            }
        }
        for row in 0..ROWS {
            let p = softmax(&inputs.teacher[row], 1.0);
            let q = softmax(&inputs.student[row], 1.0);
            for token in 0..VOCABULARY {
                let (got, expected) = (mean[row * VOCABULARY + token], q[token] - p[token]);
                // 15,000 draws and more: a standard error of 0.004 at most, and the bias of normalised weights.
                assert!((got - expected).abs() < 0.02, "{got} and {expected}");
            }
        }
    }
    let inputs_case = Inputs::new(0);
    let student = tensor(&inputs_case.student);
    assert!(
        values(&inputs_case.value(&plain(&loss), &student))
            .iter()
            .all(|&value| value > 0.0)
    );
}

#[test]
fn constant_logits_are_no_trouble() {
    let flat = Tensor::ones([2, 70], (Kind::Float, tch::Device::Cpu));
    for name in LogitKind::NAMES {
        let kind = LogitKind::with_defaults(name).unwrap();
        for norm in Normalization::ALL {
            let student = flat.copy().set_requires_grad(true);
            let sigma = Tensor::full([2, 1], 1e-6, (Kind::Float, tch::Device::Cpu));
            let value = kind.loss().value(&LogitRows {
                student: &norm.apply(&student),
                teacher: Some(&norm.apply(&flat)),
                teacher_sigma: None,
                top_k: None,
                labels: &Tensor::from_slice(&[0i64, 1]),
                keys: &Tensor::from_slice(&[0i64, 1]),
                sample_sigma: Some(&SampleSigma {
                    student: sigma.shallow_clone(),
                    teacher: sigma,
                }),
                of_student: Some(&of_student(2)),
                lookups: &Lookups::default(),
            });
            let gradient =
                Tensor::run_backward(&[value.sum(None::<Kind>)], &[&student], false, false)
                    .swap_remove(0);
            assert!(
                values(&value).iter().all(|value| value.is_finite()),
                "{name}"
            );
            assert!(
                values(&gradient).iter().all(|value| value.is_finite()),
                "{name}"
            );
            // All but the label's, the draws' and NKD's cross-entropy are divergences.
            if !["cross-entropy", "random-sampling-kd", "nkd"].contains(name) {
                assert!(
                    values(&value).iter().all(|value| value.abs() < 1e-5),
                    "{name}"
                );
            }
        }
    }
}
