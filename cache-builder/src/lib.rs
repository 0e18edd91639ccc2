//! Builds a teacher cache: text → tokens → one teacher forward pass → fused statistics → shards.
//!
//! The stage is [`build()`]; everything else serves it. The batches, and with them every byte of
//! the cache, depend on the data and the options alone, never on timing, so an interrupted build
//! resumes to the same bytes.

mod build;
mod data;
mod error;
mod fidelity;
mod noise_shaping;
mod options;
mod rebuild;
mod recheck;
mod statistics;
mod transform_fit;

pub use build::{BuildReport, Progress, Stage, build};
pub use data::{
    BadRecord, DataEvent, DataOptions, NAMED_BAD_RECORDS, OnError, PromptForm, TokenizedData,
    TokenizedSequence, USUAL_CHAT_DATE, alpaca_prompt, tokenize,
};
pub use error::{Error, Result};
pub use fidelity::{measure_cache, pruned_teacher};
pub use options::{BuildOptions, LayerChoice};
pub use recheck::{Deviation, Recheck, recheck};
pub use statistics::{RowStatistics, summarize_logits};
