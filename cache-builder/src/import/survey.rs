//! The first pass: everything is read and checked, nothing is written.

use std::sync::atomic::{AtomicBool, Ordering};

use caskd_formats::{Alignment, AlignmentCheck, OFFSETS, Origin, ValueKind};

use super::foreign::{Foreign, Layout, Placed, Problem, Row, Values, check_row};
use super::{Format, GivenValues, Reader, Setup, known_positions, known_statistics};
use crate::data::hash_sequence;
use crate::{Error, Result};

/// Positions that whole vocabularies are looked into; kept entries are looked at everywhere.
const WHOLE_POSITIONS: u64 = 2048;

/// Positions that labels are compared on.
const ALIGNMENT_POSITIONS: u64 = 1 << 16;

/// Probabilities of one position may add up to so much more than 1 by rounding.
const MASS_SLACK: f64 = 2e-2;

/// And so much by the lossy codecs of DistillKit.
const LOSSY_MASS_SLACK: f64 = 0.25;

/// Where those of every position add up to 1 so exactly, they were normalised over the kept tokens.
const RENORMALISED_SLACK: f64 = 2e-4;

/// What the first pass found.
pub(crate) struct Survey {
    /// Sequences read, those without a target too.
    pub(crate) read: u64,
    pub(crate) sequences: u64,
    pub(crate) positions: u64,
    pub(crate) targets: u64,
    pub(crate) targets_without_values: u64,
    pub(crate) truncated: u64,
    pub(crate) skipped: u64,
    /// Of the longest sequence.
    pub(crate) longest: usize,
    /// Over tokens and masks, as a build computes it.
    pub(crate) digest: String,
    pub(crate) layout: Layout,
    pub(crate) origin: Origin,
    pub(crate) alignment: Option<Alignment>,
    pub(crate) notes: Vec<String>,
}

/// What the values of all positions look like.
#[derive(Debug)]
struct Seen {
    rows: u64,
    fewest: usize,
    most: usize,
    /// Largest and smallest Σ exp over a position's entries, as natural logarithms.
    log_mass: (f64, f64),
    /// The largest |ln Σ exp| of a whole vocabulary.
    whole_log_mass: f64,
    every_position: bool,
}

/// Reads everything once. `None` when stopped.
pub(crate) fn survey(
    format: Format,
    reader: &mut dyn Reader,
    setup: &Setup<'_>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&dyn Reader, u64),
) -> Result<Option<Survey>> {
    let options = setup.options;
    let tokens = setup.tokenizer.tokenizer.get_vocab_size(true);
    let vocab_size = vocab_size(reader, options.vocab_size, tokens)?;
    if let Some(k) = options.top_k.filter(|k| *k > vocab_size) {
        return Err(Error::Option {
            problem: format!("--top-k {k} is larger than the vocabulary of {vocab_size}"),
            hint: "64 is a good choice".into(),
        });
    }
    let mut layout = Layout {
        shift: options.shift.unwrap_or(0),
        max_len: options.max_len.unwrap_or(usize::MAX),
        top_k: options.top_k.unwrap_or(0),
        vocab_size,
        scale: 1.0,
        normalised: true,
        whole_statistics: format != Format::LlamaCpp,
    };
    let slack = match format {
        Format::Distillkit => LOSSY_MASS_SLACK,
        _ => MASS_SLACK,
    };
    let mut counts = Counts::default();
    let mut seen = Seen {
        rows: 0,
        fewest: usize::MAX,
        most: 0,
        log_mass: (f64::NEG_INFINITY, f64::INFINITY),
        whole_log_mass: 0.0,
        every_position: true,
    };
    let mut digest = blake3::Hasher::new();
    let mut check = AlignmentCheck::default();
    let mut looked_into = 0;
    while options
        .limit
        .is_none_or(|limit| counts.sequences < limit as u64)
    {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Some(foreign) = reader.next(looked_into < WHOLE_POSITIONS)? else {
            break;
        };
        counts.read += 1;
        check_tokens(&foreign, vocab_size)?;
        let place = foreign.place.clone();
        let Some(placed) = foreign.place(&layout) else {
            counts.skipped += 1;
            continue;
        };
        counts.add(&placed);
        hash_sequence(
            &mut digest,
            &placed.foreign.token_ids,
            &placed.foreign.loss_mask,
        );
        let before_last = placed.positions() - 1;
        seen.every_position &= placed.present[..before_last].iter().all(|present| *present);
        match &placed.foreign.values {
            Values::Kept(rows) => {
                for (position, row) in rows.iter().enumerate() {
                    let Some(row) = row else { continue };
                    seen.look_at(row, setup, vocab_size, slack)
                        .map_err(|problem| {
                            place.error(Problem {
                                problem: format!("position {position}: {}", problem.problem),
                                hint: problem.hint,
                            })
                        })?;
                }
            }
            Values::Whole {
                count,
                log_mass,
                summary,
                ..
            } => {
                if summary.is_some() {
                    looked_into += *count as u64;
                    seen.rows += *count as u64;
                    seen.whole_log_mass = seen.whole_log_mass.max(f64::from(*log_mass));
                }
            }
        }
        align(&mut check, placed, &layout)?;
        progress(reader, counts.positions);
    }
    progress(reader, counts.positions);

    let whole = seen.most == 0;
    layout.top_k = kept_entries(whole, &seen, setup, vocab_size);
    let values = kind_of_values(whole, &seen, options.values);
    apply_temperature(whole, values, options.temperature, &mut layout)?;
    let alignment = check.finish();
    let mut notes = Vec::new();
    if let Some(alignment) = &alignment {
        judge_alignment(alignment, options.shift, &mut notes)?;
    } else {
        notes.push("too few positions to tell whether the values fit the labels".to_owned());
    }
    if counts.targets_without_values > 0 {
        notes.push(format!(
            "{} tokens that are marked as targets have no values before them and are no targets in the cache",
            counts.targets_without_values
        ));
    }
    if !whole && seen.most > layout.top_k {
        notes.push(format!(
            "positions have {} to {} entries; {} are kept of each",
            seen.fewest, seen.most, layout.top_k
        ));
    }
    if values == ValueKind::LogProbabilities && seen.log_mass.0 > MASS_SLACK {
        notes.push(format!(
            "probabilities add up to {:.3} at some position: its codec was lossy",
            seen.log_mass.0.exp()
        ));
    }
    if values == ValueKind::RenormalisedLogProbabilities {
        notes.push(
            "the values add up to 1 at every position: they were normalised over the kept tokens, so losses that \
             weigh the others cannot run on this cache (`--values logprobs` if they were not)"
                .to_owned(),
        );
    }
    Ok(Some(Survey {
        read: counts.read,
        sequences: counts.sequences,
        positions: counts.positions,
        targets: counts.targets,
        targets_without_values: counts.targets_without_values,
        truncated: counts.truncated,
        skipped: counts.skipped,
        longest: counts.longest,
        digest: digest.finalize().to_hex().to_string(),
        origin: Origin {
            format: format.name().to_owned(),
            values,
            temperature: options.temperature,
            statistics: known_statistics(format, values),
            positions: known_positions(seen.every_position),
        },
        layout,
        alignment,
        notes,
    }))
}

#[derive(Debug, Default)]
struct Counts {
    read: u64,
    sequences: u64,
    positions: u64,
    targets: u64,
    targets_without_values: u64,
    truncated: u64,
    skipped: u64,
    longest: usize,
}

impl Counts {
    fn add(&mut self, placed: &Placed) {
        self.sequences += 1;
        self.positions += placed.positions() as u64;
        let targets = placed
            .foreign
            .loss_mask
            .iter()
            .skip(1)
            .filter(|target| **target);
        self.targets += targets.count() as u64;
        self.targets_without_values += placed.without_values;
        self.truncated += u64::from(placed.truncated);
        self.longest = self.longest.max(placed.positions());
    }
}

impl Seen {
    fn look_at(
        &mut self,
        row: &Row,
        setup: &Setup<'_>,
        vocab_size: usize,
        slack: f64,
    ) -> std::result::Result<(), Problem> {
        check_row(row, vocab_size)?;
        if let Some(k) = setup.options.top_k.filter(|k| row.len() < *k) {
            return Err(Problem::new(
                format!(
                    "{} entries with a probability, --top-k asks for {k}",
                    row.len()
                ),
                format!("give --top-k {} or less", row.len()),
            ));
        }
        let mass: f64 = row.iter().map(|(_, value)| f64::from(*value).exp()).sum();
        let given = setup.options.values;
        if given != GivenValues::Logits && mass > 1.0 + slack {
            return Err(Problem::new(
                format!(
                    "its probabilities add up to {mass:.3}, so the values are no log-probabilities"
                ),
                "if they are logits, say --values logits; losses that need the whole vocabulary's log-sum-exp will be refused",
            ));
        }
        if given == GivenValues::Renormalised && (mass - 1.0).abs() > 1e-2 {
            return Err(Problem::new(
                format!(
                    "its probabilities add up to {mass:.3} and not to 1, so they are not renormalised"
                ),
                "leave --values out",
            ));
        }
        self.rows += 1;
        self.fewest = self.fewest.min(row.len());
        self.most = self.most.max(row.len());
        self.log_mass = (
            self.log_mass.0.max(mass.ln()),
            self.log_mass.1.min(mass.ln()),
        );
        Ok(())
    }
}

/// V: what the user says, else what the files say, else the tokenizer's tokens.
fn vocab_size(reader: &dyn Reader, asked: Option<usize>, tokens: usize) -> Result<usize> {
    let refuse = |problem: String, hint: &str| {
        Err(Error::Option {
            problem,
            hint: hint.into(),
        })
    };
    match (asked, reader.vocab_size()) {
        (Some(asked), Some(found)) if asked != found => refuse(
            format!("--vocab-size {asked}, but the file holds {found} values a position"),
            "leave --vocab-size out: this file tells it",
        ),
        (_, Some(found)) if found < tokens => refuse(
            format!("the file holds {found} values a position, the tokenizer has {tokens} tokens"),
            "give the teacher's own tokenizer",
        ),
        (Some(asked), _) if asked < tokens => refuse(
            format!("--vocab-size {asked} is below the tokenizer's {tokens} tokens"),
            "give the rows of the teacher's LM head, or leave it out",
        ),
        (asked, found) => Ok(found.or(asked).unwrap_or(tokens)),
    }
}

fn check_tokens(foreign: &Foreign, vocab_size: usize) -> Result<()> {
    match foreign.token_ids.iter().find(|id| **id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(foreign.place.error(Problem::new(
            format!("token id {id} is beyond the vocabulary of {vocab_size}"),
            "is this the teacher's tokenizer? where its LM head has rows beyond the tokenizer's tokens, give their number with --vocab-size",
        ))),
    }
}

/// Scores the labels of a sequence at several offsets, with as many entries as each position has.
fn align(check: &mut AlignmentCheck, placed: Placed, layout: &Layout) -> Result<()> {
    if check.positions() >= ALIGNMENT_POSITIONS {
        return Ok(());
    }
    let layout = match &placed.foreign.values {
        // The fewest entries of this sequence; later ones may have fewer.
        Values::Kept(rows) => Layout {
            top_k: rows.iter().flatten().map(Vec::len).min().unwrap_or(0),
            ..layout.clone()
        },
        Values::Whole {
            summary: Some((_, top_k)),
            ..
        } => Layout {
            top_k: top_k.k,
            ..layout.clone()
        },
        Values::Whole { summary: None, .. } => return Ok(()),
    };
    if layout.top_k > 0 {
        check.add(&placed.into_sequence(&layout)?);
    }
    Ok(())
}

/// K: all that every position has, or what the reader keeps of a whole vocabulary.
fn kept_entries(whole: bool, seen: &Seen, setup: &Setup<'_>, vocab_size: usize) -> usize {
    if whole {
        setup.top_k.min(vocab_size)
    } else {
        setup.options.top_k.unwrap_or(seen.fewest)
    }
}

fn kind_of_values(whole: bool, seen: &Seen, given: GivenValues) -> ValueKind {
    match given {
        GivenValues::Renormalised => ValueKind::RenormalisedLogProbabilities,
        GivenValues::Logits => ValueKind::Logits,
        GivenValues::Auto if whole && seen.whole_log_mass > MASS_SLACK => ValueKind::Logits,
        GivenValues::Auto if !whole && seen.rows > 0 && seen.log_mass.1 > -RENORMALISED_SLACK => {
            ValueKind::RenormalisedLogProbabilities
        }
        GivenValues::LogProbabilities | GivenValues::Auto => ValueKind::LogProbabilities,
    }
}

/// Values at temperature τ times τ are logits up to a constant: right for whole vocabularies and within a kept set, but
/// the mass outside a kept set at temperature 1 does not follow from that at τ.
fn apply_temperature(
    whole: bool,
    values: ValueKind,
    temperature: f64,
    layout: &mut Layout,
) -> Result<()> {
    layout.normalised = values == ValueKind::LogProbabilities;
    if temperature == 1.0 {
        return Ok(());
    }
    if !layout.whole_statistics {
        return Err(Error::Option {
            problem: format!(
                "--temperature {temperature}, but llama.cpp computes at temperature 1"
            ),
            hint: "leave --temperature out".into(),
        });
    }
    if !whole && values == ValueKind::LogProbabilities {
        return Err(Error::Option {
            problem: format!(
                "top-k log-probabilities at temperature {temperature} do not tell what the other tokens weigh at temperature 1"
            ),
            hint: "have the teacher serve log-probabilities at temperature 1 (vLLM: --logprobs-mode raw_logprobs), \
                   or give up the mass of the other tokens with --values logits"
                .into(),
        });
    }
    // Readers of whole vocabularies multiply before they summarise.
    layout.scale = temperature as f32;
    Ok(())
}

fn judge_alignment(
    alignment: &Alignment,
    shift: Option<i64>,
    notes: &mut Vec<String>,
) -> Result<()> {
    if alignment.best_offset == 0 {
        return Ok(());
    }
    let at = |offset: i64| {
        let index = OFFSETS
            .iter()
            .position(|known| *known == offset)
            .unwrap_or(0);
        alignment.mean_log_probability[index]
    };
    let best = alignment.best_offset;
    let problem = format!(
        "the values do not fit the tokens that follow: those have mean log-probability {:.3}, and {:.3} with the values moved by {best:+}",
        at(0),
        at(best),
    );
    let wanted = shift.unwrap_or(0) + best;
    match shift {
        // Who names a shift has looked.
        Some(_) => {
            notes.push(format!(
                "warning: {problem}; --shift {wanted} would fit better"
            ));
            Ok(())
        }
        None => Err(Error::Option {
            problem,
            hint: format!(
                "import with --shift {wanted}, or insist on the places in the file with --shift 0"
            ),
        }),
    }
}
