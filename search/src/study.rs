//! A durable study: ask for a trial, tell its result, look at it, replay a suggestion.

mod lease;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::{Direction, StudyConfig};
use crate::error::{Error, Result};
use crate::objective::{Objective, Outcome};
use crate::params::Params;
use crate::rng::{Rng, Stream};
use crate::sampler::{Discrepancies, History, Observation, Part, Sampler, Suggestion};
use crate::space::Space;
use crate::view::{StudyView, TrialState, Why};
use store::{Lease, NewTrial, Store, TrialRow};

pub(crate) use lease::Heartbeat;
pub use lease::Holder;
pub use store::Told;

/// Name of the database in the study's folder.
pub const STUDY_FILE: &str = "study.sqlite";

/// An open study.
///
/// ```
/// use caskd_search::{Holder, Outcome, SamplerKind, Space, Study, StudyConfig};
///
/// let folder = tempfile::tempdir()?;
/// let config = StudyConfig { sampler: SamplerKind::Gp, ..StudyConfig::default() };
/// let mut study = Study::create(folder.path(), &Space::table2(), &config)?;
/// for _ in 0..10 {
///     let asked = study.ask(Holder::External { seconds: 3600.0 })?;
///     let scaling = asked.params.get("scaling_value").and_then(|v| v.as_f64()).unwrap_or(1.0);
///     study.tell(asked.trial, None, &Outcome::Value((scaling - 12.0).abs()), 0.0)?;
/// }
/// assert!(study.view()?.best().is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Study {
    dir: PathBuf,
    store: Store,
    config: StudyConfig,
    sampler: Sampler,
    known: BTreeMap<(Part, String), f64>,
}

/// A trial that was handed out.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Asked {
    /// Its number.
    pub trial: u64,
    /// Its configuration.
    pub params: Params,
    /// Its seed.
    pub seed: u64,
    /// Why it was suggested.
    pub why: Why,
    /// True where it was handed out before, and no result came.
    pub resumed: bool,
    /// The lease, to be shown when the result is told.
    pub token: u64,
}

/// What there is to do.
pub(crate) enum Claim {
    Trial(Asked),
    /// All trials are handed out, some are still running elsewhere.
    Wait,
    /// All trials are finished.
    Done,
}

impl Study {
    /// Creates a study in a folder that holds none (the folder may exist).
    pub fn create(dir: &Path, space: &Space, config: &StudyConfig) -> Result<Self> {
        config.validate()?;
        std::fs::create_dir_all(dir).map_err(|source| Error::Io {
            path: dir.to_owned(),
            source,
        })?;
        let mut store = Store::open(&dir.join(STUDY_FILE))?;
        if store.has_study()? || !store.create(space, config)? {
            return Err(Error::StudyExists {
                path: dir.to_owned(),
            });
        }
        Self::open(dir)
    }

    /// A study that lives and dies with this object, for objectives that cost nothing.
    pub fn in_memory(space: &Space, config: &StudyConfig) -> Result<Self> {
        config.validate()?;
        let dir = PathBuf::from(":memory:");
        let mut store = Store::open(&dir)?;
        store.create(space, config)?;
        Ok(Self::from_store(dir, store, space, config.clone()))
    }

    /// Opens the study in a folder.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(STUDY_FILE);
        let missing = || Error::StudyMissing {
            path: dir.to_owned(),
        };
        if !path.is_file() {
            return Err(missing());
        }
        let store = Store::open(&path)?;
        if !store.has_study()? {
            return Err(missing());
        }
        let (space, config) = store.space_and_config()?;
        let mut study = Self::from_store(dir.to_owned(), store, &Space::from_json(&space)?, config);
        study.known = study.store.discrepancies()?;
        Ok(study)
    }

    fn from_store(dir: PathBuf, store: Store, space: &Space, config: StudyConfig) -> Self {
        Self {
            dir,
            store,
            config,
            sampler: Sampler::new(space),
            known: BTreeMap::new(),
        }
    }

    /// Opens the study in a folder, or creates it. An existing one must have been created with the same space and
    /// settings; only `trials`, `lease_seconds` and `max_attempts` may have changed, and are taken over.
    pub fn open_or_create(dir: &Path, space: &Space, config: &StudyConfig) -> Result<Self> {
        config.validate()?;
        match Self::create(dir, space, config) {
            Err(Error::StudyExists { .. }) => {}
            result => return result,
        }
        let mut study = Self::open(dir)?;
        study.compare(space, config)?;
        if study.config != *config {
            study.store.set_config(config)?;
            study.config = config.clone();
        }
        Ok(study)
    }

    /// The settings.
    pub fn config(&self) -> &StudyConfig {
        &self.config
    }

    /// The space.
    pub fn space(&self) -> &Space {
        &self.sampler.space
    }

    /// The study's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder of a trial (`trials/00012`), which may not exist yet.
    pub fn trial_dir(&self, trial: u64) -> PathBuf {
        self.dir.join("trials").join(format!("{trial:05}"))
    }

    /// The next trial: one that was given back or whose holder is silent or dead, otherwise a new one. What `sabo`
    /// has not measured counts as S = 0; see [`Study::ask_measured`].
    pub fn ask(&mut self, holder: Holder) -> Result<Asked> {
        self.ask_from(holder, None)
    }

    /// Like [`Study::ask`], with an objective that can measure S(x).
    pub fn ask_measured(&mut self, holder: Holder, objective: &mut dyn Objective) -> Result<Asked> {
        self.ask_from(holder, Some(objective))
    }

    fn ask_from(&mut self, holder: Holder, objective: Option<&mut dyn Objective>) -> Result<Asked> {
        match self.claim(holder, None, objective)? {
            Claim::Trial(asked) => Ok(asked),
            Claim::Wait | Claim::Done => unreachable!("without a limit there is always a trial"),
        }
    }

    /// Reports the result of a trial. `token` is the one of [`Asked`]; without it, the first result counts.
    /// A value that is not finite is recorded as a failure; [`Outcome::Stopped`] gives the trial back.
    pub fn tell(
        &mut self,
        trial: u64,
        token: Option<u64>,
        outcome: &Outcome,
        seconds: f64,
    ) -> Result<Told> {
        let seconds = if seconds.is_finite() {
            seconds.max(0.0)
        } else {
            0.0
        };
        match outcome {
            Outcome::Value(value) if value.is_finite() => {
                self.store.tell(trial, token, Some(*value), None, seconds)
            }
            Outcome::Value(value) => {
                let error = format!("the value is not finite: {value}");
                self.store.tell(trial, token, None, Some(&error), seconds)
            }
            Outcome::Failed(error) => self.store.tell(trial, token, None, Some(error), seconds),
            Outcome::Stopped => {
                let token = match token {
                    Some(token) => token,
                    None => self.current_token(trial)?,
                };
                self.store.give_back(trial, token, seconds)?;
                Ok(Told::Recorded)
            }
        }
    }

    /// Everything, read from the file as it is now.
    pub fn view(&self) -> Result<StudyView> {
        view(&self.store)
    }

    /// Computes the suggestion of an existing trial again, from the study's seed, the trial's number and the
    /// observations that it was based on. It equals the stored one bit for bit.
    pub fn replay(&mut self, trial: u64) -> Result<(Params, Why)> {
        let rows = self.store.trials()?;
        let row = rows
            .iter()
            .find(|row| row.view.number == trial)
            .ok_or(Error::TrialUnknown { trial })?;
        let history = self.history(&rows, trial, row.view.seen)?;
        let suggestion = self.suggest(trial, &history, None)?;
        Ok((self.space().params(&suggestion.point), suggestion.why))
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.dir.join(STUDY_FILE)
    }

    /// Hands out a trial; never more than `limit` trials exist.
    pub(crate) fn claim(
        &mut self,
        holder: Holder,
        limit: Option<u64>,
        mut objective: Option<&mut dyn Objective>,
    ) -> Result<Claim> {
        let owner = holder.owner();
        let seconds = match holder {
            Holder::Process => self.config.lease_seconds,
            Holder::External { seconds } => seconds,
        };
        loop {
            let taken = self
                .store
                .take_up(&owner, seconds, self.config.max_attempts)?;
            if let Some(lease) = taken {
                return Ok(Claim::Trial(asked(lease)));
            }
            let rows = self.store.trials()?;
            let number = rows.len() as u64;
            if limit.is_some_and(|limit| number >= limit) {
                let open = rows.iter().any(|row| !row.view.state.is_finished());
                return Ok(if open { Claim::Wait } else { Claim::Done });
            }
            let seen = rows
                .iter()
                .filter_map(|row| row.finish_order)
                .max()
                .unwrap_or(0);
            let history = self.history(&rows, number, seen)?;
            // Reborrowed by hand: the trait object must outlive this round only.
            let measuring: Option<&mut dyn Objective> = match &mut objective {
                Some(objective) => Some(&mut **objective),
                None => None,
            };
            let suggestion = self.suggest(number, &history, measuring)?;
            let params = self.space().params(&suggestion.point);
            let seed = trial_seed(self.config.seed, number);
            let trial = NewTrial {
                number,
                params: &params,
                seed,
                why: &suggestion.why,
                seen,
            };
            // False where another worker took the number while this one was thinking: think again, with its trial
            // as a pending one.
            if self.store.insert(&trial, &owner, seconds)? {
                return Ok(Claim::Trial(Asked {
                    trial: number,
                    params,
                    seed,
                    why: suggestion.why,
                    resumed: false,
                    token: 1,
                }));
            }
        }
    }

    fn suggest(
        &mut self,
        number: u64,
        history: &History,
        objective: Option<&mut dyn Objective>,
    ) -> Result<Suggestion> {
        let measured = objective.is_some();
        let depends_on = match &objective {
            Some(objective) => self.store.agree_on_dependence(&objective.depends_on())?,
            None => self.store.dependence()?.unwrap_or_default(),
        };
        let mut measure =
            objective.map(|objective| move |params: &Params| objective.discrepancy(params));
        let mut discrepancies = Discrepancies::new(
            depends_on,
            &mut self.known,
            measure
                .as_mut()
                .map(|m| m as &mut crate::sampler::Measure<'_>),
        );
        let suggestion = self
            .sampler
            .suggest(&self.config, number, history, &mut discrepancies);
        let fresh = std::mem::take(&mut discrepancies.fresh);
        if measured {
            self.store.keep_discrepancies(&fresh)?;
        }
        suggestion
    }

    /// What trial `number` could know when `seen` results were in.
    fn history(&self, rows: &[TrialRow], number: u64, seen: u64) -> Result<History> {
        let sign = match self.config.direction {
            Direction::Minimize => 1.0,
            Direction::Maximize => -1.0,
        };
        let mut history = History::default();
        for row in rows.iter().filter(|row| row.view.number < number) {
            let point =
                self.space()
                    .point(&row.view.params)
                    .map_err(|error| Error::StudyDamaged {
                        path: self.database(),
                        trial: row.view.number,
                        message: error.to_string(),
                    })?;
            if row.finish_order.is_some_and(|order| order <= seen) {
                let complete = row.view.state == TrialState::Complete;
                let value = row
                    .view
                    .value
                    .filter(|_| complete)
                    .map(|value| sign * value);
                history.observations.push(Observation { point, value });
            } else {
                history.pending.push(point);
            }
        }
        Ok(history)
    }

    fn current_token(&self, trial: u64) -> Result<u64> {
        self.store
            .token(trial)?
            .ok_or(Error::TrialUnknown { trial })
    }

    fn compare(&self, space: &Space, config: &StudyConfig) -> Result<()> {
        let differs = |what: String, stored: String, asked: String| {
            Err(Error::StudyDiffers {
                path: self.dir.clone(),
                what,
                stored,
                asked,
            })
        };
        if let Some((what, stored, asked)) = self.space().difference(space) {
            return differs(what, stored, asked);
        }
        let (Ok(serde_json::Value::Object(stored)), Ok(serde_json::Value::Object(asked))) = (
            serde_json::to_value(&self.config),
            serde_json::to_value(config),
        ) else {
            return Ok(());
        };
        for (setting, value) in &asked {
            let free = ["trials", "lease-seconds", "max-attempts"].contains(&setting.as_str());
            let before = stored.get(setting);
            if !free && before != Some(value) {
                let before = before.map_or_else(|| "nothing".to_owned(), ToString::to_string);
                return differs(setting.clone(), before, value.to_string());
            }
        }
        Ok(())
    }
}

/// Reads a study without changing it.
pub fn read_study(dir: &Path) -> Result<StudyView> {
    let path = dir.join(STUDY_FILE);
    let missing = || Error::StudyMissing {
        path: dir.to_owned(),
    };
    if !path.is_file() {
        return Err(missing());
    }
    let store = Store::open_read_only(&path)?;
    if !store.has_study()? {
        return Err(missing());
    }
    view(&store)
}

fn view(store: &Store) -> Result<StudyView> {
    let (space, config) = store.space_and_config()?;
    Ok(StudyView {
        config,
        space: serde_json::from_str(&space).unwrap_or_default(),
        trials: store.trials()?.into_iter().map(|row| row.view).collect(),
        late: store.late_results()?,
    })
}

fn asked(lease: Lease) -> Asked {
    Asked {
        trial: lease.number,
        params: lease.params,
        seed: lease.seed,
        why: lease.why,
        resumed: true,
        token: lease.token,
    }
}

/// The seed of a trial: below 2^53, so that every reader of JSON gets it whole.
fn trial_seed(seed: u64, number: u64) -> u64 {
    Rng::new(seed, Stream::TrialSeed, number).next_u64() >> 11
}
