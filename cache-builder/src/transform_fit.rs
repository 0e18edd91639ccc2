//! The fit of the compact tier: a basis, a step and a K for this teacher and these data.
//!
//! y = A(h − μ), where A diagonalises the covariance C of last hidden states in a metric G of the LM head, so that the
//! squared error of y is an error of logits and every coefficient can be quantised with the same step. G mixes three
//! second derivatives of the loss: the vocabulary-centred head WcᵀWc/V (KL at high temperature) and
//! E[Wᵀ(diag p − p pᵀ)W] at temperatures 2 and 4, each scaled to the same share of C. Measured in docs/lab-log.md.

use std::ops::Range;

use caskd_formats::{
    Basis, BasisParts, CacheSpec, CodeSpec, CodeTarget, Coefficients, Sequence, SymbolCounts, TopK,
    trial_bytes_per_position,
};
use tch::{Kind, Tensor};

use crate::error::torch;
use crate::noise_shaping::Shaping;
use crate::rebuild::{Rebuilt, kl_rows};
use crate::statistics::{round_statistics, snap_top_k};
use crate::{Error, Result};

/// Positions that a basis is fitted on, where there are so many: half as many cost 4% more bytes.
pub(crate) const FIT_POSITIONS: usize = 16_384;

/// Positions below which all are fitted on, and none held out.
pub(crate) const LEAST_FIT_POSITIONS: usize = 8192;

/// Positions that step and K are chosen on; none of them is fitted on, where there are enough.
pub(crate) const HELD_OUT_POSITIONS: usize = 2048;

/// Of these, those whose rebuilt logits are compared with the teacher's.
const KL_POSITIONS: i64 = 512;

/// Positions that the metric is averaged over.
const METRIC_POSITIONS: i64 = 512;

/// Positions whose logits exist at one time.
const ROWS: i64 = 128;

/// Temperatures of the metric, each with half the weight of the flat one.
const METRIC_TEMPERATURES: [f64; 2] = [2.0, 4.0];

/// What K is chosen from.
const K_CHOICES: [usize; 3] = [4, 8, 16];

/// How much more KL at temperature 1 counts than at 4 in the choice of K, T² apart: what is left of it there does not cancel.
const AT_ONE: f64 = 16.0;

/// Largest K that the sample's top-k must have.
pub(crate) const MOST_K: usize = 16;

/// K where a distortion is asked for: other values reach the same with a few bytes more.
const USUAL_K: usize = 8;

/// Halvings of a step's range on a logarithmic scale: the step is right to half a percent.
const BISECTIONS: usize = 11;

/// The steps of different K lie within this factor of each other, and need fewer halvings.
const NEIGHBOURHOOD: f64 = 1.5;
const NEIGHBOUR_BISECTIONS: usize = 7;

/// A share of the rate that is left for what differs between the sample and all of the data.
const MARGIN: f64 = 0.01;

/// Temperature at which the mass outside the top K is put right: at 1 the log-sum-exp does that, far above it the top K
/// hardly count.
const TAIL_TEMPERATURE: f64 = 2.0;

/// Coefficients that are not zero at so few of the sample's positions are dropped, with all after them.
const RARE: f64 = 1e-3;

/// What the fit works on.
pub(crate) struct Sample {
    /// Sequences with their last hidden states, the statistics, and top-k of at least [`MOST_K`] (or the K asked for).
    pub(crate) sequences: Vec<Sequence>,
    /// The first so many are fitted on.
    pub(crate) fitted: usize,
    /// The later ones from here on are held out; the same ones where there is too little text.
    pub(crate) held_out: usize,
}

/// The transform before a step was chosen, in f64.
struct Transform {
    /// A \[D, D\], rows by falling variance.
    analysis: Tensor,
    /// A⁻¹ \[D, D\].
    synthesis: Tensor,
    /// μ \[D\].
    mean: Tensor,
    /// (h − μ)Aᵀ of the fitted positions, f32 \[N, D\].
    fitted: Tensor,
}

/// Fits basis, step and K. `spec` is the cache's without its code, `head` \[V, D\] in f32.
pub(crate) fn fit(
    sample: &Sample,
    spec: &CacheSpec,
    head: &Tensor,
    target: CodeTarget,
    top_k: Option<usize>,
) -> Result<(CodeSpec, Basis)> {
    let head = head.to_device(tch::Device::Cpu);
    let transform = tch::no_grad(|| transform(sample, &head))?;
    let trial = Trial {
        sample,
        spec,
        head: &head,
        transform: &transform,
        shapings: shapings(sample)?,
        target,
    };
    let basis = match target {
        CodeTarget::Rate(bytes) => {
            let choices = top_k.map_or(K_CHOICES.to_vec(), |k| vec![k]);
            let mut best: Option<(Basis, f64)> = None;
            let mut step = None;
            let mut least = f64::INFINITY;
            for k in choices.into_iter().filter(|k| *k <= spec.vocab_size) {
                let (basis, found) = match trial.at_rate(k, f64::from(bytes), step)? {
                    Ok(found) => found,
                    Err(coarsest) => {
                        least = least.min(coarsest);
                        continue;
                    }
                };
                step = Some(found);
                let divergence = trial.divergence(&basis)?;
                // T² · KL is what a gradient at T sees of an error; at 1 no rounding is made up for by later ones.
                let cost = AT_ONE * divergence.at_one + 16.0 * divergence.at_four;
                if best.as_ref().is_none_or(|(_, least)| cost < *least) {
                    best = Some((basis.with_tail_shift(divergence.tail_shift), cost));
                }
            }
            best.map(|(basis, _)| basis).ok_or_else(|| Error::Option {
                problem: format!(
                    "--rate {bytes} is less than token ids, statistics and top-k take"
                ),
                hint: format!(
                    "give at least {:.0} bytes a position{}",
                    least.ceil(),
                    if top_k.is_some_and(|k| k > 1) {
                        ", or a smaller --top-k"
                    } else {
                        ""
                    }
                ),
            })?
        }
        CodeTarget::DistortionMicronats(nats) => {
            let k = top_k.unwrap_or(USUAL_K).min(spec.vocab_size);
            let basis = trial.at_distortion(k, f64::from(nats) * 1e-6)?;
            let shift = trial.divergence(&basis)?.tail_shift;
            basis.with_tail_shift(shift)
        }
    };
    let (_, info) = basis.to_file();
    let code = CodeSpec {
        target,
        fitted_positions: transform.fitted.size()[0] as u64,
        basis: info,
    };
    Ok((code, basis))
}

struct Trial<'a> {
    sample: &'a Sample,
    spec: &'a CacheSpec,
    head: &'a Tensor,
    transform: &'a Transform,
    /// Of every sequence of the sample.
    shapings: Vec<Shaping>,
    target: CodeTarget,
}

/// How far rebuilt logits of held-out positions are from the teacher's.
struct Divergence {
    /// Mean KL(teacher ‖ rebuilt) at temperature 1.
    at_one: f64,
    /// The same at temperature 4.
    at_four: f64,
    /// What lowers the logits outside the top K to the teacher's mass.
    tail_shift: f32,
}

impl Trial<'_> {
    /// The basis with the finest step that keeps to a rate, and the step; else the rate that the coarsest keeps to.
    /// `near` is the step that another K led to.
    fn at_rate(
        &self,
        k: usize,
        rate: f64,
        near: Option<f64>,
    ) -> Result<std::result::Result<(Basis, f64), f64>> {
        let rate = rate * (1.0 - MARGIN);
        let (mut fine, mut coarse) = self.step_range();
        let mut bisections = BISECTIONS;
        let mut best = None;
        if let Some(near) = near {
            let step = near * NEIGHBOURHOOD;
            let basis = self.basis(step, k)?;
            if self.bytes_per_position(&basis)? <= rate {
                (fine, coarse, bisections) = (near / NEIGHBOURHOOD, step, NEIGHBOUR_BISECTIONS);
                best = Some((basis, step));
            }
        }
        let (mut basis, mut step) = if let Some(near) = best {
            near
        } else {
            let coarsest = self.basis(coarse, k)?;
            let bytes = self.bytes_per_position(&coarsest)?;
            if bytes > rate {
                return Ok(Err(bytes / (1.0 - MARGIN)));
            }
            (coarsest, coarse)
        };
        for _ in 0..bisections {
            let next = (fine * coarse).sqrt();
            let tried = self.basis(next, k)?;
            if self.bytes_per_position(&tried)? > rate {
                fine = next;
            } else {
                coarse = next;
                (basis, step) = (tried, next);
            }
        }
        Ok(Ok((basis, step)))
    }

    /// The basis with the coarsest step that keeps to a KL at temperature 1.
    fn at_distortion(&self, k: usize, most: f64) -> Result<Basis> {
        let (mut fine, mut coarse) = self.step_range();
        let mut best = self.basis(fine, k)?;
        for _ in 0..BISECTIONS / 2 {
            let step = (fine * coarse).sqrt();
            let basis = self.basis(step, k)?;
            if self.divergence(&basis)?.at_one > most {
                coarse = step;
            } else {
                (fine, best) = (step, basis);
            }
        }
        Ok(best)
    }

    /// From far finer than any use to so coarse that next to nothing is left.
    fn step_range(&self) -> (f64, f64) {
        let squares =
            self.transform
                .fitted
                .square()
                .mean_dim([0_i64].as_slice(), false, Kind::Double);
        let deviation = squares.max().double_value(&[]).sqrt().max(1e-12);
        (deviation / 2000.0, deviation)
    }

    fn basis(&self, step: f64, k: usize) -> Result<Basis> {
        let transform = self.transform;
        let fitted = &self.shapings[..self.sample.fitted];
        let scaled = to_f32(&(&transform.fitted / step));
        let levels = round_all(fitted, &scaled);
        let width = transform.fitted.size()[1] as usize;
        let mut present = vec![0_u32; width];
        for row in levels.chunks_exact(width) {
            for (count, level) in present.iter_mut().zip(row) {
                *count += u32::from(*level != 0);
            }
        }
        let positions = levels.len() / width;
        let rank = present
            .iter()
            .rposition(|count| f64::from(*count) > RARE * positions as f64)
            .map_or(1, |last| last + 1);
        let levels: Vec<i16> = levels
            .chunks_exact(width)
            .flat_map(|row| &row[..rank])
            .copied()
            .collect();
        let top_k = joined_top_k(&self.sample.sequences[..self.sample.fitted], k);
        let counts = SymbolCounts::of(&levels, rank, &top_k, self.spec.vocab_size);
        let to_vec = |tensor: Tensor| {
            Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().view(-1))
        };
        let parts = BasisParts {
            mean: to_vec(transform.mean.shallow_clone()).map_err(torch("reading the mean"))?,
            analysis: to_vec(transform.analysis.narrow(0, 0, rank as i64) / step)
                .map_err(torch("reading the analysis"))?,
            synthesis: to_vec(transform.synthesis.narrow(1, 0, rank as i64) * step)
                .map_err(torch("reading the synthesis"))?,
            tail_shift: 0.0,
        };
        Ok(Basis::new(parts, &counts)?)
    }

    /// Some of the sequences as this basis would have them in the cache.
    fn coded(&self, basis: &Basis, which: Range<usize>) -> Vec<Sequence> {
        let coder = Coder::new(basis);
        let sequences = &self.sample.sequences[which.clone()];
        let coefficients = coder.round(&self.shapings[which], &last_hidden(sequences));
        sequences
            .iter()
            .zip(coefficients)
            .map(|(sequence, coefficients)| {
                let mut coded = Sequence {
                    coefficients: Some(coefficients),
                    hidden: Vec::new(),
                    top_k: Some(joined_top_k(std::slice::from_ref(sequence), basis.k())),
                    ..sequence.clone()
                };
                if let (Some(statistics), Some(top_k)) = (&mut coded.statistics, &mut coded.top_k) {
                    round_statistics(statistics);
                    snap_top_k(top_k, &statistics.max);
                }
                coded
            })
            .collect()
    }

    fn held_out(&self) -> Range<usize> {
        self.sample.held_out..self.sample.sequences.len()
    }

    /// Of everything that a logit loss reads: what the fitted and the other positions of the data are expected to take.
    fn bytes_per_position(&self, basis: &Basis) -> Result<f64> {
        let (_, info) = basis.to_file();
        let spec = CacheSpec {
            origin: None,
            top_k: basis.k(),
            layers: Vec::new(),
            code: Some(CodeSpec {
                target: self.target,
                fitted_positions: 0,
                basis: info,
            }),
            ..self.spec.clone()
        };
        let held_out = self.held_out();
        let bytes = |which| trial_bytes_per_position(&spec, basis, &self.coded(basis, which));
        let new = bytes(held_out.clone())?;
        if self.sample.held_out < self.sample.fitted {
            return Ok(new);
        }
        // As many of the fitted ones, which cost less.
        let first = self.sample.fitted.saturating_sub(held_out.len());
        let known = bytes(first..self.sample.fitted)?;
        let fitted = self.transform.fitted.size()[0] as f64;
        let share = fitted / (self.spec.data.positions as f64).max(fitted);
        Ok(share * known + (1.0 - share) * new)
    }

    fn divergence(&self, basis: &Basis) -> Result<Divergence> {
        let coded = self.coded(basis, self.held_out());
        let rebuilt = Rebuilt::compact(basis, self.head, &coded)?;
        let hidden = last_hidden(&self.sample.sequences[self.held_out()]);
        let rows = KL_POSITIONS.min(hidden.size()[0]);
        let (mut at_one, mut at_four, mut raised) = (0.0, 0.0, 0.0);
        tch::no_grad(|| {
            for first in (0..rows).step_by(ROWS as usize) {
                let count = ROWS.min(rows - first);
                let teacher = hidden.narrow(0, first, count).matmul(&self.head.tr());
                let logits = rebuilt.logits(first, count);
                at_four += kl_rows(&(&teacher / 4.0), &(&logits / 4.0));
                at_one += kl_rows(&teacher, &rebuilt.at_temperature_one(&logits, first, count));
                let tail = |logits: &Tensor| rebuilt.tail_mass(logits, TAIL_TEMPERATURE, first);
                raised += (tail(&logits) - tail(&teacher))
                    .sum(Kind::Double)
                    .double_value(&[]);
            }
        });
        let rows = rows as f64;
        // Where the top K are the whole vocabulary there is no tail.
        let shift = (TAIL_TEMPERATURE * raised / rows) as f32;
        Ok(Divergence {
            at_one: at_one / rows,
            at_four: at_four / rows,
            tail_shift: if shift.is_finite() { shift } else { 0.0 },
        })
    }
}

/// The analysis of a basis, ready for hidden states.
#[derive(Debug)]
pub(crate) struct Coder {
    mean: Tensor,
    analysis: Tensor,
}

impl Coder {
    pub(crate) fn new(basis: &Basis) -> Coder {
        let parts = basis.parts();
        let (rank, width) = (basis.rank() as i64, basis.width() as i64);
        Coder {
            mean: Tensor::from_slice(&parts.mean),
            analysis: Tensor::from_slice(&parts.analysis).view([rank, width]),
        }
    }

    /// Levels of the hidden states [N, D] of whole sequences, one after the other, of which the loss masks are given.
    pub(crate) fn code(
        &self,
        hidden: &Tensor,
        loss_masks: &[&[bool]],
    ) -> Result<Vec<Coefficients>> {
        let hidden = hidden.to_kind(Kind::Float).to_device(tch::Device::Cpu);
        let mut first = 0;
        let mut shapings = Vec::with_capacity(loss_masks.len());
        for mask in loss_masks {
            let own = hidden.narrow(0, first, mask.len() as i64);
            shapings.push(Shaping::of(&own, mask)?);
            first += mask.len() as i64;
        }
        Ok(self.round(&shapings, &hidden))
    }

    fn round(&self, shapings: &[Shaping], hidden: &Tensor) -> Vec<Coefficients> {
        let rank = self.analysis.size()[0] as usize;
        let scaled = to_f32(&(hidden - &self.mean).matmul(&self.analysis.tr()));
        let levels = round_all(shapings, &scaled);
        let mut levels = levels.as_slice();
        let mut take = |positions: usize| {
            let (own, rest) = levels.split_at(positions * rank);
            levels = rest;
            let levels = own.to_vec();
            Coefficients { rank, levels }
        };
        shapings
            .iter()
            .map(|shaping| take(shaping.positions()))
            .collect()
    }
}

/// Levels of the coefficients of sequences that follow each other, on all processors.
fn round_all(shapings: &[Shaping], scaled: &[f32]) -> Vec<i16> {
    let positions: usize = shapings.iter().map(Shaping::positions).sum();
    let width = scaled.len() / positions.max(1);
    let mut pieces = Vec::with_capacity(shapings.len());
    let mut rest = scaled;
    for shaping in shapings {
        let (own, after) = rest.split_at(shaping.positions() * width);
        rest = after;
        pieces.push((shaping, own));
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = pieces.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = pieces
            .chunks(share)
            .map(|pieces| {
                scope.spawn(move || {
                    pieces
                        .iter()
                        .flat_map(|(shaping, scaled)| shaping.round(scaled))
                        .collect::<Vec<i16>>()
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

fn shapings(sample: &Sample) -> Result<Vec<Shaping>> {
    let of = |sequence: &Sequence| {
        let hidden = last_hidden(std::slice::from_ref(sequence));
        Shaping::of(&hidden, &sequence.loss_mask)
    };
    sample.sequences.iter().map(of).collect()
}

fn to_f32(values: &Tensor) -> Vec<f32> {
    let values = values.to_kind(Kind::Float).contiguous();
    let mut copy = vec![0.0; values.numel()];
    let length = copy.len();
    values.copy_data(&mut copy, length);
    copy
}

/// The last hidden states of sequences, f32 [N, D].
fn last_hidden(sequences: &[Sequence]) -> Tensor {
    let states = || {
        sequences
            .iter()
            .filter_map(|sequence| sequence.hidden.last())
    };
    let width = states().next().map_or(1, |state| state.width);
    let values: Vec<f32> = states()
        .flat_map(|state| state.values.iter().copied())
        .collect();
    Tensor::from_slice(&values).view([-1, width as i64])
}

/// The first K entries of all positions.
fn joined_top_k(sequences: &[Sequence], k: usize) -> TopK {
    let mut joined = TopK {
        k,
        ..TopK::default()
    };
    for top_k in sequences
        .iter()
        .filter_map(|sequence| sequence.top_k.as_ref())
    {
        for (ids, logits) in top_k
            .ids
            .chunks_exact(top_k.k)
            .zip(top_k.logits.chunks_exact(top_k.k))
        {
            joined.ids.extend_from_slice(&ids[..k]);
            joined.logits.extend_from_slice(&logits[..k]);
        }
    }
    joined
}

fn transform(sample: &Sample, head: &Tensor) -> Result<Transform> {
    let fitted = last_hidden(&sample.sequences[..sample.fitted]);
    let positions = fitted.size()[0];
    let width = fitted.size()[1];
    let mean = fitted.mean_dim([0_i64].as_slice(), false, Kind::Double);
    let centred = fitted.to_kind(Kind::Double) - &mean;
    let covariance = centred.tr().matmul(&centred) / positions as f64;
    // Fewer positions than channels leave directions that the sample never saw: a little of every channel is added.
    let average = covariance.trace().double_value(&[]).max(1e-30) / width as f64;
    let share = width as f64 / (width as f64 + 100.0 * positions as f64);
    let eye = Tensor::eye(width, (Kind::Double, covariance.device()));
    let covariance = covariance * (1.0 - share) + eye * (average * share);

    let metric = metric(&fitted, head, &covariance);
    let symmetric = |matrix: Tensor| (&matrix + matrix.tr()) * 0.5;
    let (values, vectors) = symmetric(metric)
        .f_linalg_eigh("L")
        .map_err(torch("diagonalising the metric of the LM head"))?;
    let root = values
        .clamp_min(values.max().double_value(&[]) * 1e-12)
        .sqrt();
    let half = &vectors * &root; // G = half · halfᵀ
    let inner = symmetric(half.tr().matmul(&covariance).matmul(&half));
    let (_, rotation) = inner
        .f_linalg_eigh("L")
        .map_err(torch("diagonalising the hidden states"))?;
    let rotation = rotation.flip([1]); // by falling variance
    let analysis = rotation.tr().matmul(&half.tr());
    let synthesis = (&vectors / &root).matmul(&rotation);
    Ok(Transform {
        fitted: centred.matmul(&analysis.tr()).to_kind(Kind::Float),
        analysis,
        synthesis,
        mean,
    })
}

/// The mixed metric \[D, D\] in f64.
fn metric(fitted: &Tensor, head: &Tensor, covariance: &Tensor) -> Tensor {
    let gram = |matrix: &Tensor| matrix.tr().matmul(matrix).to_kind(Kind::Double);
    let vocabulary = head.size()[0] as f64;
    let share = |metric: Tensor| {
        let trace = (&metric * covariance).sum(Kind::Double).double_value(&[]);
        metric / trace.max(1e-30)
    };
    let centred = head - head.mean_dim([0_i64].as_slice(), true, Kind::Float);
    let mut mixed = share(gram(&centred) / vocabulary);
    // Positions from all over the sample.
    let every = (fitted.size()[0] / METRIC_POSITIONS).max(1);
    let rows = fitted.slice(0, 0, None, every);
    for temperature in METRIC_TEMPERATURES {
        let mut weights = Tensor::zeros([head.size()[0]], (Kind::Double, head.device()));
        let mut of_means = Tensor::zeros_like(&mixed);
        for first in (0..rows.size()[0]).step_by(ROWS as usize) {
            let count = ROWS.min(rows.size()[0] - first);
            let logits = rows.narrow(0, first, count).matmul(&head.tr()) / temperature;
            let p = logits.softmax(-1, Kind::Float);
            weights += p.sum_dim_intlist([0_i64].as_slice(), false, Kind::Double);
            of_means += gram(&p.matmul(head));
        }
        let weighted = head * weights.sqrt().to_kind(Kind::Float).unsqueeze(1);
        mixed += share(gram(&weighted) - of_means) * 0.5;
    }
    mixed
}
