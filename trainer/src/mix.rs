//! The caches of a run: one, or several mixed by weights.

use std::path::Path;
use std::sync::Arc;

use caskd_formats::Cache;
use caskd_models::{LoadedModel, load_tokenizer};
use tch::Device;

use crate::objective::Objective;
use crate::order::{Order, Part, ReadShard};
use crate::reader::Source;
use crate::retokenize::Retokenizer;
use crate::teacher_logits::LinearCode;
use crate::{Error, Result, TrainConfig};

/// Caches to train on together, each with its weight: how many times an epoch goes through it. Of a
/// cache with weight 0.3 an epoch takes three tenths, and the next one goes on where it ended.
///
/// A batch comes from one cache, so caches may differ in tier, kept layers and teacher; what they
/// share is the tokenizer.
#[derive(Debug, Clone)]
pub struct CacheMix(Vec<(Arc<Cache>, f64)>);

impl From<Arc<Cache>> for CacheMix {
    fn from(cache: Arc<Cache>) -> CacheMix {
        CacheMix(vec![(cache, 1.0)])
    }
}

/// One cache of a run, resolved.
pub(crate) struct MixPart {
    pub(crate) objective: Objective,
    /// The teacher's logits, where a loss asks for them.
    pub(crate) teacher: Option<LinearCode>,
    cache: Arc<Cache>,
    retokenizer: Option<Arc<Retokenizer>>,
}

impl CacheMix {
    /// # Errors
    /// A weight that is not a positive number, no cache at all, a cache given twice.
    pub fn new(caches: Vec<(Arc<Cache>, f64)>) -> Result<CacheMix> {
        if caches.is_empty() {
            return Err(Error::NoSequences {
                reason: "no cache was given".to_owned(),
            });
        }
        for (index, (cache, weight)) in caches.iter().enumerate() {
            let bad = |message: &str| Error::BadWeight {
                cache: cache.dir().to_owned(),
                weight: *weight,
                message: message.to_owned(),
            };
            if !(weight.is_finite() && *weight > 0.0) {
                return Err(bad(
                    "a weight is how many times an epoch goes through a cache",
                ));
            }
            let checksum = &cache.manifest().checksum;
            let before = &caches[..index];
            if before
                .iter()
                .any(|(other, _)| other.manifest().checksum == *checksum)
            {
                return Err(bad(
                    "the same cache was given before; give it once, with a larger weight",
                ));
            }
        }
        Ok(CacheMix(caches))
    }

    /// The caches with their weights.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Arc<Cache>, f64)> {
        self.0.iter()
    }

    /// The terms, resolved for every cache.
    pub(crate) fn resolve(
        &self,
        config: &TrainConfig,
        student: &LoadedModel,
    ) -> Result<Vec<MixPart>> {
        let terms = config.terms();
        let part = |(cache, _): &(Arc<Cache>, f64)| -> Result<MixPart> {
            let retokenizer = retokenizer(config, student, cache)?;
            let across = retokenizer.is_some();
            let objective = Objective::resolve(&terms, student, cache.manifest(), across)?;
            let (kind, device) = (student.network.kind(), student.network.device());
            let teacher = objective
                .full_logits
                .then(|| LinearCode::of(cache, objective.teacher_vocabulary, kind, device))
                .transpose()?
                .flatten();
            Ok(MixPart {
                objective,
                teacher,
                cache: Arc::clone(cache),
                retokenizer,
            })
        };
        let named = |cache: &(Arc<Cache>, f64)| {
            part(cache).map_err(|source| match self.0.as_slice() {
                [_] => source,
                _ => Error::OfCache {
                    path: cache.0.dir().to_owned(),
                    source: Box::new(source),
                },
            })
        };
        self.0.iter().map(named).collect()
    }

    /// The order in which their sequences come.
    pub(crate) fn order(&self, config: &TrainConfig) -> Result<Order> {
        let part = |(cache, weight): &(Arc<Cache>, f64)| {
            let shards = cache.manifest().shards.len() as u32;
            let cache = Arc::clone(cache);
            // The cache's validation split is for judging, whatever the fraction.
            let read: ReadShard = Arc::new(move |shard| {
                let mut rows = cache.shard_rows(shard as usize)?;
                rows.retain(|row| !cache.manifest().data.is_validation(row.split_hash));
                Ok(rows)
            });
            Part::new(shards, read, *weight, config.fraction)
        };
        let parts = self.0.iter().map(part).collect::<Result<_>>()?;
        Ok(Order::new(parts, config))
    }
}

impl MixPart {
    pub(crate) fn source(&self) -> Source {
        Source {
            cache: Arc::clone(&self.cache),
            columns: self.objective.columns.clone(),
            vocabulary: self.objective.vocabulary,
            max_len: self.cache.manifest().max_len,
            retokenizer: self.retokenizer.clone(),
        }
    }

    /// Makes the projections that the terms ask for.
    pub(crate) fn make_projections(&mut self, student_width: usize, seed: u64, device: Device) {
        let manifest = self.cache.manifest();
        self.objective
            .make_projections(student_width, manifest, seed, device);
    }
}

/// From the cache's tokenizer to the student's, where they differ and the configuration names the teacher's.
fn retokenizer(
    config: &TrainConfig,
    student: &LoadedModel,
    cache: &Cache,
) -> Result<Option<Arc<Retokenizer>>> {
    let of_cache = &cache.manifest().tokenizer.fingerprint;
    let Some(path) = &config.teacher_tokenizer else {
        return Ok(None);
    };
    if student.fingerprint == *of_cache {
        return Ok(None);
    }
    let teacher = load_tokenizer(Path::new(path))?;
    if teacher.fingerprint != *of_cache {
        return Err(Error::OtherTeacherTokenizer { path: path.into() });
    }
    Ok(Some(Arc::new(Retokenizer::new(teacher, student))))
}
