//! A durable study: ask for a trial, tell its result, look at it, replay a suggestion.

mod database;
mod lease;
mod location;
#[cfg(feature = "postgres")]
mod postgres;
mod sqlite;
mod store;

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::config::{Climb, Direction, SaboOptions, SamplerKind, StudyConfig};
use crate::error::{Error, Result};
use crate::ladder::{self, Step};
use crate::objective::{Objective, Outcome};
use crate::params::Params;
use crate::rng::{Rng, Stream};
use crate::sampler::{Discrepancies, History, Observation, Part, Sampler, Suggestion};
use crate::space::Space;
use crate::view::{StudyView, TrialState, TrialView, Why};
use store::{Lease, NewTrial, Store, Taker, TrialRow};

pub use lease::Holder;
pub(crate) use lease::{Heartbeat, is_dead};
pub use location::{Location, STUDY_FILE};
pub use store::Told;

/// Prefix of the callers' texts among the study's own.
const NOTE: &str = "note.";

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
    location: Location,
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
    /// Step of the ladder of fidelities, from 0.
    pub rung: u64,
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

/// What a caller asks of a study that may exist already: only what is set is compared.
#[derive(Debug, Clone, Default)]
pub struct Expected<'a> {
    /// The space.
    pub space: Option<&'a Space>,
    /// How configurations are chosen.
    pub sampler: Option<SamplerKind>,
    /// Seed of the study.
    pub seed: Option<u64>,
    /// Whether small or large values are good.
    pub direction: Option<Direction>,
    /// Trials of the space-filling start.
    pub startup: Option<u64>,
    /// Options of `sabo`.
    pub sabo: Option<SaboOptions>,
}

impl Study {
    /// Creates a study in a place that holds none (its folder may exist).
    pub fn create(
        location: impl Into<Location>,
        space: &Space,
        config: &StudyConfig,
    ) -> Result<Self> {
        let location = location.into();
        config.validate()?;
        make_parent(&location)?;
        let store = Store::open(&location)?;
        if store.has_study()? || !store.create(space, config)? {
            return Err(Error::StudyExists {
                path: location.to_string().into(),
            });
        }
        Ok(Self::from_store(location, store, space, config.clone()))
    }

    /// A study that lives and dies with this object, for objectives that cost nothing.
    pub fn in_memory(space: &Space, config: &StudyConfig) -> Result<Self> {
        Self::create(Location::memory(), space, config)
    }

    /// Opens an existing study.
    pub fn open(location: impl Into<Location>) -> Result<Self> {
        let location = location.into();
        let missing = || Error::StudyMissing {
            path: location.to_string().into(),
        };
        if !location.may_exist() {
            return Err(missing());
        }
        let store = Store::open(&location)?;
        if !store.has_study()? {
            return Err(missing());
        }
        let (space, config) = store.space_and_config()?;
        let mut study = Self::from_store(location, store, &Space::from_json(&space)?, config);
        study.known = study.store.discrepancies()?;
        Ok(study)
    }

    fn from_store(location: Location, store: Store, space: &Space, config: StudyConfig) -> Self {
        Self {
            location,
            store,
            config,
            sampler: Sampler::new(space),
            known: BTreeMap::new(),
        }
    }

    /// Opens a study, or creates it. An existing one must have been created with the same space and settings; only
    /// `trials`, `lease_seconds` and `max_attempts` may have changed, and are taken over.
    pub fn open_or_create(
        location: impl Into<Location>,
        space: &Space,
        config: &StudyConfig,
    ) -> Result<Self> {
        let location = location.into();
        config.validate()?;
        match Self::create(&location, space, config) {
            Err(Error::StudyExists { .. }) => {}
            result => return result,
        }
        let mut study = Self::open(location)?;
        study.compare(space, config)?;
        if study.config != *config {
            study.store.set_config(config)?;
            study.config = config.clone();
        }
        Ok(study)
    }

    /// Checks that the study was created with what is expected of it.
    pub fn expect(&self, expected: &Expected<'_>) -> Result<()> {
        let config = StudyConfig {
            sampler: expected.sampler.unwrap_or(self.config.sampler),
            seed: expected.seed.unwrap_or(self.config.seed),
            direction: expected.direction.unwrap_or(self.config.direction),
            startup: expected.startup.unwrap_or(self.config.startup),
            sabo: expected
                .sabo
                .clone()
                .unwrap_or_else(|| self.config.sabo.clone()),
            ..self.config.clone()
        };
        self.compare(expected.space.unwrap_or(self.space()), &config)
    }

    /// A text that the caller keeps with the study, such as how its trials are evaluated.
    pub fn note(&self, key: &str) -> Result<Option<String>> {
        self.store.note(&format!("{NOTE}{key}"))
    }

    /// Keeps a text with the study.
    pub fn set_note(&self, key: &str, text: &str) -> Result<()> {
        self.store.set_note(&format!("{NOTE}{key}"), text)
    }

    /// The settings.
    pub fn config(&self) -> &StudyConfig {
        &self.config
    }

    /// The space.
    pub fn space(&self) -> &Space {
        &self.sampler.space
    }

    /// Where the study is.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The folder of a trial (`trials/00012`), which may not exist yet. A trial that goes on with another one's
    /// training has that one's.
    pub fn trial_dir(&self, trial: u64) -> Result<PathBuf> {
        let folder = self.location.trials_folder()?;
        let same_training = self
            .config
            .ladder
            .as_ref()
            .is_some_and(|ladder| ladder.climb == Climb::Steps);
        let number = if same_training {
            self.view()?.root(trial)
        } else {
            trial
        };
        Ok(folder.join("trials").join(format!("{number:05}")))
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
    /// What [`Outcome::of`] takes for a failure is recorded as one; [`Outcome::Stopped`] gives the trial back.
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
        let judged = match outcome {
            Outcome::Value(metric) => &Outcome::of(*metric),
            other => other,
        };
        match judged {
            Outcome::Value(value) => self.store.tell(trial, token, Some(*value), None, seconds),
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
        if row.view.rung > 0 {
            return Ok((row.view.params.clone(), row.view.why.clone()));
        }
        let history = self.history(&rows, trial, row.view.seen)?;
        let suggestion = self.suggest(trial, &history, None)?;
        Ok((self.space().params(&suggestion.point), suggestion.why))
    }

    /// Hands out a trial. With a `limit`, the first rung never has more trials, and the ladder is climbed after it.
    pub(crate) fn claim(
        &mut self,
        holder: Holder,
        limit: Option<u64>,
        mut objective: Option<&mut dyn Objective>,
    ) -> Result<Claim> {
        let owner = holder.owner();
        let claim = lease::claim(&owner);
        let taker = Taker {
            owner: &owner,
            claim: &claim,
            seconds: match holder {
                Holder::Process => self.config.lease_seconds,
                Holder::External { seconds } => seconds,
            },
        };
        loop {
            let taken = self.store.take_up(&taker, self.config.max_attempts)?;
            if let Some(lease) = taken {
                return Ok(Claim::Trial(asked(lease)));
            }
            let rows = self.store.trials()?;
            let number = rows.len() as u64;
            let suggested = rows.iter().filter(|row| row.view.rung == 0).count() as u64;
            let seen = rows
                .iter()
                .filter_map(|row| row.finish_order)
                .max()
                .unwrap_or(0);
            let new = if limit.is_some_and(|limit| suggested >= limit) {
                let trials: Vec<&TrialView> = rows.iter().map(|row| &row.view).collect();
                match ladder::next(&self.config, &trials) {
                    Step::Wait => return Ok(Claim::Wait),
                    Step::Done => return Ok(Claim::Done),
                    Step::Promote { parent, rung } => {
                        self.promotion(trials[parent as usize], rung, number)
                    }
                }
            } else {
                let history = self.history(&rows, number, seen)?;
                // Reborrowed by hand: the trait object must outlive this round only.
                let measuring: Option<&mut dyn Objective> = match &mut objective {
                    Some(objective) => Some(&mut **objective),
                    None => None,
                };
                let suggestion = self.suggest(number, &history, measuring)?;
                New {
                    params: self.space().params(&suggestion.point),
                    seed: trial_seed(self.config.seed, number),
                    why: suggestion.why,
                    rung: 0,
                    parent: None,
                }
            };
            let trial = NewTrial {
                number,
                params: &new.params,
                seed: new.seed,
                why: &new.why,
                seen,
                rung: new.rung,
                parent: new.parent,
            };
            // False where another worker took the number while this one was thinking: think again, with its trial
            // as a pending one.
            if self.store.insert(&trial, &taker)? {
                return Ok(Claim::Trial(Asked {
                    trial: number,
                    params: new.params,
                    seed: new.seed,
                    why: new.why,
                    rung: new.rung,
                    resumed: false,
                    token: 1,
                }));
            }
        }
    }

    /// The next rung of a trial: a fresh seed on more data, or the same training for more steps.
    fn promotion(&self, parent: &TrialView, rung: u64, number: u64) -> New {
        let fresh = self
            .config
            .ladder
            .as_ref()
            .is_none_or(|ladder| ladder.climb == Climb::Data);
        New {
            params: parent.params.clone(),
            seed: if fresh {
                trial_seed(self.config.seed, number)
            } else {
                parent.seed
            },
            why: Why {
                by: "promotion".to_owned(),
                ..Why::default()
            },
            rung,
            parent: Some(parent.number),
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

    /// What trial `number` could know when `seen` results were in. Promotions are judged on another scale and
    /// repeat known configurations: the surrogate sees the first rung only.
    fn history(&self, rows: &[TrialRow], number: u64, seen: u64) -> Result<History> {
        let sign = self.config.direction.sign();
        let mut history = History::default();
        for row in rows
            .iter()
            .filter(|row| row.view.number < number && row.view.rung == 0)
        {
            let point =
                self.space()
                    .point(&row.view.params)
                    .map_err(|error| Error::StudyDamaged {
                        path: self.location.to_string().into(),
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
                path: self.location.to_string().into(),
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

/// A trial before it has its number.
struct New {
    params: Params,
    seed: u64,
    why: Why,
    rung: u64,
    parent: Option<u64>,
}

/// Reads a study without changing it.
pub fn read_study(location: impl Into<Location>) -> Result<StudyView> {
    let location = location.into();
    let missing = || Error::StudyMissing {
        path: location.to_string().into(),
    };
    if !location.may_exist() {
        return Err(missing());
    }
    let store = Store::open_read_only(&location)?;
    if !store.has_study()? {
        return Err(missing());
    }
    view(&store)
}

fn make_parent(location: &Location) -> Result<()> {
    let Some(parent) = location.parent() else {
        return Ok(());
    };
    std::fs::create_dir_all(&parent).map_err(|source| Error::Io {
        path: parent,
        source,
    })
}

fn view(store: &Store) -> Result<StudyView> {
    let (space, config) = store.space_and_config()?;
    Ok(StudyView {
        config,
        space: serde_json::from_str(&space).unwrap_or_default(),
        trials: store.trials()?.into_iter().map(|row| row.view).collect(),
        late: store.late_results()?,
        notes: store.notes(NOTE)?,
    })
}

fn asked(lease: Lease) -> Asked {
    Asked {
        trial: lease.number,
        params: lease.params,
        seed: lease.seed,
        why: lease.why,
        rung: lease.rung,
        resumed: true,
        token: lease.token,
    }
}

/// The seed of a trial: below 2^53, so that every reader of JSON gets it whole.
fn trial_seed(seed: u64, number: u64) -> u64 {
    Rng::new(seed, Stream::TrialSeed, number).next_u64() >> 11
}
