//! `caskd build`

mod placement;
mod share;

use caskd_cache_builder::{
    BuildOptions, BuildReport, CommitOptions, LayerChoice, Progress as BuildProgress, Share, Stage,
    WorkerOptions, build, commit, estimate, plan, work,
};
use caskd_formats::{CodeTarget, Fidelity, HiddenCodec, Tier};

use super::data::{BadRecordTalk, data_options, say_data};
use super::{kind_of, print_json, print_text};
use crate::cli::{BuildArgs, HiddenArg, TierArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::{self, Progress, bytes, duration, say, shell_word};
use placement::placement;

/// Padded tokens of a teacher batch. Fixed, because another batch shape rounds differently.
pub(crate) const BATCH_TOKENS: usize = 2048;

/// Bytes a position of the compact tier where nothing else is asked for.
pub(crate) const DEFAULT_RATE: u32 = 130;

pub(crate) fn run(args: &BuildArgs) -> Outcome {
    if let Some(share) = &args.worker {
        return run_worker(args, share);
    }
    if args.commit {
        return run_commit(args);
    }
    let options = build_options(args)?;
    if args.estimate {
        return run_estimate(args, &options);
    }
    if args.plan {
        return run_plan(args, &options);
    }
    let report = build_with_progress(&options, "building")?;
    if args.json {
        print_json(&report)?;
    }
    Ok(exit_of(report.completed))
}

fn exit_of(completed: bool) -> Exit {
    if completed { Exit::Done } else { Exit::Stopped }
}

fn run_estimate(args: &BuildArgs, options: &BuildOptions) -> Outcome {
    let found = with_progress("estimating", |progress| {
        estimate(options, &terminal::STOP, progress)
    })?;
    let Some(found) = found else {
        return Ok(Exit::Stopped);
    };
    if args.json {
        print_json(&found)?;
        return Ok(Exit::Done);
    }
    let mut lines = vec![
        format!(
            "{} sequences, {} positions ({} targets)\n",
            found.sequences, found.positions, found.targets
        ),
        format!(
            "{:8} {:>14} {:>10} {:>15}",
            "tier", "bytes/position", "shards", "head and basis"
        ),
    ];
    for (tier, bytes_of) in &found.tiers {
        let mark = if *tier == tier_name(found.tier) {
            "  <- --tier"
        } else {
            ""
        };
        lines.push(format!(
            "{tier:8} {:>14.0} {:>10} {:>15}{mark}",
            bytes_of.bytes_per_position,
            bytes(bytes_of.shard_bytes),
            bytes(bytes_of.shared_bytes)
        ));
    }
    lines.push(if found.memory.layered {
        format!(
            "\nmemory: layer by layer in {}, {} positions at a time (whole it would take {})",
            bytes(found.memory.bytes),
            found.memory.block_positions,
            bytes(found.in_memory_bytes)
        )
    } else {
        format!(
            "\nmemory: {} with all weights in it; layer by layer (--memory-budget) at least {}",
            bytes(found.memory.bytes),
            bytes(found.least_bytes)
        )
    });
    lines.push(format!(
        "\ntime: {} at {:.0} tokens/s in the teacher, from one of {} layers and the head, measured on {} positions;\n      {:.0}% of the batches is padding",
        duration(found.seconds),
        found.tokens_per_second,
        found.measurement.layers,
        found.measurement.positions,
        100.0 * found.padding as f64 / (found.padding + found.positions) as f64,
    ));
    for phase in &found.phases {
        lines.push(format!(
            "  {:<30} {:>8} {:>10} of memory",
            phase_name(phase.phase, "building: teacher and shards"),
            duration(phase.seconds),
            bytes(phase.memory_bytes)
        ));
    }
    print_text(lines.join("\n"));
    Ok(Exit::Done)
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Sparse => "sparse",
        Tier::Compact => "compact",
        Tier::Exact => "exact",
    }
}

fn run_plan(args: &BuildArgs, options: &BuildOptions) -> Outcome {
    let report = with_progress("planning", |progress| {
        plan(options, &terminal::STOP, progress)
    })?;
    if report.completed {
        let out = options.out.display();
        say(format!(
            "plan `{out}`: {} sequences, {} positions in {} tasks",
            report.sequences, report.positions, report.tasks
        ));
        say_data(&report.data, options.max_len);
        say(format!(
            "now: caskd build --worker I/N --out {out}, on as many machines as you like, then caskd build --commit --out {out}",
            out = shell_word(out)
        ));
    } else {
        say("stopped; go on with: --plan --resume");
    }
    if args.json {
        print_json(&report)?;
    }
    Ok(exit_of(report.completed))
}

fn run_worker(args: &BuildArgs, share: &str) -> Outcome {
    let origin = share::resolve(share, &|name| std::env::var(name).ok())?;
    let Share { index, count } = origin.share;
    say(format!("worker {index}/{count}, says {}", origin.said_by));
    for other in origin.overruled {
        say(format!(
            "warning: {other} is in the environment too, and was not asked"
        ));
    }
    let options = WorkerOptions {
        out: args.out.clone().unwrap_or_default(),
        share: origin.share,
        teacher: args.teacher.clone(),
        placement: placement(args)?,
    };
    let report = with_progress(&format!("worker {index}/{count}"), |progress| {
        work(&options, &terminal::STOP, progress)
    })?;
    if report.completed {
        say(format!(
            "{} of {} tasks done here, {} were done before; {:.0} tokens/s",
            report.tasks_done, report.tasks, report.tasks_found, report.tokens_per_second
        ));
        if report.tasks_contradicted > 0 {
            say(format!(
                "warning: {} tasks had been done by another worker with other bytes, which stay: workers must have the same kind of processor and number of threads",
                report.tasks_contradicted
            ));
        }
        say(if report.tasks_left == 0 {
            format!(
                "nothing is left: caskd build --commit --out {}",
                shell_word(options.out.display())
            )
        } else {
            format!("{} tasks of the plan are left", report.tasks_left)
        });
    } else {
        say("stopped; the same command goes on");
    }
    if args.json {
        print_json(&report)?;
    }
    Ok(exit_of(report.completed))
}

fn run_commit(args: &BuildArgs) -> Outcome {
    let options = CommitOptions {
        out: args.out.clone().unwrap_or_default(),
        teacher: args.teacher.clone(),
        placement: placement(args)?,
    };
    let report = with_progress("committing", |progress| commit(&options, progress))?;
    say(format!(
        "cache `{}`: {} sequences, {} positions in {} shards, {}",
        options.out.display(),
        report.sequences,
        report.positions,
        report.shards,
        bytes(report.cache_bytes),
    ));
    if let Some(fidelity) = &report.fidelity {
        say_fidelity(fidelity);
    }
    if args.json {
        print_json(&report)?;
    }
    Ok(Exit::Done)
}

/// The options of a build or of its plan.
fn build_options(args: &BuildArgs) -> Result<BuildOptions, Failure> {
    Ok(BuildOptions {
        teacher: args.teacher.clone().unwrap_or_default(),
        data: args.data.data.clone(),
        preparation: data_options(&args.data)?,
        tier: match args.tier {
            TierArg::Sparse => Tier::Sparse,
            TierArg::Compact => Tier::Compact,
            TierArg::Exact => Tier::Exact,
        },
        top_k: args.top_k,
        code_target: code_target(args)?,
        layers: match &args.layers {
            None => LayerChoice::Usual,
            Some(layers) => layers.parse().map_err(|problem| {
                Failure::user(
                    format!("--layers: {problem}"),
                    "for instance: --layers last,middle",
                )
            })?,
        },
        hidden_codec: match args.hidden {
            HiddenArg::Int8 => HiddenCodec::Int8,
            HiddenArg::F16 => HiddenCodec::F16,
        },
        max_len: args.data.max_len,
        kind: kind_of(args.dtype),
        batch_tokens: BATCH_TOKENS,
        out: args.out.clone().unwrap_or_default(),
        placement: placement(args)?,
        resume: args.resume,
        fidelity: !args.no_fidelity,
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

/// Builds, shows how far it is, and says what was done.
pub(crate) fn build_with_progress(
    options: &BuildOptions,
    label: &str,
) -> Result<BuildReport, Failure> {
    let report = with_progress(label, |progress| build(options, &terminal::STOP, progress))?;
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
        say_fidelity(fidelity);
    }
    if report.block_positions > 0 {
        say(format!(
            "layer by layer, {} positions at a time; {} of the time went into waiting for weights",
            report.block_positions,
            duration(report.waiting_seconds)
        ));
    }
    let mut phases = vec![("reading and loading", report.load_seconds)];
    if report.fit_seconds > 0.0 {
        phases.push(("fit", report.fit_seconds));
    }
    phases.push(("teacher and shards", report.pass_seconds));
    if report.fidelity.is_some() {
        phases.push(("fidelity", report.fidelity_seconds));
    }
    let phases: Vec<String> = phases
        .into_iter()
        .map(|(name, seconds)| format!("{name} {}", duration(seconds)))
        .collect();
    say(format!(
        "time: {} ({})",
        duration(report.seconds),
        phases.join(", ")
    ));
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

/// Runs work that tells how far it is: a bar for each stage, that of building headed by `label`.
fn with_progress<T>(
    label: &str,
    work: impl FnOnce(&mut dyn FnMut(&BuildProgress<'_>)) -> caskd_cache_builder::Result<T>,
) -> Result<T, Failure> {
    let mut bar: Option<(Stage, Progress)> = None;
    let mut talk = BadRecordTalk::default();
    let done = work(&mut |progress| {
        let stage = progress.stage;
        // Each stage has its own rate and its own end.
        if bar.as_ref().is_none_or(|(of, _)| *of != stage) {
            if let Some((_, finished)) = bar.take() {
                finished.finish();
            }
            bar = Some((stage, Progress::new(phase_name(stage, label))));
        }
        let Some((_, bar)) = &mut bar else { return };
        if let Some(bad) = progress.bad_record {
            let place = format!("{} {}", bad.unit, bad.number);
            talk.say(bar, &bad.file, &place, &bad.problem);
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
    Ok(done)
}

/// What a stage is called; that of building by what is built.
fn phase_name(stage: Stage, building: &str) -> &str {
    match stage {
        Stage::Reading => "reading the data",
        Stage::Fitting => "fitting the code",
        Stage::Building => building,
        Stage::Measuring => "measuring the fidelity",
    }
}

fn say_fidelity(fidelity: &Fidelity) {
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
