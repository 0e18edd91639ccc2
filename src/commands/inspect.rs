//! `caskd inspect`: a cache's card.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use caskd_formats::{
    CodeTarget, DataInfo, Io, KnownPositions, LossOn, Manifest, Origin, Statistic, Tier,
};
use serde::Serialize;

use super::{open_cache, print_json, print_text};
use crate::cli::InspectArgs;
use crate::exit::{Exit, Outcome};
use crate::terminal::{bytes, shell_word};

/// What `--json` prints: the manifest, and what follows from it.
#[derive(Serialize)]
struct Card<'a> {
    manifest: &'a Manifest,
    /// Compressed bytes in all shards, by column.
    bytes_by_column: &'a BTreeMap<String, u64>,
    /// The same divided by the positions.
    bytes_per_position: BTreeMap<&'a str, f64>,
    total_bytes: u64,
    /// The arguments that decide the cache's bytes, as a command.
    command: String,
    losses: Vec<Served>,
}

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON")]
struct Served {
    loss: &'static str,
    served: bool,
    note: String,
}

pub(crate) fn run(args: &InspectArgs) -> Outcome {
    let cache = open_cache(&args.cache, &args.elsewhere.shards, Io::Mmap)?;
    let manifest = cache.manifest();
    let by_column = cache.bytes_by_column()?;
    let positions = manifest.data.positions.max(1) as f64;
    let total_bytes = manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>()
        + manifest.head.as_ref().map_or(0, |head| head.bytes)
        + manifest.code.as_ref().map_or(0, |code| code.basis.bytes);
    let card = Card {
        manifest,
        bytes_by_column: &by_column,
        bytes_per_position: by_column
            .iter()
            .map(|(name, &count)| (name.as_str(), count as f64 / positions))
            .collect(),
        total_bytes,
        command: command(manifest),
        losses: losses_served(manifest),
    };
    if args.json {
        print_json(&card)?;
    } else {
        print_text(as_text(&card));
    }
    Ok(Exit::Done)
}

/// The command that makes this cache. Rebuilt from the plan and not remembered: what was typed holds folders of one
/// machine, and a cache has the same bytes on all of them.
fn command(manifest: &Manifest) -> String {
    if let Some(origin) = &manifest.origin {
        return import_command(manifest, origin);
    }
    let mut words = vec![
        "caskd build --teacher".to_owned(),
        shell_word(&manifest.teacher.name),
    ];
    for file in &manifest.data.files {
        words.push(format!("--data {}", shell_word(&file.name)));
    }
    words.push(format!("--tier {:?} --top-k {}", manifest.tier, manifest.top_k).to_lowercase());
    match manifest.code.as_ref().map(|code| code.target) {
        Some(CodeTarget::Rate(bytes)) => words.push(format!("--rate {bytes}")),
        Some(CodeTarget::DistortionMicronats(nats)) => {
            words.push(format!("--distortion {}", f64::from(nats) / 1e6));
        }
        None => {}
    }
    let layers: Vec<String> = manifest
        .layers
        .iter()
        .map(|layer| layer.layer.to_string())
        .collect();
    words.push(match layers.as_slice() {
        [] => "--layers none".to_owned(),
        layers => format!("--layers {}", layers.join(",")),
    });
    if let Some(layer) = manifest.layers.first() {
        words.push(format!("--hidden {:?}", layer.codec).to_lowercase());
    }
    words.push(format!(
        "--max-len {} --dtype {}",
        manifest.max_len, manifest.teacher.compute_dtype
    ));
    words.extend(data_words(&manifest.data));
    if manifest.fidelity.is_none() {
        words.push("--no-fidelity".to_owned());
    }
    words.join(" ")
}

fn import_command(manifest: &Manifest, origin: &Origin) -> String {
    let mut words = vec![format!("caskd import --from {}", origin.format)];
    words.extend(
        manifest
            .data
            .files
            .iter()
            .map(|file| shell_word(&file.name)),
    );
    words.push(format!(
        "--top-k {} --max-len {}",
        manifest.top_k, manifest.max_len
    ));
    if origin.temperature != 1.0 {
        words.push(format!("--temperature {}", origin.temperature));
    }
    words.extend(data_words(&manifest.data));
    words.join(" ")
}

/// What is known of imported values, as a sentence.
fn describe_origin(origin: &Origin) -> String {
    let statistics: Vec<String> = origin
        .statistics
        .iter()
        .map(|statistic| {
            serde_json::json!(statistic)
                .as_str()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    format!(
        "{}, given at temperature {}, imported from {}; known at {}; of the statistics {}",
        super::import::value_kind(origin.values),
        origin.temperature,
        origin.format,
        match origin.positions {
            KnownPositions::All => "all positions but the last of each sequence",
            KnownPositions::Targets => "the positions before targets",
        },
        statistics.join(", ")
    )
}

/// The arguments that say how records became sequences, where they are not the usual ones.
fn data_words(data: &DataInfo) -> Vec<String> {
    let of = &data.preparation;
    let mut words: Vec<String> = of
        .columns
        .iter()
        .map(|(field, name)| format!("--column {}", shell_word(format!("{field}={name}"))))
        .collect();
    let mut when = |is_so: bool, argument: String| {
        if is_so {
            words.push(argument);
        }
    };
    when(of.loss_on == LossOn::All, "--loss-on all".to_owned());
    when(data.prompt_form == "chat", "--prompt chat".to_owned());
    if let Some(date) = &of.chat_date {
        when(true, format!("--chat-date {date}"));
    }
    when(of.packed, "--pack".to_owned());
    when(of.limit > 0, format!("--limit {}", of.limit));
    when(of.keep_duplicates, "--duplicates keep".to_owned());
    when(
        of.validation_millionths > 0,
        format!("--validation {}", of.validation()),
    );
    when(of.bad_records > 0, "--on-error skip".to_owned());
    words
}

fn losses_served(manifest: &Manifest) -> Vec<Served> {
    let exact = manifest.tier != Tier::Sparse;
    let layers: Vec<String> = manifest
        .layers
        .iter()
        .map(|layer| layer.layer.to_string())
        .collect();
    let has_mass = manifest.knows(Statistic::LogSumExp);
    let needs_exact = if exact {
        String::new()
    } else {
        "needs the compact or the exact tier".to_string()
    };
    let hidden_note = if layers.is_empty() {
        "no hidden states are kept".to_string()
    } else {
        format!("on layers {}", layers.join(", "))
    };
    vec![
        Served {
            loss: "cross-entropy",
            served: true,
            note: String::new(),
        },
        Served {
            loss: "top-k-kl and bild on the kept entries",
            served: exact || manifest.top_k > 0,
            note: String::new(),
        },
        Served {
            loss: "kl at temperature 1, top-k entries and an explicit tail",
            served: has_mass,
            note: if has_mass {
                String::new()
            } else {
                "what the other tokens weigh is not known".to_owned()
            },
        },
        Served {
            loss: "kl at every temperature",
            served: exact,
            note: needs_exact.clone(),
        },
        Served {
            loss: "dual-scaling",
            served: exact,
            note: needs_exact,
        },
        Served {
            loss: "knowledge-alignment",
            served: !layers.is_empty(),
            note: hidden_note,
        },
    ]
}

fn as_text(card: &Card<'_>) -> String {
    let manifest = card.manifest;
    let data = &manifest.data;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line(
        "format",
        format!(
            "{} (written by caskd {})",
            manifest.format_version, manifest.caskd_version
        ),
    );
    line(
        "tier",
        format!("{:?}, top-{}", manifest.tier, manifest.top_k).to_lowercase(),
    );
    if let Some(origin) = &manifest.origin {
        line(
            "teacher",
            format!("{}, run by another program", manifest.teacher.name),
        );
        line("values", describe_origin(origin));
    } else {
        line("teacher", describe_teacher(manifest));
    }
    line(
        "vocabulary",
        format!(
            "{} logits, {} tokens, fingerprint {}",
            manifest.vocab_size,
            manifest.tokenizer.vocab_size,
            short(&manifest.tokenizer.fingerprint)
        ),
    );
    for file in &data.files {
        line(
            "data",
            format!(
                "{} ({}), digest {}",
                file.name,
                bytes(file.bytes),
                short(&file.digest)
            ),
        );
    }
    line(
        "sequences",
        format!(
            "{} with {} positions, {} of them targets; prompts: {}{}",
            data.sequences,
            data.positions,
            data.targets,
            data.prompt_form,
            if data.preparation.packed {
                ", packed"
            } else {
                ""
            },
        ),
    );
    line(
        "tokens",
        format!("digest {} (of ids and targets)", short(&data.digest)),
    );
    line(
        "left out",
        format!(
            "{} cut at {} tokens ({} tokens lost), {} without a target, {} repeated, {} bad records",
            data.truncated,
            manifest.max_len,
            data.preparation.truncated_tokens,
            data.skipped,
            data.preparation.duplicates,
            data.preparation.bad_records,
        ),
    );
    if let Some(template) = &data.preparation.chat_template {
        line("chat", format!("template with digest {}", short(template)));
    }
    if data.preparation.validation_millionths > 0 {
        line(
            "validation",
            format!(
                "{} of the hash range; kept out of all training",
                data.preparation.validation()
            ),
        );
    }
    line("made by", card.command.clone());
    for layer in &manifest.layers {
        line(
            "hidden",
            format!(
                "layer {} of {}, width {}, {}",
                layer.layer,
                manifest.teacher.num_layers,
                layer.width,
                format!("{:?}", layer.codec).to_lowercase()
            ),
        );
    }
    if let Some(code) = &manifest.code {
        let target = match code.target {
            CodeTarget::Rate(bytes) => format!("{bytes} bytes a position"),
            CodeTarget::DistortionMicronats(nats) => {
                format!("KL {} at temperature 1", f64::from(nats) * 1e-6)
            }
        };
        line(
            "code",
            format!(
                "{} coefficients of {}, fitted to {target} on {} positions",
                code.basis.rank, manifest.teacher.hidden_size, code.fitted_positions
            ),
        );
    }
    line(
        "files",
        format!(
            "{} shards{}, {}",
            manifest.shards.len(),
            if manifest.head.is_some() {
                " and the LM head"
            } else {
                ""
            },
            bytes(card.total_bytes)
        ),
    );
    let _ = writeln!(
        text,
        "\n{:<24} {:>14} {:>12}",
        "column", "bytes", "a position"
    );
    for (name, count) in card.bytes_by_column {
        let _ = writeln!(
            text,
            "{name:<24} {count:>14} {:>12.2}",
            card.bytes_per_position[name.as_str()]
        );
    }
    if let Some(head) = &manifest.head {
        let _ = writeln!(
            text,
            "{:<24} {:>14} {:>12}",
            "LM head (once)", head.bytes, ""
        );
    }
    if let Some(code) = &manifest.code {
        let _ = writeln!(
            text,
            "{:<24} {:>14} {:>12}",
            "basis (once)", code.basis.bytes, ""
        );
    }
    if let Some(fidelity) = &manifest.fidelity {
        let _ = writeln!(
            text,
            "\nfidelity on {} positions (student: {})",
            fidelity.positions, fidelity.student
        );
        text.push_str(super::fidelity::table(fidelity).trim_start());
    }
    let _ = writeln!(text, "\nlosses");
    for served in &card.losses {
        let note = if served.note.is_empty() {
            String::new()
        } else {
            format!(" ({})", served.note)
        };
        let _ = writeln!(
            text,
            "  {} {}{note}",
            if served.served { "yes" } else { "no " },
            served.loss
        );
    }
    text.trim_end().to_string()
}

fn describe_teacher(manifest: &Manifest) -> String {
    let teacher = &manifest.teacher;
    format!(
        "{} ({}, {:.1} M parameters, computed in {}), digest {}",
        teacher.name,
        teacher.architecture,
        teacher.num_parameters as f64 / 1e6,
        teacher.compute_dtype,
        short(&teacher.digest)
    )
}

fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}
