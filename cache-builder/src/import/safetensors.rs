//! Safetensors with logits and token ids, for instance what `caskd export --to safetensors --logits` writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Setup;
use super::dense::{ArrayInfo, Arrays, DenseReader, Element};
use super::foreign::Place;
use crate::data::Problem;
use crate::{Error, Result};

/// Far above the header of any file with a tensor for each sequence.
const HEADER_LIMIT: u64 = 256 << 20;

/// Opens all files.
pub(crate) fn open(setup: &Setup<'_>) -> Result<DenseReader> {
    let mut files: Vec<(PathBuf, Box<dyn Arrays>)> = Vec::new();
    for path in &setup.options.files {
        files.push((path.clone(), Box::new(Tensors::open(path)?)));
    }
    DenseReader::new(files, setup)
}

struct Tensors {
    path: PathBuf,
    list: Vec<ArrayInfo>,
    /// Where each begins in the file.
    starts: Vec<u64>,
}

/// A tensor in the header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        let place = Place {
            path: path.to_owned(),
            place: String::new(),
        };
        let failed = |source| Error::DataFile {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let damaged = |what: String| {
            place.error(Problem::new(
                what,
                "is it a safetensors file, written to its end?",
            ))
        };
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(failed)?;
        let size = u64::from_le_bytes(size);
        if size > HEADER_LIMIT || size > length - 8 {
            return Err(damaged(format!(
                "its header of {size} bytes is longer than the file"
            )));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
            .map_err(|error| damaged(format!("its header is no JSON: {error}")))?;
        header.remove("__metadata__");
        let mut tensors = Self {
            path: path.to_owned(),
            list: Vec::new(),
            starts: Vec::new(),
        };
        for (name, entry) in header {
            let entry: Entry = serde_json::from_value(entry)
                .map_err(|error| damaged(format!("tensor `{name}`: {error}")))?;
            // Tensors that are not asked for may be of any type.
            let Some(element) = element(&entry.dtype) else {
                continue;
            };
            let bytes = entry
                .shape
                .iter()
                .try_fold(element.bytes(), |bytes, size| bytes.checked_mul(*size));
            let (start, end) = entry.data_offsets;
            if start > end
                || Some(end - start) != bytes.map(|bytes| bytes as u64)
                || end > length - 8 - size
            {
                return Err(damaged(format!(
                    "tensor `{name}` does not fit into the file"
                )));
            }
            tensors.list.push(ArrayInfo {
                name,
                shape: entry.shape,
                element,
            });
            tensors.starts.push(8 + size + start);
        }
        Ok(tensors)
    }
}

impl Arrays for Tensors {
    fn list(&self) -> &[ArrayInfo] {
        &self.list
    }

    fn stream(&self, index: usize) -> std::io::Result<Box<dyn Read>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.starts[index]))?;
        Ok(Box::new(BufReader::with_capacity(1 << 20, file)))
    }
}

fn element(dtype: &str) -> Option<Element> {
    Some(match dtype {
        "F16" => Element::F16,
        "BF16" => Element::Bf16,
        "F32" => Element::F32,
        "F64" => Element::F64,
        "I8" => Element::Signed(1),
        "I16" => Element::Signed(2),
        "I32" => Element::Signed(4),
        "I64" => Element::Signed(8),
        "BOOL" | "U8" => Element::Unsigned(1),
        "U16" => Element::Unsigned(2),
        "U32" => Element::Unsigned(4),
        "U64" => Element::Unsigned(8),
        _ => return None,
    })
}
