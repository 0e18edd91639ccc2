//! Losses of the form factor · KL(target ‖ softmax(s/scale)) on rows of logits, with their gradient
//! by hand: a row stays in the second-level cache while its values and its gradient are computed,
//! where autograd would carry a dozen [N, V] tensors through memory.
//!
//! With a = 1/scale, q = softmax(a·s) and p the target, the gradient with respect to s is
//! factor · a · (q − p), for all targets but those of a tail: there, with r the teacher's mass
//! outside its K tokens and r' the student's,
//!
//! - one ghost token: q_k − p_k at the K tokens, q_v · (1 − r/r') elsewhere;
//! - an even tail: q_k − p_k at the K tokens, q_v − r/(V − K) elsewhere.
//!
//! Rows are independent of each other and summed up in their order, so the number of threads does
//! not change a bit.

use caskd_formats::exp_nonpositive;
use caskd_models::unchecked::{Element, RowWork, in_widest, write};
use tch::{Kind, Tensor};

use crate::losses::{ByHand, EPSILON, SMALLEST_MASS, Scaling, SoftTarget};

/// A loss and what its values are multiplied with in the total.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandLoss {
    pub(crate) form: ByHand,
    /// Weight over the denominator of the reduction.
    pub(crate) scale: f64,
}

/// Rows of numbers as a matrix product left them.
pub(crate) enum Values<'a> {
    F32(&'a mut [f32]),
    /// bfloat16 patterns.
    Bf16(&'a mut [u16]),
}

/// The values of a tensor that nobody else uses, f32 or bfloat16; `None` where they do not lie on the CPU in one piece, or
/// are of another kind. What [`write`] asks of the caller holds here, too.
pub(crate) fn values_of(tensor: &mut Tensor) -> Option<Values<'_>> {
    match tensor.kind() {
        _ if tensor.requires_grad() => None,
        Kind::Float => write(tensor).map(Values::F32),
        Kind::BFloat16 => write(tensor).map(Values::Bf16),
        _ => None,
    }
}

/// What is known of N rows beside the logits.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// \[N\].
    pub(crate) labels: &'a [i64],
    /// The teacher's cached top K, for losses with a tail.
    pub(crate) top_k: Option<TopEntries<'a>>,
    /// What makes the teacher's logits of its products.
    pub(crate) teacher: TeacherParts<'a>,
}

/// K entries of N rows.
#[derive(Clone, Copy)]
pub(crate) struct TopEntries<'a> {
    pub(crate) k: usize,
    /// [N, K].
    pub(crate) ids: &'a [i64],
    /// [N, K].
    pub(crate) logits: &'a [f32],
    /// \[N\].
    pub(crate) log_sum_exp: &'a [f32],
}

/// Teacher logits: product + bias + mean, with exact entries laid over them.
#[derive(Clone, Copy, Default)]
pub(crate) struct TeacherParts<'a> {
    /// \[V\].
    pub(crate) bias: Option<&'a [f32]>,
    /// \[N\].
    pub(crate) mean: Option<&'a [f32]>,
    /// Their σ \[N\], where it is known better than they show it.
    pub(crate) sigma: Option<&'a [f32]>,
    /// At temperature 1 the other logits are shifted so that the exact log-sum-exp holds.
    pub(crate) exact: Option<TopEntries<'a>>,
    /// Mass outside the exact entries that the shift does not go below.
    pub(crate) smallest_mass: f64,
}

/// Values [N, losses] of the rows, row by row; `student` [N, V] is overwritten with the gradient of
/// Σ scale · value. `teacher` is [N, V'] with V' ≥ V.
pub(crate) fn values_and_gradient(
    losses: &[HandLoss],
    student: Values<'_>,
    teacher: Option<Values<'_>>,
    known: &Known<'_>,
    threads: usize,
) -> Vec<f64> {
    let rows = known.labels.len();
    let mut values = vec![0.0; rows * losses.len()];
    if rows == 0 {
        return values;
    }
    let share = rows.div_ceil(threads.clamp(1, rows));
    std::thread::scope(|scope| {
        let students = student.shares(rows, share);
        let mut teachers = teacher.map(|teacher| teacher.shares(rows, share).into_iter());
        let of_losses = values.chunks_mut(share * losses.len().max(1));
        let mut own = None;
        for (index, (student, values)) in students.into_iter().zip(of_losses).enumerate() {
            let teacher = teachers.as_mut().and_then(Iterator::next);
            let first = index * share;
            let work = move || share_of_rows(losses, student, teacher, known, first, values);
            // The first share is this thread's own.
            if index == 0 {
                own = Some(work);
            } else {
                scope.spawn(work);
            }
        }
        if let Some(own) = own {
            own();
        }
    });
    values
}

fn share_of_rows<'v>(
    losses: &[HandLoss],
    mut student: Values<'v>,
    mut teacher: Option<Values<'v>>,
    known: &Known<'_>,
    first: usize,
    values: &mut [f64],
) {
    let rows = values.len() / losses.len().max(1);
    let mut scratch = Scratch {
        student: vec![0.0; student.len() / rows],
        teacher: vec![0.0; teacher.as_ref().map_or(0, Values::len) / rows],
        gradient: vec![0.0; student.len() / rows],
    };
    for (index, values) in values.chunks_mut(losses.len().max(1)).enumerate() {
        let known = RowKnown::at(known, first + index);
        in_widest(OneRow {
            losses,
            rows: (&mut student, teacher.as_mut(), index),
            known: &known,
            scratch: &mut scratch,
            values,
        });
    }
}

impl<'a> Values<'a> {
    fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    fn shares(self, rows: usize, share: usize) -> Vec<Values<'a>> {
        match self {
            Values::F32(values) => {
                let width = values.len() / rows;
                values.chunks_mut(share * width).map(Values::F32).collect()
            }
            Values::Bf16(values) => {
                let width = values.len() / rows;
                values.chunks_mut(share * width).map(Values::Bf16).collect()
            }
        }
    }
}

/// What is known of one row.
struct RowKnown<'a> {
    label: usize,
    top_k: Option<RowEntries<'a>>,
    bias: Option<&'a [f32]>,
    mean: f32,
    sigma: Option<f32>,
    exact: Option<RowEntries<'a>>,
    smallest_mass: f64,
}

#[derive(Clone, Copy)]
struct RowEntries<'a> {
    ids: &'a [i64],
    logits: &'a [f32],
    log_sum_exp: f64,
}

impl<'a> RowKnown<'a> {
    fn at(known: &Known<'a>, row: usize) -> RowKnown<'a> {
        let entries = |of: TopEntries<'a>| RowEntries {
            ids: &of.ids[row * of.k..(row + 1) * of.k],
            logits: &of.logits[row * of.k..(row + 1) * of.k],
            log_sum_exp: f64::from(of.log_sum_exp[row]),
        };
        RowKnown {
            label: known.labels[row] as usize,
            top_k: known.top_k.map(entries),
            bias: known.teacher.bias,
            mean: known.teacher.mean.map_or(0.0, |mean| mean[row]),
            sigma: known.teacher.sigma.map(|sigma| sigma[row]),
            exact: known.teacher.exact.map(entries),
            smallest_mass: known.teacher.smallest_mass,
        }
    }
}

/// One row of everything, in f32.
struct Scratch {
    student: Vec<f32>,
    teacher: Vec<f32>,
    gradient: Vec<f32>,
}

/// One row of student and teacher, the one at an index.
struct OneRow<'a, 'v> {
    losses: &'a [HandLoss],
    rows: (&'a mut Values<'v>, Option<&'a mut Values<'v>>, usize),
    known: &'a RowKnown<'a>,
    scratch: &'a mut Scratch,
    values: &'a mut [f64],
}

impl RowWork for OneRow<'_, '_> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn run(self) {
        let OneRow {
            losses,
            rows: (student, teacher, index),
            known,
            scratch,
            values,
        } = self;
        let Scratch {
            student: s,
            teacher: t,
            gradient: g,
        } = scratch;
        load(student, index, s);
        if let Some(teacher) = teacher {
            load(teacher, index, t);
            lay_over(t, known);
        }
        let vocabulary = s.len();
        g.fill(0.0);
        let of_student = Spread::of(s, losses);
        let of_teacher = match known.sigma {
            Some(sigma) => Spread {
                sigma: f64::from(sigma),
            },
            None => Spread::of(&t[..vocabulary.min(t.len())], losses),
        };

        // Teacher logits that hold at temperature 1 alone come last: they take the others' place.
        let at_one = |loss: &HandLoss| {
            known.exact.is_some()
                && loss.form.target == SoftTarget::Teacher
                && loss.form.scaling == Scaling::Temperature(1.0)
        };
        for (last, shifted) in [(false, false), (true, known.exact.is_some())] {
            if shifted && losses.iter().any(at_one) {
                shift_to_exact(t, known);
            }
            for (loss, value) in losses.iter().zip(values.iter_mut()) {
                if at_one(loss) == last {
                    *value = one_loss(loss, s, t, g, (of_student, of_teacher), known);
                }
            }
        }
        store(g, student, index);
    }
}

/// The value of one loss; its gradient is added to `g`.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn one_loss(
    loss: &HandLoss,
    s: &[f32],
    t: &[f32],
    g: &mut [f32],
    (of_student, of_teacher): (Spread, Spread),
    known: &RowKnown<'_>,
) -> f64 {
    let a = of_student.multiplier(loss.form.scaling);
    let max = f64::from(maximum(s));
    let sum = sum_exp(s, a as f32, (a * max) as f32);
    let lse = a * max + sum.ln();
    let factor = loss.form.factor;
    let weight = loss.scale * factor * a;
    let q = |v: usize| (a * f64::from(s[v]) - lse).exp();
    let value = match loss.form.target {
        SoftTarget::Label => {
            add_softmax(g, s, a as f32, (a * max) as f32, (weight / sum) as f32, 0.0);
            g[known.label] -= weight as f32;
            lse - a * f64::from(s[known.label])
        }
        SoftTarget::Teacher => {
            let t = &t[..s.len()];
            let b = of_teacher.multiplier(loss.form.scaling);
            let max_t = f64::from(maximum(t));
            let of_teacher = (b as f32, (b * max_t) as f32);
            let (sum_t, cross) = sum_exp_and_cross(t, of_teacher, s, a as f32);
            let lse_t = b * max_t + sum_t.ln();
            add_difference(
                g,
                (s, a as f32, (a * max) as f32, (weight / sum) as f32),
                (t, of_teacher.0, of_teacher.1, (weight / sum_t) as f32),
            );
            cross / sum_t - lse_t + lse
        }
        SoftTarget::Ghost(k) | SoftTarget::EvenTail(k) => {
            let Some(top) = known.top_k else {
                return f64::NAN; // The plan of a run reads what its losses ask for.
            };
            let k = k.unwrap_or(top.ids.len()).min(top.ids.len());
            let (ids, logits) = (&top.ids[..k], &top.logits[..k]);
            let (mut mass, mut student_mass, mut value, mut in_top) = (0.0, 0.0, 0.0, 0.0);
            for (&id, &logit) in ids.iter().zip(logits) {
                let log_p = f64::from(logit) - top.log_sum_exp;
                let log_q = f64::from(s[id as usize]) - lse;
                mass += log_p.exp();
                student_mass += log_q.exp();
                in_top += log_q;
                value += log_p.exp() * (log_p - log_q);
            }
            let rest = (1.0 - mass).max(SMALLEST_MASS);
            let others = (s.len() - k).max(1) as f64;
            // What each of the other tokens gets beside its share of q.
            let (of_q, constant) = if matches!(loss.form.target, SoftTarget::Ghost(_)) {
                let student_rest = 1.0 - student_mass;
                let (kept, ratio) = if student_rest > SMALLEST_MASS {
                    (student_rest, rest / student_rest)
                } else {
                    (SMALLEST_MASS, 0.0)
                };
                value += rest * (rest.ln() - kept.ln());
                let whole = if ratio > 0.0 { mass + rest } else { mass };
                (whole - ratio, 0.0)
            } else {
                let of_others = total(s) - lse * s.len() as f64 - in_top;
                value += rest * (rest.ln() - others.ln()) - rest / others * of_others;
                (mass + rest, -rest / others)
            };
            let to_all = (weight * of_q / sum) as f32;
            add_softmax(
                g,
                s,
                a as f32,
                (a * max) as f32,
                to_all,
                (weight * constant) as f32,
            );
            let whole = match loss.form.target {
                SoftTarget::Ghost(_) if 1.0 - student_mass <= SMALLEST_MASS => mass,
                _ => mass + rest,
            };
            for (&id, &logit) in ids.iter().zip(logits) {
                let p = (f64::from(logit) - top.log_sum_exp).exp();
                let due = whole * q(id as usize) - p;
                let got = of_q * q(id as usize) + constant;
                g[id as usize] += (weight * (due - got)) as f32;
            }
            value
        }
    };
    factor * value
}

/// Standard deviation of a row, where a loss asks for it.
#[derive(Clone, Copy)]
struct Spread {
    sigma: f64,
}

impl Spread {
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it must take on its caller's instruction set"
    )]
    fn of(row: &[f32], losses: &[HandLoss]) -> Spread {
        let asked = losses
            .iter()
            .any(|loss| matches!(loss.form.scaling, Scaling::Sigma(_)));
        if !asked || row.is_empty() {
            return Spread { sigma: 1.0 };
        }
        let mean = (total(row) / row.len() as f64) as f32;
        let squares = in_lanes(row, |x| (x - mean) * (x - mean));
        let variance = squares / row.len() as f64;
        Spread {
            sigma: variance.max(EPSILON * EPSILON).sqrt(),
        }
    }

    /// What logits are multiplied with ahead of the softmax.
    fn multiplier(self, scaling: Scaling) -> f64 {
        match scaling {
            Scaling::Temperature(temperature) => 1.0 / temperature,
            Scaling::Sigma(base) => 1.0 / (self.sigma * base),
        }
    }
}

const LANES: usize = 16;

/// Elements after which the lanes are added up in f64, so that f32 sums stay short.
const BLOCK: usize = 64 * LANES;

/// Σ f(x) over a row.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn in_lanes(row: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut sum = 0.0f64;
    for block in row.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for values in whole {
            for lane in 0..LANES {
                lanes[lane] += f(values[lane]);
            }
        }
        sum += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
        sum += rest.iter().map(|&value| f64::from(f(value))).sum::<f64>();
    }
    sum
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn total(row: &[f32]) -> f64 {
    in_lanes(row, |x| x)
}

/// The largest value; a NaN is passed over, and found in the sum of exponentials.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            lanes[lane] = if values[lane] > lanes[lane] {
                values[lane]
            } else {
                lanes[lane]
            };
        }
    }
    let max = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    rest.iter().copied().fold(max, f32::max)
}

/// Σ exp(a·x − max).
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn sum_exp(row: &[f32], a: f32, max: f32) -> f64 {
    in_lanes(row, |x| exp_nonpositive(a * x - max))
}

/// Σ e and Σ e · (b·t − a·s) with e = exp(b·t − max).
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn sum_exp_and_cross(t: &[f32], (b, max): (f32, f32), s: &[f32], a: f32) -> (f64, f64) {
    let (mut sum, mut cross) = (0.0f64, 0.0f64);
    for (t, s) in t.chunks(BLOCK).zip(s.chunks(BLOCK)) {
        let (mut sums, mut crosses) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (whole_t, rest_t) = t.as_chunks::<LANES>();
        let (whole_s, rest_s) = s.as_chunks::<LANES>();
        for (t, s) in whole_t.iter().zip(whole_s) {
            for lane in 0..LANES {
                let scaled = b * t[lane];
                let e = exp_nonpositive(scaled - max);
                sums[lane] += e;
                crosses[lane] += e * (scaled - a * s[lane]);
            }
        }
        for (&t, &s) in rest_t.iter().zip(rest_s) {
            let e = exp_nonpositive(b * t - max);
            sums[0] += e;
            crosses[0] += e * (b * t - a * s);
        }
        sum += sums.iter().map(|&lane| f64::from(lane)).sum::<f64>();
        cross += crosses.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    (sum, cross)
}

/// g += weight · exp(a·s − max) + constant.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn add_softmax(g: &mut [f32], s: &[f32], a: f32, max: f32, weight: f32, constant: f32) {
    for (g, &s) in g.iter_mut().zip(s) {
        *g += weight * exp_nonpositive(a * s - max) + constant;
    }
}

/// g += w_s · exp(a·s − max_s) − w_t · exp(b·t − max_t).
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn add_difference(
    g: &mut [f32],
    (s, a, max_s, w_s): (&[f32], f32, f32, f32),
    (t, b, max_t, w_t): (&[f32], f32, f32, f32),
) {
    for ((g, &s), &t) in g.iter_mut().zip(s).zip(t) {
        *g += w_s * exp_nonpositive(a * s - max_s) - w_t * exp_nonpositive(b * t - max_t);
    }
}

/// Bias, mean and exact entries over a row of products.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn lay_over(t: &mut [f32], known: &RowKnown<'_>) {
    match known.bias {
        Some(bias) => {
            for (t, bias) in t.iter_mut().zip(bias) {
                *t = *t + bias + known.mean;
            }
        }
        None => {
            for t in t.iter_mut() {
                *t += known.mean;
            }
        }
    }
    lay_exact(t, known);
}

fn lay_exact(t: &mut [f32], known: &RowKnown<'_>) {
    if let Some(exact) = known.exact {
        for (&id, &logit) in exact.ids.iter().zip(exact.logits) {
            t[id as usize] = logit;
        }
    }
}

/// Moves all but the exact entries so that the exact log-sum-exp holds.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn shift_to_exact(t: &mut [f32], known: &RowKnown<'_>) {
    let Some(exact) = known.exact else { return };
    for &id in exact.ids {
        t[id as usize] = f32::NEG_INFINITY;
    }
    let max = maximum(t);
    let others = f64::from(max) + sum_exp(t, 1.0, max).ln();
    let kept = |&logit: &f32| (f64::from(logit) - exact.log_sum_exp).exp();
    let kept: f64 = exact.logits.iter().map(kept).sum();
    let rest = (1.0 - kept).max(known.smallest_mass).ln() + exact.log_sum_exp;
    let shift = (rest - others) as f32;
    for t in t.iter_mut() {
        *t += shift;
    }
    lay_exact(t, known);
}

#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn load(values: &Values<'_>, index: usize, row: &mut [f32]) {
    let places = index * row.len()..(index + 1) * row.len();
    match values {
        Values::F32(values) => row.copy_from_slice(&values[places]),
        Values::Bf16(values) => {
            for (to, &from) in row.iter_mut().zip(&values[places]) {
                *to = from.wide();
            }
        }
    }
}

/// Rounds to the nearest, ties to even, where the place is narrower.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
fn store(row: &[f32], values: &mut Values<'_>, index: usize) {
    let places = index * row.len()..(index + 1) * row.len();
    match values {
        Values::F32(values) => values[places].copy_from_slice(row),
        Values::Bf16(values) => {
            for (to, &from) in values[places].iter_mut().zip(row) {
                *to = u16::narrow(from);
            }
        }
    }
}
