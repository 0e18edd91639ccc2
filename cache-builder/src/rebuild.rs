//! The teacher's logits as the cache gives them back, for measuring; what a trainer does in training.

use caskd_formats::{Basis, CacheSpec, Sequence, Tier};
use caskd_models::linear;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Rows of the LM head that are centred at one time.
const HEAD_ROWS: i64 = 16_384;

/// Decoded sequences, and what turns them into logits of the whole vocabulary.
#[derive(Debug)]
pub(crate) struct Rebuilt {
    form: Form,
    /// Exact top-k logits over them: ids i64 [N, K], logits f32 [N, K].
    overlay: (Tensor, Tensor),
    /// log Σ exp at temperature 1 \[N\].
    log_sum_exp: Tensor,
    /// σ over the vocabulary [N, 1], where rebuilt logits do not show it: their errors widen them.
    sigma: Option<Tensor>,
    vocab_size: i64,
}

#[derive(Debug)]
enum Form {
    /// coefficients [N, R] · weight [V, R]ᵀ + bias \[V\] + mean [N, 1].
    Linear {
        coefficients: Tensor,
        weight: Tensor,
        bias: Option<Tensor>,
        mean: Tensor,
    },
    /// The mass that the top K leave, spread evenly: one logit for all others [N, 1].
    UniformTail(Tensor),
}

impl Rebuilt {
    /// The logits of decoded sequences of any tier. `head` is [V, D] in f32.
    pub(crate) fn of(
        spec: &CacheSpec,
        basis: Option<&Basis>,
        head: &Tensor,
        sequences: &[Sequence],
    ) -> Result<Rebuilt> {
        match (spec.tier, basis) {
            (Tier::Compact, Some(basis)) => Rebuilt::compact(basis, head, sequences),
            (Tier::Exact, _) => Rebuilt::exact(spec, head, sequences),
            _ => Rebuilt::sparse(spec, head, sequences),
        }
    }

    pub(crate) fn compact(basis: &Basis, head: &Tensor, sequences: &[Sequence]) -> Result<Rebuilt> {
        let (rank, width) = (basis.rank() as i64, basis.width() as i64);
        let parts = basis.parts();
        let vocab_size = head.size()[0];
        let mean_row = head.mean_dim([0_i64].as_slice(), true, Kind::Float);
        let mean_state = Tensor::from_slice(&parts.mean);
        let synthesis = Tensor::from_slice(&parts.synthesis).view([width, rank]);
        let weight = Tensor::zeros([vocab_size, rank], (Kind::Float, Device::Cpu));
        let bias = Tensor::zeros([vocab_size], (Kind::Float, Device::Cpu));
        // A centred head as large as the head exists in slices only.
        for first in (0..vocab_size).step_by(HEAD_ROWS as usize) {
            let rows = HEAD_ROWS.min(vocab_size - first);
            let centred = head.narrow(0, first, rows) - &mean_row;
            weight
                .narrow(0, first, rows)
                .copy_(&centred.matmul(&synthesis));
            bias.narrow(0, first, rows)
                .copy_(&(centred.matmul(&mean_state) - f64::from(parts.tail_shift)));
        }
        let levels: Vec<f32> = sequences
            .iter()
            .filter_map(|sequence| sequence.coefficients.as_ref())
            .flat_map(|found| found.levels.iter().map(|level| f32::from(*level)))
            .collect();
        let coefficients = Tensor::from_slice(&levels).view([-1, rank]);
        let overlay = top_k(sequences)?;
        Ok(Rebuilt::linear(
            coefficients,
            weight,
            Some(bias),
            overlay,
            sequences,
        ))
    }

    fn exact(spec: &CacheSpec, head: &Tensor, sequences: &[Sequence]) -> Result<Rebuilt> {
        let values: Vec<f32> = sequences
            .iter()
            .flat_map(|sequence| &sequence.hidden)
            .filter(|state| state.layer == spec.teacher.num_layers)
            .flat_map(|state| state.values.iter().copied())
            .collect();
        let hidden = Tensor::from_slice(&values).view([-1, head.size()[1]]);
        let overlay = if spec.top_k > 0 {
            top_k(sequences)?
        } else {
            let none = hidden.narrow(1, 0, 0);
            (none.to_kind(Kind::Int64), none)
        };
        Ok(Rebuilt::linear(
            hidden,
            centred(head),
            None,
            overlay,
            sequences,
        ))
    }

    fn linear(
        coefficients: Tensor,
        weight: Tensor,
        bias: Option<Tensor>,
        overlay: (Tensor, Tensor),
        sequences: &[Sequence],
    ) -> Rebuilt {
        Rebuilt {
            vocab_size: weight.size()[0],
            form: Form::Linear {
                coefficients,
                weight,
                bias,
                mean: statistic(sequences, |statistics| &statistics.mean).unsqueeze(1),
            },
            overlay,
            log_sum_exp: statistic(sequences, |statistics| &statistics.log_sum_exp),
            sigma: Some(statistic(sequences, |statistics| &statistics.std).unsqueeze(1)),
        }
    }

    fn sparse(spec: &CacheSpec, head: &Tensor, sequences: &[Sequence]) -> Result<Rebuilt> {
        let (ids, logits) = top_k(sequences)?;
        let log_sum_exp = statistic(sequences, |statistics| &statistics.log_sum_exp);
        let kept = (&logits - log_sum_exp.unsqueeze(1)).exp();
        let rest = (1.0f64 - kept.sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float))
            .clamp_min(1e-12);
        let others = (spec.vocab_size - spec.top_k).max(1) as f64;
        Ok(Rebuilt {
            form: Form::UniformTail((rest / others).log() + log_sum_exp.unsqueeze(1)),
            overlay: (ids, logits),
            log_sum_exp,
            sigma: None,
            vocab_size: head.size()[0],
        })
    }

    /// Logits of some positions [rows, V], right up to a shift at every temperature.
    pub(crate) fn logits(&self, first: i64, rows: i64) -> Tensor {
        let logits = match &self.form {
            Form::Linear {
                coefficients,
                weight,
                bias,
                mean,
            } => {
                let product = linear(&coefficients.narrow(0, first, rows), weight, None);
                let product = match bias {
                    Some(bias) => product + bias,
                    None => product,
                };
                product + mean.narrow(0, first, rows)
            }
            Form::UniformTail(tail) => tail.narrow(0, first, rows).repeat([1, self.vocab_size]),
        };
        let (ids, exact) = self.overlay(first, rows);
        logits.scatter(-1, &ids, &exact)
    }

    fn overlay(&self, first: i64, rows: i64) -> (Tensor, Tensor) {
        let (ids, exact) = &self.overlay;
        (ids.narrow(0, first, rows), exact.narrow(0, first, rows))
    }

    /// σ of some positions' logits over the whole vocabulary [rows, 1], where the cache knows it.
    pub(crate) fn sigma(&self, first: i64, rows: i64) -> Option<Tensor> {
        Some(self.sigma.as_ref()?.narrow(0, first, rows))
    }

    /// log Σ exp(logit / temperature) outside the top K of some positions' logits [rows, V]: \[rows\].
    pub(crate) fn tail_mass(&self, logits: &Tensor, temperature: f64, first: i64) -> Tensor {
        let (ids, _) = self.overlay(first, logits.size()[0]);
        let tail = logits.scatter_value(-1, &ids, f64::NEG_INFINITY);
        (tail / temperature).logsumexp([-1_i64].as_slice(), false)
    }

    /// The logits for temperature 1, where the exact log-sum-exp says how much mass the others have.
    pub(crate) fn at_temperature_one(&self, logits: &Tensor, first: i64, rows: i64) -> Tensor {
        if matches!(self.form, Form::UniformTail(_)) {
            return logits.shallow_clone();
        }
        let (ids, exact) = self.overlay(first, rows);
        let log_sum_exp = self.log_sum_exp.narrow(0, first, rows).unsqueeze(1);
        let kept = (&exact - &log_sum_exp).exp();
        let rest =
            (1.0f64 - kept.sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float)).clamp_min(1e-6);
        let others = logits
            .scatter_value(-1, &ids, f64::NEG_INFINITY)
            .logsumexp([-1_i64].as_slice(), true);
        let shift = rest.log() + log_sum_exp - others;
        (logits + shift).scatter(-1, &ids, &exact)
    }
}

/// The head [V, D] less the mean of its rows.
fn centred(head: &Tensor) -> Tensor {
    head - head.mean_dim([0_i64].as_slice(), true, Kind::Float)
}

/// Σ over rows of KL(softmax(teacher) ‖ softmax(other)).
pub(crate) fn kl_rows(teacher: &Tensor, other: &Tensor) -> f64 {
    let log_p = teacher.log_softmax(-1, Kind::Float);
    let log_q = other.log_softmax(-1, Kind::Float);
    (log_p.exp() * (log_p - log_q))
        .sum(Kind::Double)
        .double_value(&[])
}

fn statistic(
    sequences: &[Sequence],
    column: impl Fn(&caskd_formats::Statistics) -> &Vec<f32>,
) -> Tensor {
    let values: Vec<f32> = sequences
        .iter()
        .filter_map(|sequence| sequence.statistics.as_ref())
        .flat_map(|statistics| column(statistics).iter().copied())
        .collect();
    Tensor::from_slice(&values)
}

fn top_k(sequences: &[Sequence]) -> Result<(Tensor, Tensor)> {
    let all = || {
        sequences
            .iter()
            .filter_map(|sequence| sequence.top_k.as_ref())
    };
    let Some(k) = all().next().map(|top_k| top_k.k as i64) else {
        return Err(Error::Cache(caskd_formats::Error::InvalidRequest(
            "the sequences were read without their top-k".to_owned(),
        )));
    };
    let ids: Vec<i64> = all()
        .flat_map(|top_k| top_k.ids.iter().map(|id| i64::from(*id)))
        .collect();
    let logits: Vec<f32> = all()
        .flat_map(|top_k| top_k.logits.iter().copied())
        .collect();
    Ok((
        Tensor::from_slice(&ids).view([-1, k]),
        Tensor::from_slice(&logits).view([-1, k]),
    ))
}
