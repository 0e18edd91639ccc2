//! Data files, read as streams: the records of a file one after the other, and the identity of its bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use arrow_json::LineDelimitedWriter;
use caskd_formats::DataFile;
use minijinja::Value;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::options::DataOptions;
use super::record::FIELDS;
use super::stream::{READ_BYTES, Stream, unpacked_name, unreadable};
use crate::{Error, Result};

/// The kinds of data file, known by the ending of their names; all but Parquet may be packed (.gz, .zst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// One JSON object a line.
    Jsonl,
    /// A list of JSON objects, or one a line.
    Json,
    /// One record a row.
    Parquet,
    /// Running text.
    Text,
}

impl FileKind {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let ending = unpacked_name(path).extension();
        let ending = ending.and_then(|ending| ending.to_str());
        match ending.map(str::to_ascii_lowercase).as_deref() {
            Some("jsonl" | "ndjson") => Ok(Self::Jsonl),
            Some("json") => Ok(Self::Json),
            Some("parquet") if unpacked_name(path) == path => Ok(Self::Parquet),
            Some("txt" | "md") => Ok(Self::Text),
            _ => Err(Error::DataKind { path: path.into() }),
        }
    }
}

/// Some editors begin a file with it.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// A text file, block by block.
pub(crate) struct TextBlocks {
    path: PathBuf,
    reader: Stream,
    /// Unpacked bytes that have been read.
    read: u64,
    /// Bytes of a character that the last block cut.
    rest: Vec<u8>,
}

impl TextBlocks {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.into(),
            reader: Stream::open(path)?,
            read: 0,
            rest: Vec::new(),
        })
    }

    /// The next block of about `size` bytes, whole characters; `None` at the end.
    pub(crate) fn next_block(&mut self, size: usize) -> Result<Option<String>> {
        let mut bytes = std::mem::take(&mut self.rest);
        let wanted = size.saturating_sub(bytes.len()).max(4);
        let before = self.read - bytes.len() as u64;
        let count = (&mut self.reader)
            .take(wanted as u64)
            .read_to_end(&mut bytes)
            .map_err(|source| unreadable(&self.path, source))?;
        if self.read == 0 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        self.read += count as u64;
        if bytes.is_empty() {
            return Ok(None);
        }
        let valid = match std::str::from_utf8(&bytes) {
            Ok(_) => bytes.len(),
            // A character that the block's end cuts is no error unless the file ends there too.
            Err(error) if error.error_len().is_none() && error.valid_up_to() > 0 => {
                error.valid_up_to()
            }
            Err(error) => {
                let at = before + error.valid_up_to() as u64;
                let source = std::io::Error::new(
                    std::io::ErrorKind::InvalidData,
                    format!("no UTF-8 text at byte {at}"),
                );
                return Err(unreadable(&self.path, source));
            }
        };
        self.rest = bytes.split_off(valid);
        let text = String::from_utf8(bytes).map_err(|error| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            unreadable(&self.path, source)
        })?;
        Ok(Some(text))
    }

    pub(crate) fn bytes_done(&self) -> u64 {
        self.reader.bytes_done()
    }

    /// The identity of the whole file.
    pub(crate) fn identity(&mut self) -> Result<DataFile> {
        self.reader.identity()
    }
}

/// One record as it stands in its file.
pub(crate) struct RawRecord {
    /// 1-based line, entry or row.
    pub(crate) number: u64,
    pub(crate) body: RawBody,
}

pub(crate) enum RawBody {
    /// JSON that nobody has looked at yet.
    Json(String),
    /// An entry of a list.
    Parsed(Value),
    /// Bytes that are no text.
    NotText,
}

impl RawBody {
    /// Roughly how much text it is.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Json(json) => json.len(),
            Self::Parsed(_) | Self::NotText => 1024,
        }
    }
}

/// The records of a file.
pub(crate) struct Records {
    path: PathBuf,
    reader: Reader,
    number: u64,
}

enum Reader {
    Lines(Box<BufReader<Stream>>),
    List {
        entries: std::vec::IntoIter<Value>,
        identity: DataFile,
    },
    Rows {
        batches: Box<ParquetRecordBatchReader>,
        rows: std::vec::IntoIter<String>,
        total: u64,
        identity: DataFile,
    },
}

impl Records {
    pub(crate) fn open(path: &Path, kind: FileKind, options: &DataOptions) -> Result<Self> {
        let reader = match kind {
            FileKind::Parquet => open_parquet(path, options)?,
            FileKind::Json if !begins_with_object(path)? => open_list(path)?,
            _ => Reader::Lines(Box::new(BufReader::with_capacity(
                READ_BYTES,
                Stream::open(path)?,
            ))),
        };
        Ok(Self {
            path: path.into(),
            reader,
            number: 0,
        })
    }

    /// What a place in this kind of file is called.
    pub(crate) fn unit(&self) -> &'static str {
        match self.reader {
            Reader::Rows { .. } => "row",
            Reader::List { .. } => "record",
            Reader::Lines(_) => "line",
        }
    }

    /// The next record; blank lines are none.
    pub(crate) fn next_record(&mut self) -> Result<Option<RawRecord>> {
        loop {
            self.number += 1;
            let body = match &mut self.reader {
                Reader::Lines(reader) => {
                    let mut line = Vec::new();
                    let count = reader
                        .read_until(b'\n', &mut line)
                        .map_err(|source| unreadable(&self.path, source))?;
                    if count == 0 {
                        return Ok(None);
                    }
                    if line.trim_ascii().is_empty() {
                        continue;
                    }
                    String::from_utf8(line).map_or(RawBody::NotText, RawBody::Json)
                }
                Reader::List { entries, .. } => match entries.next() {
                    None => return Ok(None),
                    Some(entry) => RawBody::Parsed(entry),
                },
                Reader::Rows { batches, rows, .. } => match rows.next() {
                    Some(row) => RawBody::Json(row),
                    None => match batches.next() {
                        None => return Ok(None),
                        Some(batch) => {
                            *rows = json_rows(&self.path, batch)?;
                            self.number -= 1;
                            continue;
                        }
                    },
                },
            };
            return Ok(Some(RawRecord {
                number: self.number,
                body,
            }));
        }
    }

    /// Bytes of the file that have been read, or the share of the rows that corresponds to them.
    pub(crate) fn bytes_done(&self) -> u64 {
        match &self.reader {
            Reader::Lines(reader) => reader.get_ref().bytes_done(),
            Reader::List { identity, .. } => identity.bytes,
            Reader::Rows {
                total, identity, ..
            } => {
                let share = self.number as f64 / (*total).max(1) as f64;
                (identity.bytes as f64 * share.min(1.0)) as u64
            }
        }
    }

    /// The identity of the whole file.
    pub(crate) fn identity(&mut self) -> Result<DataFile> {
        match &mut self.reader {
            Reader::Lines(reader) => reader.get_mut().identity(),
            Reader::List { identity, .. } | Reader::Rows { identity, .. } => Ok(identity.clone()),
        }
    }
}

/// Many files called .json hold an object a line.
fn begins_with_object(path: &Path) -> Result<bool> {
    for byte in BufReader::new(Stream::open(path)?).bytes() {
        let byte = byte.map_err(|source| unreadable(path, source))?;
        if !byte.is_ascii_whitespace() && !BYTE_ORDER_MARK.contains(&byte) {
            return Ok(byte == b'{');
        }
    }
    Ok(false)
}

fn open_list(path: &Path) -> Result<Reader> {
    let mut reader = Stream::open(path)?;
    let mut bytes = Vec::new();
    reader
        .read_to_end(&mut bytes)
        .map_err(|source| unreadable(path, source))?;
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    let entries: Vec<Value> = serde_json::from_slice(text).map_err(|error| Error::Damaged {
        path: path.into(),
        message: format!("it is no JSON list of records ({error})"),
        hint: "a list of objects, or one object a line".into(),
    })?;
    Ok(Reader::List {
        entries: entries.into_iter(),
        identity: reader.identity()?,
    })
}

/// Rows that are decoded at a time.
const BATCH_ROWS: usize = 1024;

fn open_parquet(path: &Path, options: &DataOptions) -> Result<Reader> {
    let identity = Stream::open(path)?.identity()?;
    let damaged = |message: String| damaged_parquet(path, message);
    let file = File::open(path).map_err(|source| unreadable(path, source))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file)
        .map_err(|error| damaged(error.to_string()))?;
    let schema = builder.parquet_schema();
    let names: Vec<String> = schema
        .root_schema()
        .get_fields()
        .iter()
        .map(|field| field.name().to_owned())
        .collect();
    let wanted: Vec<usize> = (0..names.len())
        .filter(|&index| {
            FIELDS
                .iter()
                .any(|field| options.key(field) == names[index])
        })
        .collect();
    for &index in &wanted {
        let of_bytes = builder
            .schema()
            .field_with_name(&names[index])
            .is_ok_and(|field| field.data_type().is_binary());
        if of_bytes {
            return Err(Error::Damaged {
                path: path.into(),
                message: format!("its column `{}` holds bytes and not text", names[index]),
                hint: "save the column with a string type".into(),
            });
        }
    }
    if wanted.is_empty() {
        return Err(Error::Damaged {
            path: path.into(),
            message: format!(
                "none of its columns is known as part of a record ({})",
                names.join(", ")
            ),
            hint: super::record::FORMS.into(),
        });
    }
    let total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let projection = ProjectionMask::roots(schema, wanted);
    let batches = builder
        .with_projection(projection)
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(|error| damaged(error.to_string()))?;
    Ok(Reader::Rows {
        batches: Box::new(batches),
        rows: Vec::new().into_iter(),
        total,
        identity,
    })
}

fn damaged_parquet(path: &Path, message: String) -> Error {
    // Brotli is the one codec that is left out.
    let hint = if message.contains("Disabled feature") {
        "write it with zstd, snappy, gzip or lz4"
    } else {
        "is it a Parquet file, and whole?"
    };
    Error::Damaged {
        path: path.into(),
        message,
        hint: hint.into(),
    }
}

fn json_rows(
    path: &Path,
    batch: std::result::Result<arrow::record_batch::RecordBatch, arrow::error::ArrowError>,
) -> Result<std::vec::IntoIter<String>> {
    let written = batch.and_then(|batch| {
        let mut writer = LineDelimitedWriter::new(Vec::new());
        writer.write(&batch)?;
        writer.finish()?;
        Ok(writer.into_inner())
    });
    let bytes = written.map_err(|error| damaged_parquet(path, error.to_string()))?;
    let rows: Vec<String> = bytes
        .split(|byte| *byte == b'\n')
        .filter(|row| !row.is_empty())
        .map(|row| String::from_utf8_lossy(row).into_owned())
        .collect();
    Ok(rows.into_iter())
}
