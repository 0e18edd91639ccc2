//! Every loss in f64 against a slow plain-Rust reference, its gradient against finite differences,
//! and KL against the values of another package where they are at hand.

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

    fn value(&self, loss: &dyn LogitLoss, student: &Tensor) -> Tensor {
        let teacher = tensor(&self.teacher);
        let (logits, ids) = teacher.topk(KEPT as i64, -1, true, true);
        let top_k = TopKRows {
            ids,
            logits,
            log_sum_exp: teacher.logsumexp([-1].as_slice(), false),
        };
        let labels: Vec<i64> = self.labels.iter().map(|&label| label as i64).collect();
        let sigmas: Vec<_> = loss
            .sample_sigma()
            .into_iter()
            .map(|norm| {
                let spread = |logits: &[Vec<f64>]| {
                    let normal: Vec<Vec<f64>> =
                        logits.iter().map(|row| normalized(norm, row)).collect();
                    let sigmas = sample_sigmas(&normal, &self.sample_of);
                    tensor(&sigmas.iter().map(|&sigma| vec![sigma]).collect::<Vec<_>>())
                };
                (
                    norm,
                    SampleSigma {
                        student: spread(&self.student),
                        teacher: spread(&self.teacher),
                    },
                )
            })
            .collect();
        loss.value(&LogitRows {
            student,
            teacher: Some(&teacher),
            top_k: Some(&top_k),
            labels: &Tensor::from_slice(&labels),
            sample_sigmas: &sigmas,
        })
    }
}

fn tensor(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
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
fn check(name: &str, loss: &dyn LogitLoss, reference: &dyn Fn(&Inputs, usize) -> f64) {
    for seed in 0..2 {
        let inputs = Inputs::new(seed);
        let expected: Vec<f64> = (0..ROWS).map(|row| reference(&inputs, row)).collect();
        let student = tensor(&inputs.student).set_requires_grad(true);
        let value = inputs.value(loss, &student);
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
                    .value(loss, &student)
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
    check("cross-entropy", &CrossEntropy, &|inputs, row| {
        -softmax(&inputs.student[row], 1.0)[inputs.labels[row]].ln()
    });
}

#[test]
fn kl_at_every_temperature_and_normalisation() {
    for temperature in [0.5, 1.0, 3.0, 20.0] {
        for logits_norm in Normalization::ALL {
            for temperature_squared in [false, true] {
                let loss = Kl {
                    temperature,
                    temperature_squared,
                    logits_norm,
                };
                let factor = if temperature_squared {
                    temperature * temperature
                } else {
                    1.0
                };
                check(&format!("{loss:?}"), &loss, &|inputs, row| {
                    let p = softmax(&normalized(logits_norm, &inputs.teacher[row]), temperature);
                    let q = softmax(&normalized(logits_norm, &inputs.student[row]), temperature);
                    factor * kl(&p, &q)
                });
            }
        }
    }
}

#[test]
fn dual_scaling_per_position_with_gradient_through_sigma() {
    for logits_norm in Normalization::ALL {
        let loss = DualScaling {
            scaling_value: 2.0,
            gamma: 0.5,
            sigma: Sigma::Position,
            detach_sigma: false,
            scaling_squared: true,
            logits_norm,
        };
        check(&format!("{loss:?}"), &loss, &|inputs, row| {
            let scaled = |logits: &[f64]| {
                let normal = normalized(logits_norm, logits);
                softmax(&normal, 2.0 * sigma(&normal))
            };
            0.5 * 4.0 * kl(&scaled(&inputs.teacher[row]), &scaled(&inputs.student[row]))
        });
    }
}

#[test]
fn dual_scaling_per_sample() {
    for logits_norm in Normalization::ALL {
        let loss = DualScaling {
            scaling_value: 3.0,
            gamma: 1.0,
            sigma: Sigma::Sample,
            detach_sigma: true,
            scaling_squared: false,
            logits_norm,
        };
        check(&format!("{loss:?}"), &loss, &|inputs, row| {
            let scaled = |logits: &[Vec<f64>]| {
                let normal: Vec<Vec<f64>> = logits
                    .iter()
                    .map(|row| normalized(logits_norm, row))
                    .collect();
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
            gamma: 1.0,
            sigma: Sigma::Position,
            detach_sigma,
            scaling_squared: false,
            logits_norm: Normalization::None,
        };
        let student = tensor(&inputs.student).set_requires_grad(true);
        let value = inputs.value(&loss, &student);
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
fn top_k_kl_with_both_tails() {
    let tail = |inputs: &Inputs, row: usize| {
        let p = softmax(&inputs.teacher[row], 1.0);
        let q = softmax(&inputs.student[row], 1.0);
        let mut order: Vec<usize> = (0..VOCABULARY).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        (p, q, order)
    };
    check(
        "uniform tail",
        &TopKKl {
            tail: Tail::Uniform,
        },
        &|inputs, row| {
            let (mut p, q, order) = tail(inputs, row);
            let rest: f64 = order[KEPT..].iter().map(|&token| p[token]).sum();
            order[KEPT..]
                .iter()
                .for_each(|&token| p[token] = rest / (VOCABULARY - KEPT) as f64);
            kl(&p, &q)
        },
    );
    check(
        "ghost token",
        &TopKKl { tail: Tail::Ghost },
        &|inputs, row| {
            let (p, q, order) = tail(inputs, row);
            let bins = |x: &[f64]| -> Vec<f64> {
                let kept = order[..KEPT].iter().map(|&token| x[token]);
                kept.chain([order[KEPT..].iter().map(|&token| x[token]).sum()])
                    .collect()
            };
            kl(&bins(&p), &bins(&q))
        },
    );
}

#[test]
fn constant_logits_are_no_trouble() {
    let flat = Tensor::ones([2, 7], (Kind::Float, tch::Device::Cpu));
    for logits_norm in Normalization::ALL {
        let student = flat.copy().set_requires_grad(true);
        let rows = LogitRows {
            student: &student,
            teacher: Some(&flat),
            top_k: None,
            labels: &Tensor::from_slice(&[0i64, 1]),
            sample_sigmas: &[],
        };
        for detach_sigma in [true, false] {
            let loss = DualScaling {
                scaling_value: 1.0,
                gamma: 1.0,
                sigma: Sigma::Position,
                detach_sigma,
                scaling_squared: false,
                logits_norm,
            };
            let value = loss.value(&rows).sum(None::<Kind>);
            let gradient =
                Tensor::run_backward(&[&value], &[&student], false, false).swap_remove(0);
            assert_eq!(value.double_value(&[]), 0.0, "{logits_norm:?}");
            assert_eq!(
                gradient.abs().max().double_value(&[]),
                0.0,
                "{logits_norm:?} {detach_sigma}"
            );
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
                let got = loss.sum_over_positions(&x, &tensor(&teacher));
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
                        loss.sum_over_positions(&x, &tensor(&teacher))
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

/// Values and gradients of the BiLD authors' package, in the folder `reference` of `CASKD_SHARED`.
#[test]
fn kl_agrees_with_another_package() {
    let Some(shared) = std::env::var_os("CASKD_SHARED") else {
        eprintln!(
            "SKIPPED: set CASKD_SHARED to the folder that holds reference/losses_bild_11.safetensors"
        );
        return;
    };
    let path = std::path::Path::new(&shared).join("reference/losses_bild_11.safetensors");
    let tensors = Tensor::read_safetensors(&path).unwrap();
    let find = |name: &str| {
        tensors
            .iter()
            .find(|(of, _)| of == name)
            .unwrap()
            .1
            .shallow_clone()
    };
    let flat = |name: &str| find(name).view([-1, 97]).to_kind(Kind::Double);
    let teacher = flat("teacher");
    let labels = find("labels").view(-1);
    for temperature in [1.0, 2.0, 3.0, 8.0, 20.0] {
        let student = flat("student").set_requires_grad(true);
        let loss = Kl {
            temperature,
            temperature_squared: false,
            logits_norm: Normalization::None,
        };
        let rows = LogitRows {
            student: &student,
            teacher: Some(&teacher),
            top_k: None,
            labels: &labels,
            sample_sigmas: &[],
        };
        let value = loss.value(&rows);
        let gradient = Tensor::run_backward(&[value.mean(Kind::Double)], &[&student], false, false)
            .swap_remove(0);
        for (got, name) in [(value, "value"), (gradient, "grad")] {
            let expected = values(&find(&format!("kl.tau{temperature}.{name}")));
            let largest = expected
                .iter()
                .fold(0.0f64, |most, value| most.max(value.abs()));
            for (got, expected) in values(&got).iter().zip(&expected) {
                assert!(
                    (got - expected).abs() < 1e-9 * largest,
                    "{name} at {temperature}: {got} and {expected}"
                );
            }
        }
    }
}
