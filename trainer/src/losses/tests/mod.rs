//! Every loss in f64 against a slow plain-Rust reference, its gradient against finite differences.
//! PyTorch's values and those of another package are met in `trainer/tests/losses.rs`.

mod divergences;
mod hidden;
mod scaled;
mod single_tokens;

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
