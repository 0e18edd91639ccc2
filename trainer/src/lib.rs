//! Trains students from a teacher cache, and judges them.
//!
//! One step: a batch is read ahead and collated ([`train()`] says in which order), the trunk of the
//! student runs with its graph, the fused head turns last hidden states into losses and their
//! gradient chunk by chunk, the trunk's backward pass starts from that gradient, AdamW updates the
//! adapters.
//!
//! Letters in shape comments, beside those of `caskd_models`:
//!
//! | letter | means |
//! |---|---|
//! | P | real positions of a batch (padding not counted) |
//! | N | target positions of a batch: position t is one when the loss mask holds at t + 1 |
//! | K | kept entries of a top-k column |
//! | R | coefficients of the code that teacher logits are rebuilt from |
//!
//! What this crate never does: load the teacher, hold [tokens, V] tensors of a whole batch, use a
//! global random generator, let a thread's speed reach a result, change an existing run without
//! being asked to resume it, train on a loss that the cache cannot answer rightly.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batch;
mod calibration;
mod checkpoint;
mod config;
mod config_text;
mod error;
mod eval;
mod head;
mod loglikelihood;
mod loss_term;
mod loss_values;
pub mod losses;
mod matmul;
mod memory;
mod mix;
mod objective;
mod optimizer;
mod order;
mod perplexity;
mod probe;
mod reader;
mod recipe;
mod retokenize;
mod row_kernel;
mod run_folder;
mod schedule;
mod step;
mod tasks;
mod teacher_logits;
mod tensorboard;
mod train;
mod wikitext;

pub use calibration::Calibration;
pub use config::{CacheIo, Dtype, Mode, Quantize, TrainConfig};
pub use error::{Error, Result};
pub use eval::{CacheScore, evaluate_cache, teacher_perplexity};
pub use loglikelihood::{Loglikelihood, Request, loglikelihoods, request};
pub use loss_term::{LossTerm, TermLoss};
pub use loss_values::{LossValues, loss_values};
pub use mix::CacheMix;
pub use objective::{check_fidelity, check_fit, check_terms};
pub use perplexity::{Rolling, TextScore, evaluate_text, evaluate_wikitext};
pub use probe::{Pair, Probe, probe};
pub use recipe::{KdType, LayerPair, Layers};
pub use run_folder::{is_run, load_run, load_run_onto, paused_at, run_caches};
pub use schedule::{Course, Schedule};
pub use tasks::{ItemScore, Task, TaskScore, evaluate_task};
pub use train::{Control, StepReport, TrainSummary, load_base, train};
