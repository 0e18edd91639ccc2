//! Losses in units of σ.

use super::*;

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
