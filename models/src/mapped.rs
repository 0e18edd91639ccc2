//! Memory-mapped files, and the one copy from their bytes to a tensor. All of the crate's unsafe
//! code is here.
#![expect(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use tch::{Device, Kind, Tensor};

use crate::{Error, LoadOptions, Result};

/// A file mapped for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<MappedFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is private to this struct and only read. Another process that cut the
        // file short while a model loads would end us with SIGBUS; weight files are published
        // whole and not changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(MappedFile {
            path: path.to_owned(),
            map,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// An owned tensor of `shape` made from little-endian bytes of type `from`, converted to the
/// options' type and device in the same copy.
pub(crate) fn copy_of_bytes(
    bytes: &[u8],
    shape: &[i64],
    from: Kind,
    options: &LoadOptions,
) -> Result<Tensor> {
    let count = shape.iter().product::<i64>() as usize;
    assert_eq!(
        bytes.len(),
        count * from.elt_size_in_bytes(),
        "bytes of a tensor of shape {shape:?}"
    );
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    // SAFETY: `bytes` holds exactly the elements of a contiguous tensor of this shape and type
    // (asserted above) and outlives `view`, which ends with this function; the copy below is
    // forced, so nothing that is returned shares its memory.
    let view = unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &strides, from, Device::Cpu) }
        .map_err(Error::torch("read a weight"))?;
    view.f_to_device_(options.device, options.kind, false, true)
        .map_err(Error::torch("copy a weight"))
}
