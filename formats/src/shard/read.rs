//! The rows of a shard to sequences.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::footer::{Column, Footer};
use super::page::{OpenPage, PageFault};
use super::schema::{
    COEFFICIENTS, KEYS_CHECKSUM, LOSS_MASK, POSITIONS, SOURCE, SPLIT_HASH, STATISTICS,
    STATISTICS_CHECKSUM, TARGETS, TOKEN_DIGEST, TOKEN_IDS, TOKENS_CHECKSUM, TOP_K, hidden_column,
    keys_checksum, statistics_checksum, tokens_checksum,
};
use crate::cache::Columns;
use crate::error::{Error, Result};
use crate::frame::{Compared, Decoder};
use crate::manifest::ShardInfo;
use crate::sequence::{HiddenState, Sequence, Statistics, TokenDigest};
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::transform::{Basis, coefficients, ranked};
use crate::{hidden, topk};

/// The small columns of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) digest: TokenDigest,
    pub(crate) split_hash: u64,
    pub(crate) positions: u32,
    pub(crate) targets: u32,
}

/// An open shard: its footer parsed, its pages located.
#[derive(Debug)]
pub(crate) struct Shard {
    file: String,
    pub(super) rows: u32,
    pub(super) source: Source,
    pub(super) footer: Footer,
    spec: Arc<CacheSpec>,
    /// In the compact tier.
    basis: Option<Arc<Basis>>,
}

/// Buffers and contexts of one reading thread; serves any shard of any cache, one after the other.
#[derive(Debug)]
pub(crate) struct Workspace {
    pages: Vec<OpenPage>,
    decoder: Decoder,
    statistics: Statistics,
    /// What a call asked for fewer rows left over: their buffers serve a later call.
    spare: Vec<Sequence>,
}

impl Workspace {
    /// `compared` is [`Compared::Page`] to compare every byte once, or [`Compared::Nothing`] to compare the blobs too.
    pub(crate) fn new(compared: Compared) -> std::io::Result<Workspace> {
        let mut decoder = Decoder::new()?;
        decoder.compared = compared;
        Ok(Workspace {
            pages: Vec::new(),
            decoder,
            statistics: Statistics::default(),
            spare: Vec::new(),
        })
    }

    /// Makes `out` so many sequences long, without giving buffers away.
    fn resize(&mut self, out: &mut Vec<Sequence>, rows: usize) {
        if out.len() > rows {
            self.spare.extend(out.drain(rows..));
        }
        out.resize_with(rows, || self.spare.pop().unwrap_or_default());
    }

    #[cfg(test)]
    pub(super) fn decompressor(&mut self) -> &mut zstd::bulk::Decompressor<'static> {
        self.decoder.decompressor()
    }

    /// Forgets the pages of another call, keeps their buffers.
    fn begin(&mut self, columns: usize) {
        self.pages.resize_with(columns, OpenPage::default);
        for page in &mut self.pages {
            page.number = None;
        }
    }
}

impl Shard {
    /// Compares the tail of the file with the manifest, then parses it.
    pub(crate) fn open(
        spec: &Arc<CacheSpec>,
        index: usize,
        info: &ShardInfo,
        source: &Source,
        basis: Option<Arc<Basis>>,
    ) -> Result<Shard> {
        let footer = Footer::load(spec, index, info, source)?;
        Ok(Shard {
            file: info.file.clone(),
            // The footer holds as many rows as the manifest says, and they fit in 32 bits.
            rows: info.sequences as u32,
            source: source.clone(),
            footer,
            spec: spec.clone(),
            basis,
        })
    }

    /// Bytes that this shard takes in memory, its file apart.
    pub(crate) fn footprint(&self) -> usize {
        let pages: usize = self
            .footer
            .columns
            .iter()
            .map(|column| column.pages.capacity())
            .sum();
        let scales: usize = self.footer.scales.iter().map(Vec::capacity).sum();
        pages * size_of::<super::pages::Page>() + scales * 4 + (4 << 10)
    }

    /// The small columns of every row.
    pub(crate) fn keys(&self, workspace: &mut Workspace) -> Result<Vec<Key>> {
        workspace.begin(self.footer.columns.len());
        let [digests, splits, positions, targets, checksums] =
            [TOKEN_DIGEST, SPLIT_HASH, POSITIONS, TARGETS, KEYS_CHECKSUM]
                .map(|name| self.number(name));
        let mut keys = Vec::new();
        for row in 0..self.rows {
            let (page, _) = self.seek(workspace, digests, row)?;
            let key = Key {
                digest: *page.scalar(&self.source, row),
                split_hash: self.u64(workspace, splits, row)?,
                positions: self.u32(workspace, positions, row)?,
                targets: self.u32(workspace, targets, row)?,
            };
            let found = keys_checksum(&key.digest, key.split_hash, key.positions, key.targets);
            if found != self.u64(workspace, checksums, row)? {
                let column = "token_digest, split_hash, positions, targets";
                return Err(self.damaged_at(column, row, "the checksum does not match"));
            }
            keys.push(key);
        }
        Ok(keys)
    }

    /// Rows in the order asked, into `out`, whose buffers are used again. Each row is decoded once.
    pub(crate) fn read(
        &self,
        workspace: &mut Workspace,
        rows: &[u32],
        columns: &Columns,
        out: &mut Vec<Sequence>,
    ) -> Result<()> {
        if let Some(row) = rows.iter().find(|row| **row >= self.rows) {
            return Err(Error::InvalidRequest(format!(
                "`{}` has {} rows, not row {row}",
                self.file, self.rows
            )));
        }
        let wanted = self.wanted(columns)?;
        workspace.begin(self.footer.columns.len());
        workspace.resize(out, rows.len());
        let mut before: Option<usize> = None;
        let mut read = |place: usize| {
            match before.replace(place) {
                Some(before) if rows[before] == rows[place] => out[place] = out[before].clone(),
                _ => self.decode(workspace, rows[place], &wanted, &mut out[place])?,
            }
            Ok(())
        };
        if rows.is_sorted() {
            return (0..rows.len()).try_for_each(read);
        }
        // Pages are shared by neighbouring rows, so rows are decoded in their order on disk.
        let mut places: Vec<usize> = (0..rows.len()).collect();
        places.sort_by_key(|place| rows[*place]);
        places.into_iter().try_for_each(&mut read)
    }

    fn decode(
        &self,
        workspace: &mut Workspace,
        row: u32,
        wanted: &Wanted,
        out: &mut Sequence,
    ) -> Result<()> {
        self.decode_tokens(workspace, row, wanted, out)?;
        let positions = out.token_ids.len();
        let mut statistics = match out.statistics.take() {
            Some(statistics) if wanted.keeps_statistics => statistics,
            _ => std::mem::take(&mut workspace.statistics),
        };
        if let Some(columns) = &wanted.statistics {
            self.decode_statistics(workspace, row, columns, positions, &mut statistics)?;
        }
        out.top_k = match wanted.top_k {
            Some(column) => {
                let mut top_k = out.top_k.take().unwrap_or_default();
                let (page, decoder) = self.seek(workspace, column, row)?;
                let blobs = page.blobs(&self.source, row);
                let (k, vocab_size) = (self.spec.top_k, self.spec.vocab_size);
                let max = &statistics.max;
                match &self.basis {
                    Some(basis) => ranked::decode(decoder, blobs, basis, max, &mut top_k),
                    None => topk::decode(decoder, blobs, max, k, vocab_size, &mut top_k),
                }
                .map_err(|fault| fault.at(&self.file, TOP_K, u64::from(row)))?;
                Some(top_k)
            }
            None => None,
        };
        out.coefficients = match (wanted.coefficients, &self.basis) {
            (Some(column), Some(basis)) => {
                let (page, decoder) = self.seek(workspace, column, row)?;
                let blobs = page.blobs(&self.source, row);
                let found = coefficients::decode(decoder, blobs, basis, positions)
                    .map_err(|fault| fault.at(&self.file, COEFFICIENTS, u64::from(row)))?;
                Some(found)
            }
            _ => None,
        };
        if wanted.keeps_statistics {
            out.statistics = Some(statistics);
        } else {
            workspace.statistics = statistics;
        }
        out.hidden
            .resize_with(wanted.layers.len(), HiddenState::default);
        for ((index, column), state) in wanted.layers.iter().zip(&mut out.hidden) {
            let layer = &self.spec.layers[*index];
            let (page, decoder) = self.seek(workspace, *column, row)?;
            let blobs = page.blobs(&self.source, row);
            let scales = &self.footer.scales[*index];
            hidden::decode(decoder, blobs, layer, scales, positions, state).map_err(|fault| {
                fault.at(&self.file, &hidden_column(layer.layer), u64::from(row))
            })?;
        }
        Ok(())
    }

    fn decode_tokens(
        &self,
        workspace: &mut Workspace,
        row: u32,
        wanted: &Wanted,
        out: &mut Sequence,
    ) -> Result<()> {
        let [source, token_ids, loss_mask, checksum] = wanted.tokens;
        let (page, _) = self.seek(workspace, source, row)?;
        let Ok(text) = std::str::from_utf8(page.binary(&self.source, row)) else {
            return Err(self.damaged_at(SOURCE, row, "it is no UTF-8"));
        };
        text.clone_into(&mut out.source);
        let (page, _) = self.seek(workspace, token_ids, row)?;
        page.integers(&self.source, row, &mut out.token_ids);
        let (page, _) = self.seek(workspace, loss_mask, row)?;
        page.bits(&self.source, row, &mut out.loss_mask);
        let stored = self.u64(workspace, checksum, row)?;
        if out.token_ids.len() != out.loss_mask.len()
            || tokens_checksum(&out.source, &out.token_ids, &out.loss_mask) != stored
        {
            let column = "source, token_ids, loss_mask";
            return Err(self.damaged_at(column, row, "the checksum does not match"));
        }
        Ok(())
    }

    fn decode_statistics(
        &self,
        workspace: &mut Workspace,
        row: u32,
        columns: &[usize; 6],
        positions: usize,
        out: &mut Statistics,
    ) -> Result<()> {
        let [mean, std, min, max, log_sum_exp, checksum] = *columns;
        for (column, values) in [
            (mean, &mut out.mean),
            (std, &mut out.std),
            (min, &mut out.min),
            (max, &mut out.max),
            (log_sum_exp, &mut out.log_sum_exp),
        ] {
            let (page, _) = self.seek(workspace, column, row)?;
            page.floats(&self.source, row, values);
        }
        let stored = self.u64(workspace, checksum, row)?;
        let is_complete = out.columns().iter().all(|column| column.len() == positions);
        if !is_complete || statistics_checksum(out) != stored {
            let columns = STATISTICS.join(", ");
            return Err(self.damaged_at(&columns, row, "the checksum does not match"));
        }
        Ok(())
    }

    fn u32(&self, workspace: &mut Workspace, column: usize, row: u32) -> Result<u32> {
        let (page, _) = self.seek(workspace, column, row)?;
        Ok(u32::from_le_bytes(*page.scalar(&self.source, row)))
    }

    fn u64(&self, workspace: &mut Workspace, column: usize, row: u32) -> Result<u64> {
        let (page, _) = self.seek(workspace, column, row)?;
        Ok(u64::from_le_bytes(*page.scalar(&self.source, row)))
    }

    /// Opens the page of a column that holds `row`, unless it is open, and lends it with the decoder.
    fn seek<'a>(
        &self,
        workspace: &'a mut Workspace,
        number: usize,
        row: u32,
    ) -> Result<(&'a OpenPage, &'a mut Decoder)> {
        let Workspace { pages, decoder, .. } = workspace;
        let column = &self.footer.columns[number];
        let open = &mut pages[number];
        let holds = |page: usize| {
            let range = self.rows_of(column, page);
            range.contains(&row)
        };
        if !open.number.is_some_and(holds) {
            // Rows mostly come in order: the next page is tried before the search.
            let next = open.number.map_or(0, |page| page + 1);
            let page = if next < column.pages.len() && holds(next) {
                next
            } else {
                // The first page begins at row 0.
                column.pages.partition_point(|page| page.first_row <= row) - 1
            };
            open.number = None;
            let rows = self.rows_of(column, page);
            open.load(
                &self.source,
                &column.pages[page],
                rows.end - rows.start,
                column.layout,
                decoder.decompressor(),
            )
            .map_err(|fault| self.page_damaged(column, &rows, &fault))?;
            open.number = Some(page);
        }
        Ok((open, decoder))
    }

    fn rows_of(&self, column: &Column, page: usize) -> Range<u32> {
        let end = column.pages.get(page + 1);
        column.pages[page].first_row..end.map_or(self.rows, |next| next.first_row)
    }

    fn page_damaged(&self, column: &Column, rows: &Range<u32>, fault: &PageFault) -> Error {
        let is_one = rows.len() == 1;
        Error::Damaged {
            file: self.file.clone(),
            column: Some(column.name.clone()),
            row: is_one.then_some(u64::from(rows.start)),
            message: if is_one {
                fault.to_string()
            } else {
                format!("rows {} to {}: {fault}", rows.start, rows.end - 1)
            },
        }
    }

    /// Bytes per column; what is no column counts as `footer`.
    pub(crate) fn bytes_by_column(&self, file_bytes: u64, totals: &mut BTreeMap<String, u64>) {
        let mut left = file_bytes;
        for column in &self.footer.columns {
            let bytes = column.bytes.min(left);
            *totals.entry(column.name.clone()).or_default() += bytes;
            left -= bytes;
        }
        *totals.entry("footer".to_owned()).or_default() += left;
    }

    /// Number of a column that every shard has.
    fn number(&self, name: &str) -> usize {
        let mut columns = self.footer.columns.iter();
        // The footer was compared with the schema that all these names come from.
        columns
            .position(|column| column.name == name)
            .unwrap_or_default()
    }

    fn wanted(&self, columns: &Columns) -> Result<Wanted> {
        let absent = |column: String| {
            let names = super::column_infos(&self.spec)
                .into_iter()
                .map(|column| column.name);
            let names: Vec<String> = names.chain(["statistics".to_owned()]).collect();
            Err(Error::NoColumn {
                column,
                available: names.join(", "),
            })
        };
        if columns.top_k && self.spec.top_k == 0 {
            return absent(TOP_K.to_owned());
        }
        if columns.coefficients && self.spec.code.is_none() {
            return absent(COEFFICIENTS.to_owned());
        }
        let mut layers = Vec::with_capacity(columns.layers.len());
        for layer in &columns.layers {
            let found = self
                .spec
                .layers
                .iter()
                .position(|spec| spec.layer == *layer);
            match found {
                Some(index) => layers.push((index, self.number(&hidden_column(*layer)))),
                None => return absent(hidden_column(*layer)),
            }
        }
        layers.sort_unstable();
        layers.dedup();
        let [mean, std, min, max, log_sum_exp] = STATISTICS;
        let statistics = [mean, std, min, max, log_sum_exp, STATISTICS_CHECKSUM];
        // The top-k is stored relative to the maximum, which is a statistic.
        let needs_statistics = columns.statistics || columns.top_k;
        Ok(Wanted {
            tokens: [SOURCE, TOKEN_IDS, LOSS_MASK, TOKENS_CHECKSUM].map(|name| self.number(name)),
            statistics: needs_statistics.then(|| statistics.map(|name| self.number(name))),
            keeps_statistics: columns.statistics,
            top_k: columns.top_k.then(|| self.number(TOP_K)),
            coefficients: columns.coefficients.then(|| self.number(COEFFICIENTS)),
            layers,
        })
    }

    fn damaged_at(&self, column: &str, row: u32, message: &str) -> Error {
        Error::Damaged {
            file: self.file.clone(),
            column: Some(column.to_owned()),
            row: Some(u64::from(row)),
            message: message.to_owned(),
        }
    }
}

/// What one call reads, as numbers of columns.
struct Wanted {
    tokens: [usize; 4],
    /// The five statistics and their checksum.
    statistics: Option<[usize; 6]>,
    keeps_statistics: bool,
    top_k: Option<usize>,
    coefficients: Option<usize>,
    /// Positions in the spec's layers, ascending, with their columns.
    layers: Vec<(usize, usize)>,
}
