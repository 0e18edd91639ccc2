//! Builds a teacher cache: text → tokens → one teacher forward pass → fused statistics → shards.
//!
//! The stage is [`build()`]; everything else serves it. The batches, and with them every byte of
//! the cache, depend on the data and the options alone, never on timing, so an interrupted build
//! resumes to the same bytes.

mod activations;
mod build;
mod data;
mod device_statistics;
mod error;
mod estimate;
mod fidelity;
mod footprint;
mod head;
mod import;
mod layers;
mod memory;
mod noise_shaping;
mod options;
mod pipeline;
mod plan;
mod prepare;
mod rebuild;
mod recheck;
mod row_comparison;
mod sample_pass;
mod statistics;
mod teacher;
mod teacher_pass;
mod transform_fit;
mod worker;

pub use build::{BuildReport, Progress, Stage, build};
pub use data::{
    BadRecord, DataEvent, DataOptions, NAMED_BAD_RECORDS, OnError, PromptForm, TokenizedData,
    TokenizedSequence, USUAL_CHAT_DATE, alpaca_prompt, tokenize,
};
pub use error::{Error, Result};
pub use estimate::{Estimate, Measurement, PhaseEstimate, TierEstimate, estimate};
pub use fidelity::{measure_cache, pruned_teacher};
pub use footprint::{Footprint, MemoryPlan};
pub use import::{
    BadPlace, Format, GivenValues, ImportOptions, ImportProgress, ImportReport, ImportStage,
    WindowStart, import,
};
pub use memory::available_memory;
pub use options::{BuildOptions, LayerChoice};
pub use plan::{PlanReport, plan};
pub use recheck::{Deviation, Recheck, recheck};
pub use statistics::{RowStatistics, summarize_logits};
pub use teacher::Placement;
pub use worker::{CommitOptions, CommitReport, Share, WorkerOptions, WorkerReport, commit, work};
