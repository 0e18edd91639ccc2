//! Logits of the whole vocabulary from what a cache keeps: for export and witnesses, not for training.

use crate::error::{Error, Result};
use crate::head::Head;
use crate::sequence::Sequence;
use crate::transform::Basis;
use crate::unchecked::multiply_transposed;

/// Rows of the head converted to f32 at a time; a block of a wide model stays near the processor.
const BLOCK: usize = 2048;

/// \[T·V\] = hidden \[T·D\] · headᵀ \[D·V\] in f32.
pub(crate) fn rebuild(head: &Head, hidden: &[f32], width: usize) -> Result<Vec<f32>> {
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

/// \[T·V\] of the compact tier: head · (μ + synthesis · levels), moved to the cached mean less the tail's
/// shift, with the top K laid over it.
pub(crate) fn rebuild_compact(head: &Head, basis: &Basis, sequence: &Sequence) -> Result<Vec<f32>> {
    let (Some(coefficients), Some(statistics), Some(top_k)) = (
        &sequence.coefficients,
        &sequence.statistics,
        &sequence.top_k,
    ) else {
        let message = "logits of the compact tier need coefficients, statistics and top_k";
        return Err(Error::InvalidRequest(message.to_owned()));
    };
    let (width, rank, positions) = (basis.width(), basis.rank(), sequence.token_ids.len());
    let vocab_size = head.vocab_size;
    let fits = coefficients.levels.len() == positions * rank
        && statistics.mean.len() == positions
        && top_k.ids.len() == positions * top_k.k
        && top_k.logits.len() == top_k.ids.len()
        && top_k.ids.iter().all(|id| (*id as usize) < vocab_size);
    if !fits {
        let message = "the columns of the sequence do not fit each other";
        return Err(Error::InvalidRequest(message.to_owned()));
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
    let mut logits = rebuild(head, &hidden, width)?;
    for (t, row) in logits.chunks_exact_mut(vocab_size).enumerate() {
        let mean = row.iter().map(|logit| f64::from(*logit)).sum::<f64>() / vocab_size as f64;
        let shift = (f64::from(statistics.mean[t]) - mean) as f32 - basis.parts().tail_shift;
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
