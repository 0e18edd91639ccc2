//! One page of a column, from its bytes to the values of its rows.
//!
//! A shard's pages are of one simple kind (`docs/FORMAT.md`), so they are parsed here and not by a general library:
//! rows come straight out of the memory map, a page costs nothing but its bytes, and no content, however forged, can
//! make it loop, panic, or allocate more than its size allows.

use std::io;
use std::ops::Range;

use zstd::bulk::Decompressor;

use super::pages::{Page, checksum};
use super::thrift::{I32, STRUCT, Thrift};
use crate::source::Source;

/// How the values of a column stand in its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    /// Little-endian values of so many bytes.
    Fixed(usize),
    /// f32 as four streams of bytes.
    Split,
    /// One bit a value, least significant first.
    Bits,
    /// A u32 length, then so many bytes.
    Binary,
}

/// What the pages of a column are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) values: Values,
    /// A row is a list of values, not one.
    pub(super) is_list: bool,
    pub(super) is_compressed: bool,
}

/// What is wrong with a page.
#[derive(Debug)]
pub(super) enum PageFault {
    Checksum,
    Malformed(&'static str),
    Io(io::Error),
}

impl std::fmt::Display for PageFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PageFault::Checksum => f.write_str("the page's checksum does not match"),
            PageFault::Malformed(message) => f.write_str(message),
            PageFault::Io(error) => write!(f, "the page cannot be read: {error}"),
        }
    }
}

fn malformed<T>(message: &'static str) -> Result<T, PageFault> {
    Err(PageFault::Malformed(message))
}

/// No zstd frame is smaller than its content by more: a block of 128 KiB takes at least four bytes.
const LARGEST_RATIO: usize = 33_000;

/// Whether `length` bytes can have come out of `stored` compressed ones: what bounds an allocation by the file's size.
pub(crate) fn can_unpack_to(stored: usize, length: usize) -> bool {
    length <= stored.saturating_mul(LARGEST_RATIO)
}

/// The page that a column's reader stands in. Its buffers are used again by the next page.
#[derive(Debug, Default)]
pub(super) struct OpenPage {
    /// Number of the page in its column.
    pub(super) number: Option<usize>,
    first_row: u32,
    /// The page, where it is not mapped.
    raw: Vec<u8>,
    unpacked: Vec<u8>,
    body: Body,
    /// Number of values.
    count: usize,
    /// Value at which each row begins, and the end. Lists only.
    starts: Vec<u32>,
    /// Byte at which each value begins, and the end. Binary only.
    offsets: Vec<u32>,
}

/// Where the values lie.
#[derive(Debug, Default)]
enum Body {
    #[default]
    Nowhere,
    Mapped(Range<u64>),
    Raw(Range<usize>),
    Unpacked(Range<usize>),
}

impl OpenPage {
    /// Reads, compares and parses a page of `rows` rows.
    pub(super) fn load(
        &mut self,
        source: &Source,
        page: &Page,
        rows: u32,
        layout: Layout,
        decompressor: &mut Decompressor<'static>,
    ) -> Result<(), PageFault> {
        let OpenPage { raw, unpacked, .. } = self;
        let (bytes, is_mapped) = source
            .view(page.start, page.length as usize, raw)
            .map_err(PageFault::Io)?;
        if checksum(bytes) != page.checksum {
            return Err(PageFault::Checksum);
        }
        let Some(header) = Header::parse(bytes) else {
            return malformed("a page header cannot be parsed");
        };
        let expected_encoding = match layout.values {
            Values::Split => BYTE_STREAM_SPLIT,
            Values::Fixed(_) | Values::Bits | Values::Binary => PLAIN,
        };
        if header.encoding != expected_encoding {
            return malformed("a page has another encoding than its column");
        }
        let stored = &bytes[header.length..];
        if stored.len() != header.stored {
            return malformed("a page's length contradicts its header");
        }
        let data = if layout.is_compressed {
            if !can_unpack_to(stored.len(), header.unpacked) {
                return malformed("a page claims to be larger than it can be");
            }
            if unpacked.len() < header.unpacked {
                unpacked.resize(header.unpacked, 0);
            }
            let target = &mut unpacked[..header.unpacked];
            match decompressor.decompress_to_buffer(stored, target) {
                Ok(found) if found == header.unpacked => &*target,
                _ => return malformed("a page cannot be unpacked"),
            }
        } else if header.unpacked == header.stored {
            stored
        } else {
            return malformed("a page's length contradicts its header");
        };
        self.starts.clear();
        let values = if layout.is_list {
            let Some(values) = parse_levels(data, header.count, rows, &mut self.starts) else {
                return malformed("the rows of a page cannot be told apart");
            };
            values
        } else if header.count == rows as usize {
            data
        } else {
            return malformed("a page has another number of rows than the index says");
        };
        self.offsets.clear();
        let fits = match layout.values {
            Values::Fixed(width) => header.count.checked_mul(width) == Some(values.len()),
            Values::Split => header.count.checked_mul(4) == Some(values.len()),
            Values::Bits => header.count.div_ceil(8) == values.len(),
            Values::Binary => parse_lengths(values, header.count, &mut self.offsets).is_some(),
        };
        if !fits {
            return malformed("the values of a page do not fill it");
        }
        let skipped = data.len() - values.len();
        self.body = if layout.is_compressed {
            Body::Unpacked(skipped..data.len())
        } else if is_mapped {
            let start = page.start + (header.length + skipped) as u64;
            Body::Mapped(start..page.start + u64::from(page.length))
        } else {
            Body::Raw(header.length + skipped..bytes.len())
        };
        self.count = header.count;
        self.first_row = page.first_row;
        Ok(())
    }

    fn body<'a>(&'a self, source: &'a Source) -> &'a [u8] {
        match &self.body {
            Body::Nowhere => &[],
            Body::Mapped(range) => source.mapped(range.clone()),
            Body::Raw(range) => &self.raw[range.clone()],
            Body::Unpacked(range) => &self.unpacked[range.clone()],
        }
    }

    /// The values of a list's row.
    fn list(&self, row: u32) -> Range<usize> {
        let at = (row - self.first_row) as usize;
        self.starts[at] as usize..self.starts[at + 1] as usize
    }

    /// The one value of a row.
    pub(super) fn scalar<'a, const WIDTH: usize>(
        &'a self,
        source: &'a Source,
        row: u32,
    ) -> &'a [u8; WIDTH] {
        let at = (row - self.first_row) as usize;
        let (values, _) = self.body(source).as_chunks::<WIDTH>();
        &values[at]
    }

    /// The one binary value of a row.
    pub(super) fn binary<'a>(&'a self, source: &'a Source, row: u32) -> &'a [u8] {
        self.blob(self.body(source), (row - self.first_row) as usize)
    }

    /// The binary values of a list's row.
    pub(super) fn blobs<'a>(
        &'a self,
        source: &'a Source,
        row: u32,
    ) -> impl Iterator<Item = &'a [u8]> {
        let body = self.body(source);
        self.list(row).map(move |value| self.blob(body, value))
    }

    fn blob<'a>(&self, body: &'a [u8], value: usize) -> &'a [u8] {
        &body[self.offsets[value] as usize + 4..self.offsets[value + 1] as usize]
    }

    /// A list's row of u32.
    pub(super) fn integers(&self, source: &Source, row: u32, out: &mut Vec<u32>) {
        let (values, _) = self.body(source).as_chunks::<4>();
        out.clear();
        out.extend(
            values[self.list(row)]
                .iter()
                .map(|value| u32::from_le_bytes(*value)),
        );
    }

    /// A list's row of f32 that stands as four streams.
    pub(super) fn floats(&self, source: &Source, row: u32, out: &mut Vec<f32>) {
        let body = self.body(source);
        let rows = self.list(row);
        let stream = |number: usize| &body[number * self.count..][rows.clone()];
        let (low, high) = (
            stream(0).iter().zip(stream(1)),
            stream(2).iter().zip(stream(3)),
        );
        out.clear();
        out.extend(
            low.zip(high)
                .map(|((a, b), (c, d))| f32::from_le_bytes([*a, *b, *c, *d])),
        );
    }

    /// A list's row of bits.
    pub(super) fn bits(&self, source: &Source, row: u32, out: &mut Vec<bool>) {
        let body = self.body(source);
        out.clear();
        out.extend(
            self.list(row)
                .map(|value| body[value / 8] >> (value % 8) & 1 == 1),
        );
    }
}

const PLAIN: i64 = 0;
const BYTE_STREAM_SPLIT: i64 = 9;
const DATA_PAGE: i64 = 0;

/// What a header of a first-version data page says.
struct Header {
    /// Bytes of the header itself.
    length: usize,
    stored: usize,
    unpacked: usize,
    count: usize,
    encoding: i64,
}

impl Header {
    fn parse(page: &[u8]) -> Option<Header> {
        let mut thrift = Thrift(page);
        let (mut kind, mut stored, mut unpacked) = (None, None, None);
        let (mut count, mut encoding) = (None, None);
        let mut last = 0;
        while let Some((field, field_type)) = thrift.field(&mut last)? {
            match (field, field_type) {
                (1, I32) => kind = Some(thrift.integer()?),
                (2, I32) => unpacked = Some(thrift.count()?),
                (3, I32) => stored = Some(thrift.count()?),
                (5, STRUCT) => {
                    let mut last = 0;
                    while let Some((field, field_type)) = thrift.field(&mut last)? {
                        match (field, field_type) {
                            (1, I32) => count = Some(thrift.count()?),
                            (2, I32) => encoding = Some(thrift.integer()?),
                            (_, field_type) => thrift.skip(field_type)?,
                        }
                    }
                }
                (_, field_type) => thrift.skip(field_type)?,
            }
        }
        (kind? == DATA_PAGE).then_some(Header {
            length: page.len() - thrift.0.len(),
            stored: stored?,
            unpacked: unpacked?,
            count: count?,
            encoding: encoding?,
        })
    }
}

/// Repetition and definition levels of `count` values in `rows` lists, none of them empty; what is left are the values.
fn parse_levels<'a>(
    data: &'a [u8],
    count: usize,
    rows: u32,
    starts: &mut Vec<u32>,
) -> Option<&'a [u8]> {
    // Row starts are u32; a page of more values than this has no place in a page of at most 2 GiB.
    let end = u32::try_from(count).ok()?;
    let (repetition, data) = prefixed(data)?;
    let is_short = Levels(repetition).read(end, |level, run| {
        if level == 0 {
            if run.len() > rows as usize - starts.len() {
                return None;
            }
            starts.extend(run);
        }
        Some(())
    });
    is_short?;
    if starts.len() != rows as usize || starts.first() != Some(&0) {
        return None;
    }
    starts.push(end);
    let (definition, values) = prefixed(data)?;
    Levels(definition).read(end, |level, _| (level == 1).then_some(()))?;
    Some(values)
}

fn prefixed(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

/// Levels of one bit in Parquet's mixture of runs and packed bits.
struct Levels<'a>(&'a [u8]);

impl Levels<'_> {
    /// Calls `each` with every level and the values that have it, in order; exactly `count` values.
    fn read(self, count: u32, mut each: impl FnMut(u8, Range<u32>) -> Option<()>) -> Option<()> {
        let mut thrift = Thrift(self.0);
        let mut at = 0;
        while at < count {
            let header = thrift.varint()?;
            let length = u32::try_from(header >> 1).ok()?;
            let left = count - at;
            if header & 1 == 0 {
                let level = thrift.byte()?;
                if level > 1 || length == 0 {
                    return None;
                }
                let length = length.min(left);
                each(level, at..at + length)?;
                at += length;
            } else {
                let (packed, rest) = thrift.0.split_at_checked(length as usize)?;
                thrift.0 = rest;
                if packed.is_empty() {
                    return None;
                }
                for byte in packed {
                    let end = count.min(at + 8);
                    // Most groups lie inside a row.
                    if *byte == 0xFF {
                        each(1, at..end)?;
                    } else {
                        for value in at..end {
                            each(*byte >> (value - at) & 1, value..value + 1)?;
                        }
                    }
                    at = end;
                }
            }
        }
        Some(())
    }
}

/// Offsets of `count` values with a length before each, which must fill `values`.
fn parse_lengths(values: &[u8], count: usize, offsets: &mut Vec<u32>) -> Option<()> {
    u32::try_from(values.len()).ok()?;
    let mut at = 0;
    offsets.push(0);
    for _ in 0..count {
        let length = values.get(at..)?.first_chunk::<4>()?;
        at = at.checked_add(4 + u32::from_le_bytes(*length) as usize)?;
        if at > values.len() {
            return None;
        }
        offsets.push(at as u32);
    }
    (at == values.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(bytes: &[u8], count: u32) -> Option<Vec<u8>> {
        let mut found = Vec::new();
        Levels(bytes).read(count, |level, run| {
            found.extend(run.map(|_| level));
            Some(())
        })?;
        Some(found)
    }

    #[test]
    fn runs_and_packed_bits() {
        // Two packed groups, then a run of five ones; the last group is cut by the count elsewhere.
        assert_eq!(
            levels(&[0x03, 0b1111_1110, 0x0A, 1], 13).unwrap(),
            [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
        );
        assert_eq!(levels(&[0x03, 0b0000_0101], 3).unwrap(), [1, 0, 1]);
        for (bytes, count) in [
            (&[0x03][..], 3),
            (&[0x0A, 2], 5),
            (&[0x00, 1], 1),
            (&[0x01], 1),
            (&[0x04, 1], 3),
            (&[], 1),
        ] {
            assert_eq!(levels(bytes, count), None, "{bytes:?}");
        }
    }

    #[test]
    fn lengths_must_fill_the_values() {
        let mut offsets = Vec::new();
        let values = [1, 0, 0, 0, 9, 0, 0, 0, 0];
        parse_lengths(&values, 2, &mut offsets).unwrap();
        assert_eq!(offsets, [0, 5, 9]);
        for (values, count) in [(&values[..8], 2), (&values[..], 1), (&[255; 8], 1)] {
            assert!(parse_lengths(values, count, &mut Vec::new()).is_none());
        }
    }
}
