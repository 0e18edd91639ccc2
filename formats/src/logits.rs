//! Logits of the whole vocabulary from the last hidden state: for export and witnesses, not for training.

use crate::error::{Error, Result};
use crate::head::Head;
use crate::sequence::HiddenState;
use crate::unchecked::multiply_transposed;

/// Rows of the head converted to f32 at a time; a block of a wide model stays near the processor.
const BLOCK: usize = 2048;

/// \[T·V\] = hidden \[T·D\] · headᵀ \[D·V\] in f32.
pub(crate) fn rebuild(head: &Head, hidden: &HiddenState) -> Result<Vec<f32>> {
    if hidden.width != head.width
        || hidden.width == 0
        || !hidden.values.len().is_multiple_of(hidden.width)
    {
        return Err(Error::InvalidRequest(format!(
            "a hidden state of width {} with {} values does not fit a head of width {}",
            hidden.width,
            hidden.values.len(),
            head.width
        )));
    }
    let positions = hidden.values.len() / hidden.width;
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
            let shape = (positions, rows, hidden.width);
            multiply_transposed(
                &mut logits[first..],
                head.vocab_size,
                &hidden.values,
                &weights,
                shape,
            );
        }
    }
    Ok(logits)
}
