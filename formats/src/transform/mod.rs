//! The transform code of the compact tier: what is left of a last hidden state when only its effect on logits counts.
//!
//! y = A(h − μ), where A diagonalises the covariance of hidden states in a metric of the LM head, is quantised to
//! integers q with one step and entropy-coded; logits = W(μ + S·q) up to their mean, which is a statistic. `Basis` holds
//! μ, A/step, S = A⁻¹·step and every frequency table, once for a whole cache. Decoding is integer work: the same bytes
//! give the same levels on every machine.

pub(crate) mod basis;
pub(crate) mod bits;
pub(crate) mod coefficients;
pub(crate) mod ranked;
pub(crate) mod rans;

pub use basis::{Basis, BasisParts, SymbolCounts, TOP_K_STEPS};

#[cfg(test)]
pub(crate) mod tests;
