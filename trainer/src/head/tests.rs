//! The fused head against one product over all positions, and the row kernel against autograd.

use caskd_formats::{Coefficients, Columns, HiddenState, Sequence, Statistics, TopK};
use caskd_models::SeededRng;
use caskd_models::unchecked::read;
use tch::Device;

use super::*;
use crate::losses::{
    BildTeacherLed, CrossEntropy, DualScaling, GhostKl, Kl, Sigma, Tail, UniformTailKl,
};
use crate::row_kernel::{
    HandLoss, Known, TeacherParts, TopEntries, values_and_gradient, values_of,
};

const WIDTH: usize = 6;
const VOCABULARY: usize = 23;

fn random(rng: &mut SeededRng, shape: &[i64]) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product::<i64>())
        .map(|_| rng.normal() as f32)
        .collect();
    Tensor::from_slice(&values).view(shape)
}

fn sequence(rng: &mut SeededRng, positions: usize) -> Sequence {
    let values =
        |rng: &mut SeededRng, n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    Sequence {
        source: format!("test:{positions}"),
        token_ids: (0..positions)
            .map(|_| rng.below(VOCABULARY as u64) as u32)
            .collect(),
        loss_mask: (0..positions).map(|t| t >= 2).collect(),
        statistics: Some(Statistics {
            log_sum_exp: vec![4.0; positions],
            ..Statistics::default()
        }),
        top_k: Some(TopK {
            k: 2,
            ids: [3, 7].repeat(positions),
            logits: [2.0, 1.5].repeat(positions),
        }),
        hidden: vec![HiddenState {
            layer: 2,
            width: WIDTH,
            values: values(rng, positions * WIDTH),
        }],
        coefficients: None,
    }
}

/// Sequences of 5, 9 and 3 positions of a teacher with the head [V, WIDTH].
fn batch_of_three(rng: &mut SeededRng, teacher_head: &Tensor) -> Batch {
    let sequences = [5, 9, 3].map(|positions| {
        let mut sequence = sequence(rng, positions);
        let hidden = Tensor::from_slice(&sequence.hidden[0].values).view([-1, WIDTH as i64]);
        let logits = hidden.matmul(&teacher_head.tr());
        let floats = |of: Tensor| Vec::<f32>::try_from(of.contiguous().view(-1)).unwrap();
        let last = [-1_i64];
        sequence.statistics = Some(Statistics {
            mean: floats(logits.mean_dim(last.as_slice(), false, Kind::Float)),
            std: floats(logits.std_dim(last.as_slice(), false, false)),
            min: floats(logits.amin(last, false)),
            max: floats(logits.amax(last, false)),
            log_sum_exp: floats(logits.logsumexp(last.as_slice(), false)),
        });
        let (logits, ids) = logits.topk(2, -1, true, true);
        let ids = Vec::<i64>::try_from(ids.contiguous().view(-1)).unwrap();
        sequence.top_k = Some(TopK {
            k: 2,
            ids: ids.into_iter().map(|id| id as u32).collect(),
            logits: floats(logits),
        });
        sequence
    });
    let columns = Columns {
        statistics: true,
        top_k: true,
        layers: vec![2],
        coefficients: false,
    };
    Batch::collate(&sequences, &columns, VOCABULARY).unwrap()
}

/// The fused head's sums and gradient, whatever the chunk, are those of autograd through one
/// product over all positions.
#[test]
fn chunks_add_up_to_unchunked_autograd() {
    let mut rng = SeededRng::new(2);
    let teacher_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
    let batch = batch_of_three(&mut rng, &teacher_head);
    let rows = batch.num_targets() as i64;
    assert_eq!((batch.num_positions(), rows), (17, 3 + 7 + 1));
    let hidden = random(&mut rng, &[rows, WIDTH as i64]);
    let student_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
    let code = LinearCode::for_test(&teacher_head, 2);
    let dual = |sigma: Sigma| DualScaling {
        scaling_value: 2.0,
        sigma,
        ..DualScaling::default()
    };
    let kl = Kl {
        temperature: 3.0,
        temperature_squared: true,
        ..Kl::default()
    };
    let losses: [(&dyn LogitLoss, Normalization); 8] = [
        (&CrossEntropy {}, Normalization::None),
        (&kl, Normalization::None),
        (&dual(Sigma::Position), Normalization::MaxMin),
        (&dual(Sigma::Sample), Normalization::None),
        (&dual(Sigma::Sample), Normalization::Standardize),
        (&UniformTailKl { k: 2 }, Normalization::None),
        (&kl, Normalization::Standardize),
        (&BildTeacherLed::default(), Normalization::MaxMin),
    ];
    let scaled: Vec<ScaledLoss<'_>> = losses
        .iter()
        .enumerate()
        .map(|(index, &(loss, norm))| ScaledLoss {
            loss,
            norm,
            scale: 0.1 + index as f64,
        })
        .collect();
    let heads = Heads {
        student: &student_head,
        teacher: Some(&code),
        trains: true,
    };

    let leaf = hidden.copy().set_requires_grad(true);
    let head_leaf = student_head.copy().set_requires_grad(true);
    let student = leaf.matmul(&head_leaf.tr());
    let coefficients = batch
        .teacher_hidden(2)
        .index_select(0, &batch.targets_in_positions);
    let teacher = coefficients.matmul(&teacher_head.tr());
    let of_sample = |logits: &Tensor| {
        let per_row: Vec<Tensor> = (0..rows)
            .map(|row| {
                let sample = batch.sequence_of_target.int64_value(&[row]);
                let same = batch.sequence_of_target.eq(sample).nonzero().view(-1);
                logits.index_select(0, &same).std(false)
            })
            .collect();
        Tensor::stack(&per_row, 0).unsqueeze(1)
    };
    let lookups = Lookups::default();
    let sums: Vec<Tensor> = losses
        .iter()
        .map(|(loss, norm)| {
            let (student, teacher) = (norm.apply(&student), norm.apply(&teacher));
            let sigma = SampleSigma {
                student: of_sample(&student.detach()),
                teacher: of_sample(&teacher),
            };
            let top_k = batch.top_k.as_ref();
            loss.value(&LogitRows {
                student: &student,
                teacher: Some(&teacher),
                teacher_sigma: None,
                top_k: top_k.filter(|_| *norm == Normalization::None),
                labels: &batch.labels,
                keys: &batch.keys,
                sample_sigma: Some(&sigma),
                of_student: None,
                lookups: &lookups,
            })
            .sum(None::<Kind>)
        })
        .collect();
    let total: Tensor = sums
        .iter()
        .zip(&scaled)
        .map(|(sum, scaled)| sum * scaled.scale)
        .sum();
    let mut expected = Tensor::run_backward(&[total], &[&leaf, &head_leaf], false, false);
    let of_head = expected.swap_remove(1);
    let expected = expected.swap_remove(0);

    for chunk in [1, 4, 100] {
        let fused = fused_head(&hidden, &batch, &heads, &scaled, chunk).unwrap();
        for (got, expected) in fused.sums.iter().zip(&sums) {
            let expected = expected.double_value(&[]);
            assert!(
                (got - expected).abs() < 1e-4 * expected.abs(),
                "{got} and {expected}"
            );
        }
        let error = (&fused.hidden - &expected).abs().max().double_value(&[]);
        assert!(
            error < 1e-5 * expected.abs().max().double_value(&[]),
            "chunk {chunk}: {error}"
        );
        let weight = fused.weight.unwrap();
        let error = (&weight - &of_head).abs().max().double_value(&[]);
        assert!(
            error < 1e-5 * of_head.abs().max().double_value(&[]),
            "chunk {chunk}, head: {error}"
        );
    }
}

/// By hand as by autograd, whatever the chunk: every form, alone and all together, in both kinds.
#[test]
fn the_row_kernel_agrees_with_autograd() {
    let mut rng = SeededRng::new(7);
    let teacher_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
    let batch = batch_of_three(&mut rng, &teacher_head);
    let rows = batch.num_targets() as i64;
    let hidden = random(&mut rng, &[rows, WIDTH as i64]);
    let student_head = random(&mut rng, &[VOCABULARY as i64, WIDTH as i64]);
    let kl = |temperature: f64, tail: Tail| Kl {
        temperature,
        temperature_squared: temperature > 2.0,
        tail,
    };
    let dual = DualScaling {
        scaling_value: 0.7,
        gamma: 1.5,
        temperature_squared: true,
        ..DualScaling::default()
    };
    let losses: [&dyn LogitLoss; 8] = [
        &CrossEntropy {},
        &kl(1.0, Tail::Refuse),
        &kl(3.0, Tail::Refuse),
        &dual,
        &GhostKl { k: 2 },
        &UniformTailKl { k: 1 },
        &kl(1.0, Tail::Ghost),
        &kl(1.0, Tail::Uniform),
    ];
    for kind in [Kind::Float, Kind::BFloat16] {
        // In bfloat16 both begin with the same rounded products; the gradient is rounded once more.
        let allowed = if kind == Kind::Float { 1e-5 } else { 2e-2 };
        let (hidden, student_head) = (hidden.to_kind(kind), student_head.to_kind(kind));
        let teacher_head = teacher_head.to_kind(kind);
        let code = LinearCode::for_test(&teacher_head, 2);
        let heads = Heads {
            student: &student_head,
            teacher: Some(&code),
            trains: false,
        };
        let of_teacher = code.rows(&batch);
        let alone = (0..losses.len()).map(|one| vec![one]);
        for chosen in alone.chain([(0..losses.len()).collect()]) {
            let scaled: Vec<ScaledLoss<'_>> = chosen
                .iter()
                .map(|&index| ScaledLoss {
                    loss: losses[index],
                    norm: Normalization::None,
                    scale: 0.3 + index as f64,
                })
                .collect();
            // The reference in f64: a student's small tail mass is lost in f32.
            let wide = |logits: Tensor| logits.to_kind(Kind::Double);
            let leaf = wide(logits(&hidden, &student_head)).set_requires_grad(true);
            let teacher = wide(code.logits(&of_teacher));
            let at_one = wide(code.logits_at_one(&of_teacher));
            let sigma = code
                .known_spread(&of_teacher)
                .unwrap()
                .sigma
                .shallow_clone();
            let lookups = Lookups::default();
            let sums: Vec<Tensor> = scaled
                .iter()
                .map(|scaled| {
                    let rows = LogitRows {
                        student: &leaf,
                        teacher: Some(if scaled.is_at_temperature_one() {
                            &at_one
                        } else {
                            &teacher
                        }),
                        teacher_sigma: Some(&sigma),
                        top_k: batch.top_k.as_ref(),
                        labels: &batch.labels,
                        keys: &batch.keys,
                        sample_sigma: None,
                        of_student: None,
                        lookups: &lookups,
                    };
                    scaled.loss.value(&rows).sum(None::<Kind>)
                })
                .collect();
            let total: Tensor = sums
                .iter()
                .zip(&scaled)
                .map(|(sum, scaled)| sum * scaled.scale)
                .sum();
            let gradient = Tensor::run_backward(&[total], &[&leaf], false, false);
            let gradient = gradient[0].to_kind(Kind::Float);
            let expected = times(&gradient, &student_head).to_kind(Kind::Float);
            for chunk in [1, 4, 100] {
                let hand = by_hand(&scaled, &batch, heads.teacher).unwrap();
                let of_teacher = Some(&of_teacher);
                let done = head_by_hand(&hidden, &batch, &heads, of_teacher, &hand, chunk);
                let done = done.unwrap().unwrap();
                for (got, expected) in done.sums.iter().zip(&sums) {
                    let expected = expected.double_value(&[]);
                    assert!(
                        (got - expected).abs() < 1e-5 * expected.abs().max(1.0),
                        "{kind:?} {chosen:?}: {got} and {expected}"
                    );
                }
                let error = (done.hidden.to_kind(Kind::Float) - &expected).abs().max();
                let largest = expected.abs().max().double_value(&[]);
                assert!(
                    error.double_value(&[]) < allowed * largest,
                    "{kind:?} {chosen:?} in chunks of {chunk}: {error} of {largest}"
                );
            }
        }
    }
}

/// What the compact tier lays over its products, with the logits of temperature 1 beside the others.
#[test]
fn the_row_kernel_lays_exact_logits_over_products() {
    let (rows, vocabulary, k) = (3usize, 29usize, 2usize);
    let mut rng = SeededRng::new(8);
    let mut draw = |shape: &[i64]| random(&mut rng, shape);
    let shape = [rows as i64, vocabulary as i64];
    let (student, product) = (draw(&shape), draw(&shape) * 2.0);
    let (bias, mean) = (draw(&[vocabulary as i64]), draw(&[rows as i64, 1]));
    let ids = Tensor::from_slice(&[3i64, 7, 0, 28, 11, 12]).view([rows as i64, k as i64]);
    let exact = draw(&[rows as i64, k as i64]) + 4.0;
    let log_sum_exp = exact.logsumexp([-1].as_slice(), true) + 0.4;
    let labels = [1i64, 28, 7];

    let laid = (&product + &bias + &mean).scatter(-1, &ids, &exact);
    let kept = (&exact - &log_sum_exp)
        .exp()
        .sum_dim_intlist([-1].as_slice(), true, Kind::Float);
    let rest = (1.0f64 - kept).log() + &log_sum_exp;
    let others = laid.scatter_value(-1, &ids, f64::NEG_INFINITY);
    let shift = rest - others.logsumexp([-1].as_slice(), true);
    let at_one = (&laid + shift).scatter(-1, &ids, &exact);
    let leaf = student.copy().set_requires_grad(true);
    let (one, two) = (
        Kl::default(),
        Kl {
            temperature: 2.0,
            ..Kl::default()
        },
    );
    let dual = DualScaling::default();
    let sigma = Tensor::from_slice(&[0.7_f32, 1.9, 3.0]).unsqueeze(1);
    let of_student = crate::losses::population_sigma(&student);
    let values = [
        (crate::losses::divergence(&at_one, &leaf), 1.5),
        (
            crate::losses::divergence(&(&laid / 2.0), &(&leaf / 2.0)),
            0.5,
        ),
        (
            crate::losses::divergence(&(&laid / &sigma), &(&leaf / of_student)),
            0.7,
        ),
    ];
    let total: Tensor = values
        .iter()
        .map(|(value, scale)| value.sum(None::<Kind>) * *scale)
        .sum();
    let expected = Tensor::run_backward(&[total], &[&leaf], false, false).swap_remove(0);

    let losses: [(&dyn LogitLoss, f64); 3] = [(&one, 1.5), (&two, 0.5), (&dual, 0.7)];
    let losses = losses.map(|(loss, scale)| HandLoss {
        form: loss.by_hand().unwrap(),
        scale,
    });
    let entries = TopEntries {
        k,
        ids: read(&ids).unwrap(),
        logits: read(&exact).unwrap(),
        log_sum_exp: read(&log_sum_exp).unwrap(),
    };
    let known = Known {
        labels: &labels,
        top_k: None,
        teacher: TeacherParts {
            bias: read(&bias),
            mean: read(&mean),
            sigma: read(&sigma),
            exact: Some(entries),
            smallest_mass: 1e-6,
        },
    };
    for threads in [1, 2, 5] {
        let (mut gradient, mut product) = (student.copy(), product.copy());
        let got = values_and_gradient(
            &losses,
            values_of(&mut gradient).unwrap(),
            values_of(&mut product),
            &known,
            threads,
        );
        for (index, (value, _)) in values.iter().enumerate() {
            for row in 0..rows {
                let expected = value.double_value(&[row as i64]);
                let got = got[row * 3 + index];
                assert!((got - expected).abs() < 1e-5, "{got} and {expected}");
            }
        }
        let error = (&gradient - &expected).abs().max().double_value(&[]);
        assert!(error < 1e-6, "{error}");
    }
}

fn loss(loss: &dyn LogitLoss, norm: Normalization) -> ScaledLoss<'_> {
    ScaledLoss {
        loss,
        norm,
        scale: 1.0,
    }
}

/// Rebuilt logits are spread wider than the teacher's: what divides by σ goes by the cached one, in both ways of the head.
#[test]
fn the_compact_tier_scales_by_the_cached_spread() {
    let (positions, k) = (5, 2);
    let mut rng = SeededRng::new(9);
    let mut sequence = sequence(&mut rng, positions);
    sequence.hidden.clear();
    sequence.coefficients = Some(Coefficients {
        rank: 3,
        levels: (0..3 * positions as i16)
            .map(|level| level % 7 - 3)
            .collect(),
    });
    let spread = |from: f32| (0..positions).map(|t| from + 0.25 * t as f32).collect();
    sequence.statistics = Some(Statistics {
        mean: spread(0.1),
        std: spread(0.5),
        min: spread(-9.0),
        max: vec![2.0; positions],
        log_sum_exp: vec![4.0; positions],
    });
    let columns = Columns {
        statistics: true,
        top_k: true,
        coefficients: true,
        layers: Vec::new(),
    };
    let batch = Batch::collate(&[sequence], &columns, VOCABULARY).unwrap();
    let (rows, vocabulary) = (batch.num_targets() as i64, VOCABULARY as i64);
    assert_eq!(rows, 3);
    let (weight, bias) = (
        random(&mut rng, &[vocabulary, 3]),
        random(&mut rng, &[vocabulary]),
    );
    let code = LinearCode::for_test_of_levels(&weight, &bias);
    let student_head = random(&mut rng, &[vocabulary, WIDTH as i64]);
    let hidden = random(&mut rng, &[rows, WIDTH as i64]);
    let heads = Heads {
        student: &student_head,
        teacher: Some(&code),
        trains: false,
    };

    // Positions 1 to 3 predict a target.
    let column =
        |from: f32| Tensor::from_slice(&[1.0_f32, 2.0, 3.0].map(|t| from + 0.25 * t)).unsqueeze(1);
    let levels = batch.coefficients.as_ref().unwrap().narrow(0, 1, rows);
    let ids = Tensor::from_slice(&[3_i64, 7]).repeat([rows, 1]);
    let exact = Tensor::from_slice(&[2.0_f32, 1.5]).repeat([rows, 1]);
    assert_eq!(ids.size(), [rows, k]);
    let laid = (levels.matmul(&weight.tr()) + &bias + column(0.1)).scatter(-1, &ids, &exact);
    let student = hidden.matmul(&student_head.tr());
    let of_student = crate::losses::population_sigma(&student);
    let sum = |value: Tensor| value.sum(Kind::Double).double_value(&[]);
    let by_position = sum(crate::losses::divergence(
        &(&laid / (column(0.5) * 2.0)),
        &(&student / (&of_student * 2.0)),
    ));
    let range = laid.amax([-1], true) - column(-9.0) + 1e-6;
    let of_max_min = sum(crate::losses::divergence(
        &((&laid - column(-9.0)) / range),
        &Normalization::MaxMin.apply(&student),
    ));

    let dual = DualScaling {
        scaling_value: 2.0,
        ..DualScaling::default()
    };
    let kl = Kl::default();
    let check = |losses: &[ScaledLoss<'_>], expected: &[f64]| {
        let done = fused_head(&hidden, &batch, &heads, losses, 2).unwrap();
        for (got, expected) in done.sums.iter().zip(expected) {
            assert!(
                (got - expected).abs() < 1e-4 * expected.abs(),
                "{:?} instead of {expected:?}",
                done.sums
            );
        }
        done.hidden
    };
    let by_hand = check(&[loss(&dual, Normalization::None)], &[by_position]);
    // A loss without a form by hand, and without weight.
    let other = BildTeacherLed::default();
    let other = ScaledLoss {
        scale: 0.0,
        ..loss(&other, Normalization::None)
    };
    let by_graph = check(&[loss(&dual, Normalization::None), other], &[by_position]);
    let error = (&by_hand - &by_graph).abs().max().double_value(&[]);
    let largest = by_hand.abs().max().double_value(&[]);
    assert!(error < 1e-5 * largest, "{error} of {largest}");
    // Dual-Scaling has the same value whatever stands ahead of it.
    let _ = check(
        &[
            loss(&dual, Normalization::Standardize),
            loss(&dual, Normalization::MaxMin),
            loss(&kl, Normalization::MaxMin),
        ],
        &[by_position, by_position, of_max_min],
    );
}

#[test]
fn a_value_that_is_not_finite_is_found() {
    let mut rng = SeededRng::new(3);
    let sequences = [sequence(&mut rng, 4), sequence(&mut rng, 6)];
    let batch = Batch::collate(&sequences, &Columns::default(), VOCABULARY).unwrap();
    let hidden = random(&mut rng, &[batch.num_targets() as i64, WIDTH as i64]);
    let _ = hidden.get(3).fill_(f64::NAN);
    let head = Tensor::ones(
        [VOCABULARY as i64, WIDTH as i64],
        (Kind::Float, Device::Cpu),
    );
    let heads = Heads {
        student: &head,
        teacher: None,
        trains: false,
    };
    let losses = [ScaledLoss {
        loss: &CrossEntropy {},
        norm: Normalization::None,
        scale: 1.0,
    }];
    let Err(bad) = fused_head(&hidden, &batch, &heads, &losses, 2) else {
        panic!("it is not finite")
    };
    assert_eq!(
        (bad.loss, bad.row, batch.source_of_target(bad.row)),
        (0, 3, "test:6")
    );
}
