//! Losses that take single tokens apart: the label, the largest, those that a cache keeps.

use super::*;

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
