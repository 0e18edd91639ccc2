//! Every loss in f64 against a slow plain-Rust reference, its gradient against finite differences.
//! PyTorch's values and those of another package are met in `trainer/tests/losses.rs`.

use caskd_models::SeededRng;
use tch::{Kind, Tensor};

use super::*;

const ROWS: usize = 5;
const VOCABULARY: usize = 13;
const KEPT: usize = 4;

/// Inputs of the losses in plain Rust and as tensors.
struct Inputs {
    student: Vec<Vec<f64>>,
    teacher: Vec<Vec<f64>>,
    labels: Vec<usize>,
    /// Rows 0 and 1 are one sample, the others another.
    sample_of: Vec<usize>,
}

impl Inputs {
    fn new(seed: u64) -> Inputs {
        let mut rng = SeededRng::new(seed);
        let mut logits = |scale: f64, shift: f64| -> Vec<Vec<f64>> {
            (0..ROWS)
                .map(|_| {
                    (0..VOCABULARY)
                        .map(|_| scale * rng.normal() + shift)
                        .collect()
                })
                .collect()
        };
        let (student, teacher) = (logits(2.0, 1.0), logits(3.0, -2.0));
        let labels = (0..ROWS)
            .map(|_| rng.below(VOCABULARY as u64) as usize)
            .collect();
        Inputs {
            student,
            teacher,
            labels,
            sample_of: vec![0, 0, 1, 1, 1],
        }
    }

    /// As the fused head calls it: the normalisation ahead, σ per sample measured as a number, the
    /// teacher's top K beside its full logits or in their place.
    fn value(&self, term: &Case<'_>, student: &Tensor) -> Tensor {
        let norm = term.norm;
        let teacher = norm.apply(&tensor(&self.teacher));
        let (logits, ids) = teacher.topk(KEPT as i64, -1, true, true);
        let top_k = TopKRows {
            ids,
            logits,
            log_sum_exp: teacher.logsumexp([-1].as_slice(), false),
        };
        let labels: Vec<i64> = self.labels.iter().map(|&label| label as i64).collect();
        let spread = |logits: &[Vec<f64>]| {
            let normal: Vec<Vec<f64>> = logits.iter().map(|row| normalized(norm, row)).collect();
            let sigmas = sample_sigmas(&normal, &self.sample_of);
            tensor(&sigmas.iter().map(|&sigma| vec![sigma]).collect::<Vec<_>>())
        };
        let sigma = SampleSigma {
            student: spread(&self.student),
            teacher: spread(&self.teacher),
        };
        term.loss.value(&LogitRows {
            student: &norm.apply(student),
            teacher: Some(&teacher).filter(|_| !term.sparse),
            teacher_sigma: None,
            top_k: Some(&top_k),
            labels: &Tensor::from_slice(&labels),
            keys: &Tensor::arange(ROWS as i64, (Kind::Int64, tch::Device::Cpu)),
            sample_sigma: Some(&sigma),
            of_student: Some(&of_student(ROWS as i64)),
            lookups: &Lookups::default(),
        })
    }
}

/// A loss and what it is run on.
#[derive(Clone, Copy)]
struct Case<'a> {
    loss: &'a dyn LogitLoss,
    norm: Normalization,
    /// Without the full logits of the teacher.
    sparse: bool,
}

fn plain(loss: &dyn LogitLoss) -> Case<'_> {
    on(loss, false)
}

fn on(loss: &dyn LogitLoss, sparse: bool) -> Case<'_> {
    Case {
        loss,
        norm: Normalization::None,
        sparse,
    }
}

fn tensor(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
}

/// Every second row's response is the student's.
fn of_student(rows: i64) -> Tensor {
    Tensor::arange(rows, (Kind::Int64, tch::Device::Cpu))
        .remainder(2)
        .eq(1)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn sigma(x: &[f64]) -> f64 {
    let centre = mean(x);
    mean(
        &x.iter()
            .map(|value| (value - centre).powi(2))
            .collect::<Vec<_>>(),
    )
    .sqrt()
}

fn sample_sigmas(rows: &[Vec<f64>], sample_of: &[usize]) -> Vec<f64> {
    let of = |sample: usize| -> Vec<f64> {
        rows.iter()
            .zip(sample_of)
            .filter(|(_, of)| **of == sample)
            .flat_map(|(row, _)| row.clone())
            .collect()
    };
    sample_of.iter().map(|&sample| sigma(&of(sample))).collect()
}

fn normalized(norm: Normalization, x: &[f64]) -> Vec<f64> {
    let (min, max) = x.iter().fold((f64::MAX, f64::MIN), |(min, max), &value| {
        (min.min(value), max.max(value))
    });
    let (centre, deviation) = (mean(x), sigma(x));
    x.iter()
        .map(|value| match norm {
            Normalization::None => *value,
            Normalization::MaxMin => (value - min) / (max - min + 1e-6),
            Normalization::Standardize => (value - centre) / (deviation + 1e-6),
        })
        .collect()
}

fn softmax(x: &[f64], scale: f64) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let exp: Vec<f64> = x
        .iter()
        .map(|value| ((value - max) / scale).exp())
        .collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|value| value / sum).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()
}

/// The loss gives the reference's values, and its gradient is that of finite differences.
fn check(name: &str, case: &Case<'_>, reference: &dyn Fn(&Inputs, usize) -> f64) {
    for seed in 0..2 {
        let inputs = Inputs::new(seed);
        let expected: Vec<f64> = (0..ROWS).map(|row| reference(&inputs, row)).collect();
        let student = tensor(&inputs.student).set_requires_grad(true);
        let value = inputs.value(case, &student);
        assert_eq!(
            (value.kind(), value.size()),
            (Kind::Double, vec![ROWS as i64]),
            "{name}"
        );
        for (got, expected) in values(&value).iter().zip(&expected) {
            assert!(
                (got - expected).abs() <= 1e-9 * expected.abs().max(1.0),
                "{name}: {got} and {expected}"
            );
        }
        let gradient = Tensor::run_backward(&[value.sum(Kind::Double)], &[&student], false, false)
            .swap_remove(0);
        let gradient = values(&gradient);
        // σ per sample comes in as a number: differences must leave it alone too.
        let step = 1e-5;
        for index in 0..ROWS * VOCABULARY {
            let moved = |by: f64| {
                let mut flat = inputs.student.concat();
                flat[index] += by;
                let student = Tensor::from_slice(&flat).view([ROWS as i64, -1]);
                inputs
                    .value(case, &student)
                    .sum(Kind::Double)
                    .double_value(&[])
            };
            let difference = (moved(step) - moved(-step)) / (2.0 * step);
            let got = gradient[index];
            assert!(
                (got - difference).abs() < 1e-7 * difference.abs().max(1.0),
                "{name}: {got} and {difference}"
            );
        }
    }
}

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
fn dual_scaling_per_position_with_gradient_through_sigma() {
    let loss = DualScaling {
        scaling_value: 2.0,
        gamma: 0.5,
        detach_sigma: false,
        temperature_squared: true,
        ..DualScaling::default()
    };
    for norm in Normalization::ALL {
        let case = Case {
            norm,
            ..plain(&loss)
        };
        check(&format!("dual-scaling {norm:?}"), &case, &|inputs, row| {
            let scaled = |logits: &[f64]| {
                let normal = normalized(norm, logits);
                softmax(&normal, 2.0 * sigma(&normal))
            };
            0.5 * 4.0 * kl(&scaled(&inputs.teacher[row]), &scaled(&inputs.student[row]))
        });
    }
}

#[test]
fn dual_scaling_per_sample() {
    let loss = DualScaling {
        scaling_value: 3.0,
        sigma: Sigma::Sample,
        ..DualScaling::default()
    };
    for norm in Normalization::ALL {
        let case = Case {
            norm,
            ..plain(&loss)
        };
        check(&format!("dual-scaling {norm:?}"), &case, &|inputs, row| {
            let scaled = |logits: &[Vec<f64>]| {
                let normal: Vec<Vec<f64>> =
                    logits.iter().map(|row| normalized(norm, row)).collect();
                softmax(
                    &normal[row],
                    3.0 * sample_sigmas(&normal, &inputs.sample_of)[row],
                )
            };
            kl(&scaled(&inputs.teacher), &scaled(&inputs.student))
        });
    }
}

#[test]
fn a_detached_sigma_changes_the_gradient_only() {
    let inputs = Inputs::new(1);
    let gradient = |detach_sigma: bool| {
        let loss = DualScaling {
            scaling_value: 2.0,
            detach_sigma,
            ..DualScaling::default()
        };
        let student = tensor(&inputs.student).set_requires_grad(true);
        let value = inputs.value(&plain(&loss), &student);
        let gradient = Tensor::run_backward(&[value.sum(Kind::Double)], &[&student], false, false)
            .swap_remove(0);
        (values(&value), values(&gradient))
    };
    let (detached, through) = (gradient(true), gradient(false));
    assert_eq!(detached.0, through.0);
    // With σ a constant, d/ds = (q − p) / (σ·b).
    for row in 0..ROWS {
        let scale = 2.0 * sigma(&inputs.student[row]);
        let p = softmax(&inputs.teacher[row], 2.0 * sigma(&inputs.teacher[row]));
        let q = softmax(&inputs.student[row], scale);
        for token in 0..VOCABULARY {
            let expected = (q[token] - p[token]) / scale;
            assert!((detached.1[row * VOCABULARY + token] - expected).abs() < 1e-12);
        }
    }
    assert!(
        detached
            .1
            .iter()
            .zip(&through.1)
            .any(|(a, b)| (a - b).abs() > 1e-3)
    );
}

#[test]
fn losses_in_units_of_sigma() {
    let wide = (VOCABULARY as f64 / (VOCABULARY as f64 - 1.0)).sqrt();
    check("norm-kd", &plain(&NormKd::default()), &|inputs, row| {
        let scale = |x: &[f64]| 1.5 * wide * sigma(x);
        let (t, s) = (&inputs.teacher[row], &inputs.student[row]);
        scale(t).powi(2) * kl(&softmax(t, scale(t)), &softmax(s, scale(s)))
    });
    let standardization = LogitStandardization::default();
    check(
        "logit-standardization",
        &plain(&standardization),
        &|inputs, row| {
            let z = |x: &[f64]| softmax(x, 2.0 * (wide * sigma(x) + 1e-7));
            4.0 * kl(&z(&inputs.teacher[row]), &z(&inputs.student[row]))
        },
    );
}

/// Probabilities of the token and of all others together, and the others' among themselves.
fn decoupled(logits: &[f64], token: usize, scale: f64) -> (Vec<f64>, Vec<f64>) {
    let p = softmax(logits, scale);
    let mut others = p.clone();
    others.remove(token);
    let rest: f64 = others.iter().sum();
    (
        vec![p[token], rest],
        others.iter().map(|p| p / rest).collect(),
    )
}

fn first(x: &[f64]) -> usize {
    (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap()
}

#[test]
fn losses_that_take_one_token_apart() {
    let wide = (VOCABULARY as f64 / (VOCABULARY as f64 - 1.0)).sqrt();
    check("dkd", &plain(&Dkd::default()), &|inputs, row| {
        let (t, s) = (&inputs.teacher[row], &inputs.student[row]);
        let scale = |x: &[f64]| 2.0 * wide * sigma(x);
        let (p, q) = (
            decoupled(t, inputs.labels[row], scale(t)),
            decoupled(s, inputs.labels[row], scale(s)),
        );
        scale(t).powi(2) * 0.5 * (kl(&p.0, &q.0) + kl(&p.1, &q.1))
    });
    let original = Dkd {
        normalized: false,
        temperature: 4.0,
        alpha: 1.0,
        beta: 8.0,
        ..Dkd::default()
    };
    check("dkd, original", &plain(&original), &|inputs, row| {
        let at = |x: &[f64]| decoupled(x, inputs.labels[row], 4.0);
        let (p, q) = (at(&inputs.teacher[row]), at(&inputs.student[row]));
        16.0 * (kl(&p.0, &q.0) + 8.0 * kl(&p.1, &q.1))
    });
    for temperature in [1.0, 2.0] {
        let nkd = Nkd {
            temperature,
            ..Nkd::default()
        };
        check("nkd", &plain(&nkd), &|inputs, row| {
            let (t, s) = (&inputs.teacher[row], &inputs.student[row]);
            let token = first(t);
            let among = |x: &[f64]| decoupled(x, token, temperature).1;
            let cross: f64 = among(t).iter().zip(among(s)).map(|(p, q)| p * q.ln()).sum();
            -softmax(t, 1.0)[token] * softmax(s, 1.0)[token].ln() - 0.25 * cross
        });
    }
    check("atkd", &plain(&Atkd::default()), &|inputs, row| {
        let unsure = |row: usize| 1.0 - softmax(&inputs.teacher[row], 1.0)[inputs.labels[row]];
        let at = |x: &[f64]| decoupled(x, inputs.labels[row], 1.0);
        let (p, q) = (at(&inputs.teacher[row]), at(&inputs.student[row]));
        // Three of five rows are hard.
        let harder = (0..ROWS)
            .filter(|&other| unsure(other) > unsure(row))
            .count();
        if harder < 3 {
            0.8 * 5.0 / 3.0 * (kl(&p.0, &q.0) + kl(&p.1, &q.1))
        } else {
            0.2 * 5.0 / 2.0 * kl(&p.1, &q.1)
        }
    });
}

#[test]
fn a_row_without_a_label_takes_the_teachers_first_token_in_dkd() {
    let mut inputs = Inputs::new(3);
    let student = tensor(&inputs.student);
    inputs.labels = inputs.teacher.iter().map(|row| first(row)).collect();
    let expected = values(&inputs.value(&plain(&Dkd::default()), &student));
    let teacher = tensor(&inputs.teacher);
    let got = Dkd::default().value(&LogitRows {
        student: &student,
        teacher: Some(&teacher),
        teacher_sigma: None,
        top_k: None,
        labels: &Tensor::full([ROWS as i64], -100, (Kind::Int64, tch::Device::Cpu)),
        keys: &Tensor::zeros([ROWS as i64], (Kind::Int64, tch::Device::Cpu)),
        sample_sigma: None,
        of_student: Some(&of_student(ROWS as i64)),
        lookups: &Lookups::default(),
    });
    assert_eq!(values(&got), expected);
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

/// Tokens by descending value.
fn ranked(x: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order
}

#[test]
fn losses_on_the_top_k_run_with_and_without_the_rest() {
    for sparse in [false, true] {
        let top = TopKKl {
            k: 3,
            temperature: 2.0,
            temperature_squared: true,
        };
        check("top-k-kl", &on(&top, sparse), &|inputs, row| {
            let order = ranked(&inputs.teacher[row]);
            let kept = |x: &[f64]| {
                let kept: Vec<f64> = order[..3].iter().map(|&token| x[token]).collect();
                softmax(&kept, 2.0)
            };
            4.0 * kl(&kept(&inputs.teacher[row]), &kept(&inputs.student[row]))
        });
        let uniform = |inputs: &Inputs, row: usize, k: usize| {
            let (mut p, q) = (
                softmax(&inputs.teacher[row], 1.0),
                softmax(&inputs.student[row], 1.0),
            );
            let order = ranked(&p);
            let rest: f64 = order[k..].iter().map(|&token| p[token]).sum();
            order[k..]
                .iter()
                .for_each(|&token| p[token] = rest / (VOCABULARY - k) as f64);
            kl(&p, &q)
        };
        let ghost = |inputs: &Inputs, row: usize, k: usize| {
            let (p, q) = (
                softmax(&inputs.teacher[row], 1.0),
                softmax(&inputs.student[row], 1.0),
            );
            let order = ranked(&p);
            let bins = |x: &[f64]| -> Vec<f64> {
                let kept = order[..k].iter().map(|&token| x[token]);
                kept.chain([order[k..].iter().map(|&token| x[token]).sum()])
                    .collect()
            };
            kl(&bins(&p), &bins(&q))
        };
        check(
            "uniform-tail-kl",
            &on(&UniformTailKl { k: 3 }, sparse),
            &|inputs, row| uniform(inputs, row, 3),
        );
        check(
            "ghost-kl",
            &on(&GhostKl { k: 3 }, sparse),
            &|inputs, row| ghost(inputs, row, 3),
        );
        let kl_with = |tail| Kl {
            tail,
            ..Kl::default()
        };
        check(
            "kl, uniform",
            &on(&kl_with(Tail::Uniform), sparse),
            &|inputs, row| uniform(inputs, row, KEPT),
        );
        check(
            "kl, ghost",
            &on(&kl_with(Tail::Ghost), sparse),
            &|inputs, row| ghost(inputs, row, KEPT),
        );
    }
}

#[test]
fn bild_and_its_halves() {
    let differences = |x: &[f64], leaders: &[usize]| -> Vec<f64> {
        let pairs = (0..leaders.len()).flat_map(|i| (i + 1..leaders.len()).map(move |j| (i, j)));
        pairs.map(|(i, j)| x[leaders[i]] - x[leaders[j]]).collect()
    };
    let led = |teacher: &[f64], student: &[f64], leaders: &[usize]| {
        let d = |x: &[f64]| softmax(&differences(x, leaders), 3.0);
        kl(&d(teacher), &d(student))
    };
    // Where the cache keeps four, others get the fourth.
    let cached = |teacher: &[f64]| -> Vec<f64> {
        let least = teacher[ranked(teacher)[KEPT - 1]];
        teacher.iter().map(|&logit| logit.max(least)).collect()
    };
    for sparse in [false, true] {
        let known = |teacher: &[f64]| {
            if sparse {
                cached(teacher)
            } else {
                teacher.to_vec()
            }
        };
        let by_teacher = |inputs: &Inputs, row: usize| {
            let teacher = &inputs.teacher[row];
            led(teacher, &inputs.student[row], &ranked(teacher)[..4])
        };
        let by_student = |inputs: &Inputs, row: usize| {
            let student = &inputs.student[row];
            led(&known(&inputs.teacher[row]), student, &ranked(student)[..4])
        };
        let (k, temperature) = (4, 3.0);
        let teacher_led = BildTeacherLed { k, temperature };
        check("bild-teacher-led", &on(&teacher_led, sparse), &by_teacher);
        let student_led = BildStudentLed { k, temperature };
        check("bild-student-led", &on(&student_led, sparse), &by_student);
        check(
            "bild",
            &on(&Bild { k, temperature }, sparse),
            &|inputs, row| by_teacher(inputs, row) + by_student(inputs, row),
        );
    }
}

#[test]
fn missing_teacher_logits_are_counted() {
    let teacher = Tensor::from_slice2(&[[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]);
    let student = Tensor::from_slice2(&[[9.0, 1.0, 1.0, 1.0, 8.0], [1.0, 1.0, 1.0, 9.0, 8.0]]);
    let (logits, ids) = teacher.topk(2, -1, true, true);
    let top_k = TopKRows {
        ids,
        logits,
        log_sum_exp: teacher.logsumexp([-1].as_slice(), false),
    };
    let lookups = Lookups::default();
    let rows = LogitRows {
        student: &student,
        teacher: None,
        teacher_sigma: None,
        top_k: Some(&top_k),
        labels: &Tensor::from_slice(&[0i64, 0]),
        keys: &Tensor::from_slice(&[0i64, 1]),
        sample_sigma: None,
        of_student: Some(&of_student(2)),
        lookups: &lookups,
    };
    let at = rows.teacher_at(&student.topk(2, -1, true, true).1);
    assert_eq!(values(&at), [5.0, 4.0, 4.0, 5.0]);
    let expected = MissingLogits {
        asked: 4,
        missing: 1,
    };
    assert_eq!(lookups.count(), expected);
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

    for proposal_exponent in [1.0, 0.8] {
        let mut mean = vec![0.0; ROWS * VOCABULARY];
        for seed in 0..SEEDS {
            let loss = RandomSamplingKd {
                draws: 50,
                proposal_exponent,
                seed,
            };
            for (mean, value) in mean.iter_mut().zip(gradient(&loss, &keys)) {
                *mean += value / SEEDS as f64;
            }
        }
        for row in 0..ROWS {
            let p = softmax(&inputs.teacher[row], 1.0);
            let q = softmax(&inputs.student[row], 1.0);
            for token in 0..VOCABULARY {
                let (got, expected) = (mean[row * VOCABULARY + token], q[token] - p[token]);
                // 15,000 draws: a standard error of 0.004 at most, and the bias of normalised weights.
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

#[test]
fn knowledge_alignment_of_like_and_unlike_widths() {
    let mut rng = SeededRng::new(5);
    let mut random = |rows: usize, width: usize| -> Vec<Vec<f64>> {
        (0..rows)
            .map(|_| (0..width).map(|_| rng.normal()).collect())
            .collect()
    };
    for (student_width, teacher_width) in [(6, 6), (6, 12), (12, 6), (5, 8)] {
        let (student, teacher) = (random(3, student_width), random(3, teacher_width));
        let width = student_width.min(teacher_width);
        // Output i of an adaptive average pool takes ⌊i·n/m⌋ up to ⌈(i+1)·n/m⌉.
        let pooled = |x: &[f64]| -> Vec<f64> {
            (0..width)
                .map(|i| mean(&x[i * x.len() / width..((i + 1) * x.len()).div_ceil(width)]))
                .collect()
        };
        for hidden_norm in Normalization::ALL {
            for reduction in [HiddenReduction::Mean, HiddenReduction::Paper] {
                let loss = KnowledgeAlignment {
                    beta: 0.7,
                    hidden_norm,
                    reduction,
                };
                let of_width = if reduction == HiddenReduction::Mean {
                    width as f64
                } else {
                    1.0
                };
                let expected: f64 = student
                    .iter()
                    .zip(&teacher)
                    .map(|(student, teacher)| {
                        let (a, b) = (
                            normalized(hidden_norm, &pooled(student)),
                            normalized(hidden_norm, &pooled(teacher)),
                        );
                        0.7 * a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / of_width
                    })
                    .sum();
                let x = tensor(&student).set_requires_grad(true);
                let got = loss.value(&x, &tensor(&teacher)).sum(Kind::Double);
                assert!(
                    (got.double_value(&[]) - expected).abs() < 1e-9,
                    "{loss:?} {student_width} {teacher_width}"
                );
                let gradient =
                    values(&Tensor::run_backward(&[&got], &[&x], false, false).swap_remove(0));
                for (index, gradient) in gradient.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut flat = student.concat();
                        flat[index] += by;
                        let x = Tensor::from_slice(&flat).view([3, -1]);
                        loss.value(&x, &tensor(&teacher))
                            .sum(Kind::Double)
                            .double_value(&[])
                    };
                    let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!(
                        (gradient - difference).abs() < 1e-6,
                        "{loss:?}: {gradient} and {difference}"
                    );
                }
            }
        }
    }
}

#[test]
fn patient_kd_is_twice_the_cosine_loss() {
    let mut rng = SeededRng::new(8);
    let mut random = || -> Vec<Vec<f64>> {
        (0..3)
            .map(|_| (0..5).map(|_| rng.normal()).collect())
            .collect()
    };
    let (student, teacher) = (random(), random());
    let (s, t) = (tensor(&student), tensor(&teacher));
    let cosine = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let patient = values(&PatientKd {}.value(&s, &t));
    let of_cosine = values(&HiddenCosine {}.value(&s, &t));
    for row in 0..3 {
        let expected = 1.0 - cosine(&student[row], &teacher[row]);
        assert!((of_cosine[row] - expected).abs() < 1e-12);
        assert!((patient[row] - 2.0 * expected).abs() < 1e-12);
    }
    // Zeros have no direction and no gradient.
    let zero = Tensor::zeros([1, 5], (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
    let value = PatientKd {}
        .value(&zero, &t.narrow(0, 0, 1))
        .sum(Kind::Double);
    let gradient = Tensor::run_backward(&[value], &[&zero], false, false).swap_remove(0);
    assert!(values(&gradient).iter().all(|value| value.is_finite()));
}

/// Of the spread that logits show, a known one says the same; of another, σ follows.
#[test]
fn a_known_spread_normalises_as_logits_of_that_spread() {
    let inputs = Inputs::new(21);
    let logits = tensor(&inputs.teacher);
    for norm in Normalization::ALL {
        let known = |factor: f64| KnownSpread {
            sigma: population_sigma(&logits) * factor,
            min: logits.amin([-1], true),
        };
        let (same, sigma) = known(1.0).normalize(norm, &logits);
        let own = norm.apply(&logits);
        let error = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(error(&same, &own) < 1e-12, "{norm:?}");
        assert!(error(&sigma, &population_sigma(&own)) < 1e-12, "{norm:?}");
        let (other, sigma) = known(2.0).normalize(norm, &logits);
        let (times, of_sigma) = match norm {
            Normalization::None | Normalization::MaxMin => (1.0, 2.0),
            Normalization::Standardize => (0.5, 1.0),
        };
        assert!(error(&other, &(&own * times)) < 1e-5, "{norm:?}");
        let expected = population_sigma(&own) * of_sigma;
        assert!(error(&sigma, &expected) < 1e-5, "{norm:?}");
    }
}
