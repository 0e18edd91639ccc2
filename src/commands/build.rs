//! `caskd build`

use caskd_cache_builder::{BuildOptions, BuildReport, build};
use caskd_formats::{HiddenCodec, Tier};

use super::{kind_of, parse_device, print_json};
use crate::cli::{BuildArgs, HiddenArg, TierArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, bytes, duration, say};

/// Padded tokens of a teacher batch. Fixed, because another batch shape rounds differently.
pub(crate) const BATCH_TOKENS: usize = 2048;

pub(crate) fn run(args: &BuildArgs) -> Outcome {
    let options = BuildOptions {
        teacher: args.teacher.clone(),
        data: args.data.clone(),
        tier: match args.tier {
            TierArg::Sparse => Tier::Sparse,
            TierArg::Exact => Tier::Exact,
        },
        top_k: args.top_k,
        layers: args.layers.parse().map_err(|problem| {
            Failure::user(
                format!("--layers: {problem}"),
                "for instance: --layers last,middle",
            )
        })?,
        hidden_codec: match args.hidden {
            HiddenArg::Int8 => HiddenCodec::Int8,
            HiddenArg::F16 => HiddenCodec::F16,
        },
        max_len: args.max_len,
        kind: kind_of(args.dtype),
        batch_tokens: BATCH_TOKENS,
        out: args.out.clone(),
        device: parse_device(&args.device)?,
        resume: args.resume,
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

/// Builds, shows how far it is, and says what was done.
pub(crate) fn build_with_progress(
    options: &BuildOptions,
    label: &str,
) -> Result<BuildReport, Failure> {
    let mut bar = Progress::new(label);
    let report = build(options, &terminal::STOP, &mut |progress| {
        bar.update(
            progress.positions_done,
            progress.positions_total,
            &format!("{:.0} tokens/s", progress.tokens_per_second),
        );
    })?;
    bar.finish();
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
    if report.truncated > 0 {
        say(format!(
            "warning: {} records were longer than --max-len {} and were cut",
            report.truncated, options.max_len
        ));
    }
    if report.skipped > 0 {
        say(format!(
            "warning: {} records were dropped: nothing to learn within --max-len {}",
            report.skipped, options.max_len
        ));
    }
    if report.shards_reused > 0 {
        say(format!(
            "{} of {} shards were there already",
            report.shards_reused, report.shards
        ));
    }
    say(format!(
        "teacher: {} for {} positions ({:.0} tokens/s); statistics and top-k took {:.1}% of it",
        duration(report.teacher_seconds),
        report.teacher_positions,
        report.tokens_per_second,
        100.0 * report.statistics_seconds / report.teacher_seconds.max(1e-9),
    ));
    Ok(report)
}
