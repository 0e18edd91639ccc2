//! The teacher's logits from the cache, whatever its tier: a linear code, coefficients × weightᵀ + bias, with what
//! is known exactly laid over it.
//!
//! For the exact tier the coefficients are the last hidden states and the weight is Wc, the LM head less the mean of its
//! rows. For the compact tier they are the levels of the transform code, the weight is Wc·S (S the synthesis of the basis),
//! and the bias Wc·μ less the tail's shift. The cached mean of the logits is added to each row, the top K replace what was
//! rebuilt of them, and at temperature 1 the others are shifted so that the cached log-sum-exp holds. Losses that divide by
//! the logits' own spread take the cached one.

use caskd_formats::{Basis, Cache, Columns, Head, HeadDtype};
use caskd_models::unchecked::read;
use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::head::{chunks, rows_per_chunk};
use crate::losses::KnownSpread;
use crate::matmul::times_transposed;
use crate::row_kernel::{TeacherParts, TopEntries};

use crate::{Error, Result};

/// Mass outside the top K that a shift to the exact log-sum-exp does not go below.
const SMALLEST_MASS: f64 = 1e-6;

/// Half of the step that the compact tier's `std` is rounded to.
const SMALLEST_SIGMA: f64 = 1.0 / 128.0;

/// What turns cached coefficients into logits.
#[derive(Debug)]
pub(crate) struct LinearCode {
    /// [V, R] in the kind of the student's matrix products.
    weight: Tensor,
    /// \[V\] f32.
    bias: Option<Tensor>,
    source: Source,
    /// Rows of the result: those that the student has too.
    vocabulary: i64,
}

/// Where the coefficients are.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A cached layer.
    Hidden(u32),
    /// The compact tier's column.
    Levels,
}

/// What a batch holds for the code, at its N target positions.
#[derive(Debug)]
pub(crate) struct TeacherRows {
    /// [N, R].
    coefficients: Tensor,
    exact: ExactRows,
}

/// What the cache knows exactly.
#[derive(Debug)]
struct ExactRows {
    /// [N, 1].
    mean: Tensor,
    /// The errors of rebuilt logits widen their spread, at every position alike.
    spread: KnownSpread,
    /// [N, 1].
    log_sum_exp: Tensor,
    /// [N, K] i64.
    ids: Tensor,
    /// [N, K].
    logits: Tensor,
}

impl LinearCode {
    /// The code of a cache, for the first `vocabulary` rows; `None` in the sparse tier.
    pub(crate) fn of(
        cache: &Cache,
        vocabulary: usize,
        kind: Kind,
        device: Device,
    ) -> Result<Option<LinearCode>> {
        if Columns::for_logits(cache.manifest()).is_none() {
            return Ok(None);
        }
        let head = cache.head()?.ok_or_else(|| Error::TierCannotAnswer {
            term: "full-vocabulary logits".to_owned(),
            tier: "headless".to_owned(),
            reason: "it has no LM head".to_owned(),
            remedy: "build the cache with `--tier exact` or `--tier compact`".to_owned(),
        })?;
        let head = head_tensor(&head)?.to_device(device);
        let (weight, bias, source) = match cache.basis()? {
            None => {
                let weight = tch::no_grad(|| centred(&head)).to_kind(kind);
                let layer = cache.manifest().teacher.num_layers;
                (weight, None, Source::Hidden(layer))
            }
            Some(basis) => {
                let (weight, bias) = tch::no_grad(|| through_basis(&head, &basis));
                (weight.to_kind(kind), Some(bias), Source::Levels)
            }
        };
        Ok(Some(LinearCode {
            weight,
            bias,
            source,
            vocabulary: vocabulary as i64,
        }))
    }

    /// The code of the exact tier with the head [V, R].
    #[cfg(test)]
    pub(crate) fn for_test(head: &Tensor, layer: u32) -> LinearCode {
        LinearCode {
            weight: centred(head).to_kind(head.kind()),
            bias: None,
            source: Source::Hidden(layer),
            vocabulary: head.size()[0],
        }
    }

    /// A code of given weights [V, R] and bias \[V\] on the levels of the compact tier.
    #[cfg(test)]
    pub(crate) fn for_test_of_levels(weight: &Tensor, bias: &Tensor) -> LinearCode {
        LinearCode {
            weight: weight.shallow_clone(),
            bias: Some(bias.shallow_clone()),
            source: Source::Levels,
            vocabulary: weight.size()[0],
        }
    }

    /// What the code reads of a batch.
    ///
    /// # Panics
    /// When its columns were not read; the plan of a run reads [`Columns::for_logits`].
    pub(crate) fn rows(&self, batch: &Batch) -> TeacherRows {
        let read = "the columns that logits are rebuilt from are read together";
        let coefficients = match self.source {
            Source::Hidden(layer) => batch.teacher_hidden(layer),
            Source::Levels => batch.coefficients.as_ref().expect(read),
        };
        let moments = batch.moments.as_ref().expect(read);
        let log_sum_exp = batch.log_sum_exp.as_ref().expect(read).unsqueeze(1);
        let (ids, logits) = if let Some(top_k) = &batch.top_k {
            (top_k.ids.shallow_clone(), top_k.logits.shallow_clone())
        } else {
            // A cache of the exact tier may have been built without.
            let none = log_sum_exp.narrow(1, 0, 0);
            (none.to_kind(Kind::Int64), none)
        };
        TeacherRows {
            coefficients: coefficients.index_select(0, &batch.targets_in_positions),
            exact: ExactRows {
                mean: moments.mean.shallow_clone(),
                spread: KnownSpread {
                    // In the compact tier it may be 0 below half of its last digit.
                    sigma: moments.std.clamp_min(SMALLEST_SIGMA),
                    min: moments.min.shallow_clone(),
                },
                log_sum_exp,
                ids,
                logits,
            },
        }
    }

    #[cfg(test)]
    pub(crate) fn logits(&self, rows: &TeacherRows) -> Tensor {
        self.both_logits(rows, false).0
    }

    /// The logits that hold at temperature 1 [N, V].
    pub(crate) fn logits_at_one(&self, rows: &TeacherRows) -> Tensor {
        self.shifted_to_one(rows, &self.all_logits(rows))
    }

    /// Logits in f32 [N, V], right up to what the tier loses at every temperature but 1, and with `at_one` those that hold
    /// there, by one product.
    pub(crate) fn both_logits(&self, rows: &TeacherRows, at_one: bool) -> (Tensor, Option<Tensor>) {
        let all = self.all_logits(rows);
        let shifted = at_one.then(|| self.shifted_to_one(rows, &all));
        (all.narrow(1, 0, self.vocabulary), shifted)
    }

    /// Logits of the whole vocabulary [N, V'], moved outside the top K to the cached log-sum-exp: [N, V].
    fn shifted_to_one(&self, rows: &TeacherRows, logits: &Tensor) -> Tensor {
        let exact = &rows.exact;
        let kept = (&exact.logits - &exact.log_sum_exp).exp().sum_dim_intlist(
            [-1].as_slice(),
            true,
            Kind::Float,
        );
        let rest = (1.0f64 - kept).clamp_min(SMALLEST_MASS).log() + &exact.log_sum_exp;
        let others = logits
            .scatter_value(-1, &exact.ids, f64::NEG_INFINITY)
            .logsumexp([-1].as_slice(), true);
        let shifted = logits + (rest - others);
        shifted
            .scatter(-1, &exact.ids, &exact.logits)
            .narrow(1, 0, self.vocabulary)
    }

    /// The spread of the logits as the cache knows it; `None` where the student lacks some of the vocabulary that it was
    /// measured over.
    pub(crate) fn known_spread<'a>(&self, rows: &'a TeacherRows) -> Option<&'a KnownSpread> {
        let is_whole = self.weight.size()[0] == self.vocabulary;
        is_whole.then_some(&rows.exact.spread)
    }

    /// The products that logits are made of [N, V'], V' ≥ V, in memory of their own.
    pub(crate) fn products(&self, rows: &TeacherRows) -> Tensor {
        times_transposed(&rows.coefficients, &self.weight)
    }

    /// What makes logits of them; `None` where it does not lie in the CPU's memory.
    pub(crate) fn parts<'a>(&'a self, rows: &'a TeacherRows) -> Option<TeacherParts<'a>> {
        let bias = match &self.bias {
            Some(bias) => Some(read(bias)?),
            None => None,
        };
        let exact = &rows.exact;
        Some(TeacherParts {
            bias,
            mean: Some(read(&exact.mean)?),
            sigma: match self.known_spread(rows) {
                Some(spread) => Some(read(&spread.sigma)?),
                None => None,
            },
            exact: Some(TopEntries {
                k: exact.ids.size()[1] as usize,
                ids: read(&exact.ids)?,
                logits: read(&exact.logits)?,
                log_sum_exp: read(&exact.log_sum_exp)?,
            }),
            smallest_mass: SMALLEST_MASS,
        })
    }

    fn all_logits(&self, rows: &TeacherRows) -> Tensor {
        let product = times_transposed(&rows.coefficients, &self.weight).to_kind(Kind::Float);
        let product = match &self.bias {
            Some(bias) => product + bias,
            None => product,
        };
        let exact = &rows.exact;
        (product + &exact.mean).scatter(-1, &exact.ids, &exact.logits)
    }

    /// One logit a row, of the given tokens, at temperature 1, where it is not among the top K: \[N\] f32.
    fn logits_of(&self, rows: &TeacherRows, tokens: &Tensor) -> Tensor {
        if matches!(self.source, Source::Hidden(_)) {
            // Near enough without the shift, which needs all logits of the row.
            let weight = self.weight.index_select(0, tokens).to_kind(Kind::Float);
            let products =
                (weight * &rows.coefficients).sum_dim_intlist([-1].as_slice(), true, Kind::Float);
            return (products + &rows.exact.mean).squeeze_dim(1);
        }
        // The shift to the exact log-sum-exp needs all logits of the row.
        let tokens = tokens.unsqueeze(1);
        let parts: Vec<Tensor> = chunks(tokens.size()[0], rows_per_chunk(self.weight.size()[0]))
            .map(|(first, count)| {
                let logits = self.logits_at_one(&rows.narrow(first, count));
                logits
                    .gather(1, &tokens.narrow(0, first, count), false)
                    .squeeze_dim(1)
            })
            .collect();
        Tensor::cat(&parts, 0)
    }
}

impl TeacherRows {
    /// Rows `first` to `first + count`.
    pub(crate) fn narrow(&self, first: i64, count: i64) -> TeacherRows {
        let narrow = |tensor: &Tensor| tensor.narrow(0, first, count);
        TeacherRows {
            coefficients: narrow(&self.coefficients),
            exact: ExactRows {
                mean: narrow(&self.exact.mean),
                spread: self.exact.spread.narrow(first, count),
                log_sum_exp: narrow(&self.exact.log_sum_exp),
                ids: narrow(&self.exact.ids),
                logits: narrow(&self.exact.logits),
            },
        }
    }
}

/// The head [V, D] less the mean of its rows, in f32.
fn centred(head: &Tensor) -> Tensor {
    let head = head.to_kind(Kind::Float);
    &head - head.mean_dim([0].as_slice(), true, Kind::Float)
}

/// Wc·S [V, R] and Wc·μ less the tail's shift \[V\] in f32, from the head [V, D].
fn through_basis(head: &Tensor, basis: &Basis) -> (Tensor, Tensor) {
    let centred = centred(head);
    let parts = basis.parts();
    let to = |values: &[f32]| Tensor::from_slice(values).to_device(head.device());
    let synthesis = to(&parts.synthesis).view([basis.width() as i64, basis.rank() as i64]);
    let bias = centred.matmul(&to(&parts.mean)) - f64::from(parts.tail_shift);
    (centred.matmul(&synthesis), bias)
}

/// log p of the gold tokens under the cached teacher, at T = 1 over its whole vocabulary \[N\] f64: the
/// exact logit where it is among the top K, else the rebuilt one, less the cached log-sum-exp. NaN for a token outside the
/// top K of a sparse cache: nothing there says what it is.
pub(crate) fn gold_log_probabilities(batch: &Batch, code: Option<&LinearCode>) -> Option<Tensor> {
    let log_sum_exp = batch.log_sum_exp.as_ref()?;
    let rebuilt = code.map(|code| {
        let rows = code.rows(batch);
        tch::no_grad(|| code.logits_of(&rows, &batch.labels)) - log_sum_exp
    });
    let log_p = match (rebuilt, &batch.top_k) {
        (Some(rebuilt), None) => rebuilt,
        (rebuilt, Some(top_k)) => {
            let log_p = &top_k.logits - log_sum_exp.unsqueeze(-1);
            let is_gold = top_k.ids.eq_tensor(&batch.labels.unsqueeze(-1));
            let of_gold = (&log_p * &is_gold).sum_dim_intlist([-1].as_slice(), false, Kind::Float);
            let elsewhere = rebuilt.unwrap_or_else(|| of_gold.full_like(f64::NAN));
            of_gold.where_self(&is_gold.any_dim(-1, false), &elsewhere)
        }
        (None, None) => return None,
    };
    Some(log_p.to_kind(Kind::Double))
}

fn head_tensor(head: &Head) -> Result<Tensor> {
    let kind = match head.dtype {
        HeadDtype::F32 => Kind::Float,
        HeadDtype::F16 => Kind::Half,
        HeadDtype::Bf16 => Kind::BFloat16,
    };
    let shape = [head.vocab_size as i64, head.width as i64];
    Tensor::f_from_data_size(head.bytes(), &shape, kind).map_err(|source| Error::Tensors {
        action: "read",
        path: "the cached LM head".into(),
        source,
    })
}
