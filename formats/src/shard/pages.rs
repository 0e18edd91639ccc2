//! Where the pages of a shard lie and what they hash to: Parquet's offset index, and our own table of checksums.
//!
//! Parquet libraries write no checksums of pages. No page is parsed here that was not compared.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use twox_hash::XxHash3_64;

use super::thrift::{I32, I64, LIST, STRUCT, Thrift};

/// Key of the table in the file's metadata.
pub(super) const PAGES_KEY: &str = "caskd.pages";

/// One page: header and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) start: u64,
    pub(super) length: u32,
    pub(super) checksum: u32,
    pub(super) first_row: u32,
}

/// The low half of xxh3 is plenty: rows and files have checksums of their own.
pub(super) fn checksum(page: &[u8]) -> u32 {
    XxHash3_64::oneshot(page) as u32
}

/// The pages of one column from its offset index, without checksums. They must cover the column's chunk of the file
/// and its rows without gap; `None` where they do not.
pub(super) fn parse_offset_index(
    index: &[u8],
    chunk: std::ops::Range<u64>,
    rows: u32,
) -> Option<Vec<Page>> {
    let mut thrift = Thrift(index);
    let mut last = 0;
    let (1, LIST) = thrift.field(&mut last)?? else {
        return None;
    };
    let (STRUCT, count) = thrift.list()? else {
        return None;
    };
    // A location takes at least seven bytes, and every page has a row.
    if count > index.len() / 7 || count > rows as usize {
        return None;
    }
    let mut pages: Vec<Page> = Vec::with_capacity(count);
    let mut start = chunk.start;
    for at in 0..count {
        let page = location(&mut thrift)?;
        let follows = match pages.last() {
            None => page.first_row == 0,
            Some(before) => page.first_row > before.first_row,
        };
        if page.start != start || !follows || page.first_row >= rows || at >= rows as usize {
            return None;
        }
        start = start.checked_add(u64::from(page.length))?;
        pages.push(page);
    }
    (start == chunk.end && count > 0).then_some(pages)
}

fn location(thrift: &mut Thrift<'_>) -> Option<Page> {
    let (mut start, mut length, mut first_row) = (None, None, None);
    let mut last = 0;
    while let Some((field, kind)) = thrift.field(&mut last)? {
        match (field, kind) {
            (1, I64) => start = Some(thrift.integer()?),
            (2, I32) => length = Some(thrift.integer()?),
            (3, I64) => first_row = Some(thrift.integer()?),
            (_, kind) => thrift.skip(kind)?,
        }
    }
    Some(Page {
        start: u64::try_from(start?).ok()?,
        length: u32::try_from(length?).ok()?,
        checksum: 0,
        first_row: u32::try_from(first_row?).ok()?,
    })
}

/// The table's text; columns in file order, pages in order.
pub(super) fn table(checksums: Vec<u32>) -> String {
    let bytes: Vec<u8> = checksums.into_iter().flat_map(u32::to_le_bytes).collect();
    STANDARD.encode(bytes)
}

/// Fills in the checksums; `None` where the table does not fit the pages.
pub(super) fn fill_checksums(columns: &mut [Vec<Page>], table: &str) -> Option<()> {
    let bytes = STANDARD.decode(table).ok()?;
    let pages: usize = columns.iter().map(Vec::len).sum();
    if bytes.len() != pages * 4 {
        return None;
    }
    for (page, bytes) in columns.iter_mut().flatten().zip(bytes.chunks_exact(4)) {
        page.checksum = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    Some(())
}
