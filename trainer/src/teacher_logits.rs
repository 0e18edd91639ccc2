//! Teacher logits from the cache: a linear code, coefficients × weightᵀ + bias.
//!
//! For the exact tier the coefficients are the last hidden states and the weight is the LM head.

use caskd_formats::{Cache, Head, HeadDtype};
use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::matmul::times_transposed;
use crate::{Error, Result};

/// What turns cached coefficients into logits.
#[derive(Debug)]
pub(crate) struct LinearCode {
    /// [V, R] in the kind of the student's matrix products.
    weight: Tensor,
    /// \[V\] f32.
    bias: Option<Tensor>,
    /// The cached layer that holds the coefficients.
    pub(crate) layer: u32,
}

impl LinearCode {
    /// The code of an exact cache, cut to the first `vocabulary` rows.
    pub(crate) fn of_exact(
        cache: &Cache,
        vocabulary: usize,
        kind: Kind,
        device: Device,
    ) -> Result<LinearCode> {
        let head = cache.head()?.ok_or_else(|| Error::TierCannotAnswer {
            term: "full-vocabulary logits".to_owned(),
            tier: "headless".to_owned(),
            reason: "it has no LM head".to_owned(),
            remedy: "build the cache with `--tier exact`".to_owned(),
        })?;
        let weight = head_tensor(&head)?
            .narrow(0, 0, vocabulary as i64)
            .to_kind(kind)
            .to_device(device);
        Ok(LinearCode {
            weight,
            bias: None,
            layer: cache.manifest().teacher.num_layers,
        })
    }

    /// A code of given weights [V, R].
    #[cfg(test)]
    pub(crate) fn for_test(weight: &Tensor, layer: u32) -> LinearCode {
        LinearCode {
            weight: weight.shallow_clone(),
            bias: None,
            layer,
        }
    }

    /// Logits in f32: [N, R] → [N, V].
    pub(crate) fn logits(&self, coefficients: &Tensor) -> Tensor {
        let product = times_transposed(coefficients, &self.weight).to_kind(Kind::Float);
        match &self.bias {
            Some(bias) => product + bias,
            None => product,
        }
    }

    /// One logit a row, of the given tokens: [N, R], \[N\] → \[N\] f32.
    fn logits_of(&self, coefficients: &Tensor, tokens: &Tensor) -> Tensor {
        let rows = self.weight.index_select(0, tokens).to_kind(Kind::Float);
        let product = (rows * coefficients).sum_dim_intlist([-1].as_slice(), false, Kind::Float);
        match &self.bias {
            Some(bias) => product + bias.index_select(0, tokens),
            None => product,
        }
    }
}

/// log p of the gold tokens under the cached teacher, at T = 1 over its whole vocabulary \[N\] f64: the
/// exact logit where it is among the top K, else the rebuilt one, less the cached log-sum-exp. On a
/// sparse cache a token outside the top K gets an equal share of the mass that the top K leave.
pub(crate) fn gold_log_probabilities(
    batch: &Batch,
    code: Option<&LinearCode>,
    vocabulary: usize,
) -> Option<Tensor> {
    let log_sum_exp = batch.log_sum_exp.as_ref()?;
    let rebuilt = code.map(|code| {
        let hidden = batch
            .teacher_hidden(code.layer)
            .index_select(0, &batch.targets_in_positions);
        code.logits_of(&hidden, &batch.labels) - log_sum_exp
    });
    let log_p = match (rebuilt, &batch.top_k) {
        (Some(rebuilt), None) => rebuilt,
        (rebuilt, Some(top_k)) => {
            let log_p = &top_k.logits - log_sum_exp.unsqueeze(-1);
            let is_gold = top_k.ids.eq_tensor(&batch.labels.unsqueeze(-1));
            let of_gold = (&log_p * &is_gold).sum_dim_intlist([-1].as_slice(), false, Kind::Float);
            let elsewhere = rebuilt.unwrap_or_else(|| {
                let others = (vocabulary as i64 - top_k.ids.size()[1]).max(1) as f64;
                let kept = log_p
                    .exp()
                    .sum_dim_intlist([-1].as_slice(), false, Kind::Double);
                ((1.0f64 - kept).clamp_min(1e-9) / others)
                    .log()
                    .to_kind(Kind::Float)
            });
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
