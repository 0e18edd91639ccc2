//! The fit of the compact tier: a basis, a step and a K for this teacher and these data.
//!
//! y = A(h − μ), where A diagonalises the covariance C of last hidden states in a metric G of the LM head, so that the
//! squared error of y is an error of logits and every coefficient can be quantised with the same step. G mixes three
//! second derivatives of the loss: the vocabulary-centred head WcᵀWc/V (KL at high temperature) and
//! E[Wᵀ(diag p − p pᵀ)W] at temperatures 2 and 4, each scaled to the same share of C. Measured in docs/lab-log.md.

use caskd_formats::{
    Basis, BasisParts, CacheSpec, CodeSpec, CodeTarget, Coefficients, Sequence, SymbolCounts, TopK,
    trial_bytes_per_position,
};
use tch::{Kind, Tensor};

use crate::error::torch;
use crate::rebuild::{Rebuilt, kl_rows};
use crate::statistics::{round_statistics, snap_top_k};
use crate::{Error, Result};

/// Positions that a basis is fitted on, where there are so many.
pub(crate) const FIT_POSITIONS: usize = 8192;

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

/// Largest K that the sample's top-k must have.
pub(crate) const MOST_K: usize = 16;

/// K where a distortion is asked for: other values reach the same with a few bytes more.
const USUAL_K: usize = 8;

/// Bits of precision that a search for the step ends with: its error is below a hundredth of a byte.
const BISECTIONS: usize = 12;

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
        target,
    };
    let (basis, _) = match target {
        CodeTarget::Rate(bytes) => {
            let choices = top_k.map_or(K_CHOICES.to_vec(), |k| vec![k]);
            let mut best: Option<(Basis, f64)> = None;
            for k in choices.into_iter().filter(|k| *k <= spec.vocab_size) {
                let Some(basis) = trial.at_rate(k, f64::from(bytes))? else {
                    continue;
                };
                let (at_one, at_four) = trial.divergence(&basis)?;
                // T² · KL is what a gradient at T sees of an error.
                let cost = at_one + 16.0 * at_four;
                if best.as_ref().is_none_or(|(_, least)| cost < *least) {
                    best = Some((basis, cost));
                }
            }
            best.ok_or_else(|| Error::Option {
                problem: format!(
                    "--rate {bytes} is less than token ids, statistics and top-k take"
                ),
                hint: "give at least 60 bytes a position, or a smaller --top-k".into(),
            })?
        }
        CodeTarget::DistortionMicronats(nats) => {
            let k = top_k.unwrap_or(USUAL_K).min(spec.vocab_size);
            trial.at_distortion(k, f64::from(nats) * 1e-6)?
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
    target: CodeTarget,
}

impl Trial<'_> {
    /// The basis with the finest step that keeps to a rate; `None` where even the coarsest does not.
    fn at_rate(&self, k: usize, rate: f64) -> Result<Option<Basis>> {
        let (mut fine, mut coarse) = self.step_range();
        let coarsest = self.basis(coarse, k)?;
        if self.bytes_per_position(&coarsest)? > rate {
            return Ok(None);
        }
        let mut best = coarsest;
        for _ in 0..BISECTIONS {
            let step = (fine * coarse).sqrt();
            let basis = self.basis(step, k)?;
            if self.bytes_per_position(&basis)? > rate {
                fine = step;
            } else {
                coarse = step;
                best = basis;
            }
        }
        Ok(Some(best))
    }

    /// The basis with the coarsest step that keeps to a KL at temperature 1, and the KL.
    fn at_distortion(&self, k: usize, most: f64) -> Result<(Basis, f64)> {
        let (mut fine, mut coarse) = self.step_range();
        let mut best = self.basis(fine, k)?;
        let mut reached = self.divergence(&best)?.0;
        for _ in 0..BISECTIONS / 2 {
            let step = (fine * coarse).sqrt();
            let basis = self.basis(step, k)?;
            let kl = self.divergence(&basis)?.0;
            if kl > most {
                coarse = step;
            } else {
                (fine, best, reached) = (step, basis, kl);
            }
        }
        Ok((best, reached))
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
        let levels = levels_of(&(&transform.fitted / step));
        let present = levels.not_equal(0).to_kind(Kind::Float).mean_dim(
            [0_i64].as_slice(),
            false,
            Kind::Double,
        );
        let present: Vec<f64> = Vec::try_from(present).map_err(torch("counting levels"))?;
        let rank = present
            .iter()
            .rposition(|share| *share > RARE)
            .map_or(1, |last| last + 1);
        let levels = levels.narrow(1, 0, rank as i64).contiguous();
        let top_k = joined_top_k(&self.sample.sequences[..self.sample.fitted], k);
        let counts = SymbolCounts::of(&to_i16(&levels), rank, &top_k, self.spec.vocab_size);
        let to_vec = |tensor: Tensor| {
            Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().view(-1))
        };
        let parts = BasisParts {
            mean: to_vec(transform.mean.shallow_clone()).map_err(torch("reading the mean"))?,
            analysis: to_vec(transform.analysis.narrow(0, 0, rank as i64) / step)
                .map_err(torch("reading the analysis"))?,
            synthesis: to_vec(transform.synthesis.narrow(1, 0, rank as i64) * step)
                .map_err(torch("reading the synthesis"))?,
        };
        Ok(Basis::new(parts, &counts)?)
    }

    /// The held-out sequences as this basis would have them in the cache.
    fn coded(&self, basis: &Basis) -> Vec<Sequence> {
        let coder = Coder::new(basis);
        let held_out = &self.sample.sequences[self.sample.held_out..];
        held_out
            .iter()
            .map(|sequence| {
                let hidden = last_hidden(std::slice::from_ref(sequence));
                let mut coded = Sequence {
                    coefficients: Some(coder.code(&hidden)),
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

    /// Of everything that a logit loss reads.
    fn bytes_per_position(&self, basis: &Basis) -> Result<f64> {
        let (_, info) = basis.to_file();
        let spec = CacheSpec {
            top_k: basis.k(),
            layers: Vec::new(),
            code: Some(CodeSpec {
                target: self.target,
                fitted_positions: 0,
                basis: info,
            }),
            ..self.spec.clone()
        };
        Ok(trial_bytes_per_position(&spec, basis, &self.coded(basis))?)
    }

    /// Mean KL(teacher ‖ rebuilt) at temperatures 1 and 4 on held-out positions.
    fn divergence(&self, basis: &Basis) -> Result<(f64, f64)> {
        let coded = self.coded(basis);
        let rebuilt = Rebuilt::compact(basis, self.head, &coded)?;
        let hidden = last_hidden(&self.sample.sequences[self.sample.held_out..]);
        let rows = KL_POSITIONS.min(hidden.size()[0]);
        let (mut at_one, mut at_four) = (0.0, 0.0);
        tch::no_grad(|| {
            for first in (0..rows).step_by(ROWS as usize) {
                let count = ROWS.min(rows - first);
                let teacher = hidden.narrow(0, first, count).matmul(&self.head.tr());
                let logits = rebuilt.logits(first, count);
                at_four += kl_rows(&(&teacher / 4.0), &(&logits / 4.0));
                at_one += kl_rows(&teacher, &rebuilt.at_temperature_one(&logits, first, count));
            }
        });
        Ok((at_one / rows as f64, at_four / rows as f64))
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

    /// Levels of hidden states [N, D].
    pub(crate) fn code(&self, hidden: &Tensor) -> Coefficients {
        let hidden = hidden.to_kind(Kind::Float).to_device(tch::Device::Cpu);
        let levels = levels_of(&(hidden - &self.mean).matmul(&self.analysis.tr()));
        Coefficients {
            rank: self.analysis.size()[0] as usize,
            levels: to_i16(&levels),
        }
    }
}

fn levels_of(scaled: &Tensor) -> Tensor {
    scaled
        .round()
        .clamp(f64::from(i16::MIN), f64::from(i16::MAX))
}

fn to_i16(levels: &Tensor) -> Vec<i16> {
    let levels = levels.to_kind(Kind::Int16).contiguous();
    let mut values = vec![0_i16; levels.numel()];
    let length = values.len();
    levels.copy_data(&mut values, length);
    values
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
