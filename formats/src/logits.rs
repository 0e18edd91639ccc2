//! Logits of the whole vocabulary from what a cache keeps: for export and witnesses, not for training.

use crate::error::{Error, Result};
use crate::head::Head;
use crate::sequence::{HiddenState, Sequence, TopK};
use crate::transform::Basis;
use crate::unchecked::multiply_transposed;

/// Rows of the head converted to f32 at a time; a block of a wide model stays near the processor.
const BLOCK: usize = 2048;

/// \[T·V\] = hidden \[T·D\] · headᵀ \[D·V\] in f32.
fn product(head: &Head, hidden: &[f32], width: usize) -> Result<Vec<f32>> {
    if width != head.width || width == 0 || !hidden.len().is_multiple_of(width) {
        return Err(Error::InvalidRequest(format!(
            "a hidden state of width {width} with {} values does not fit a head of width {}",
            hidden.len(),
            head.width
        )));
    }
    let positions = hidden.len() / width;
    let size = positions
        .checked_mul(head.vocab_size)
        .filter(|size| *size <= isize::MAX as usize / 4);
    let mut logits = Vec::new();
    let reserved = size.is_some_and(|size| logits.try_reserve_exact(size).is_ok());
    if !reserved {
        return Err(Error::InvalidRequest(format!(
            "{positions} positions by {} logits do not fit in memory",
            head.vocab_size
        )));
    }
    logits.resize(positions * head.vocab_size, 0.0);
    for first in (0..head.vocab_size).step_by(BLOCK) {
        let rows = BLOCK.min(head.vocab_size - first);
        let weights = head.rows(first..first + rows);
        if positions > 0 {
            let shape = (positions, rows, width);
            multiply_transposed(
                &mut logits[first..],
                head.vocab_size,
                hidden,
                &weights,
                shape,
            );
        }
    }
    Ok(logits)
}

/// \[T·V\]: the last hidden state times the head, moved to the cached mean less the tail's shift, with the top K laid over
/// it. The hidden state is that of the last layer in the exact tier, μ + synthesis · levels in the compact tier.
pub(crate) fn rebuild(
    head: &Head,
    basis: Option<&Basis>,
    last_layer: u32,
    sequence: &Sequence,
) -> Result<Vec<f32>> {
    let positions = sequence.token_ids.len();
    let (mut logits, tail_shift) = if let Some(basis) = basis {
        let hidden = through_basis(basis, sequence)?;
        let logits = product(head, &hidden, basis.width())?;
        (logits, basis.parts().tail_shift)
    } else {
        let is_last = |state: &&HiddenState| state.layer == last_layer;
        let Some(state) = sequence.hidden.iter().find(is_last) else {
            return Err(Error::InvalidRequest(format!(
                "logits come from layer {last_layer}, which the sequence does not have"
            )));
        };
        (product(head, &state.values, state.width)?, 0.0)
    };
    let Some(statistics) = &sequence.statistics else {
        return absent("statistics");
    };
    let none = TopK::default();
    let top_k = match (&sequence.top_k, basis) {
        (Some(top_k), _) => top_k,
        // A cache of the exact tier may have been built without.
        (None, None) => &none,
        (None, Some(_)) => return absent("top_k"),
    };
    let vocab_size = head.vocab_size;
    let fits = logits.len() == positions * vocab_size
        && statistics.mean.len() == positions
        && top_k.ids.len() == positions * top_k.k
        && top_k.logits.len() == top_k.ids.len()
        && top_k.ids.iter().all(|id| (*id as usize) < vocab_size);
    if !fits {
        return misfit();
    }
    for (t, row) in logits.chunks_exact_mut(vocab_size).enumerate() {
        let mean = row.iter().map(|logit| f64::from(*logit)).sum::<f64>() / vocab_size as f64;
        let shift = (f64::from(statistics.mean[t]) - mean) as f32 - tail_shift;
        for logit in row.iter_mut() {
            *logit += shift;
        }
        let entries = t * top_k.k..(t + 1) * top_k.k;
        for (id, logit) in top_k.ids[entries.clone()]
            .iter()
            .zip(&top_k.logits[entries])
        {
            row[*id as usize] = *logit;
        }
    }
    Ok(logits)
}

/// \[T·D\] of the compact tier.
fn through_basis(basis: &Basis, sequence: &Sequence) -> Result<Vec<f32>> {
    let Some(coefficients) = &sequence.coefficients else {
        return absent("coefficients");
    };
    let (width, rank, positions) = (basis.width(), basis.rank(), sequence.token_ids.len());
    if coefficients.levels.len() != positions * rank {
        return misfit();
    }
    let levels: Vec<f32> = coefficients
        .levels
        .iter()
        .map(|level| f32::from(*level))
        .collect();
    let mut hidden = vec![0.0; positions * width];
    if positions > 0 {
        let shape = (positions, width, rank);
        multiply_transposed(&mut hidden, width, &levels, &basis.parts().synthesis, shape);
    }
    for row in hidden.chunks_exact_mut(width) {
        for (value, mean) in row.iter_mut().zip(&basis.parts().mean) {
            *value += mean;
        }
    }
    Ok(hidden)
}

fn absent<T>(column: &str) -> Result<T> {
    Err(Error::InvalidRequest(format!(
        "logits need the column {column}, which the sequence does not have"
    )))
}

fn misfit<T>() -> Result<T> {
    let message = "the columns of the sequence do not fit each other";
    Err(Error::InvalidRequest(message.to_owned()))
}
