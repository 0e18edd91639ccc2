//! Everything before the first shard: the options against the teacher, the spec of the cache, the compact tier's code.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use caskd_formats::{
    Basis, CacheSpec, CacheWriter, LayerSpec, TeacherInfo, Tier, TokenizerInfo, split_hash,
    stored_code,
};
use caskd_models::ModelFiles;
use tch::Kind;

use crate::build::{Progress, Stage};
use crate::data::{BadRecord, DataEvent, TokenizedData, TokenizedSequence, tokenize};
use crate::footprint::Footprint;
use crate::head::write_head;
use crate::options::{BuildOptions, USUAL_TOP_K};
use crate::teacher::Teacher;
use crate::teacher_pass::TeacherPass;
use crate::transform_fit::{
    self, FIT_POSITIONS, HELD_OUT_POSITIONS, LEAST_FIT_POSITIONS, MOST_K, Sample,
};
use crate::{Error, Result};

/// A build whose first shard can be computed.
pub(crate) struct Prepared {
    pub(crate) teacher: Teacher,
    /// Bytes of memory that the build will take.
    pub(crate) memory_bytes: u64,
    pub(crate) sequences: Vec<TokenizedSequence>,
    /// The first bad records.
    pub(crate) bad_records: Vec<BadRecord>,
    /// Sequences of each shard.
    pub(crate) shards: Vec<Range<usize>>,
    pub(crate) spec: CacheSpec,
    /// Has the LM head and the basis. `None` where the fit was stopped.
    pub(crate) writer: Option<CacheWriter>,
    pub(crate) load_seconds: f64,
    pub(crate) fit_seconds: f64,
}

/// Reads the data, loads the teacher, fits the compact tier's code and opens the cache. `None` where the
/// reading was stopped.
pub(crate) fn prepare(
    options: &BuildOptions,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Option<Prepared>> {
    let started = Instant::now();
    check_options(options)?;
    CacheWriter::check_folder(&options.out, options.resume)?;
    let files = ModelFiles::open(&options.teacher)?;
    let Some(data) = read_data(options, &files, stop, progress)? else {
        return Ok(None);
    };
    warn_beyond_context(&files, &data.sequences);
    let digest = files.digest();
    let spec = cache_spec(options, &files, digest.clone(), data.info)?;
    let mut footprint = Footprint::new(&files, options.kind, &spec, options.batch_tokens);
    if !options.fidelity {
        footprint.measuring = 0;
    }
    let teacher = Teacher::load(
        (files, digest),
        &options.teacher,
        options.kind,
        &options.placement,
        &footprint,
    )?;
    let mut prepared = Prepared {
        teacher,
        memory_bytes: footprint.plan(&options.placement)?.bytes,
        shards: shard_ranges(data.sequences.len(), spec.sequences_per_shard),
        sequences: data.sequences,
        bad_records: data.bad_records,
        spec,
        writer: None,
        load_seconds: started.elapsed().as_secs_f64(),
        fit_seconds: 0.0,
    };
    let mut basis = None;
    if options.tier == Tier::Compact {
        let fitting = Instant::now();
        let fitted = fit_code(
            options,
            &prepared.teacher,
            &mut prepared.spec,
            &prepared.sequences,
            stop,
            progress,
        )?;
        prepared.fit_seconds = fitting.elapsed().as_secs_f64();
        let Some(fitted) = fitted else {
            return Ok(Some(prepared));
        };
        basis = Some(fitted);
    }
    let mut writer = CacheWriter::open(&options.out, &prepared.spec, options.resume)?;
    if options.tier != Tier::Sparse {
        write_head(&mut writer, &prepared.teacher)?;
    }
    if let Some(basis) = basis {
        writer.write_basis(basis)?;
    }
    prepared.writer = Some(writer);
    Ok(Some(prepared))
}

/// Reads the data; `None` when stopped.
pub(crate) fn read_data(
    options: &BuildOptions,
    teacher: &ModelFiles,
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

pub(crate) fn warn_beyond_context(files: &ModelFiles, sequences: &[TokenizedSequence]) {
    let Some(context) = files.config().last_position() else {
        return;
    };
    let lengths = sequences.iter().map(|sequence| sequence.token_ids.len());
    let beyond = lengths.filter(|length| *length > context).count();
    if beyond > 0 {
        tracing::warn!(
            "{beyond} sequences are longer than the {context} positions that the teacher was made for (--max-len {context} cuts them)"
        );
    }
}

/// Hidden-state bytes (as f32) that one shard may hold in memory.
const SHARD_BYTES: usize = 256 << 20;

/// Sequences in a shard at most.
const SHARD_SEQUENCES: usize = 256;

pub(crate) fn check_options(options: &BuildOptions) -> Result<()> {
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

/// The spec of the cache that the options ask for; the compact tier's code is still missing.
pub(crate) fn cache_spec(
    options: &BuildOptions,
    files: &ModelFiles,
    digest: String,
    data: caskd_formats::DataInfo,
) -> Result<CacheSpec> {
    let config = files.config();
    let (vocab_size, width) = (config.vocab_size(), config.hidden_size());
    let top_k = options.top_k.unwrap_or(USUAL_TOP_K.min(vocab_size));
    if top_k > vocab_size {
        return Err(Error::Option {
            problem: format!(
                "--top-k {top_k} is larger than the teacher's vocabulary of {vocab_size}"
            ),
            hint: "64 is a good choice; statistics and the exact tier cover the rest".into(),
        });
    }
    let num_layers = config.num_layers() as u32;
    let layers = options
        .layers
        .resolve(num_layers, width, options.tier, options.hidden_codec)?;
    Ok(CacheSpec {
        origin: None,
        tier: options.tier,
        top_k,
        vocab_size,
        code: None,
        sequences_per_shard: sequences_per_shard(options.max_len, &layers),
        layers,
        teacher: TeacherInfo {
            name: files.name.clone(),
            architecture: config.architecture().into(),
            digest,
            compute_dtype: if options.kind == Kind::BFloat16 {
                "bf16"
            } else {
                "f32"
            }
            .into(),
            num_layers,
            hidden_size: width,
            num_parameters: files.num_parameters(),
        },
        tokenizer: TokenizerInfo {
            fingerprint: files.tokenizer.fingerprint.clone(),
            vocab_size: files.tokenizer.tokenizer.get_vocab_size(true),
        },
        data,
        max_len: options.max_len,
    })
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

/// Completes the spec of a compact cache by its code: the one that an interrupted build left, or a new fit. `None` when
/// stopped.
fn fit_code(
    options: &BuildOptions,
    teacher: &Teacher,
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
    let read = pass.run_one(chosen, &mut |pass| {
        progress(&Progress {
            stage: Stage::Fitting,
            positions_done: pass.positions + pass.under_way,
            positions_total,
            tokens_per_second: pass.tokens_per_second(),
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
    let head = teacher.head()?.to_kind(Kind::Float);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_all_sequences() {
        assert_eq!(shard_ranges(5, 2), vec![0..2, 2..4, 4..5]);
        assert_eq!(shard_ranges(0, 2), Vec::<Range<usize>>::new());
    }
}
