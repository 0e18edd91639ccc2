//! The bytes of one published file, mapped or read by position.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

/// A file of known length.
#[derive(Clone, Debug)]
pub enum Source {
    /// In memory, or mapped into it.
    Mapped(Bytes),
    /// Read by position; the length at the time of opening.
    File(Arc<File>, u64),
}

impl Source {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Source::Mapped(bytes) => bytes.len() as u64,
            Source::File(_, length) => *length,
        }
    }

    fn check(&self, start: u64, length: usize) -> io::Result<Range<u64>> {
        match start.checked_add(length as u64) {
            Some(end) if end <= self.len() => Ok(start..end),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a range beyond the end of the file",
            )),
        }
    }

    /// `length` bytes from `start`; zero-copy when mapped.
    pub(crate) fn range(&self, start: u64, length: usize) -> io::Result<Bytes> {
        let range = self.check(start, length)?;
        match self {
            Source::Mapped(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Source::File(file, _) => {
                let mut buffer = vec![0; length];
                read_at(file, &mut buffer, start)?;
                Ok(buffer.into())
            }
        }
    }

    /// The same without an allocation or a shared counter, and whether it is mapped; `buffer` holds the bytes if not.
    pub(crate) fn view<'a>(
        &'a self,
        start: u64,
        length: usize,
        buffer: &'a mut Vec<u8>,
    ) -> io::Result<(&'a [u8], bool)> {
        let range = self.check(start, length)?;
        match self {
            Source::Mapped(_) => Ok((self.mapped(range), true)),
            Source::File(file, _) => {
                buffer.resize(length, 0);
                read_at(file, buffer, start)?;
                Ok((buffer, false))
            }
        }
    }

    /// A range that [`Source::view`] has returned as mapped.
    pub(crate) fn mapped(&self, range: Range<u64>) -> &[u8] {
        match self {
            Source::Mapped(bytes) => &bytes[range.start as usize..range.end as usize],
            Source::File(..) => &[],
        }
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
