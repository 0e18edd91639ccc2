//! The teacher once more: does a cache still say what its teacher says?

use std::path::Path;
use std::sync::atomic::AtomicBool;

use caskd_formats::{Cache, Columns, RowInfo, Sequence};
use serde::Serialize;
use tch::{Device, Kind};

use crate::data::TokenizedSequence;
use crate::teacher::Teacher;
use crate::teacher_pass::TeacherPass;
use crate::{Error, Result};

/// How far one kind of value in the cache is from the teacher's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Deviation {
    /// Column of the cache.
    pub column: String,
    /// Root mean square of the differences, divided by that of the teacher's values about their mean.
    pub relative: f64,
    /// The largest difference, in the column's own unit.
    pub largest: f64,
    /// Where the largest difference is: source of the sequence.
    pub source: String,
    /// And its position.
    pub position: usize,
    /// The largest `relative` that rounding explains.
    pub allowed: f64,
}

/// What a re-run of the teacher found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recheck {
    /// Every column is within what rounding explains.
    pub ok: bool,
    /// Sequences that the teacher read again.
    pub sequences: usize,
    /// Their positions.
    pub positions: usize,
    /// By column.
    pub deviations: Vec<Deviation>,
    /// Share of the cached top-k entries that are in the teacher's own top-k.
    pub top_k_agreement: Option<f64>,
}

/// Runs the teacher over `sample` sequences spread evenly over the cache and compares.
///
/// The teacher computes in the type of the build. Batches are others than in the build, so the values differ by the
/// rounding of that type, and by what the codecs promise.
///
/// # Errors
/// Another teacher than the cache's, a cache or teacher that cannot be read.
pub fn recheck(cache: &Cache, teacher: &Path, sample: usize, device: Device) -> Result<Recheck> {
    let manifest = cache.manifest();
    let is_bf16 = manifest.teacher.compute_dtype == "bf16";
    let kind = if is_bf16 { Kind::BFloat16 } else { Kind::Float };
    let teacher = Teacher::whole(teacher, kind, &[device])?;
    if teacher.digest != manifest.teacher.digest {
        return Err(Error::Option {
            problem: format!(
                "`{}` is not the teacher of this cache, which is {}",
                teacher.files().name,
                manifest.teacher.name
            ),
            hint:
                "give the weights that the cache was built from; `caskd inspect` shows their digest"
                    .into(),
        });
    }
    let cached = read_sample(cache, sample)?;
    let tokens: Vec<TokenizedSequence> = cached
        .iter()
        .map(|sequence| TokenizedSequence {
            source: sequence.source.clone(),
            token_ids: sequence.token_ids.clone(),
            loss_mask: sequence.loss_mask.clone(),
        })
        .collect();
    let stop = AtomicBool::new(false);
    let spec = manifest.spec();
    let computed = TeacherPass::new(&teacher, &spec, 2048, &stop)
        .run_one(tokens, &mut |_| {})?
        .unwrap_or_default();
    // The compact tier keeps the top-k and its statistics on grids of their own.
    let grid = if manifest.code.is_some() { 0.02 } else { 0.0 };
    Ok(compare(&cached, &computed, is_bf16, grid))
}

fn read_sample(cache: &Cache, sample: usize) -> Result<Vec<Sequence>> {
    let rows = cache.rows()?;
    let count = sample.clamp(1, rows.len());
    let columns = Columns::all(cache.manifest());
    let chosen = (0..count).map(|index| &rows[index * rows.len() / count]);
    let mut sequences = Vec::with_capacity(count);
    for RowInfo { shard, row, .. } in chosen {
        sequences.extend(cache.read(*shard, &[*row], &columns)?);
    }
    Ok(sequences)
}

/// Differences of one column.
struct Tally {
    column: String,
    allowed: f64,
    count: f64,
    sum: f64,
    squares: f64,
    errors: f64,
    largest: f64,
    place: (String, usize),
}

impl Tally {
    fn new(column: String, allowed: f64) -> Self {
        Self {
            column,
            allowed,
            count: 0.0,
            sum: 0.0,
            squares: 0.0,
            errors: 0.0,
            largest: 0.0,
            place: (String::new(), 0),
        }
    }

    fn add(&mut self, source: &str, position: usize, cached: f32, computed: f32) {
        // -inf is the same as -inf; an infinite difference counts as such.
        let error = if cached == computed {
            0.0
        } else {
            (f64::from(cached) - f64::from(computed)).abs()
        };
        if computed.is_finite() {
            self.count += 1.0;
            self.sum += f64::from(computed);
            self.squares += f64::from(computed) * f64::from(computed);
        }
        self.errors += error * error;
        if error > self.largest || error.is_nan() {
            self.largest = error;
            self.place = (source.to_owned(), position);
        }
    }

    fn finish(self) -> Deviation {
        let mean = self.sum / self.count.max(1.0);
        let variance = (self.squares / self.count.max(1.0) - mean * mean).max(0.0);
        let error = self.errors / self.count.max(1.0);
        Deviation {
            column: self.column,
            relative: (error / variance.max(1e-12)).sqrt(),
            largest: self.largest,
            source: self.place.0,
            position: self.place.1,
            allowed: self.allowed,
        }
    }
}

fn compare(cached: &[Sequence], computed: &[Sequence], is_bf16: bool, grid: f64) -> Recheck {
    // Measured on a real teacher: other batches move f32 values by 1e-6 of their spread and bf16 values by 1e-2.
    let rounding = grid + if is_bf16 { 0.05 } else { 1e-3 };
    let names = ["mean", "std", "min", "max", "log_sum_exp"];
    let mut statistics = names.map(|name| Tally::new(name.to_owned(), rounding));
    // f16 keeps eleven bits of the distance to the maximum.
    let mut logits = Tally::new("top_k".to_owned(), rounding + 1e-3);
    let mut layers: Vec<Tally> = Vec::new();
    let (mut kept, mut found) = (0_usize, 0_usize);
    for (cached, computed) in cached.iter().zip(computed) {
        let source = cached.source.as_str();
        if let (Some(a), Some(b)) = (&cached.statistics, &computed.statistics) {
            let pairs = [
                (&a.mean, &b.mean),
                (&a.std, &b.std),
                (&a.min, &b.min),
                (&a.max, &b.max),
                (&a.log_sum_exp, &b.log_sum_exp),
            ];
            for (tally, (a, b)) in statistics.iter_mut().zip(pairs) {
                for (position, (a, b)) in a.iter().zip(b).enumerate() {
                    tally.add(source, position, *a, *b);
                }
            }
        }
        if let (Some(a), Some(b)) = (&cached.top_k, &computed.top_k) {
            for position in 0..cached.token_ids.len() {
                let entries = position * a.k..(position + 1) * a.k;
                for entry in entries.clone() {
                    kept += 1;
                    let same = entries.clone().find(|other| b.ids[*other] == a.ids[entry]);
                    if let Some(same) = same {
                        found += 1;
                        logits.add(source, position, a.logits[entry], b.logits[same]);
                    }
                }
            }
        }
        for (index, (a, b)) in cached.hidden.iter().zip(&computed.hidden).enumerate() {
            if layers.len() == index {
                // int8 rounds to a 127th of six times the 90% quantile of a channel, at worst of its maximum.
                layers.push(Tally::new(format!("hidden.{}", a.layer), rounding + 0.05));
            }
            for (at, (a_value, b_value)) in a.values.iter().zip(&b.values).enumerate() {
                layers[index].add(source, at / a.width.max(1), *a_value, *b_value);
            }
        }
    }
    let has_top_k = kept > 0;
    let tallies = statistics.into_iter().chain(has_top_k.then_some(logits));
    let deviations: Vec<Deviation> = tallies.chain(layers).map(Tally::finish).collect();
    let agreement = found as f64 / kept.max(1) as f64;
    Recheck {
        // Entries at the edge of the top-k may change places; the many others may not.
        ok: deviations
            .iter()
            .all(|deviation| deviation.relative <= deviation.allowed)
            && (!has_top_k || agreement > 0.9),
        sequences: cached.len(),
        positions: cached.iter().map(|sequence| sequence.token_ids.len()).sum(),
        deviations,
        top_k_agreement: has_top_k.then_some(agreement),
    }
}
