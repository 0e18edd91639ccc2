//! `caskd build`

use caskd_cache_builder::{BuildOptions, BuildReport, Stage, build};
use caskd_formats::{CodeTarget, HiddenCodec, Tier};

use super::data::{data_options, say_data};
use super::{kind_of, parse_device, print_json};
use crate::cli::{BuildArgs, HiddenArg, TierArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, bytes, duration, say};

/// Padded tokens of a teacher batch. Fixed, because another batch shape rounds differently.
pub(crate) const BATCH_TOKENS: usize = 2048;

/// Bytes a position of the compact tier where nothing else is asked for.
pub(crate) const DEFAULT_RATE: u32 = 130;

pub(crate) fn run(args: &BuildArgs) -> Outcome {
    let layers = match (&args.layers, args.tier) {
        (Some(layers), _) => layers.as_str(),
        // A hidden state in 8 bits would cost several times the code.
        (None, TierArg::Compact) => "none",
        (None, _) => "last,middle",
    };
    let options = BuildOptions {
        teacher: args.teacher.clone(),
        data: args.data.data.clone(),
        preparation: data_options(&args.data)?,
        tier: match args.tier {
            TierArg::Sparse => Tier::Sparse,
            TierArg::Compact => Tier::Compact,
            TierArg::Exact => Tier::Exact,
        },
        top_k: args.top_k,
        code_target: code_target(args)?,
        layers: layers.parse().map_err(|problem| {
            Failure::user(
                format!("--layers: {problem}"),
                "for instance: --layers last,middle",
            )
        })?,
        hidden_codec: match args.hidden {
            HiddenArg::Int8 => HiddenCodec::Int8,
            HiddenArg::F16 => HiddenCodec::F16,
        },
        max_len: args.data.max_len,
        kind: kind_of(args.dtype),
        batch_tokens: BATCH_TOKENS,
        out: args.out.clone(),
        device: parse_device(&args.device)?,
        resume: args.resume,
        fidelity: !args.no_fidelity,
    };
    let report = build_with_progress(&options, "building")?;
    if args.json {
        print_json(&report)?;
    }
    Ok(if report.completed {
        Exit::Done
    } else {
        Exit::Stopped
    })
}

fn code_target(args: &BuildArgs) -> Result<CodeTarget, Failure> {
    if args.tier != TierArg::Compact && (args.rate.is_some() || args.distortion.is_some()) {
        return Err(Failure::user(
            "--rate and --distortion are for the compact tier",
            "add --tier compact, or leave them out",
        ));
    }
    match args.distortion {
        None => Ok(CodeTarget::Rate(args.rate.unwrap_or(DEFAULT_RATE))),
        Some(nats) if (1e-4..=10.0).contains(&nats) => {
            Ok(CodeTarget::DistortionMicronats((nats * 1e6).round() as u32))
        }
        Some(nats) => Err(Failure::user(
            format!("--distortion {nats} is not between 0.0001 and 10 nats"),
            "0.03 is close to the teacher, 0.3 is far",
        )),
    }
}

/// Bad records that are shown one by one.
const NAMED_ON_TERMINAL: u64 = 20;

/// Builds, shows how far it is, and says what was done.
pub(crate) fn build_with_progress(
    options: &BuildOptions,
    label: &str,
) -> Result<BuildReport, Failure> {
    let mut bar: Option<(Stage, Progress)> = None;
    let mut named = 0;
    let report = build(options, &terminal::STOP, &mut |progress| {
        let stage = progress.stage;
        // Each stage has its own rate and its own end.
        if bar.as_ref().is_none_or(|(of, _)| *of != stage) {
            if let Some((_, finished)) = bar.take() {
                finished.finish();
            }
            let label = match stage {
                Stage::Reading => "reading the data",
                Stage::Fitting => "fitting the code",
                Stage::Building => label,
                Stage::Measuring => "measuring the fidelity",
            };
            bar = Some((stage, Progress::new(label)));
        }
        let Some((_, bar)) = &mut bar else { return };
        if let Some(bad) = progress.bad_record {
            named += 1;
            if named <= NAMED_ON_TERMINAL {
                bar.say(&format!(
                    "skipped `{}` {} {}: {}",
                    bad.file.display(),
                    bad.unit,
                    bad.number,
                    bad.problem
                ));
            } else if named == NAMED_ON_TERMINAL + 1 {
                bar.say("further bad records are counted only");
            }
            return;
        }
        let note = match stage {
            Stage::Measuring => String::new(),
            _ => format!("{:.0} tokens/s", progress.tokens_per_second),
        };
        bar.update(progress.positions_done, progress.positions_total, &note);
    })?;
    if let Some((_, bar)) = bar {
        bar.finish();
    }
    if !report.completed {
        say(format!(
            "stopped; go on with: --resume (out `{}`)",
            options.out.display()
        ));
        return Ok(report);
    }
    say(format!(
        "cache `{}`: {} sequences, {} positions ({} targets) in {} shards, {}",
        options.out.display(),
        report.sequences,
        report.positions,
        report.targets,
        report.shards,
        bytes(report.cache_bytes),
    ));
    say_data(&report, options.max_len);
    if report.shards_reused > 0 {
        say(format!(
            "{} of {} shards were there already",
            report.shards_reused, report.shards
        ));
    }
    if let Some((k, rank)) = report.code {
        say(format!(
            "code: {rank} coefficients and top-{k}, fitted in {}",
            duration(report.fit_seconds)
        ));
    }
    if let Some(fidelity) = &report.fidelity {
        let worst = fidelity
            .gradient_error
            .values()
            .copied()
            .fold(0.0, f64::max);
        say(format!(
            "fidelity: KL {:.4} at temperature 1, gradient error at most {:.1}% over all temperatures",
            fidelity.kl.get("1").copied().unwrap_or(f64::NAN),
            100.0 * worst,
        ));
    }
    say(format!(
        "teacher: {} for {} positions ({:.0} tokens/s); statistics, top-k and encoding took {:.1}% of it",
        duration(report.teacher_seconds),
        report.teacher_positions,
        report.tokens_per_second,
        100.0 * (report.statistics_seconds + report.encoding_seconds)
            / report.teacher_seconds.max(1e-9),
    ));
    Ok(report)
}
