//! NumPy's .npy and .npz.
//!
//! A `.npz` holds named arrays (see [`super::dense`]); a `.npy` holds one, the logits, and its token ids come with
//! `--tokens`. Both little-endian and in C order, the archive's members stored or deflated.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use npyz::{DType, Endianness, NpyHeader, Order, TypeChar};

use super::Setup;
use super::dense::{ArrayInfo, Arrays, DenseReader, Element};
use super::foreign::Place;
use crate::data::Problem;
use crate::{Error, Result};

/// Opens all files.
pub(crate) fn open(setup: &Setup<'_>) -> Result<DenseReader> {
    let options = setup.options;
    let mut files: Vec<(PathBuf, Box<dyn Arrays>)> = Vec::new();
    for path in &options.files {
        let is_archive = path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("npz"));
        let members = if is_archive {
            archive(path)?
        } else {
            let Some(tokens) = &options.tokens else {
                return Err(Error::Option {
                    problem: format!("`{}` holds one array, the logits", path.display()),
                    hint: "give their token ids with --tokens FILE.npy, or save both with numpy.savez as `logits` and `input_ids`".into(),
                });
            };
            if options.files.len() > 1 {
                return Err(Error::Option {
                    problem: "--tokens goes with one .npy file".into(),
                    hint: "save logits and token ids of each part with numpy.savez as `logits` and `input_ids`".into(),
                });
            }
            vec![single(path, "logits")?, single(tokens, "input_ids")?]
        };
        let list = members.iter().map(|member| member.info.clone()).collect();
        files.push((path.clone(), Box::new(Npy { members, list })));
    }
    DenseReader::new(files, setup)
}

struct Npy {
    members: Vec<Member>,
    list: Vec<ArrayInfo>,
}

/// Where an array's bytes are.
struct Member {
    path: PathBuf,
    info: ArrayInfo,
    /// In the file.
    start: u64,
    /// In the file, compressed or not.
    bytes: u64,
    is_deflated: bool,
}

impl Member {
    /// The member from its beginning: header, then data.
    fn open(&self) -> std::io::Result<Box<dyn Read>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.start))?;
        let raw = std::io::BufReader::with_capacity(1 << 20, file.take(self.bytes));
        Ok(if self.is_deflated {
            Box::new(flate2::bufread::DeflateDecoder::new(raw))
        } else {
            Box::new(raw)
        })
    }

    /// Reads the header and checks that there is as much data as it promises, where that can be told.
    fn describe(mut self, name: &str) -> std::result::Result<Self, Problem> {
        let unreadable = |error: std::io::Error| {
            Problem::new(
                format!("`{name}` is no NumPy array: {error}"),
                "save it with numpy.save or numpy.savez",
            )
        };
        let header =
            NpyHeader::from_reader(&mut self.open().map_err(unreadable)?).map_err(unreadable)?;
        if header.order() != Order::C && header.shape().len() > 1 {
            return Err(Problem::new(
                format!("`{name}` is in Fortran order"),
                "save numpy.ascontiguousarray of it",
            ));
        }
        let element = element(&header.dtype()).ok_or_else(|| {
            Problem::new(
                format!("`{name}` holds {}", header.dtype().descr()),
                "save little-endian numbers: floats of 2, 4 or 8 bytes, or integers",
            )
        })?;
        let shape: Vec<usize> = header.shape().iter().map(|size| *size as usize).collect();
        let data = shape
            .iter()
            .try_fold(element.bytes(), |bytes, size| bytes.checked_mul(*size));
        let fits = data.is_some_and(|data| self.is_deflated || data as u64 <= self.bytes);
        if !fits {
            return Err(Problem::new(
                format!(
                    "`{name}` is cut short: {shape:?} do not fit in {} bytes",
                    self.bytes
                ),
                "the file is damaged, or was not written to its end",
            ));
        }
        self.info = ArrayInfo {
            name: name.to_owned(),
            shape,
            element,
        };
        Ok(self)
    }
}

impl Arrays for Npy {
    fn list(&self) -> &[ArrayInfo] {
        &self.list
    }

    fn stream(&self, index: usize) -> std::io::Result<Box<dyn Read>> {
        let mut stream = self.members[index].open()?;
        NpyHeader::from_reader(&mut stream)?;
        Ok(stream)
    }
}

fn nameless() -> ArrayInfo {
    ArrayInfo {
        name: String::new(),
        shape: Vec::new(),
        element: Element::F32,
    }
}

fn single(path: &Path, name: &str) -> Result<Member> {
    let bytes = std::fs::metadata(path)
        .map_err(|source| Error::DataFile {
            path: path.to_owned(),
            source,
        })?
        .len();
    let member = Member {
        path: path.to_owned(),
        info: nameless(),
        start: 0,
        bytes,
        is_deflated: false,
    };
    let place = Place {
        path: path.to_owned(),
        place: String::new(),
    };
    member
        .describe(name)
        .map_err(|problem| place.error(problem))
}

fn archive(path: &Path) -> Result<Vec<Member>> {
    let place = Place {
        path: path.to_owned(),
        place: String::new(),
    };
    let file = File::open(path).map_err(|source| Error::DataFile {
        path: path.to_owned(),
        source,
    })?;
    let damaged = |error: zip::result::ZipError| {
        place.error(Problem::new(
            format!("no archive of arrays: {error}"),
            "save it with numpy.savez",
        ))
    };
    let mut zip = zip::ZipArchive::new(file).map_err(damaged)?;
    let mut members = Vec::new();
    for index in 0..zip.len() {
        let entry = zip.by_index_raw(index).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        let Some(name) = name.strip_suffix(".npy") else {
            continue;
        };
        let is_deflated = match entry.compression() {
            zip::CompressionMethod::Stored => false,
            zip::CompressionMethod::DEFLATE => true,
            other => {
                return Err(place.error(Problem::new(
                    format!("`{name}` is compressed as {other}"),
                    "save it with numpy.savez or numpy.savez_compressed",
                )));
            }
        };
        let member = Member {
            path: path.to_owned(),
            info: nameless(),
            start: entry.data_start().unwrap_or(0),
            bytes: entry.compressed_size(),
            is_deflated,
        };
        members.push(
            member
                .describe(name)
                .map_err(|problem| place.error(problem))?,
        );
    }
    Ok(members)
}

fn element(dtype: &DType) -> Option<Element> {
    let DType::Plain(plain) = dtype else {
        return None;
    };
    let bytes = plain.num_bytes()?;
    if bytes > 1 && plain.endianness() != Endianness::Little {
        return None;
    }
    match (plain.type_char(), bytes) {
        (TypeChar::Float, 2) => Some(Element::F16),
        (TypeChar::Float, 4) => Some(Element::F32),
        (TypeChar::Float, 8) => Some(Element::F64),
        (TypeChar::Int, 1 | 2 | 4 | 8) => Some(Element::Signed(bytes)),
        (TypeChar::Uint, 1 | 2 | 4 | 8) => Some(Element::Unsigned(bytes)),
        (TypeChar::Bool, 1) => Some(Element::Unsigned(1)),
        _ => None,
    }
}
