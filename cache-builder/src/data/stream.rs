//! A data file's bytes as a stream: counted and hashed as they stand on the disk, unpacked where the name ends in .gz
//! or .zst.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use caskd_formats::DataFile;
use flate2::read::MultiGzDecoder;

use crate::{Error, Result};

/// The largest window of a Zstandard frame that is read, as a power of two: what `zstd --long=31` asks for.
const ZSTD_WINDOW: u32 = 31;

/// Bytes that are read at a time.
pub(crate) const READ_BYTES: usize = 1 << 20;

/// The name that sources and the manifest call a file by: without its folders.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// The path without the ending that says how the file is packed.
pub(crate) fn unpacked_name(path: &Path) -> &Path {
    match Packing::of(path) {
        Packing::None => path,
        _ => path.file_stem().map_or(path, Path::new),
    }
}

/// A file that is read from front to back.
pub(crate) struct Stream {
    path: PathBuf,
    reader: Unpacked,
}

enum Unpacked {
    Plain(Box<Hashed>),
    Gzip(Box<MultiGzDecoder<Hashed>>),
    Zstd(Box<zstd::Decoder<'static, BufReader<Hashed>>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    fn of(path: &Path) -> Self {
        let ending = path.extension().and_then(|ending| ending.to_str());
        match ending.map(str::to_ascii_lowercase).as_deref() {
            Some("gz") => Self::Gzip,
            Some("zst") => Self::Zstd,
            _ => Self::None,
        }
    }
}

impl Stream {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |source| unreadable(path, source);
        let file = File::open(path).map_err(failed)?;
        if file.metadata().is_ok_and(|data| data.is_dir()) {
            return Err(failed(std::io::ErrorKind::IsADirectory.into()));
        }
        let hashed = Hashed {
            inner: file,
            hasher: blake3::Hasher::new(),
            bytes: 0,
        };
        let reader = match Packing::of(path) {
            Packing::None => Unpacked::Plain(Box::new(hashed)),
            Packing::Gzip => Unpacked::Gzip(Box::new(MultiGzDecoder::new(hashed))),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::new(hashed).map_err(failed)?;
                decoder.window_log_max(ZSTD_WINDOW).map_err(failed)?;
                Unpacked::Zstd(Box::new(decoder))
            }
        };
        Ok(Self {
            path: path.to_owned(),
            reader,
        })
    }

    fn file(&self) -> &Hashed {
        match &self.reader {
            Unpacked::Plain(file) => file,
            Unpacked::Gzip(decoder) => decoder.get_ref(),
            Unpacked::Zstd(decoder) => decoder.get_ref().get_ref(),
        }
    }

    /// Bytes of the file that have been read.
    pub(crate) fn bytes_done(&self) -> u64 {
        self.file().bytes
    }

    /// What the file is. What nobody has read of it is read here, as it stands on the disk.
    pub(crate) fn identity(&mut self) -> Result<DataFile> {
        let file = match &mut self.reader {
            Unpacked::Plain(file) => file.as_mut(),
            Unpacked::Gzip(decoder) => decoder.get_mut(),
            Unpacked::Zstd(decoder) => decoder.get_mut().get_mut(),
        };
        let read = std::io::copy(file, &mut std::io::sink());
        read.map_err(|source| unreadable(&self.path, source))?;
        Ok(DataFile {
            name: file_name(&self.path),
            bytes: file.bytes,
            digest: file.hasher.finalize().to_hex().to_string(),
        })
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match &mut self.reader {
            Unpacked::Plain(file) => file.read(buffer),
            Unpacked::Gzip(decoder) => decoder.read(buffer),
            Unpacked::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// A file that knows how many of its bytes have been read, and their digest.
struct Hashed {
    inner: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

pub(crate) fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::DataFile {
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn packed_files_are_hashed_as_they_are_and_read_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let text = b"a line\n".repeat(50_000);
        let gzip = |part: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap()
        };
        // Several members and frames one after the other are one file.
        let (first, second) = text.split_at(100_000);
        let zstd = |part| zstd::encode_all(part, 1).unwrap();
        for (name, bytes) in [
            ("a.jsonl", text.clone()),
            ("a.jsonl.gz", [gzip(first), gzip(second)].concat()),
            ("a.JSONL.ZST", [zstd(first), zstd(second)].concat()),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let mut stream = Stream::open(&path).unwrap();
            let mut read = Vec::new();
            stream.read_to_end(&mut read).unwrap();
            assert!(read == text, "{name}");
            let identity = stream.identity().unwrap();
            assert_eq!(identity.bytes, bytes.len() as u64);
            assert_eq!(identity.digest, blake3::hash(&bytes).to_hex().to_string());
            let mut unread = Stream::open(&path).unwrap();
            assert_eq!(unread.read(&mut [0; 10]).unwrap(), 10);
            assert_eq!(unread.identity().unwrap(), identity);
            if name != "a.jsonl" {
                std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
                let cut = Stream::open(&path).unwrap().read_to_end(&mut Vec::new());
                assert!(cut.is_err(), "{name}");
            }
        }
        assert_eq!(
            unpacked_name(Path::new("x/a.jsonl.gz")),
            Path::new("a.jsonl")
        );
    }
}
