//! Builds a teacher cache: text → tokens → one teacher forward pass → fused statistics → shards.
//!
//! The stage is [`build()`]; everything else serves it. The batches, and with them every byte of
//! the cache, depend on the data and the options alone, never on timing, so an interrupted build
//! resumes to the same bytes.

mod build;
mod error;
mod fidelity;
mod noise_shaping;
mod options;
mod rebuild;
mod recheck;
mod records;
mod statistics;
mod tokenize;
mod transform_fit;

pub use build::{BuildReport, Progress, Stage, build};
pub use error::{Error, Result};
pub use fidelity::{measure_cache, pruned_teacher};
pub use options::{BuildOptions, LayerChoice};
pub use recheck::{Deviation, Recheck, recheck};
pub use records::{Record, RecordBody, read_records};
pub use statistics::{RowStatistics, summarize_logits};
pub use tokenize::{PROMPT_FORM, TokenizedData, TokenizedSequence, alpaca_prompt, tokenize};
