//! A sequence as another program left it, and its way to one of the cache.

use std::path::PathBuf;

use caskd_formats::{Sequence, Statistics, TopK};

use crate::data::Problem;
use crate::{Error, Result};

/// Values at or below this stand for "no probability": servers write −9999 or −1e9 where JSON has no −inf.
pub(crate) const NOTHING: f32 = -9999.0;

/// The kept entries of one position, token id and value, in any order.
pub(crate) type Row = Vec<(u32, f32)>;

/// Where a sequence stands in its file, for messages: the path, and `line 17` or `window 3`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) place: String,
}

impl Place {
    /// The error of a problem here.
    pub(crate) fn error(&self, problem: Problem) -> Error {
        Error::Foreign {
            path: self.path.clone(),
            place: if self.place.is_empty() {
                String::new()
            } else {
                format!(" {}", self.place)
            },
            problem: problem.message,
            hint: problem.hint,
        }
    }
}

/// One sequence; T tokens.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// `file.jsonl:17`.
    pub(crate) source: String,
    pub(crate) place: Place,
    /// \[T\].
    pub(crate) token_ids: Vec<u32>,
    /// Asked-for targets \[T\].
    pub(crate) loss_mask: Vec<bool>,
    pub(crate) values: Values,
}

/// What is known of the tokens that follow.
#[derive(Debug)]
pub(crate) enum Values {
    /// The largest values of every position \[T\]: row t is about token t + 1.
    Kept(Vec<Option<Row>>),
    /// Whole vocabularies at positions `first` to `first + count`, already summarised; `None` where they were not read.
    Whole {
        first: usize,
        count: usize,
        /// The largest |ln Σ exp| of some rows as they were given: near 0 for log-probabilities.
        log_mass: f32,
        summary: Option<(Statistics, TopK)>,
    },
}

/// How sequences are laid out in the cache; the same for all of them.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Positions that values are moved by.
    pub(crate) shift: i64,
    /// Longest sequence.
    pub(crate) max_len: usize,
    /// K.
    pub(crate) top_k: usize,
    /// V.
    pub(crate) vocab_size: usize,
    /// Factor that brings kept values to temperature 1.
    pub(crate) scale: f32,
    /// Kept values are normalised over the whole vocabulary: their log-sum-exp is 0.
    pub(crate) normalised: bool,
    /// Mean, deviation and minimum of whole vocabularies mean what they say.
    pub(crate) whole_statistics: bool,
}

/// A sequence whose values stand where they belong.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) foreign: Foreign,
    /// Whether there are values \[T\].
    pub(crate) present: Vec<bool>,
    pub(crate) truncated: bool,
    /// Targets that were dropped because nothing is known before them.
    pub(crate) without_values: u64,
}

impl Foreign {
    /// Cuts it, moves its values and takes targets without values back; `None` where no target is left.
    pub(crate) fn place(mut self, layout: &Layout) -> Option<Placed> {
        let truncated = self.token_ids.len() > layout.max_len;
        self.token_ids.truncate(layout.max_len);
        self.loss_mask.truncate(layout.max_len);
        let positions = self.token_ids.len();
        let mut present = vec![false; positions];
        match &mut self.values {
            Values::Kept(rows) => {
                let mut moved: Vec<Option<Row>> = vec![None; positions];
                for (index, row) in rows.drain(..).enumerate() {
                    let to = index as i64 + layout.shift;
                    if let Some(slot) = usize::try_from(to).ok().and_then(|to| moved.get_mut(to)) {
                        *slot = row;
                    }
                }
                for (present, row) in present.iter_mut().zip(&moved) {
                    *present = row.is_some();
                }
                *rows = moved;
            }
            Values::Whole {
                first,
                count,
                summary,
                ..
            } => {
                let start = *first as i64 + layout.shift;
                let dropped = (-start).max(0) as usize;
                let first_kept = start.max(0) as usize;
                let kept = (*count)
                    .saturating_sub(dropped)
                    .min(positions.saturating_sub(first_kept));
                if let Some((statistics, top_k)) = summary {
                    cut(statistics, top_k, dropped, kept);
                }
                (*first, *count) = (first_kept, kept);
                present[first_kept.min(positions)..(first_kept + kept).min(positions)].fill(true);
            }
        }
        let mut without_values = 0;
        for position in 1..positions {
            if self.loss_mask[position] && !present[position - 1] {
                self.loss_mask[position] = false;
                without_values += 1;
            }
        }
        let has_target = self.loss_mask.iter().skip(1).any(|target| *target);
        has_target.then_some(Placed {
            foreign: self,
            present,
            truncated,
            without_values,
        })
    }
}

/// Rows `first` to `first + count`.
fn cut(statistics: &mut Statistics, top_k: &mut TopK, first: usize, count: usize) {
    let columns = [
        &mut statistics.mean,
        &mut statistics.std,
        &mut statistics.min,
        &mut statistics.max,
        &mut statistics.log_sum_exp,
    ];
    for column in columns {
        *column = column
            .get(first..first + count)
            .unwrap_or_default()
            .to_vec();
    }
    let entries = first * top_k.k..(first + count) * top_k.k;
    top_k.ids = top_k.ids.get(entries.clone()).unwrap_or_default().to_vec();
    top_k.logits = top_k.logits.get(entries).unwrap_or_default().to_vec();
}

impl Placed {
    /// T.
    pub(crate) fn positions(&self) -> usize {
        self.foreign.token_ids.len()
    }

    /// As the cache has it: K entries at every position, placeholders where nothing is known.
    pub(crate) fn into_sequence(self, layout: &Layout) -> Result<Sequence> {
        let positions = self.positions();
        let foreign = self.foreign;
        let mut filled = Filled::new(positions, layout);
        match foreign.values {
            Values::Kept(rows) => {
                for (position, row) in rows.into_iter().enumerate() {
                    match row {
                        None => filled.push_unknown(),
                        Some(row) => filled.push_row(row).map_err(|problem| {
                            let place = format!("position {position}");
                            foreign.place.error(problem.at(place))
                        })?,
                    }
                }
            }
            Values::Whole {
                first,
                count,
                summary,
                ..
            } => {
                let (statistics, top_k) = summary.unwrap_or_default();
                (0..first).for_each(|_| filled.push_unknown());
                filled.append(&statistics, &top_k);
                (first + count..positions).for_each(|_| filled.push_unknown());
            }
        }
        Ok(Sequence {
            source: foreign.source,
            token_ids: foreign.token_ids,
            loss_mask: foreign.loss_mask,
            statistics: Some(filled.statistics),
            top_k: Some(filled.top_k),
            ..Sequence::default()
        })
    }
}

/// The columns of one sequence, filled position by position.
struct Filled<'a> {
    layout: &'a Layout,
    statistics: Statistics,
    top_k: TopK,
}

impl<'a> Filled<'a> {
    fn new(positions: usize, layout: &'a Layout) -> Self {
        let entries = positions * layout.top_k;
        Self {
            layout,
            statistics: Statistics::default(),
            top_k: TopK {
                k: layout.top_k,
                ids: Vec::with_capacity(entries),
                logits: Vec::with_capacity(entries),
            },
        }
    }

    /// Statistics that cannot be known get values that nothing can be computed with.
    fn push_statistics(&mut self, max: f32, log_sum_exp: f32) {
        self.statistics.mean.push(f32::NEG_INFINITY);
        self.statistics.std.push(f32::INFINITY);
        self.statistics.min.push(f32::NEG_INFINITY);
        self.statistics.max.push(max);
        self.statistics.log_sum_exp.push(log_sum_exp);
    }

    /// The even distribution, which ranks nothing.
    fn push_unknown(&mut self) {
        let even = -(self.layout.vocab_size as f32).ln();
        self.top_k.ids.extend(0..self.layout.top_k as u32);
        self.top_k.logits.resize(self.top_k.ids.len(), even);
        self.push_statistics(even, 0.0);
    }

    fn push_row(&mut self, mut row: Row) -> std::result::Result<(), Problem> {
        let (k, vocab_size) = (self.layout.top_k, self.layout.vocab_size);
        check_row(&row, vocab_size)?;
        if row.len() < k {
            return Err(Problem::new(
                format!(
                    "{} entries with a probability, {k} are to be kept",
                    row.len()
                ),
                format!("give --top-k {} or less", row.len()),
            ));
        }
        for (_, value) in &mut row {
            *value *= self.layout.scale;
        }
        row.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        row.truncate(k);
        let max = row[0].1;
        let log_sum_exp = if self.layout.normalised {
            0.0
        } else {
            let sum: f64 = row
                .iter()
                .map(|(_, value)| f64::from(value - max).exp())
                .sum();
            (f64::from(max) + sum.ln()) as f32
        };
        self.top_k.ids.extend(row.iter().map(|entry| entry.0));
        self.top_k.logits.extend(row.iter().map(|entry| entry.1));
        self.push_statistics(max, log_sum_exp);
        Ok(())
    }

    fn append(&mut self, statistics: &Statistics, top_k: &TopK) {
        self.top_k.ids.extend_from_slice(&top_k.ids);
        self.top_k.logits.extend_from_slice(&top_k.logits);
        if self.layout.whole_statistics {
            self.statistics.mean.extend_from_slice(&statistics.mean);
            self.statistics.std.extend_from_slice(&statistics.std);
            self.statistics.min.extend_from_slice(&statistics.min);
            self.statistics.max.extend_from_slice(&statistics.max);
            self.statistics
                .log_sum_exp
                .extend_from_slice(&statistics.log_sum_exp);
        } else {
            // What was clipped to a floor weighs too much in a sum over the row; the values themselves were normalised
            // before.
            for (max, log_sum_exp) in statistics.max.iter().zip(&statistics.log_sum_exp) {
                let normalised = self.layout.normalised;
                self.push_statistics(*max, if normalised { 0.0 } else { *log_sum_exp });
            }
        }
    }
}

/// Whether a row's entries can be kept at all.
pub(crate) fn check_row(row: &Row, vocab_size: usize) -> std::result::Result<(), Problem> {
    if row.is_empty() {
        return Err(Problem::new(
            "no entry has a probability",
            "write null for a position that nothing is known of",
        ));
    }
    if let Some((id, value)) = row.iter().find(|(_, value)| !value.is_finite()) {
        return Err(Problem::new(
            format!("the value of token {id} is {value}"),
            "the server or the model that computed it is at fault; compute the record again",
        ));
    }
    if let Some((id, _)) = row.iter().find(|(id, _)| *id as usize >= vocab_size) {
        return Err(Problem::new(
            format!("token id {id} is beyond the vocabulary of {vocab_size}"),
            "is this the teacher's tokenizer? where its LM head has rows beyond the tokenizer's tokens, give their number with --vocab-size",
        ));
    }
    let mut ids: Vec<u32> = row.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    if let Some([id, _]) = ids.array_windows().find(|[id, next]| id == next) {
        return Err(Problem::new(
            format!("token id {id} comes twice"),
            "every token may come once in a position",
        ));
    }
    Ok(())
}
