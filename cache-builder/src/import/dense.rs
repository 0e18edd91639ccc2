//! Logits of the whole vocabulary as arrays [T, V] or [B, T, V] beside their token ids, whatever file they are in.
//!
//! `logits` (or `logprobs`) has a partner `input_ids` (or `token_ids`, `tokens`) of the same name otherwise: `logits.3`
//! goes with `input_ids.3`. Row t is about token t + 1, as every causal model gives them; a missing last row is allowed.
//! `lengths` or `attention_mask` tell where sequences end, `labels` or `loss_mask` which tokens are targets.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::PathBuf;

use super::foreign::{Foreign, Place, Values};
use super::whole::Whole;
use super::{GivenValues, Reader, Setup};
use crate::data::{Problem, file_name};
use crate::{Error, Result};

/// Positions whose logits exist at one time.
const ROWS: usize = 256;

/// Positions of a sequence that are looked at before they are brought to temperature 1.
const LOOKED_AT: usize = 16;

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    F16,
    Bf16,
    F32,
    F64,
    /// Whole numbers of so many bytes.
    Signed(usize),
    Unsigned(usize),
}

impl Element {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Element::F16 | Element::Bf16 => 2,
            Element::F32 => 4,
            Element::F64 => 8,
            Element::Signed(bytes) | Element::Unsigned(bytes) => bytes,
        }
    }
}

/// An array of a file.
#[derive(Debug, Clone)]
pub(crate) struct ArrayInfo {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) element: Element,
}

/// A file of named arrays, little-endian and row-major.
pub(crate) trait Arrays {
    fn list(&self) -> &[ArrayInfo];

    /// The bytes of array number `index`, from its beginning.
    fn stream(&self, index: usize) -> std::io::Result<Box<dyn Read>>;
}

/// The arrays of one sequence or batch.
struct Group {
    file: usize,
    logits: usize,
    name: String,
    element: Element,
    /// Rows of logits of a sequence, padding included.
    rows: usize,
    /// Of each sequence.
    token_ids: Vec<Vec<u32>>,
    loss_masks: Vec<Vec<bool>>,
}

/// Reads the groups of all files in order.
pub(crate) struct DenseReader {
    files: Vec<(PathBuf, Box<dyn Arrays>)>,
    groups: Vec<Group>,
    vocab_size: usize,
    top_k: usize,
    temperature: f32,
    /// Group and sequence to come.
    next: (usize, usize),
    stream: Option<Box<dyn Read>>,
    /// Bytes of the stream that nobody asked for, not passed over yet.
    behind: u64,
    bytes: u64,
    buffer: Vec<u8>,
    values: Vec<f32>,
    notes: Vec<String>,
}

impl DenseReader {
    pub(crate) fn new(files: Vec<(PathBuf, Box<dyn Arrays>)>, setup: &Setup<'_>) -> Result<Self> {
        let mut groups = Vec::new();
        let mut vocab_size = None;
        for (index, (path, arrays)) in files.iter().enumerate() {
            let place = Place {
                path: path.clone(),
                place: String::new(),
            };
            let found = groups_of(index, arrays.as_ref(), &mut vocab_size)
                .map_err(|problem| place.error(problem))?;
            groups.extend(found);
        }
        let vocab_size = vocab_size.unwrap_or(1);
        Ok(Self {
            files,
            groups,
            vocab_size,
            top_k: setup.top_k.min(vocab_size),
            temperature: setup.options.temperature as f32,
            next: (0, 0),
            stream: None,
            behind: 0,
            bytes: 0,
            buffer: Vec::new(),
            values: Vec::new(),
            notes: if setup.options.values == GivenValues::Renormalised {
                vec!["--values renormalised means nothing for a whole vocabulary".to_owned()]
            } else {
                Vec::new()
            },
        })
    }

    /// Statistics and top-k of the next `count` rows of the stream; all of them are read, whatever they hold.
    fn summarize(&mut self, group: usize, count: usize, place: &Place) -> Result<Whole> {
        let file = self.groups[group].file;
        let failed = |path: &PathBuf| {
            let path = path.clone();
            move |source| Error::DataFile { path, source }
        };
        let element = self.groups[group].element;
        let path = self.files[file].0.clone();
        if self.stream.is_none() {
            let stream = self.files[file]
                .1
                .stream(self.groups[group].logits)
                .map_err(failed(&path))?;
            self.stream = Some(stream);
        }
        let Some(stream) = &mut self.stream else {
            return Ok(Whole::new(self.top_k));
        };
        let passed = std::io::copy(&mut stream.by_ref().take(self.behind), &mut std::io::sink())
            .map_err(failed(&path))?;
        if passed < self.behind {
            return Err(failed(&path)(std::io::ErrorKind::UnexpectedEof.into()));
        }
        self.behind = 0;
        let mut whole = Ok(Whole::new(self.top_k));
        let mut first = 0;
        while first < count {
            let rows = ROWS.min(count - first);
            self.buffer
                .resize(rows * self.vocab_size * element.bytes(), 0);
            stream.read_exact(&mut self.buffer).map_err(failed(&path))?;
            to_f32(&self.buffer, element, &mut self.values);
            let looked_at = if first == 0 { LOOKED_AT } else { 0 };
            whole = whole.and_then(|mut whole: Whole| {
                whole
                    .add(
                        &mut self.values,
                        self.vocab_size,
                        self.temperature,
                        looked_at,
                    )
                    .map(|()| whole)
                    .map_err(|(row, problem)| {
                        place.error(Problem::new(
                            format!("position {}: {problem}", first + row),
                            "the model that computed it is at fault; compute it again in a wider type",
                        ))
                    })
            });
            first += rows;
        }
        whole
    }
}

impl Reader for DenseReader {
    fn next(&mut self, values: bool) -> Result<Option<Foreign>> {
        let (at, index) = self.next;
        let Some(group) = self.groups.get(at) else {
            return Ok(None);
        };
        if index >= group.token_ids.len() {
            self.next = (at + 1, 0);
            (self.stream, self.behind) = (None, 0);
            return self.next(values);
        }
        self.next = (at, index + 1);
        let (token_ids, loss_mask) = (
            group.token_ids[index].clone(),
            group.loss_masks[index].clone(),
        );
        let row_bytes = (self.vocab_size * group.element.bytes()) as u64;
        let count = group.rows.min(token_ids.len());
        let padding = (group.rows - count) as u64 * row_bytes;
        let path = self.files[group.file].0.clone();
        let of_one = group.token_ids.len() == 1;
        let name = if of_one {
            group.name.clone()
        } else {
            format!("{}[{index}]", group.name)
        };
        let source = format!("{}:{name}", file_name(&path));
        let place = Place {
            path,
            place: format!("`{name}`"),
        };
        let summary = if values {
            Some(self.summarize(at, count, &place))
        } else {
            self.behind += count as u64 * row_bytes;
            None
        };
        self.behind += padding;
        self.bytes += count as u64 * row_bytes + padding;
        let summary = summary.transpose()?;
        Ok(Some(Foreign {
            source,
            place,
            token_ids,
            loss_mask,
            values: Values::Whole {
                first: 0,
                count,
                log_mass: summary.as_ref().map_or(0.0, |whole| whole.log_mass),
                summary: summary.map(|whole| (whole.statistics, whole.top_k)),
            },
        }))
    }

    fn bytes_read(&self) -> u64 {
        self.bytes
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(self.vocab_size)
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

fn to_f32(bytes: &[u8], element: Element, out: &mut Vec<f32>) {
    out.clear();
    match element {
        Element::F16 => out.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|value| half::f16::from_le_bytes(*value).to_f32()),
        ),
        Element::Bf16 => out.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|value| half::bf16::from_le_bytes(*value).to_f32()),
        ),
        Element::F32 => out.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|value| f32::from_le_bytes(*value)),
        ),
        Element::F64 => out.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|value| f64::from_le_bytes(*value) as f32),
        ),
        Element::Signed(_) | Element::Unsigned(_) => {}
    }
}

/// Whole numbers of an array.
fn integers(arrays: &dyn Arrays, index: usize) -> std::result::Result<Vec<i64>, Problem> {
    let info = &arrays.list()[index];
    let size = info.element.bytes();
    let is_signed = match info.element {
        Element::Signed(_) => true,
        Element::Unsigned(_) => false,
        _ => {
            return Err(Problem::new(
                format!("`{}` does not hold whole numbers", info.name),
                "token ids, labels and masks are integers",
            ));
        }
    };
    let count = info.shape.iter().product::<usize>();
    let mut bytes = Vec::new();
    let unreadable = |error: std::io::Error| {
        Problem::new(
            format!("`{}` can't be read: {error}", info.name),
            "the file is damaged",
        )
    };
    let stream = arrays.stream(index).map_err(unreadable)?;
    stream
        .take((count * size) as u64)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() != count * size {
        return Err(Problem::new(
            format!("`{}` is cut short", info.name),
            "the file is damaged",
        ));
    }
    Ok(bytes
        .chunks_exact(size)
        .map(|value| {
            let negative = is_signed && value[size - 1] >= 0x80;
            let mut wide = if negative { [0xFF; 8] } else { [0; 8] };
            wide[..size].copy_from_slice(value);
            i64::from_le_bytes(wide)
        })
        .collect())
}

const LOGITS: [&str; 3] = ["logits", "logprobs", "log_probs"];
const TOKENS: [&str; 3] = ["input_ids", "token_ids", "tokens"];

const NAMES: &str = "the file holds `logits` [T, V] or [B, T, V] in floats beside `input_ids` [T] or [B, T] in integers";

fn groups_of(
    file: usize,
    arrays: &dyn Arrays,
    vocab_size: &mut Option<usize>,
) -> std::result::Result<Vec<Group>, Problem> {
    let list = arrays.list();
    let mut named: Vec<(usize, &str)> = Vec::new();
    for (index, info) in list.iter().enumerate() {
        if let Some(word) = LOGITS.iter().find(|word| info.name.contains(**word)) {
            named.push((index, word));
        }
    }
    named.sort_by_key(|(index, _)| natural(&list[*index].name));
    if named.is_empty() {
        let names: Vec<String> = list.iter().map(|info| format!("`{}`", info.name)).collect();
        return Err(Problem::new(
            format!(
                "no array is named `logits` or `logprobs` (there are {})",
                names.join(", ")
            ),
            NAMES,
        ));
    }
    // Other tensors may be named so, like the top-k logits of an export: those without token ids are passed over, unless
    // others have them that are named alike but for a number.
    let partnered = |(index, word): &&(usize, &str)| {
        TOKENS
            .iter()
            .any(|name| partner(list, &list[*index].name, word, name).is_some())
    };
    let kind =
        |(index, _): &(usize, &str)| list[*index].name.replace(|c: char| c.is_ascii_digit(), "");
    let kinds: BTreeSet<String> = named.iter().filter(partnered).map(kind).collect();
    if !kinds.is_empty() {
        named.retain(|one| kinds.contains(&kind(one)));
    }
    named
        .into_iter()
        .map(|(index, word)| group_of(file, arrays, index, word, vocab_size))
        .collect()
}

/// The array that is named as this one, but for the word.
fn partner(list: &[ArrayInfo], name: &str, word: &str, other: &str) -> Option<usize> {
    let wanted = name.replacen(word, other, 1);
    list.iter().position(|info| info.name == wanted)
}

fn group_of(
    file: usize,
    arrays: &dyn Arrays,
    logits: usize,
    word: &str,
    vocab_size: &mut Option<usize>,
) -> std::result::Result<Group, Problem> {
    let list = arrays.list();
    let info = &list[logits];
    let partner = |name: &str| partner(list, &info.name, word, name);
    if matches!(info.element, Element::Signed(_) | Element::Unsigned(_)) {
        return Err(Problem::new(
            format!("`{}` does not hold floats", info.name),
            NAMES,
        ));
    }
    let (batch, rows, width) = match info.shape.as_slice() {
        [rows, width] => (1, *rows, *width),
        [batch, rows, width] => (*batch, *rows, *width),
        shape => {
            return Err(Problem::new(
                format!("`{}` has shape {shape:?}", info.name),
                NAMES,
            ));
        }
    };
    if width == 0 || *vocab_size.get_or_insert(width) != width {
        return Err(Problem::new(
            format!(
                "`{}` has {width} values a position, others {}",
                info.name,
                vocab_size.unwrap_or(0)
            ),
            "all logits come from one teacher",
        ));
    }
    let Some(tokens) = TOKENS.iter().find_map(|name| partner(name)) else {
        return Err(Problem::new(
            format!("there are no token ids for `{}`", info.name),
            "save them beside the logits as `input_ids`; for .npy logits give --tokens FILE.npy",
        ));
    };
    let length = list[tokens].shape.last().copied().unwrap_or(0);
    let is_table = |index: usize| list[index].shape.iter().product::<usize>() == batch * length;
    if !is_table(tokens) || !(rows == length || rows + 1 == length) {
        return Err(Problem::new(
            format!(
                "`{}` has shape {:?}, `{}` {:?}",
                list[tokens].name, list[tokens].shape, info.name, info.shape
            ),
            "there is one row of logits for each token, or for each but the last",
        ));
    }
    let mut token_ids = Vec::with_capacity(batch);
    let all = integers(arrays, tokens)?;
    let lengths = lengths(arrays, &partner, batch, length)?;
    let targets = target_table(arrays, &partner, batch * length)?;
    let mut loss_masks = Vec::with_capacity(batch);
    for (sequence, real) in lengths.into_iter().enumerate() {
        let range = sequence * length..sequence * length + real;
        let ids: std::result::Result<Vec<u32>, _> = all[range.clone()]
            .iter()
            .map(|id| u32::try_from(*id))
            .collect();
        token_ids.push(ids.map_err(|_| {
            Problem::new(
                format!("`{}` holds a number that is no token id", list[tokens].name),
                "padding with -1 needs `lengths` [B] or an `attention_mask` [B, T] beside it",
            )
        })?);
        loss_masks.push(targets[range].to_vec());
    }
    Ok(Group {
        file,
        logits,
        name: info.name.clone(),
        element: info.element,
        rows,
        token_ids,
        loss_masks,
    })
}

/// Real tokens of each sequence.
fn lengths(
    arrays: &dyn Arrays,
    partner: &dyn Fn(&str) -> Option<usize>,
    batch: usize,
    length: usize,
) -> std::result::Result<Vec<usize>, Problem> {
    let wrong = |what: &str| Problem::new(what.to_owned(), "sequences are padded on the right");
    if let Some(index) = partner("lengths") {
        let lengths = integers(arrays, index)?;
        let fits = |count: &i64| {
            usize::try_from(*count)
                .ok()
                .filter(|count| *count <= length)
        };
        let lengths: Option<Vec<usize>> = lengths.iter().map(fits).collect();
        return lengths
            .filter(|lengths| lengths.len() == batch)
            .ok_or_else(|| wrong("`lengths` does not hold a length for each sequence"));
    }
    let Some(index) = partner("attention_mask") else {
        return Ok(vec![length; batch]);
    };
    let mask = integers(arrays, index)?;
    if mask.len() != batch * length {
        return Err(wrong(
            "`attention_mask` has another shape than the token ids",
        ));
    }
    mask.chunks_exact(length.max(1))
        .map(|mask| {
            let real = mask.iter().take_while(|flag| **flag == 1).count();
            if mask[real..].iter().all(|flag| *flag == 0) {
                Ok(real)
            } else {
                Err(wrong(
                    "`attention_mask` is not 1 for the tokens and 0 behind them",
                ))
            }
        })
        .collect()
}

/// Which tokens are targets, for all sequences; all of them where nothing says otherwise.
fn target_table(
    arrays: &dyn Arrays,
    partner: &dyn Fn(&str) -> Option<usize>,
    count: usize,
) -> std::result::Result<Vec<bool>, Problem> {
    for (name, is_labels) in [("loss_mask", false), ("labels", true)] {
        if let Some(index) = partner(name) {
            let flags = integers(arrays, index)?;
            if flags.len() != count {
                return Err(Problem::new(
                    format!("`{name}` has another shape than the token ids"),
                    "it has an entry for each token",
                ));
            }
            return Ok(flags
                .iter()
                .map(|flag| if is_labels { *flag != -100 } else { *flag != 0 })
                .collect());
        }
    }
    Ok(vec![true; count])
}

/// Sorts `logits.10` behind `logits.9`.
fn natural(name: &str) -> Vec<(bool, u64, String)> {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digits = rest.len()
            - rest
                .trim_start_matches(|letter: char| letter.is_ascii_digit())
                .len();
        let end = if digits > 0 {
            digits
        } else {
            rest.find(|letter: char| letter.is_ascii_digit())
                .unwrap_or(rest.len())
        };
        let (part, after) = rest.split_at(end);
        parts.push((digits > 0, part.parse().unwrap_or(0), part.to_owned()));
        rest = after;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_people_count() {
        let mut names = vec!["logits.10", "logits.9", "logits"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["logits", "logits.9", "logits.10"]);
    }
}
