//! The stage: one pass of the teacher over the data, written shard by shard.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use caskd_formats::{
    Basis, CacheSpec, CacheWriter, Columns, DataInfo, Fidelity, HeadDtype, HeadWeights,
    HiddenState, LayerSpec, Manifest, Sequence, Statistics, TeacherInfo, Tier, TokenizerInfo, TopK,
    split_hash, stored_code,
};
use caskd_models::{LoadOptions, LoadedModel};
use crossbeam_channel::bounded;
use tch::{Device, Kind, Tensor};

use crate::data::{
    BadRecord, DataEvent, TokenizedData, TokenizedSequence, tokenize, validation_sequences,
};
use crate::fidelity;
use crate::options::{BuildOptions, USUAL_TOP_K};
use crate::statistics::{round_statistics, snap_top_k, summarize_logits};
use crate::transform_fit::{
    self, Coder, FIT_POSITIONS, HELD_OUT_POSITIONS, LEAST_FIT_POSITIONS, MOST_K, Sample,
};
use crate::{Error, Result};

/// Positions whose logits exist at one time: V of them take 50 MB at V = 49,152.
const HEAD_ROWS: i64 = 256;

/// Hidden-state bytes (as f32) that one shard may hold in memory.
const SHARD_BYTES: usize = 256 << 20;

/// Sequences in a shard at most.
const SHARD_SEQUENCES: usize = 256;

/// Positions that a build measures its fidelity on.
const FIDELITY_POSITIONS: usize = 1024;

/// What the build is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The data files are read; the counts are bytes of them.
    Reading,
    /// The teacher reads the sample that the compact tier's basis is fitted on.
    Fitting,
    /// The teacher reads the data.
    Building,
    /// What is in the cache is compared with the teacher.
    Measuring,
}

/// How far the build is.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Progress<'a> {
    /// What it is at; the counts are those of this stage.
    pub stage: Stage,
    /// Positions whose teacher values are known, those of finished shards included.
    pub positions_done: u64,
    /// All positions.
    pub positions_total: u64,
    /// Positions a second of teacher time in this run.
    pub tokens_per_second: f64,
    /// A record that has just been passed over.
    pub bad_record: Option<&'a BadRecord>,
}

/// What a build did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct BuildReport {
    /// False when it was stopped and can be resumed.
    pub completed: bool,
    /// Sequences in the cache.
    pub sequences: u64,
    /// Positions in the cache.
    pub positions: u64,
    /// Positions that a loss may ask for.
    pub targets: u64,
    /// Sequences of the validation split.
    pub validation_sequences: u64,
    /// Records read, bad ones included; a text file is one.
    pub records: u64,
    /// Records that could not be used.
    pub bad_records: u64,
    /// The first of them.
    pub bad: Vec<BadRecord>,
    /// Sequences left out because the same tokens had come before.
    pub duplicates: u64,
    /// Records cut at the longest length.
    pub truncated: u64,
    /// Tokens that were cut off them.
    pub truncated_tokens: u64,
    /// Records dropped because the cut left no target.
    pub skipped: u64,
    /// The date that the chat template wrote into the prompts, where it asked for one.
    pub chat_date: Option<String>,
    /// Shards of the cache.
    pub shards: usize,
    /// Shards that an earlier, interrupted build had finished.
    pub shards_reused: usize,
    /// Positions that went through the teacher in this run.
    pub teacher_positions: u64,
    /// Seconds spent in the teacher (forward pass, head, statistics) in this run.
    pub teacher_seconds: f64,
    /// Of these, seconds in statistics and top-k.
    pub statistics_seconds: f64,
    /// Seconds in encoding shards, beside the teacher's.
    pub encoding_seconds: f64,
    /// Seconds in the fit of the compact tier, its teacher pass over the sample included.
    pub fit_seconds: f64,
    /// The compact tier's K, and coefficients of a position.
    pub code: Option<(usize, usize)>,
    /// How near the cache is to the teacher, where it was measured.
    pub fidelity: Option<Fidelity>,
    /// Seconds from start to end, loading and writing included.
    pub seconds: f64,
    /// Positions a second of teacher time.
    pub tokens_per_second: f64,
    /// Size of the cache's files; 0 while it is not complete.
    pub cache_bytes: u64,
}

/// Builds the cache that `options` ask for. Stops between batches once `stop` is set; what is
/// finished then is kept, and the same call with `resume` completes it to the same bytes.
///
/// # Errors
/// Bad data, options that don't fit the teacher, values that are not finite, a folder or disk
/// that can't take the cache. Nothing is left under a final name that is not whole.
pub fn build(
    options: &BuildOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<BuildReport> {
    let started = Instant::now();
    check_options(options)?;
    let teacher = caskd_models::load(
        &options.teacher,
        &LoadOptions {
            device: options.device,
            kind: options.kind,
        },
    )?;
    let Some(data) = read_data(options, &teacher, stop, progress)? else {
        return Ok(BuildReport {
            seconds: started.elapsed().as_secs_f64(),
            ..BuildReport::default()
        });
    };
    let mut spec = cache_spec(options, &teacher, data.info)?;
    let about_data = data_report(&spec.data, &data.sequences, data.bad_records);
    let fit_started = Instant::now();
    let mut basis = None;
    if options.tier == Tier::Compact {
        CacheWriter::check_folder(&options.out, options.resume)?;
        let fitted = fit_code(
            options,
            &teacher,
            &mut spec,
            &data.sequences,
            stop,
            progress,
        )?;
        let Some(fitted) = fitted else {
            return Ok(BuildReport {
                fit_seconds: fit_started.elapsed().as_secs_f64(),
                seconds: started.elapsed().as_secs_f64(),
                ..about_data
            });
        };
        basis = Some(fitted);
    }
    let fit_seconds = fit_started.elapsed().as_secs_f64();
    let mut writer = CacheWriter::open(&options.out, &spec, options.resume)?;
    write_head(&mut writer, &teacher)?;
    if let Some(basis) = &basis {
        writer.write_basis(basis.clone())?;
    }

    let shards: Vec<Range<usize>> = shard_ranges(data.sequences.len(), spec.sequences_per_shard);
    let pending: Vec<usize> = (0..shards.len())
        .filter(|&shard| !writer.is_done(shard))
        .collect();
    let reused: u64 = (0..shards.len())
        .filter(|shard| !pending.contains(shard))
        .map(|shard| {
            data.sequences[shards[shard].clone()]
                .iter()
                .map(|sequence| sequence.token_ids.len() as u64)
                .sum::<u64>()
        })
        .sum();
    let mut pass = TeacherPass::new(&teacher, &spec, options.batch_tokens, stop);
    pass.coder = basis.as_ref().map(Coder::new);
    let positions_total = spec.data.positions;
    let mut on_batch = |pass: &PassTotals| {
        progress(&Progress {
            stage: Stage::Building,
            positions_done: reused + pass.positions,
            positions_total,
            tokens_per_second: pass.positions as f64 / pass.teacher_seconds.max(1e-9),
            bad_record: None,
        });
    };

    // Writing a shard overlaps the teacher's work on the next one.
    let (mut writer, completed, encoding_seconds) = std::thread::scope(|scope| {
        let (sender, receiver) = bounded::<(usize, Vec<Sequence>)>(1);
        let writing = scope.spawn(move || -> Result<(CacheWriter, f64)> {
            let mut seconds = 0.0;
            for (shard, sequences) in receiver {
                let started = Instant::now();
                writer.write_shard(shard, &sequences)?;
                seconds += started.elapsed().as_secs_f64();
            }
            Ok((writer, seconds))
        });
        let computed: Result<bool> = (|| {
            for &shard in &pending {
                let Some(sequences) =
                    pass.run(&data.sequences[shards[shard].clone()], &mut on_batch)?
                else {
                    return Ok(false);
                };
                if sender.send((shard, sequences)).is_err() {
                    return Ok(false); // the writing thread failed; its error follows below
                }
            }
            Ok(true)
        })();
        drop(sender);
        let (writer, seconds) = writing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok::<_, Error>((writer, computed?, seconds))
    })?;

    if completed && options.fidelity && !writer.is_finished() {
        progress(&Progress {
            stage: Stage::Measuring,
            positions_done: 0,
            positions_total: FIDELITY_POSITIONS as u64,
            tokens_per_second: 0.0,
            bad_record: None,
        });
        let sample = read_back(&writer, &spec, &data.sequences, &shards)?;
        let load = caskd_models::LoadOptions {
            device: options.device,
            kind: options.kind,
        };
        let student = fidelity::pruned_teacher(&options.teacher, &load)?;
        let report = fidelity::measure(&teacher, &student, &spec, basis.as_ref(), &sample)?;
        writer.set_fidelity(report);
    }
    let manifest = if completed {
        Some(writer.finish()?)
    } else {
        None
    };
    let totals = pass.totals;
    Ok(BuildReport {
        completed,
        shards: shards.len(),
        shards_reused: shards.len() - pending.len(),
        teacher_positions: totals.positions,
        teacher_seconds: totals.teacher_seconds,
        statistics_seconds: totals.statistics_seconds,
        encoding_seconds,
        fit_seconds,
        code: spec.code.as_ref().map(|code| (spec.top_k, code.basis.rank)),
        fidelity: manifest
            .as_ref()
            .and_then(|manifest| manifest.fidelity.clone()),
        seconds: started.elapsed().as_secs_f64(),
        tokens_per_second: totals.positions as f64 / totals.teacher_seconds.max(1e-9),
        cache_bytes: manifest.as_ref().map_or(0, cache_bytes),
        ..about_data
    })
}

/// Reads the data; `None` when stopped.
fn read_data(
    options: &BuildOptions,
    teacher: &LoadedModel,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Option<TokenizedData>> {
    let mut last = Progress {
        stage: Stage::Reading,
        positions_done: 0,
        positions_total: 0,
        tokens_per_second: 0.0,
        bad_record: None,
    };
    tokenize(
        teacher,
        &options.data,
        options.max_len,
        &options.preparation,
        stop,
        &mut |event| match event {
            DataEvent::Progress {
                bytes,
                total,
                tokens_per_second,
            } => {
                last.positions_done = bytes;
                last.positions_total = total;
                last.tokens_per_second = tokens_per_second;
                progress(&last);
            }
            DataEvent::BadRecord(bad) => progress(&Progress {
                bad_record: Some(bad),
                ..last
            }),
        },
    )
}

/// The part of the report that is known once the data are read.
fn data_report(
    data: &DataInfo,
    sequences: &[TokenizedSequence],
    bad: Vec<BadRecord>,
) -> BuildReport {
    BuildReport {
        sequences: data.sequences,
        positions: data.positions,
        targets: data.targets,
        validation_sequences: validation_sequences(sequences, data),
        records: data.preparation.records,
        bad_records: data.preparation.bad_records,
        bad,
        duplicates: data.preparation.duplicates,
        truncated: data.truncated,
        truncated_tokens: data.preparation.truncated_tokens,
        skipped: data.skipped,
        chat_date: data.preparation.chat_date.clone(),
        ..BuildReport::default()
    }
}

fn cache_bytes(manifest: &Manifest) -> u64 {
    manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>()
        + manifest.head.as_ref().map_or(0, |head| head.bytes)
        + manifest.code.as_ref().map_or(0, |code| code.basis.bytes)
}

/// Completes the spec of a compact cache by its code: the one that an interrupted build left, or a new fit. `None` when
/// stopped.
fn fit_code(
    options: &BuildOptions,
    teacher: &LoadedModel,
    spec: &mut CacheSpec,
    sequences: &[TokenizedSequence],
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Option<Basis>> {
    let wanted = options.top_k;
    if let Some((code, basis)) = stored_code(&options.out)?
        && code.target == options.code_target
        && wanted.is_none_or(|k| k == basis.k())
        && basis.vocab_size() == spec.vocab_size
        && basis.width() == spec.teacher.hidden_size
    {
        // Whether everything else of the plan is the same, the writer will see.
        spec.top_k = basis.k();
        spec.code = Some(code);
        return Ok(Some(basis));
    }
    let (chosen, fitted, held_out) = choose_sample(sequences);
    let positions_total = chosen
        .iter()
        .map(|sequence| sequence.token_ids.len() as u64)
        .sum();
    let mut pass = TeacherPass::new(teacher, spec, options.batch_tokens, stop);
    pass.top_k = wanted.unwrap_or(0).max(MOST_K).min(spec.vocab_size);
    pass.layers = vec![spec.teacher.num_layers];
    let read = pass.run(&chosen, &mut |pass| {
        progress(&Progress {
            stage: Stage::Fitting,
            positions_done: pass.positions,
            positions_total,
            tokens_per_second: pass.positions as f64 / pass.teacher_seconds.max(1e-9),
            bad_record: None,
        });
    })?;
    let Some(sequences) = read else {
        return Ok(None);
    };
    let sample = Sample {
        sequences,
        fitted,
        held_out,
    };
    let head = teacher.network.head().detach().to_kind(Kind::Float);
    let (code, basis) = transform_fit::fit(&sample, spec, &head, options.code_target, wanted)?;
    spec.top_k = basis.k();
    spec.code = Some(code);
    Ok(Some(basis))
}

/// Sequences of the lowest split hash: those to fit on, then those to choose step and K on. Where the data hold no more
/// than that, all of them are fitted on, and the last quarter serves twice.
fn choose_sample(sequences: &[TokenizedSequence]) -> (Vec<TokenizedSequence>, usize, usize) {
    let mut order: Vec<(u64, usize)> = sequences
        .iter()
        .enumerate()
        .map(|(index, sequence)| (split_hash(&sequence.token_ids), index))
        .collect();
    order.sort_unstable();
    let mut chosen = Vec::new();
    let all: usize = sequences
        .iter()
        .map(|sequence| sequence.token_ids.len())
        .sum();
    // A quarter of small data stays held out.
    let to_fit = FIT_POSITIONS.min((all / 4 * 3).max(LEAST_FIT_POSITIONS));
    let (mut positions, mut fitted) = (0, None);
    for (_, index) in order {
        if positions >= to_fit && fitted.is_none() {
            fitted = Some(chosen.len());
        }
        if positions >= to_fit + HELD_OUT_POSITIONS {
            break;
        }
        positions += sequences[index].token_ids.len();
        chosen.push(sequences[index].clone());
    }
    match fitted {
        Some(fitted) if positions >= to_fit + HELD_OUT_POSITIONS / 2 => (chosen, fitted, fitted),
        _ => {
            let (all, last) = (chosen.len(), chosen.len() / 4 * 3);
            (chosen, all, last.min(all.saturating_sub(1)))
        }
    }
}

/// The sequences of the highest split hash as the cache has them.
fn read_back(
    writer: &CacheWriter,
    spec: &CacheSpec,
    sequences: &[TokenizedSequence],
    shards: &[Range<usize>],
) -> Result<Vec<Sequence>> {
    let columns: Columns = fidelity::columns(spec);
    let mut places = Vec::new();
    for (shard, range) in shards.iter().enumerate() {
        for (row, sequence) in sequences[range.clone()].iter().enumerate() {
            places.push((split_hash(&sequence.token_ids), shard, row as u32));
        }
    }
    places.sort_by_key(|(hash, shard, row)| (std::cmp::Reverse(*hash), *shard, *row));
    let mut sample = Vec::new();
    let mut positions = 0;
    for (_, shard, row) in places {
        if positions >= FIDELITY_POSITIONS {
            break;
        }
        let read = writer.read_back(shard, row, &columns)?;
        positions += read.token_ids.len();
        sample.push(read);
    }
    Ok(sample)
}

fn check_options(options: &BuildOptions) -> Result<()> {
    let refuse = |problem: &str, hint: &str| {
        Err(Error::Option {
            problem: problem.into(),
            hint: hint.into(),
        })
    };
    if options.top_k == Some(0) {
        return refuse("--top-k 0 keeps nothing", "give at least 1");
    }
    if options.max_len < 2 {
        return refuse(
            "--max-len is too short",
            "a sequence needs two tokens: one to predict from and one to predict",
        );
    }
    if !matches!(options.kind, Kind::Float | Kind::BFloat16) {
        return refuse(
            "the teacher computes in f32 or bf16 only",
            "give --dtype f32 or --dtype bf16",
        );
    }
    Ok(())
}

fn cache_spec(options: &BuildOptions, teacher: &LoadedModel, data: DataInfo) -> Result<CacheSpec> {
    let (vocab_size, width) = head_shape(teacher);
    let top_k = options.top_k.unwrap_or(USUAL_TOP_K.min(vocab_size));
    if top_k > vocab_size {
        return Err(Error::Option {
            problem: format!(
                "--top-k {top_k} is larger than the teacher's vocabulary of {vocab_size}"
            ),
            hint: "64 is a good choice; statistics and the exact tier cover the rest".into(),
        });
    }
    let num_layers = teacher.network.num_layers() as u32;
    let layers = options
        .layers
        .resolve(num_layers, width, options.tier, options.hidden_codec)?;
    Ok(CacheSpec {
        tier: options.tier,
        top_k,
        vocab_size,
        code: None,
        sequences_per_shard: sequences_per_shard(options.max_len, &layers),
        layers,
        teacher: TeacherInfo {
            name: teacher.name.clone(),
            architecture: teacher.network.architecture().into(),
            digest: teacher.digest.clone(),
            compute_dtype: if options.kind == Kind::BFloat16 {
                "bf16"
            } else {
                "f32"
            }
            .into(),
            num_layers,
            hidden_size: width,
            num_parameters: teacher.network.num_parameters(),
        },
        tokenizer: TokenizerInfo {
            fingerprint: teacher.fingerprint.clone(),
            vocab_size: teacher.tokenizer.get_vocab_size(true),
        },
        data,
        max_len: options.max_len,
    })
}

fn head_shape(teacher: &LoadedModel) -> (usize, usize) {
    let size = teacher.network.head().size();
    (size[0] as usize, size[1] as usize)
}

/// So many sequences that the longest possible ones fit into [`SHARD_BYTES`].
fn sequences_per_shard(max_len: usize, layers: &[LayerSpec]) -> usize {
    let width: usize = layers.iter().map(|layer| layer.width).sum();
    (SHARD_BYTES / (max_len * width * 4).max(1)).clamp(1, SHARD_SEQUENCES)
}

fn shard_ranges(sequences: usize, per_shard: usize) -> Vec<Range<usize>> {
    (0..sequences)
        .step_by(per_shard)
        .map(|start| start..sequences.min(start + per_shard))
        .collect()
}

/// Stores the LM head in the narrowest type that holds it exactly, or else in f16 (whose rounding,
/// 2⁻¹² of a weight, is far below that of the 8-bit hidden states), or f32 where f16 overflows.
fn write_head(writer: &mut CacheWriter, teacher: &LoadedModel) -> Result<()> {
    let (vocab_size, width) = head_shape(teacher);
    let weights = to_f32_vec(&teacher.network.head().detach());
    let exact_bf16 = weights
        .iter()
        .all(|weight| half::bf16::from_f32(*weight).to_f32() == *weight);
    let fits_f16 = weights.iter().all(|weight| weight.abs() <= 65_504.0);
    let (dtype, bytes): (HeadDtype, Vec<u8>) = if exact_bf16 {
        (
            HeadDtype::Bf16,
            weights
                .iter()
                .flat_map(|weight| half::bf16::from_f32(*weight).to_le_bytes())
                .collect(),
        )
    } else if fits_f16 {
        (
            HeadDtype::F16,
            weights
                .iter()
                .flat_map(|weight| half::f16::from_f32(*weight).to_le_bytes())
                .collect(),
        )
    } else {
        (
            HeadDtype::F32,
            weights
                .iter()
                .flat_map(|weight| weight.to_le_bytes())
                .collect(),
        )
    };
    Ok(writer.write_head(&HeadWeights {
        vocab_size,
        width,
        dtype,
        bytes: &bytes,
    })?)
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PassTotals {
    positions: u64,
    teacher_seconds: f64,
    statistics_seconds: f64,
}

/// The teacher and what is to be kept of it.
pub(crate) struct TeacherPass<'a> {
    teacher: &'a LoadedModel,
    /// `[V, D]` in f32: statistics of bf16-rounded logits would be off by up to 2⁻⁹ of a logit.
    head: Tensor,
    vocab_size: usize,
    top_k: usize,
    layers: Vec<u32>,
    /// Of the compact tier.
    coder: Option<Coder>,
    batch_tokens: usize,
    stop: &'a AtomicBool,
    logits: Vec<f32>,
    totals: PassTotals,
}

impl<'a> TeacherPass<'a> {
    pub(crate) fn new(
        teacher: &'a LoadedModel,
        spec: &CacheSpec,
        batch_tokens: usize,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            teacher,
            head: teacher
                .network
                .head()
                .detach()
                .to_kind(Kind::Float)
                .contiguous(),
            vocab_size: spec.vocab_size,
            top_k: spec.top_k,
            layers: spec.layers.iter().map(|layer| layer.layer).collect(),
            coder: None,
            batch_tokens,
            stop,
            logits: Vec::new(),
            totals: PassTotals::default(),
        }
    }

    /// The teacher's values for one shard, in the order of `sequences`; `None` when stopped.
    pub(crate) fn run(
        &mut self,
        sequences: &[TokenizedSequence],
        on_batch: &mut dyn FnMut(&PassTotals),
    ) -> Result<Option<Vec<Sequence>>> {
        let mut done: Vec<Option<Sequence>> = sequences.iter().map(|_| None).collect();
        for batch in batches_by_length(sequences, self.batch_tokens) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let started = Instant::now();
            let members: Vec<&TokenizedSequence> =
                batch.iter().map(|&index| &sequences[index]).collect();
            let results = tch::no_grad(|| self.run_batch(&members))?;
            for (&index, result) in batch.iter().zip(results) {
                self.totals.positions += result.token_ids.len() as u64;
                done[index] = Some(result);
            }
            self.totals.teacher_seconds += started.elapsed().as_secs_f64();
            on_batch(&self.totals);
        }
        Ok(Some(done.into_iter().flatten().collect()))
    }

    fn run_batch(&mut self, members: &[&TokenizedSequence]) -> Result<Vec<Sequence>> {
        let longest = members
            .iter()
            .map(|member| member.token_ids.len())
            .max()
            .unwrap_or(0);
        let mut padded = vec![0i64; members.len() * longest];
        for (row, member) in padded.chunks_exact_mut(longest).zip(members) {
            for (slot, &id) in row.iter_mut().zip(&member.token_ids) {
                *slot = i64::from(id);
            }
        }
        let input_ids = Tensor::from_slice(&padded)
            .view([members.len() as i64, longest as i64])
            .to_device(self.teacher.network.device());
        let forward = self
            .teacher
            .network
            .forward(&input_ids, &self.layers, false);

        let real = real_positions(members, longest);
        let gather = |states: &Tensor| {
            states
                .flatten(0, 1)
                .index_select(0, &real.to_device(states.device()))
        };
        let mut kept = Vec::new();
        for (layer, states) in &forward.hidden {
            kept.push((
                *layer,
                to_f32_vec(&gather(states)),
                states.size()[2] as usize,
            ));
        }
        let last_hidden = gather(&forward.last_hidden);
        let (mut statistics, mut top_k) = self
            .summarize(&last_hidden)
            .map_err(|position| not_finite("logits", members, position))?;
        let mut coefficients = Vec::new();
        if let Some(coder) = &self.coder {
            let started = Instant::now();
            round_statistics(&mut statistics);
            snap_top_k(&mut top_k, &statistics.max);
            let masks: Vec<&[bool]> = members
                .iter()
                .map(|member| member.loss_mask.as_slice())
                .collect();
            coefficients = coder.code(&last_hidden, &masks)?;
            self.totals.statistics_seconds += started.elapsed().as_secs_f64();
        }
        let mut coefficients = coefficients.into_iter();

        let mut results = Vec::with_capacity(members.len());
        let mut first = 0;
        for member in members {
            let rows = first..first + member.token_ids.len();
            first = rows.end;
            results.push(Sequence {
                source: member.source.clone(),
                token_ids: member.token_ids.clone(),
                loss_mask: member.loss_mask.clone(),
                statistics: Some(slice_statistics(&statistics, rows.clone())),
                top_k: Some(TopK {
                    k: self.top_k,
                    ids: top_k.ids[rows.start * self.top_k..rows.end * self.top_k].to_vec(),
                    logits: top_k.logits[rows.start * self.top_k..rows.end * self.top_k].to_vec(),
                }),
                hidden: kept
                    .iter()
                    .map(|(layer, values, width)| HiddenState {
                        layer: *layer,
                        width: *width,
                        values: values[rows.start * width..rows.end * width].to_vec(),
                    })
                    .collect(),
                coefficients: coefficients.next(),
            });
        }
        for (layer, values, width) in &kept {
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(not_finite(
                    &format!("hidden state of layer {layer}"),
                    members,
                    at / width,
                ));
            }
        }
        Ok(results)
    }

    /// Statistics and top-k of the logits of `last_hidden` `[N, D]`; the index of a bad row as error.
    fn summarize(
        &mut self,
        last_hidden: &Tensor,
    ) -> std::result::Result<(Statistics, TopK), usize> {
        let mut statistics = Statistics::default();
        let mut top_k = TopK {
            k: self.top_k,
            ids: Vec::new(),
            logits: Vec::new(),
        };
        let rows = last_hidden.size()[0];
        let mut first = 0;
        while first < rows {
            let count = HEAD_ROWS.min(rows - first);
            let hidden = last_hidden.narrow(0, first, count).to_kind(Kind::Float);
            let logits = caskd_models::linear(&hidden, &self.head, None)
                .to_device(Device::Cpu)
                .contiguous();
            let started = Instant::now();
            let length = count as usize * self.vocab_size;
            self.logits.resize(length, 0.0);
            logits.copy_data(&mut self.logits, length);
            summarize_logits(&self.logits, self.vocab_size, &mut statistics, &mut top_k)
                .map_err(|row| first as usize + row)?;
            self.totals.statistics_seconds += started.elapsed().as_secs_f64();
            first += count;
        }
        Ok((statistics, top_k))
    }
}

/// Indices into `sequences`, sorted by length so that little is padded, cut into batches of at
/// most `batch_tokens` padded tokens.
fn batches_by_length(sequences: &[TokenizedSequence], batch_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&index| sequences[index].token_ids.len());
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let length = sequences[index].token_ids.len();
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * length <= batch_tokens => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

/// The flat indices of the positions that are not padding, sequence by sequence.
fn real_positions(members: &[&TokenizedSequence], longest: usize) -> Tensor {
    let indices: Vec<i64> = members
        .iter()
        .enumerate()
        .flat_map(|(row, member)| {
            (0..member.token_ids.len()).map(move |position| (row * longest + position) as i64)
        })
        .collect();
    Tensor::from_slice(&indices)
}

/// Names the sequence that the flat `position` of a batch falls into.
fn not_finite(what: &str, members: &[&TokenizedSequence], position: usize) -> Error {
    let mut rest = position;
    for member in members {
        if rest < member.token_ids.len() {
            return Error::NotFinite {
                what: what.into(),
                source_name: member.source.clone(),
                position: rest,
            };
        }
        rest -= member.token_ids.len();
    }
    Error::NotFinite {
        what: what.into(),
        source_name: "a padded batch".into(),
        position: rest,
    }
}

fn slice_statistics(all: &Statistics, rows: Range<usize>) -> Statistics {
    Statistics {
        mean: all.mean[rows.clone()].to_vec(),
        std: all.std[rows.clone()].to_vec(),
        min: all.min[rows.clone()].to_vec(),
        max: all.max[rows.clone()].to_vec(),
        log_sum_exp: all.log_sum_exp[rows].to_vec(),
    }
}

fn to_f32_vec(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor
        .to_kind(Kind::Float)
        .to_device(Device::Cpu)
        .contiguous();
    let mut values = vec![0.0; tensor.numel()];
    let length = values.len();
    tensor.copy_data(&mut values, length);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lengths: &[usize]) -> Vec<TokenizedSequence> {
        lengths
            .iter()
            .map(|&length| TokenizedSequence {
                source: format!("s{length}"),
                token_ids: vec![1; length],
                loss_mask: vec![true; length],
            })
            .collect()
    }

    #[test]
    fn batches_hold_every_sequence_once_within_the_limit() {
        let all = sequences(&[5, 300, 7, 7, 2, 90, 41, 8, 64]);
        let batches = batches_by_length(&all, 100);
        let mut seen: Vec<usize> = batches.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..all.len()).collect::<Vec<_>>());
        for batch in &batches {
            let longest = batch
                .iter()
                .map(|&index| all[index].token_ids.len())
                .max()
                .unwrap();
            assert!(batch.len() == 1 || batch.len() * longest <= 100);
        }
    }

    #[test]
    fn a_bad_position_is_named_by_its_sequence() {
        let all = sequences(&[3, 4]);
        let members: Vec<&TokenizedSequence> = all.iter().collect();
        let error = not_finite("logits", &members, 5);
        assert_eq!(
            error.to_string(),
            "not finite: the teacher's logits of s4 at position 2"
        );
    }

    #[test]
    fn shards_cover_all_sequences() {
        assert_eq!(shard_ranges(5, 2), vec![0..2, 2..4, 4..5]);
        assert_eq!(shard_ranges(0, 2), Vec::<Range<usize>>::new());
    }
}
