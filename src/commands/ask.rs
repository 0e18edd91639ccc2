//! `caskd ask`: the next trial of a study, for anyone who brings an objective of their own.

use caskd_search::{
    Asked, Direction, Error, Expected, Holder, Location, SamplerKind, Space, Study, StudyConfig,
};
use serde::Serialize;

use super::search::{read_space, sampler_kind};
use super::train::add_shards;
use super::{print_json, print_text};
use crate::cli::{AskArgs, SaboArgs};
use crate::exit::{Exit, Failure, Outcome};
use crate::objective::{Distillation, DistillationObjective};
use crate::terminal::say;

#[derive(Serialize)]
struct Answer<'a> {
    study: String,
    #[serde(flatten)]
    asked: &'a Asked,
}

pub(crate) fn run(args: &AskArgs) -> Outcome {
    let location = Location::parse(&args.study)?;
    let space = args.space.as_deref().map(read_space).transpose()?;
    let mut objective = measuring(args)?;
    let (mut study, new) = open_or_create(&location, args, space.as_ref(), objective.as_mut())?;
    let holder = Holder::External {
        seconds: args.lease,
    };
    let asked = if let Some(objective) = &mut objective {
        study.ask_measured(holder, objective)?
    } else {
        if new && study.config().sampler == SamplerKind::Sabo {
            say(
                "note: without --cache and --student S(x) is not measured: sabo goes by expected improvement alone",
            );
        }
        study.ask(holder)?
    };
    if args.json {
        print_json(&Answer {
            study: location.to_string(),
            asked: &asked,
        })?;
    } else {
        print_text(format!("trial {}: {}", asked.trial, asked.params));
    }
    Ok(Exit::Done)
}

/// What S(x) is measured by, where cache and student are given.
fn measuring(args: &AskArgs) -> Result<Option<DistillationObjective>, Failure> {
    let (Some(cache), Some(student)) = (&args.cache, &args.student) else {
        return Ok(None);
    };
    let mut plan = Distillation::new(cache, student);
    add_shards(&mut plan.base, &args.elsewhere)?;
    Ok(Some(DistillationObjective::new(plan)))
}

/// The study, and whether it was created now. What was asked for must be what an existing study was created with. Its
/// space is without what the cache that S(x) is measured on can't answer.
fn open_or_create(
    location: &Location,
    args: &AskArgs,
    space: Option<&Space>,
    mut objective: Option<&mut DistillationObjective>,
) -> Result<(Study, bool), Failure> {
    let sampler = args.sampler.map(sampler_kind);
    let existing = match Study::open(location) {
        Ok(study) => study,
        Err(Error::StudyMissing { .. }) => {
            let config = StudyConfig {
                sampler: sampler.unwrap_or(SamplerKind::Sabo),
                seed: args.seed.unwrap_or(0),
                direction: direction(args.maximize).unwrap_or_default(),
                // Asked for one by one, without an end.
                trials: 0,
                startup: args.startup.unwrap_or(StudyConfig::default().startup),
                sabo: args.sabo.options(&StudyConfig::default().sabo),
                ..StudyConfig::default()
            };
            args.sabo.check(config.sampler)?;
            let table2 = Space::table2();
            let space = space.unwrap_or(&table2);
            let narrowed = match &mut objective {
                Some(objective) => &objective.narrowed(space)?,
                None => space,
            };
            match Study::create(location, narrowed, &config) {
                Ok(study) => return Ok((study, true)),
                // Another process was faster.
                Err(Error::StudyExists { .. }) => Study::open(location)?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(error) => return Err(error.into()),
    };
    let narrowed = match (space, objective) {
        (Some(space), Some(objective)) if space != existing.space() => {
            Some(objective.narrowed(space)?)
        }
        _ => None,
    };
    existing.expect(&Expected {
        space: narrowed.as_ref().or(space),
        sampler,
        seed: args.seed,
        direction: direction(args.maximize),
        startup: args.startup,
        sabo: args
            .sabo
            .any()
            .then(|| args.sabo.options(&existing.config().sabo)),
    })?;
    Ok((existing, false))
}

/// Only a study that maximises is asked to.
fn direction(maximize: bool) -> Option<Direction> {
    maximize.then_some(Direction::Maximize)
}

impl SaboArgs {
    /// Refuses them with a sampler that they say nothing to.
    pub(crate) fn check(&self, sampler: SamplerKind) -> Result<(), Failure> {
        if self.any() && sampler != SamplerKind::Sabo {
            return Err(Failure::user(
                format!("--laei, --alpha and their like are options of sabo, not of {sampler}"),
                "leave them out, or choose --sampler sabo",
            ));
        }
        Ok(())
    }

    fn any(&self) -> bool {
        self.laei
            || self.inverted
            || [self.alpha, self.lambda1, self.lambda2, self.xi, self.decay]
                .iter()
                .any(Option::is_some)
    }

    /// What was given, on top of `base`.
    pub(crate) fn options(&self, base: &caskd_search::SaboOptions) -> caskd_search::SaboOptions {
        let mut options = if self.laei {
            caskd_search::SaboOptions::laei()
        } else {
            base.clone()
        };
        let given = [
            (self.alpha, &mut options.alpha),
            (self.lambda1, &mut options.lambda1),
            (self.lambda2, &mut options.lambda2),
            (self.xi, &mut options.xi),
        ];
        for (value, option) in given {
            if let Some(value) = value {
                *option = value;
            }
        }
        if let Some(decay) = self.decay {
            options.decay = (decay > 0.0).then_some(decay);
        }
        options.inverted |= self.inverted;
        options
    }
}
