//! Bayesian search over distillation settings.
//!
//! A [`Space`] says what can be set, an [`Objective`] gives a configuration its value, and [`run_study`] looks for
//! the best one, keeping everything in a SQLite file or a PostgreSQL schema from which it goes on after any interruption. Programs that
//! bring their own loop use [`Study::ask`] and [`Study::tell`].
//!
//! Prohibitions: this crate never touches a model or a cache (it sees the trainer through [`Objective`] only), it has
//! no global random state (a suggestion is a function of the study's seed, the trial's number and the observations
//! it is based on), and a failed trial's value never reaches a surrogate.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod acquisition;
mod config;
mod effects;
mod error;
mod gp;
mod ladder;
mod objective;
mod params;
mod rng;
mod run;
mod sampler;
mod space;
mod study;
mod targets;
mod view;

pub use config::{Climb, Direction, Ladder, SaboOptions, SamplerKind, StudyConfig};
pub use effects::{Effects, Incumbent, Interaction, ParameterEffect};
pub use error::{BoxError, DatabaseError, Error, Result};
pub use objective::{DependsOn, Discrepancy, Objective, Outcome, Trial};
pub use params::{Params, Value};
pub use run::{Control, run_study, work_on};
pub use space::{Domain, Impossible, Parameter, Space};
pub use study::{Asked, Expected, Holder, Location, STUDY_FILE, Study, Told, read_study};
pub use view::{
    LateResult, Progress, RungTrust, StudySummary, StudyView, TrialState, TrialView, Why,
};
