//! The bytes of one published file, mapped or read by position.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

/// A file of known length.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Mapped(Bytes),
    File(Arc<File>, u64),
}

impl Source {
    /// `length` bytes from `start`; zero-copy when mapped.
    pub(crate) fn range(&self, start: u64, length: usize) -> io::Result<Bytes> {
        let end = start
            .checked_add(length as u64)
            .filter(|end| *end <= self.len());
        let Some(end) = end else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a range beyond the end of the file",
            ));
        };
        match self {
            Source::Mapped(bytes) => Ok(bytes.slice(start as usize..end as usize)),
            Source::File(file, _) => {
                let mut buffer = vec![0; length];
                read_at(file, &mut buffer, start)?;
                Ok(buffer.into())
            }
        }
    }
}

impl Length for Source {
    fn len(&self) -> u64 {
        match self {
            Source::Mapped(bytes) => bytes.len() as u64,
            Source::File(_, length) => *length,
        }
    }
}

impl ChunkReader for Source {
    type T = BufReader<SourceReader>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(BufReader::with_capacity(
            4096,
            SourceReader {
                source: self.clone(),
                position: start,
            },
        ))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.range(start, length)
            .map_err(|error| ParquetError::External(Box::new(error)))
    }
}

/// Sequential reading from a position; every reader has its own, so threads do not disturb each other.
pub(crate) struct SourceReader {
    source: Source,
    position: u64,
}

impl Read for SourceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.source.len().saturating_sub(self.position);
        let count = (buffer.len() as u64).min(left) as usize;
        match &self.source {
            Source::Mapped(bytes) => {
                let start = self.position.min(bytes.len() as u64) as usize;
                buffer[..count].copy_from_slice(&bytes[start..start + count]);
            }
            Source::File(file, _) => read_at(file, &mut buffer[..count], self.position)?,
        }
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], position: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, position)
}

#[cfg(windows)]
fn read_at(file: &File, mut buffer: &mut [u8], mut position: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        let count = file.seek_read(buffer, position)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[count..];
        position += count as u64;
    }
    Ok(())
}
