//! The basis of a compact cache, `basis-<16 hex>.safetensors`: the transform and every frequency table.

use std::fmt::Write as _;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};

use super::ranked;
use super::rans::{self, FREQUENCY_SUM, MAX_SYMBOLS, Table};
use crate::cache::Io;
use crate::error::{Error, Result};
use crate::sequence::TopK;
use crate::spec::{BasisInfo, CacheSpec, MAX_DIMENSION};
use crate::store::Store;

/// Top-k logits lie on a grid of 1/32 below the maximum.
pub const TOP_K_STEPS: f32 = 32.0;

/// The data begins at a multiple of this.
const ALIGNMENT: usize = 64;

/// Levels are spread over at most this many symbols; what is more goes into plain low bits.
const SPREAD: i32 = 128;

const MAX_SHIFT: u8 = 12;

/// A tensor that is absent where it would be 0.
const TAIL_SHIFT: &str = "tail_shift";

/// A transform, as the fit gives it.
#[derive(Clone, Debug, Default)]
pub struct BasisParts {
    /// μ \[D\].
    pub mean: Vec<f32>,
    /// A divided by the step, \[r·D\] row-major: levels = round(analysis · (h − μ)).
    pub analysis: Vec<f32>,
    /// \[D·r\] row-major: h ≈ μ + synthesis · levels.
    pub synthesis: Vec<f32>,
    /// How far the logits outside the top K are lowered, for the noise of the levels raises the mean of exp(logit).
    pub tail_shift: f32,
}

/// How often the symbols of each column came in a sample: frequency tables before rounding.
#[derive(Clone, Debug, Default)]
pub struct SymbolCounts {
    /// Per coefficient: low bits that stay plain, the lowest symbol, and the counts from there on.
    levels: Vec<(u8, i16, Vec<f64>)>,
    /// Ids by how often the sample had them among its top K.
    id_order: Vec<u32>,
    /// Of the K buckets and the K − 1 gaps.
    top_k: Vec<Vec<f64>>,
}

/// A transform with its tables, ready to code.
#[derive(Clone, Debug)]
pub struct Basis {
    width: usize,
    parts: BasisParts,
    pub(crate) channels: Vec<Channel>,
    /// The channels' tables side by side, as the coder takes them.
    pub(crate) level_tables: Vec<Table>,
    pub(crate) id_order: Vec<u32>,
    pub(crate) rank_of_id: Vec<u32>,
    pub(crate) top_k_tables: Vec<Table>,
    frequencies: Frequencies,
}

/// How one coefficient's levels become symbols.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    pub(crate) shift: u8,
    pub(crate) lowest: i16,
    pub(crate) table: Table,
}

/// The tables as they stand in the file.
#[derive(Clone, Debug)]
struct Frequencies {
    level_symbols: Vec<u16>,
    levels: Vec<u16>,
    top_k_symbols: Vec<u16>,
    top_k: Vec<u16>,
}

impl SymbolCounts {
    /// Counts a sample's levels \[n·r\] and top-k \[n·K\].
    pub fn of(levels: &[i16], rank: usize, top_k: &TopK, vocab_size: usize) -> SymbolCounts {
        let columns = (0..rank).map(|column| {
            let values = || {
                levels
                    .iter()
                    .skip(column)
                    .step_by(rank.max(1))
                    .map(|level| i32::from(*level))
            };
            count_levels(values)
        });
        let k = top_k.k;
        let mut of_id = vec![0_u32; vocab_size];
        for id in &top_k.ids {
            of_id[*id as usize] += 1;
        }
        let mut id_order: Vec<u32> = (0..vocab_size as u32).collect();
        id_order.sort_by_key(|id| (std::cmp::Reverse(of_id[*id as usize]), *id));
        let mut rank_of_id = vec![0_u32; vocab_size];
        for (rank, id) in id_order.iter().enumerate() {
            rank_of_id[*id as usize] = rank as u32;
        }
        let buckets = usize::from(ranked::bucket(vocab_size.saturating_sub(1) as u32)) + 1;
        let mut counts = vec![vec![0.5; buckets]; k];
        // A gap that the sample lacks must not become impossible.
        counts.extend(vec![vec![0.02; MAX_SYMBOLS]; k.saturating_sub(1)]);
        for (ids, logits) in top_k.ids.chunks_exact(k).zip(top_k.logits.chunks_exact(k)) {
            for (counts, id) in counts.iter_mut().zip(ids) {
                counts[usize::from(ranked::bucket(rank_of_id[*id as usize]))] += 1.0;
            }
            let mut before = 0;
            for (index, steps) in ranked::steps(logits, logits[0]).enumerate().skip(1) {
                let gap = (steps - before).min(MAX_SYMBOLS as u32 - 1) as usize;
                before = steps;
                counts[k + index - 1][gap] += 1.0;
            }
        }
        SymbolCounts {
            levels: columns.collect(),
            id_order,
            top_k: counts,
        }
    }
}

/// Shift, lowest symbol and counts of one coefficient's levels.
fn count_levels<I: Iterator<Item = i32>>(values: impl Fn() -> I) -> (u8, i16, Vec<f64>) {
    let least = values().min().unwrap_or(0).min(0);
    let most = values().max().unwrap_or(0).max(0);
    let mut shift = 0;
    while (most >> shift) - (least >> shift) >= SPREAD {
        shift += 1;
    }
    // Room for values a little beyond those of the sample: an exception costs eight bytes.
    let room = (1 + ((most - least) >> shift) / 8).min(4);
    let lowest = ((least >> shift) - room).max(i32::from(i16::MIN) >> shift);
    let highest = ((most >> shift) + room).min(i32::from(i16::MAX) >> shift);
    let mut counts = vec![0.1; (highest - lowest + 1) as usize];
    for value in values() {
        counts[((value >> shift) - lowest) as usize] += 1.0;
    }
    (shift, lowest as i16, counts)
}

impl Basis {
    /// A basis from a fitted transform and a sample's symbols.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] where they do not fit each other.
    pub fn new(parts: BasisParts, counts: &SymbolCounts) -> Result<Basis> {
        let mut frequencies = Frequencies {
            level_symbols: Vec::new(),
            levels: Vec::new(),
            top_k_symbols: Vec::new(),
            top_k: Vec::new(),
        };
        for (_, _, counts) in &counts.levels {
            frequencies.level_symbols.push(counts.len() as u16);
            frequencies.levels.extend(rans::frequencies(counts));
        }
        for counts in &counts.top_k {
            frequencies.top_k_symbols.push(counts.len() as u16);
            frequencies.top_k.extend(rans::frequencies(counts));
        }
        let shifts: Vec<u8> = counts.levels.iter().map(|(shift, _, _)| *shift).collect();
        let lowest: Vec<i16> = counts.levels.iter().map(|(_, lowest, _)| *lowest).collect();
        Basis::check(
            parts,
            &shifts,
            &lowest,
            counts.id_order.clone(),
            frequencies,
        )
        .map_err(|message| Error::InvalidRequest(format!("the fitted basis: {message}")))
    }

    fn check(
        parts: BasisParts,
        shifts: &[u8],
        lowest: &[i16],
        id_order: Vec<u32>,
        frequencies: Frequencies,
    ) -> Result<Basis, String> {
        let (width, rank) = (parts.mean.len(), shifts.len());
        if width == 0 || rank == 0 || rank > width || width > MAX_DIMENSION {
            return Err(format!("rank {rank} of width {width}"));
        }
        if parts.analysis.len() != rank * width || parts.synthesis.len() != rank * width {
            return Err("its matrices have other shapes".to_owned());
        }
        let all = [&parts.mean, &parts.analysis, &parts.synthesis];
        let is_finite = all.into_iter().flatten().all(|value| value.is_finite());
        if !is_finite || !parts.tail_shift.is_finite() {
            return Err("a value is not finite".to_owned());
        }
        if lowest.len() != rank || frequencies.level_symbols.len() != rank {
            return Err("its tables are not as many as its coefficients".to_owned());
        }
        let level_tables = tables(&frequencies.level_symbols, &frequencies.levels)?;
        let top_k_tables = tables(&frequencies.top_k_symbols, &frequencies.top_k)?;
        if top_k_tables.len().is_multiple_of(2) {
            return Err(format!(
                "{} tables cannot be those of a top-k",
                top_k_tables.len()
            ));
        }
        let mut channels = Vec::with_capacity(rank);
        for (((shift, lowest), table), symbols) in shifts
            .iter()
            .zip(lowest)
            .zip(&level_tables)
            .zip(&frequencies.level_symbols)
        {
            let highest = i32::from(*lowest) + i32::from(*symbols) - 1;
            let fits = *shift <= MAX_SHIFT
                && i32::from(*lowest) >= i32::from(i16::MIN) >> shift
                && highest <= i32::from(i16::MAX) >> shift;
            if !fits {
                return Err("a table's levels are beyond 16 bits".to_owned());
            }
            channels.push(Channel {
                shift: *shift,
                lowest: *lowest,
                table: table.clone(),
            });
        }
        let mut rank_of_id = vec![u32::MAX; id_order.len()];
        for (rank, id) in id_order.iter().enumerate() {
            match rank_of_id.get_mut(*id as usize) {
                Some(place) if *place == u32::MAX => *place = rank as u32,
                _ => return Err("its order of token ids is no permutation".to_owned()),
            }
        }
        let k = top_k_tables.len().div_ceil(2);
        let buckets = usize::from(ranked::bucket(id_order.len().saturating_sub(1) as u32)) + 1;
        let (of_ids, of_gaps) = frequencies.top_k_symbols.split_at(k);
        if of_ids
            .iter()
            .any(|symbols| usize::from(*symbols) != buckets)
            || of_gaps
                .iter()
                .any(|symbols| usize::from(*symbols) != MAX_SYMBOLS)
        {
            return Err("the tables of the top-k have other sizes".to_owned());
        }
        Ok(Basis {
            width,
            parts,
            channels,
            level_tables,
            id_order,
            rank_of_id,
            top_k_tables,
            frequencies,
        })
    }

    /// D: channels of the hidden state.
    pub fn width(&self) -> usize {
        self.width
    }

    /// r: coefficients of a position.
    pub fn rank(&self) -> usize {
        self.channels.len()
    }

    /// K: entries of the top-k.
    pub fn k(&self) -> usize {
        self.top_k_tables.len().div_ceil(2)
    }

    /// V: rows of the LM head.
    pub fn vocab_size(&self) -> usize {
        self.id_order.len()
    }

    /// The same with another [`BasisParts::tail_shift`].
    #[must_use]
    pub fn with_tail_shift(mut self, shift: f32) -> Basis {
        self.parts.tail_shift = shift;
        self
    }

    /// The transform.
    pub fn parts(&self) -> &BasisParts {
        &self.parts
    }

    /// The whole file, and what the spec will say of it.
    pub fn to_file(&self) -> (Vec<u8>, BasisInfo) {
        let (rank, width) = (self.rank(), self.width);
        let floats = |values: &[f32]| bytemuck::cast_slice::<f32, u8>(values).to_vec();
        let words = |values: &[u16]| bytemuck::cast_slice::<u16, u8>(values).to_vec();
        let lowest: Vec<i16> = self.channels.iter().map(|channel| channel.lowest).collect();
        let frequencies = &self.frequencies;
        let mut tensors: Vec<(&str, &str, Vec<usize>, Vec<u8>)> = vec![
            ("mean", "F32", vec![width], floats(&self.parts.mean)),
            (
                "analysis",
                "F32",
                vec![rank, width],
                floats(&self.parts.analysis),
            ),
            (
                "synthesis",
                "F32",
                vec![width, rank],
                floats(&self.parts.synthesis),
            ),
            (
                "top_k.id_order",
                "U32",
                vec![self.id_order.len()],
                bytemuck::cast_slice(&self.id_order).to_vec(),
            ),
            (
                "levels.lowest",
                "I16",
                vec![rank],
                bytemuck::cast_slice(&lowest).to_vec(),
            ),
            (
                "levels.symbols",
                "U16",
                vec![rank],
                words(&frequencies.level_symbols),
            ),
            (
                "levels.frequencies",
                "U16",
                vec![frequencies.levels.len()],
                words(&frequencies.levels),
            ),
            (
                "top_k.symbols",
                "U16",
                vec![frequencies.top_k_symbols.len()],
                words(&frequencies.top_k_symbols),
            ),
            (
                "top_k.frequencies",
                "U16",
                vec![frequencies.top_k.len()],
                words(&frequencies.top_k),
            ),
            (
                "levels.shift",
                "U8",
                vec![rank],
                self.channels.iter().map(|channel| channel.shift).collect(),
            ),
        ];
        if self.parts.tail_shift != 0.0 {
            let shift = floats(&[self.parts.tail_shift]);
            tensors.push((TAIL_SHIFT, "F32", vec![1], shift));
        }
        let mut json = String::from("{");
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &tensors {
            let (begin, end) = (data.len(), data.len() + bytes.len());
            let comma = if json.len() > 1 { "," } else { "" };
            let _ = write!(
                json,
                "{comma}\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}"
            );
            data.extend_from_slice(bytes);
        }
        json.push('}');
        let padded = (8 + json.len()).next_multiple_of(ALIGNMENT) - 8;
        json.extend(std::iter::repeat_n(' ', padded - json.len()));
        let mut file = (padded as u64).to_le_bytes().to_vec();
        file.extend_from_slice(json.as_bytes());
        file.extend_from_slice(&data);
        let digest = blake3::hash(&file).to_hex().to_string();
        let info = BasisInfo {
            file: file_name(&digest),
            digest,
            bytes: file.len() as u64,
            rank,
        };
        (file, info)
    }

    /// Parses a whole basis file whose digest has been checked.
    pub(crate) fn parse(
        info: &BasisInfo,
        file: &Bytes,
        width: usize,
        vocab_size: usize,
        k: usize,
    ) -> Result<Basis> {
        let damaged = |message: String| Error::damaged(&info.file, message);
        let tensors = SafeTensors::deserialize(file).map_err(|error| damaged(error.to_string()))?;
        let bytes = |name: &str, dtype: Dtype| -> Result<&[u8]> {
            let tensor = tensors
                .tensor(name)
                .map_err(|error| damaged(error.to_string()))?;
            if tensor.dtype() != dtype {
                return Err(damaged(format!("`{name}` is not {dtype:?}")));
            }
            Ok(tensor.data())
        };
        let floats = |name: &str| -> Result<Vec<f32>> {
            let (values, _) = bytes(name, Dtype::F32)?.as_chunks::<4>();
            Ok(values
                .iter()
                .map(|value| f32::from_le_bytes(*value))
                .collect())
        };
        let words = |name: &str| -> Result<Vec<u16>> {
            let (values, _) = bytes(name, Dtype::U16)?.as_chunks::<2>();
            Ok(values
                .iter()
                .map(|value| u16::from_le_bytes(*value))
                .collect())
        };
        let parts = BasisParts {
            mean: floats("mean")?,
            analysis: floats("analysis")?,
            synthesis: floats("synthesis")?,
            tail_shift: match tensors.tensor(TAIL_SHIFT) {
                Err(_) => 0.0,
                Ok(_) => match floats(TAIL_SHIFT)?.as_slice() {
                    [shift] => *shift,
                    _ => return Err(damaged(format!("`{TAIL_SHIFT}` is not one number"))),
                },
            },
        };
        let (order, _) = bytes("top_k.id_order", Dtype::U32)?.as_chunks::<4>();
        let (lowest, _) = bytes("levels.lowest", Dtype::I16)?.as_chunks::<2>();
        let frequencies = Frequencies {
            level_symbols: words("levels.symbols")?,
            levels: words("levels.frequencies")?,
            top_k_symbols: words("top_k.symbols")?,
            top_k: words("top_k.frequencies")?,
        };
        let basis = Basis::check(
            parts,
            bytes("levels.shift", Dtype::U8)?,
            &lowest
                .iter()
                .map(|value| i16::from_le_bytes(*value))
                .collect::<Vec<_>>(),
            order.iter().map(|id| u32::from_le_bytes(*id)).collect(),
            frequencies,
        )
        .map_err(damaged)?;
        let (found, expected) = (
            (basis.width(), basis.rank(), basis.vocab_size(), basis.k()),
            (width, info.rank, vocab_size, k),
        );
        if found != expected {
            return Err(damaged(format!(
                "width, rank, vocabulary and k are {found:?}, the manifest says {expected:?}"
            )));
        }
        Ok(basis)
    }
}

/// The one name that a basis of this digest may have.
pub(crate) fn file_name(digest: &str) -> String {
    format!("basis-{}.safetensors", digest.get(..16).unwrap_or(digest))
}

/// Reads the basis that a manifest or plan names, and checks its digest.
pub(crate) fn load(store: &Store, info: &BasisInfo, io: Io, spec: &CacheSpec) -> Result<Basis> {
    let source = store.open(&info.file, info.bytes, io)?;
    let bytes = source
        .range(0, usize::try_from(info.bytes).unwrap_or(usize::MAX))
        .map_err(|error| Error::damaged(&info.file, format!("it cannot be read: {error}")))?;
    if blake3::hash(&bytes).to_hex().as_str() != info.digest {
        return Err(Error::damaged(&info.file, "its digest does not match"));
    }
    Basis::parse(
        info,
        &bytes,
        spec.teacher.hidden_size,
        spec.vocab_size,
        spec.top_k,
    )
}

/// Cuts frequencies into tables of the given sizes.
fn tables(symbols: &[u16], frequencies: &[u16]) -> Result<Vec<Table>, String> {
    let mut rest = frequencies;
    let mut tables = Vec::with_capacity(symbols.len());
    for count in symbols {
        let cut = rest.split_at_checked(usize::from(*count));
        let table = cut.and_then(|(own, after)| {
            rest = after;
            Table::new(own)
        });
        tables.push(
            table.ok_or_else(|| format!("a frequency table does not add up to {FREQUENCY_SUM}"))?,
        );
    }
    if rest.is_empty() {
        Ok(tables)
    } else {
        Err("there are more frequencies than tables".to_owned())
    }
}
