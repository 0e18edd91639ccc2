//! Checksums of pages, compared before the Parquet library sees a page.
//!
//! The library writes none, and on damaged pages it does not always stop with an error: a wrong count in a page header
//! can keep it busy for ever. So no byte reaches it that was not compared: neither of the footer nor of a page.

use std::io::{self, Cursor};
use std::sync::{Arc, OnceLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::source::Source;

/// Key of the table in the file's metadata.
pub(super) const PAGES_KEY: &str = "caskd.pages";

/// Where the pages lie and what they hash to, ascending by offset.
#[derive(Debug)]
pub(super) struct Pages(Vec<Page>);

#[derive(Debug)]
struct Page {
    start: u64,
    length: usize,
    checksum: u32,
    column: usize,
    first_row: u64,
    end_row: u64,
}

/// The low half of xxh3 is plenty: rows and files have checksums of their own.
fn checksum(page: &[u8]) -> u32 {
    xxh3_64(page) as u32
}

/// Places without checksums, in the order of the table; `None` where the offset index makes no sense.
fn places(metadata: &ParquetMetaData) -> Option<Vec<Page>> {
    let group = metadata.row_groups().first()?;
    let rows = u64::try_from(group.num_rows()).ok()?;
    let index = metadata.page_index_for_row_group(0);
    let mut places = Vec::new();
    for column in 0..group.num_columns() {
        let locations = index.page_locations(column)?;
        let mut expected_row = 0;
        for (at, location) in locations.iter().enumerate() {
            let first_row = u64::try_from(location.first_row_index).ok()?;
            let next = locations
                .get(at + 1)
                .map(|next| u64::try_from(next.first_row_index));
            let end_row = next.unwrap_or(Ok(rows)).ok()?;
            if first_row != expected_row || end_row <= first_row || end_row > rows {
                return None;
            }
            expected_row = end_row;
            let start = u64::try_from(location.offset).ok()?;
            let length = usize::try_from(location.compressed_page_size).ok()?;
            places.push(Page {
                start,
                length,
                checksum: 0,
                column,
                first_row,
                end_row,
            });
        }
        if expected_row != rows {
            return None;
        }
    }
    Some(places)
}

/// The table's text for a file that was just written; `None` where its offset index makes no sense.
pub(super) fn table(file: &[u8], metadata: &ParquetMetaData) -> Option<String> {
    let mut checksums = Vec::new();
    for place in places(metadata)? {
        let start = usize::try_from(place.start).ok()?;
        let page = file.get(start..start.checked_add(place.length)?)?;
        checksums.extend_from_slice(&checksum(page).to_le_bytes());
    }
    Some(STANDARD.encode(checksums))
}

impl Pages {
    /// The table of a file whose footer has been checked.
    pub(super) fn load(
        file: &str,
        metadata: &ParquetMetaData,
        text: Option<&str>,
    ) -> Result<Pages> {
        let wrong = |message: &str| Err(Error::damaged(file, message));
        let Some(mut places) = places(metadata) else {
            return wrong("its page index makes no sense");
        };
        let bytes = text
            .and_then(|text| STANDARD.decode(text).ok())
            .unwrap_or_default();
        if bytes.len() != places.len() * 4 {
            return wrong("its table of page checksums is absent or wrong");
        }
        for (place, bytes) in places.iter_mut().zip(bytes.chunks_exact(4)) {
            place.checksum = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        places.sort_by_key(|place| place.start);
        Ok(Pages(places))
    }
}

/// A damaged page.
#[derive(Clone, Debug)]
pub(super) struct PageFault {
    /// Number of the column in the file.
    pub(super) column: usize,
    pub(super) first_row: u64,
    pub(super) end_row: u64,
}

/// Hands out whole pages that match their checksum, nothing else.
#[derive(Clone, Debug)]
pub(super) struct PageReader {
    pub(super) source: Source,
    pub(super) pages: Arc<Pages>,
    /// The library turns errors into text; this keeps what it was.
    pub(super) fault: Arc<OnceLock<PageFault>>,
}

impl Length for PageReader {
    fn len(&self) -> u64 {
        self.source.len()
    }
}

impl ChunkReader for PageReader {
    type T = Cursor<Bytes>;

    fn get_read(&self, _start: u64) -> ParquetResult<Self::T> {
        Err(ParquetError::General("a read that is no page".to_owned()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let found = self.pages.0.binary_search_by_key(&start, |page| page.start);
        let Some(page) = found
            .ok()
            .map(|at| &self.pages.0[at])
            .filter(|page| page.length == length)
        else {
            return Err(ParquetError::General("a read that is no page".to_owned()));
        };
        let external = |error: io::Error| ParquetError::External(Box::new(error));
        let bytes = self.source.range(start, length).map_err(external)?;
        if checksum(&bytes) != page.checksum {
            let (column, first_row, end_row) = (page.column, page.first_row, page.end_row);
            // Only the first fault counts; the reader stops there.
            let _ = self.fault.set(PageFault {
                column,
                first_row,
                end_row,
            });
            return Err(external(io::Error::other(
                "a page's checksum does not match",
            )));
        }
        Ok(bytes)
    }
}
