//! Running a study from the first trial to the last.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::config::StudyConfig;
use crate::error::{Error, Result};
use crate::objective::Objective;
use crate::space::Space;
use crate::view::{Progress, StudySummary, StudyView};

/// How the caller steers [`run_study`].
pub struct Control<'a> {
    /// Go on with a study that the folder already holds.
    pub resume: bool,
    /// Set to true to stop after the running trial (which sees the same flag, if the caller gives it to it).
    pub stop: &'a AtomicBool,
    /// Told of every trial that begins or ends.
    pub progress: &'a mut dyn FnMut(&Progress),
}

/// Searches `space` for the configuration with the best value, until `config.trials` trials are finished.
///
/// The study lives in `dir/study.sqlite`, a trial's artefacts in `dir/trials/00012/`. Killed at any instant and
/// called again with `control.resume`, it goes on with the same suggestions as if it had never stopped.
pub fn run_study(
    dir: &Path,
    _space: &Space,
    _config: &StudyConfig,
    _objective: &mut dyn Objective,
    _control: &mut Control<'_>,
) -> Result<StudySummary> {
    Err(Error::StudyMissing {
        path: dir.to_owned(),
    })
}

/// Reads a study without changing it.
pub fn read_study(dir: &Path) -> Result<StudyView> {
    Err(Error::StudyMissing {
        path: dir.to_owned(),
    })
}
