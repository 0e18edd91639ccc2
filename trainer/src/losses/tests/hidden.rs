//! Losses on hidden states.

use super::*;

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
