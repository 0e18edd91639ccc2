//! How near the logits that a cache gives back are to its teacher's, and what a student's gradient makes of the rest.
//!
//! KL(teacher ‖ rebuilt) is a mean over positions. The gradient error is ‖g' − g‖ / ‖g‖, where g is the gradient of KL
//! with respect to the student's LM head [V, D], added up over a batch, from the teacher's logits, and g' that from the
//! rebuilt ones. Both products with the student's hidden states are taken after a random projection of these to 64
//! dimensions, which keeps norms of matrices with so many rows (Johnson–Lindenstrauss) at a ninth of the cost or less.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use caskd_formats::{
    Basis, Cache, CacheSpec, Columns, Fidelity, RowInfo, Sequence, Statistics, TEMPERATURES, Tier,
    TopK, split_hash,
};
use caskd_models::{
    LoadOptions, LoadedModel, Network, PruneOptions, SeededRng, linear, load, prune, side_by_side,
};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use tch::{Device, Kind, Tensor};

use crate::data::TokenizedSequence;
use crate::error::torch;
use crate::rebuild::Rebuilt;
use crate::row_comparison::{Logits, Scales, compare};
use crate::sample_pass::{longest_first, through_teacher_and_pruned};
use crate::statistics::summarize_logits;
use crate::teacher::Teacher;
use crate::{Error, Result};

/// Positions that a build measures its fidelity on.
pub(crate) const SAMPLE_POSITIONS: usize = 1024;

/// Positions whose gradients make one batch: eight sequences of 128 tokens.
const BATCH: i64 = 1024;

/// Positions whose logits exist at one time, and these logits where the vocabulary is large.
pub(crate) const ROWS: i64 = 128;
const LOGITS: i64 = 8 << 20;

/// How often logits of some positions are in memory at one time: three products, five rows' worth of the comparison, two
/// temporary ones.
const LOGIT_COPIES: u64 = 10;

/// Dimensions that the student's hidden states are projected to.
const PROJECTED: i64 = 64;

/// b of Logits Dual-Scaling; σ is taken per position, the student's without gradient.
const SCALING_VALUE: f64 = 4.0;

/// Share of FFN channels that the default student lacks.
const PRUNED: f64 = 0.25;

/// The default student: the teacher without a quarter of its FFN channels (and KV groups, where it has four or more), by
/// magnitude, in memory only.
///
/// # Errors
/// A teacher that can't be loaded again or pruned.
pub fn pruned_teacher(path: &std::path::Path, options: &LoadOptions) -> Result<LoadedModel> {
    let mut student = load(path, options)?;
    prune(
        &mut student,
        &PruneOptions {
            ratio: PRUNED,
            ..PruneOptions::default()
        },
    )?;
    student.name = pruned_name(&student.name);
    Ok(student)
}

/// Measures a finished cache on about `positions` positions, those that a fit takes last.
///
/// # Errors
/// A teacher that is not the cache's, a student with another tokenizer, a cache that can't be read.
pub fn measure_cache(
    cache: &Cache,
    teacher: &LoadedModel,
    student: &LoadedModel,
    positions: usize,
) -> Result<Fidelity> {
    let manifest = cache.manifest();
    if teacher.digest != manifest.teacher.digest {
        return Err(Error::Option {
            problem: format!("`{}` is not the teacher of the cache", teacher.name),
            hint: format!(
                "give the model that it was built from: {}",
                manifest.teacher.name
            ),
        });
    }
    if student.fingerprint != manifest.tokenizer.fingerprint {
        return Err(Error::Option {
            problem: format!(
                "the student `{}` has another tokenizer than the cache",
                student.name
            ),
            hint: "give a student of the same model family".into(),
        });
    }
    let spec = manifest.spec();
    let columns = columns(&spec);
    let mut sequences = Vec::new();
    for row in last_rows(cache.rows()?, positions) {
        sequences.extend(cache.read(row.shard, &[row.row], &columns)?);
    }
    let ids = ids(&sequences, positions);
    tch::no_grad(|| {
        measure(
            &Side::of_model(teacher, &ids),
            &Side::of_model(student, &ids),
            &student.name,
            &spec,
            cache.basis()?.as_deref(),
            &sequences,
        )
    })
}

/// A model as a measurement sees it, in f32 on the CPU.
pub(crate) struct Side {
    /// LM head [V, D].
    head: Tensor,
    /// Last hidden states of the sample's positions, one after the other: [N, D].
    hidden: Tensor,
}

impl Side {
    fn new(head: &Tensor, hidden: &[Tensor]) -> Side {
        Side {
            head: wide(&head.detach()),
            hidden: joined(hidden),
        }
    }

    fn of_model(model: &LoadedModel, sequences: &[Vec<i64>]) -> Side {
        let order = longest_first(sequences);
        let mut hidden: Vec<Option<Tensor>> = sequences.iter().map(|_| None).collect();
        let pass = |network: &Network, index: &usize| {
            let ids = Tensor::from_slice(&sequences[*index]).unsqueeze(0);
            let ids = ids.to_device(network.device());
            network.forward(&ids, &[], false).last_hidden
        };
        side_by_side(&model.network, &order, pass, |at, found| {
            hidden[order[at]] = Some(found);
        });
        let hidden: Vec<Tensor> = hidden.into_iter().flatten().collect();
        Side::new(model.network.head(), &hidden)
    }
}

fn wide(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::Float).to_device(Device::Cpu)
}

/// Hidden states of batches, each [1, T, D], one after the other: [N, D].
fn joined(hidden: &[Tensor]) -> Tensor {
    let hidden: Vec<Tensor> = hidden.iter().map(|one| wide(&one.squeeze_dim(0))).collect();
    Tensor::cat(&hidden, 0)
}

/// Measures rows of a cache under way: the teacher against itself without a quarter of its FFN channels, which goes through
/// layer by layer and never is in memory whole.
pub(crate) fn measure_build(
    teacher: &Teacher,
    spec: &CacheSpec,
    basis: Option<&Basis>,
    sequences: &[Sequence],
) -> Result<Fidelity> {
    let ids = ids(sequences, SAMPLE_POSITIONS);
    tch::no_grad(|| {
        let head = teacher.head()?;
        let states = through_teacher_and_pruned(teacher, &ids, PRUNED)?;
        let of_teacher = Side::new(&head, &states.teacher);
        let of_student = Side {
            head: of_teacher.head.shallow_clone(),
            hidden: joined(&states.pruned),
        };
        let student = pruned_name(&teacher.files().name);
        measure(&of_teacher, &of_student, &student, spec, basis, sequences)
    })
}

/// Bytes that a comparison takes, heads apart: logits of some positions as tensors and rows, and gradients by temperature.
pub(crate) fn bytes(vocab: u64) -> u64 {
    let logits = (LOGITS as u64).min(ROWS as u64 * vocab);
    let figures = 2 * Fidelity::keys().count() as u64 * vocab * PROJECTED as u64;
    4 * (LOGIT_COPIES * logits + figures)
}

/// Seconds that the comparison of `hidden` [N, D] over a `head` [V, D] takes, both f32 on the CPU, beside the passes of
/// teacher and student.
pub(crate) fn rehearse(hidden: &Tensor, head: &Tensor) -> Result<f64> {
    let rows = hidden.size()[0];
    let width = PROJECTED.min(hidden.size()[1]);
    let mut features = Vec::new();
    copy(&hidden.narrow(1, 0, width), &mut features)?;
    let mut figures = Figures::new(head.size()[0], width);
    let scales = Scales {
        teacher: 1.0,
        student: 1.0,
        rebuilt: 1.0,
    };
    let mut chunk = Chunk::default();
    let mut seconds = f64::INFINITY;
    // The first time memory is new.
    for _ in 0..2 {
        let started = Instant::now();
        for values in [&mut chunk.teacher, &mut chunk.student, &mut chunk.rebuilt] {
            copy(&linear(hidden, head, None), values)?;
        }
        chunk.add_dual_scaling(&mut figures, None, &features)?;
        let once = started.elapsed().as_secs_f64();
        let started = Instant::now();
        chunk.add(&mut figures, &vec![scales; rows as usize], &features);
        let temperature = started.elapsed().as_secs_f64();
        seconds = seconds.min(once + TEMPERATURES.len() as f64 * temperature);
    }
    Ok(seconds)
}

/// Ids of so many positions, by sequence; the last is cut where it goes beyond them.
fn ids(sequences: &[Sequence], positions: usize) -> Vec<Vec<i64>> {
    let mut left = positions;
    let cut = |sequence: &Sequence| {
        let ids = sequence.token_ids.iter().take(left);
        let ids: Vec<i64> = ids.map(|id| i64::from(*id)).collect();
        left -= ids.len();
        ids
    };
    sequences
        .iter()
        .map(cut)
        .filter(|ids| !ids.is_empty())
        .collect()
}

fn pruned_name(of: &str) -> String {
    format!("{of} without {:.0}% of its FFN channels", 100.0 * PRUNED)
}

/// The columns that a measurement reads.
pub(crate) fn columns(spec: &CacheSpec) -> Columns {
    Columns {
        statistics: true,
        top_k: spec.top_k > 0,
        coefficients: spec.tier == Tier::Compact,
        layers: match spec.tier {
            Tier::Exact => vec![spec.teacher.num_layers],
            Tier::Sparse | Tier::Compact => Vec::new(),
        },
    }
}

/// Rows of the highest split hash that hold so many positions: a fit takes those of the lowest.
fn last_rows(mut rows: Vec<RowInfo>, positions: usize) -> Vec<RowInfo> {
    rows.sort_by_key(|row| (std::cmp::Reverse(row.split_hash), row.shard, row.row));
    let mut held = 0;
    rows.into_iter()
        .take_while(|row| {
            let more = held < positions;
            held += row.positions as usize;
            more
        })
        .collect()
}

/// Shard and row of the sequences of the highest split hash: what a build measures.
pub(crate) fn sample_places(
    sequences: &[TokenizedSequence],
    shards: &[Range<usize>],
) -> Vec<(usize, u32)> {
    let mut all = Vec::with_capacity(sequences.len());
    for (shard, range) in shards.iter().enumerate() {
        for (row, sequence) in sequences[range.clone()].iter().enumerate() {
            let hash = split_hash(&sequence.token_ids);
            all.push((hash, shard, row as u32, sequence.token_ids.len()));
        }
    }
    all.sort_by_key(|(hash, shard, row, _)| (std::cmp::Reverse(*hash), *shard, *row));
    let mut held = 0;
    all.into_iter()
        .take_while(|(.., positions)| {
            let more = held < SAMPLE_POSITIONS;
            held += positions;
            more
        })
        .map(|(_, shard, row, _)| (shard, row))
        .collect()
}

/// Measures decoded sequences, which were read with [`columns`].
fn measure(
    of_teacher: &Side,
    of_student: &Side,
    student: &str,
    spec: &CacheSpec,
    basis: Option<&Basis>,
    sequences: &[Sequence],
) -> Result<Fidelity> {
    let (teacher_hidden, student_hidden) = (&of_teacher.hidden, &of_student.hidden);
    let (of_teacher, of_student) = (&of_teacher.head, &of_student.head);
    let common = of_teacher.size()[0].min(of_student.size()[0]);
    let rebuilt = Rebuilt::of(spec, basis, of_teacher, sequences)?;
    let projected = project(student_hidden);
    let rows = teacher_hidden.size()[0];
    // A last batch that is not whole would weigh as much as a whole one.
    let whole = if rows > BATCH {
        rows / BATCH * BATCH
    } else {
        rows
    };
    let mut totals: BTreeMap<String, Figures> = Fidelity::keys()
        .map(|key| (key, Figures::new(common, projected.size()[1])))
        .collect();
    // Logits of both vocabularies exist for a moment only: what follows is over the common one.
    let rows_at_once = (LOGITS / common).clamp(1, ROWS);
    let (mut chunk, mut features) = (Chunk::default(), Vec::new());
    for batch in (0..whole).step_by(BATCH as usize) {
        let end = whole.min(batch + BATCH);
        for first in (batch..end).step_by(rows_at_once as usize) {
            let count = rows_at_once.min(end - first);
            let of = |hidden: &Tensor, head: &Tensor| {
                linear(&hidden.narrow(0, first, count), head, None).narrow(1, 0, common)
            };
            copy(&of(teacher_hidden, of_teacher), &mut chunk.teacher)?;
            copy(&of(student_hidden, of_student), &mut chunk.student)?;
            let logits = rebuilt.logits(first, count);
            copy(&projected.narrow(0, first, count), &mut features)?;
            let at_one = rebuilt.at_temperature_one(&logits, first, count);
            copy(&at_one.narrow(1, 0, common), &mut chunk.rebuilt)?;
            for temperature in TEMPERATURES {
                if let Some(figures) = totals.get_mut(&temperature.to_string()) {
                    let scale = 1.0 / temperature as f32;
                    let scales = Scales {
                        teacher: scale,
                        student: scale,
                        rebuilt: scale,
                    };
                    chunk.add(figures, &vec![scales; count as usize], &features);
                }
                // Beyond temperature 1, the first, the rebuilt logits are as they come.
                if temperature == 1 {
                    copy(&logits.narrow(1, 0, common), &mut chunk.rebuilt)?;
                }
            }
            if let Some(figures) = totals.get_mut("dual-scaling") {
                // That of the whole vocabulary.
                let known = rebuilt
                    .sigma(first, count)
                    .filter(|_| common == of_teacher.size()[0]);
                chunk.add_dual_scaling(figures, known.as_ref(), &features)?;
            }
        }
        totals.values_mut().for_each(Figures::end_batch);
    }
    let figures = |of: &dyn Fn(&Figures) -> f64| {
        totals
            .iter()
            .map(|(key, figures)| (key.clone(), Fidelity::rounded(of(figures))))
            .collect()
    };
    Ok(Fidelity {
        positions: whole as u64,
        batch_positions: whole.min(BATCH) as u64,
        student: student.to_owned(),
        tail: (spec.tier == Tier::Sparse).then(|| "uniform".to_owned()),
        kl: figures(&|figures| figures.kl / whole.max(1) as f64),
        gradient_error: figures(&|figures| {
            (figures.squared_errors / figures.batches.max(1.0)).sqrt()
        }),
    })
}

/// What is added up for one temperature.
struct Figures {
    kl: f64,
    /// Of the batch under way: the projected gradient [P, V] and what the rebuilt logits add to it.
    gradient: Mat<f32>,
    error: Mat<f32>,
    squared_errors: f64,
    batches: f64,
}

impl Figures {
    fn new(vocab: i64, features: i64) -> Figures {
        let zeros = || Mat::zeros(features as usize, vocab as usize);
        Figures {
            kl: 0.0,
            gradient: zeros(),
            error: zeros(),
            squared_errors: 0.0,
            batches: 0.0,
        }
    }

    fn end_batch(&mut self) {
        let norm = |values: &Mat<f32>| -> f64 {
            let columns = values.col_iter();
            columns
                .map(|column| column.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>())
                .sum()
        };
        self.squared_errors += norm(&self.error) / norm(&self.gradient).max(f64::MIN_POSITIVE);
        self.batches += 1.0;
        self.gradient.fill(0.0);
        self.error.fill(0.0);
    }
}

/// Logits of some positions over the common vocabulary, each [N·V].
#[derive(Default)]
struct Chunk {
    teacher: Vec<f32>,
    student: Vec<f32>,
    rebuilt: Vec<f32>,
    /// q − p and p − r.
    gradient: Vec<f32>,
    error: Vec<f32>,
}

impl Chunk {
    /// Adds (q − p)ᵀ·f and (p − r)ᵀ·f for features f [N, P].
    fn add(&mut self, figures: &mut Figures, scales: &[Scales], features: &[f32]) {
        self.gradient.resize(self.teacher.len(), 0.0);
        self.error.resize(self.teacher.len(), 0.0);
        let logits = Logits {
            teacher: &self.teacher,
            student: &self.student,
            rebuilt: &self.rebuilt,
        };
        figures.kl += compare(logits, scales, &mut self.gradient, &mut self.error);
        add_product(&mut figures.gradient, &self.gradient, features);
        add_product(&mut figures.error, &self.error, features);
    }

    /// `rebuilt_sigma` [N, 1] are those that the cache knows.
    fn add_dual_scaling(
        &mut self,
        figures: &mut Figures,
        rebuilt_sigma: Option<&Tensor>,
        features: &[f32],
    ) -> Result<()> {
        let vocab = figures.gradient.ncols();
        let of_teacher = deviations(&self.teacher, vocab, "teacher")?;
        let of_student = deviations(&self.student, vocab, "student")?;
        let mut of_rebuilt = Vec::new();
        match rebuilt_sigma {
            Some(known) => copy(known, &mut of_rebuilt)?,
            None => of_rebuilt = deviations(&self.rebuilt, vocab, "cache")?,
        }
        let scale = |sigma: f32| (f64::from(sigma) * SCALING_VALUE).recip() as f32;
        let scales: Vec<Scales> = of_teacher
            .iter()
            .zip(&of_student)
            .zip(&of_rebuilt)
            .map(|((&teacher, &student), &rebuilt)| Scales {
                teacher: scale(teacher),
                student: scale(student),
                rebuilt: scale(rebuilt),
            })
            .collect();
        // dL/d(student's logits) = (q − p) / (σ_s · b): b is the same everywhere.
        let width = features.len() / scales.len().max(1);
        let features: Vec<f32> = features
            .iter()
            .enumerate()
            .map(|(index, feature)| feature / of_student[index / width])
            .collect();
        self.add(figures, &scales, &features);
        Ok(())
    }
}

/// σ of rows of logits [N·V], over V: \[N\].
fn deviations(logits: &[f32], vocab: usize, whose: &str) -> Result<Vec<f32>> {
    let mut statistics = Statistics::default();
    let mut top = TopK {
        k: 1,
        ..TopK::default()
    };
    summarize_logits(logits, vocab, &mut statistics, &mut top).map_err(|row| Error::NotFinite {
        what: format!("logits of the {whose}"),
        source_name: "the sample of the fidelity report".into(),
        position: row,
    })?;
    Ok(statistics.std)
}

/// sum [P, V] += featuresᵀ · difference, of features [N, P] and difference [N, V] by rows. Threads share columns: their
/// number changes nothing.
fn add_product(sum: &mut Mat<f32>, difference: &[f32], features: &[f32]) {
    let (width, vocab) = sum.shape();
    let rows = features.len() / width.max(1);
    matmul(
        sum,
        Accum::Add,
        MatRef::from_column_major_slice(features, width, rows),
        MatRef::from_column_major_slice(difference, vocab, rows).transpose(),
        1.0,
        Par::rayon(tch::get_num_threads().max(1) as usize),
    );
}

/// The numbers of a tensor, in place of what `values` held.
fn copy(tensor: &Tensor, values: &mut Vec<f32>) -> Result<()> {
    values.resize(tensor.numel(), 0.0);
    tensor
        .contiguous()
        .f_copy_data(values, tensor.numel())
        .map_err(torch("reading logits"))
}

/// [N, D] → [N, 64] by a fixed Gaussian matrix; narrower states stay as they are.
fn project(hidden: &Tensor) -> Tensor {
    let width = hidden.size()[1];
    if width <= PROJECTED {
        return hidden.shallow_clone();
    }
    let mut rng = SeededRng::named(0, "fidelity");
    let values: Vec<f32> = (0..width * PROJECTED)
        .map(|_| rng.normal() as f32)
        .collect();
    hidden.matmul(&Tensor::from_slice(&values).view([width, PROJECTED]))
}
