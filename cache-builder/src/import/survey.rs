//! The first pass: everything is read and checked, nothing is written.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_formats::{Alignment, AlignmentCheck, OFFSETS, Origin, ValueKind};

use super::foreign::{Foreign, Layout, Placed, Row, Values, check_row};
use super::{BadPlace, Format, GivenValues, Reader, Setup, known_positions, known_statistics};
use crate::data::{NAMED_BAD_RECORDS, OnError, Problem, hash_sequence};
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
    /// Which answers of the reader, counted from 0, could not be used and are to be passed over.
    pub(crate) bad: BTreeSet<u64>,
    /// The first of them, for people.
    pub(crate) named: Vec<BadPlace>,
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

/// The state of the first pass.
struct Pass<'a> {
    setup: &'a Setup<'a>,
    layout: Layout,
    /// Beyond 1, for the mass of a position.
    slack: f64,
    counts: Counts,
    seen: Seen,
    digest: blake3::Hasher,
    check: AlignmentCheck,
    /// Positions of whole vocabularies that were looked into.
    looked_into: u64,
}

/// Hears how many positions a reader has given, and of records that are passed over.
type Watch<'a> = &'a mut dyn FnMut(&dyn Reader, u64, Option<&BadPlace>);

/// Reads everything once. `None` when stopped.
pub(crate) fn survey(
    format: Format,
    reader: &mut dyn Reader,
    setup: &Setup<'_>,
    stop: &AtomicBool,
    progress: Watch<'_>,
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
    let mut pass = Pass {
        setup,
        layout: Layout {
            shift: options.shift.unwrap_or(0),
            max_len: options.max_len.unwrap_or(usize::MAX),
            top_k: options.top_k.unwrap_or(0),
            vocab_size,
            scale: 1.0,
            normalised: true,
            whole_statistics: format != Format::LlamaCpp,
        },
        slack: match format {
            Format::Distillkit => LOSSY_MASS_SLACK,
            _ => MASS_SLACK,
        },
        counts: Counts::default(),
        seen: Seen {
            rows: 0,
            fewest: usize::MAX,
            most: 0,
            log_mass: (f64::NEG_INFINITY, f64::INFINITY),
            whole_log_mass: 0.0,
            every_position: true,
        },
        digest: blake3::Hasher::new(),
        check: AlignmentCheck::default(),
        looked_into: 0,
    };
    let skips = options.on_error == OnError::Skip;
    let (mut bad, mut named) = (BTreeSet::new(), Vec::new());
    let mut item = 0;
    while options
        .limit
        .is_none_or(|limit| pass.counts.sequences < limit as u64)
    {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // Who passes over bad records wants to know all of them before anything is written.
        let taken = match reader.next(skips || pass.looked_into < WHOLE_POSITIONS) {
            Ok(None) => break,
            Ok(Some(foreign)) => pass.take(foreign),
            Err(error) => Err(error),
        };
        match taken {
            Ok(()) => progress(reader, pass.counts.positions, None),
            Err(Error::Foreign {
                path,
                place,
                problem,
                ..
            }) if skips && !place.is_empty() => {
                bad.insert(item);
                let place = BadPlace {
                    file: path,
                    place: place.trim_start().to_owned(),
                    problem,
                };
                progress(reader, pass.counts.positions, Some(&place));
                if named.len() < NAMED_BAD_RECORDS {
                    named.push(place);
                }
            }
            Err(error) => return Err(with_way_out(error)),
        }
        item += 1;
    }
    progress(reader, pass.counts.positions, None);
    pass.finish(format, (bad, named)).map(Some)
}

/// Tells how to go on without a bad record.
fn with_way_out(mut error: Error) -> Error {
    if let Error::Foreign { place, hint, .. } = &mut error
        && !place.is_empty()
    {
        hint.push_str("; to pass over bad records: --on-error skip");
    }
    error
}

impl Pass<'_> {
    /// Checks a sequence and counts it; on failure it has left no trace.
    fn take(&mut self, foreign: Foreign) -> Result<()> {
        check_tokens(&foreign, self.layout.vocab_size)?;
        let place = foreign.place.clone();
        let Some(placed) = foreign.place(&self.layout) else {
            self.counts.read += 1;
            self.counts.skipped += 1;
            return Ok(());
        };
        match &placed.foreign.values {
            Values::Kept(rows) => {
                let mut masses = Vec::with_capacity(rows.len());
                for (position, row) in rows.iter().enumerate() {
                    let Some(row) = row else { continue };
                    let mass = self.mass(row).map_err(|problem| {
                        place.error(problem.at(format!("position {position}")))
                    })?;
                    masses.push((row.len(), mass));
                }
                for (entries, mass) in masses {
                    self.seen.add(entries, mass);
                }
            }
            Values::Whole {
                count,
                log_mass,
                summary: Some(_),
                ..
            } => {
                self.looked_into += *count as u64;
                self.seen.rows += *count as u64;
                self.seen.whole_log_mass = self.seen.whole_log_mass.max(f64::from(*log_mass));
            }
            Values::Whole { summary: None, .. } => {}
        }
        self.counts.add(&placed);
        hash_sequence(
            &mut self.digest,
            &placed.foreign.token_ids,
            &placed.foreign.loss_mask,
        );
        let before_last = placed.positions() - 1;
        self.seen.every_position &= placed.present[..before_last].iter().all(|present| *present);
        align(&mut self.check, placed, &self.layout)
    }

    /// Σ exp over the entries of a position that can be used.
    fn mass(&self, row: &Row) -> std::result::Result<f64, Problem> {
        let options = self.setup.options;
        check_row(row, self.layout.vocab_size)?;
        if let Some(k) = options.top_k.filter(|k| row.len() < *k) {
            return Err(Problem::new(
                format!(
                    "{} entries with a probability, --top-k asks for {k}",
                    row.len()
                ),
                format!("give --top-k {} or less", row.len()),
            ));
        }
        let mass: f64 = row.iter().map(|(_, value)| f64::from(*value).exp()).sum();
        let given = options.values;
        if given != GivenValues::Logits && mass > 1.0 + self.slack {
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
        Ok(mass)
    }

    fn finish(
        self,
        format: Format,
        (bad, named): (BTreeSet<u64>, Vec<BadPlace>),
    ) -> Result<Survey> {
        let Self {
            setup,
            mut layout,
            counts,
            seen,
            ..
        } = self;
        let options = setup.options;
        let whole = seen.most == 0;
        layout.top_k = kept_entries(whole, &seen, setup, layout.vocab_size);
        let values = kind_of_values(whole, &seen, options.values);
        apply_temperature(whole, values, options.temperature, &mut layout)?;
        let alignment = self.check.finish();
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
        Ok(Survey {
            read: counts.read + bad.len() as u64,
            sequences: counts.sequences,
            positions: counts.positions,
            targets: counts.targets,
            targets_without_values: counts.targets_without_values,
            truncated: counts.truncated,
            skipped: counts.skipped,
            longest: counts.longest,
            digest: self.digest.finalize().to_hex().to_string(),
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
            bad,
            named,
        })
    }
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
        self.read += 1;
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
    fn add(&mut self, entries: usize, mass: f64) {
        self.rows += 1;
        self.fewest = self.fewest.min(entries);
        self.most = self.most.max(entries);
        self.log_mass = (
            self.log_mass.0.max(mass.ln()),
            self.log_mass.1.min(mass.ln()),
        );
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
