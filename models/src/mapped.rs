//! Memory-mapped files, and tensors from their bytes: in place, or by one copy.
#![expect(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use tch::{Device, Kind, Tensor};

use crate::{Error, LoadOptions, Result};

/// A file mapped for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
    /// Tensors may be the mapped bytes themselves.
    in_place: bool,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<MappedFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is private to this struct and only read. Another process that cut the
        // file short while a model is in use would end us with SIGBUS; weight files are published
        // whole and not changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(MappedFile {
            path: path.to_owned(),
            map: Arc::new(map),
            in_place: false,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// From now on tensors on the CPU in the file's own type are the mapped bytes themselves. The
    /// file then stays mapped until the process ends.
    pub(crate) fn keep_mapped(&mut self) {
        self.in_place = true;
    }

    /// A tensor of `shape` from little-endian bytes of type `from`, in the options' type on their
    /// device: in place where that is allowed and nothing is to be converted, else one copy that
    /// converts. Nothing may write to it.
    pub(crate) fn tensor(
        &self,
        range: Range<usize>,
        shape: &[i64],
        from: Kind,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let bytes = &self.map[range.clone()];
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
        // (asserted above). The view is either copied below and ends with this function, or the
        // map it lies in is made to last as long as the process. The crate and its callers never
        // write to a base weight in place.
        let view =
            unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &strides, from, Device::Cpu) }
                .map_err(Error::torch("read a weight"))?;
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(from.elt_size_in_bytes());
        if self.in_place && aligned && options.kind == from && options.device == Device::Cpu {
            std::mem::forget(Arc::clone(&self.map));
            return Ok(view);
        }
        let copy = view
            .f_to_device_(options.device, options.kind, false, true)
            .map_err(Error::torch("copy a weight"))?;
        self.release(range);
        Ok(copy)
    }

    /// Hashes the whole file, and leaves no page of it with the process.
    pub(crate) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        const PIECE: usize = 16 << 20;
        for start in (0..self.map.len()).step_by(PIECE) {
            let range = start..self.map.len().min(start + PIECE);
            hasher.update(&self.map[range.clone()]);
            self.release(range);
        }
    }

    /// Tells the system that these bytes are not needed soon, so that they do not count as ours.
    pub(crate) fn release(&self, range: Range<usize>) {
        if self.in_place {
            return;
        }
        // SAFETY: the map is of a file and never written to: bytes that are touched again are read
        // from the file again.
        let advice = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // It is advice: where the system does not take it, only memory is held for longer.
        drop(advice);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_in_place_only_where_nothing_is_converted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let values: Vec<u8> = (0..4096u32)
            .flat_map(|i| (i as f32).to_le_bytes())
            .collect();
        std::fs::write(&path, &values).unwrap();
        let options = LoadOptions::default();
        let mut file = MappedFile::open(&path).unwrap();
        let inside = |file: &MappedFile, tensor: &Tensor| {
            file.bytes()
                .as_ptr_range()
                .contains(&tensor.data_ptr().cast::<u8>().cast_const())
        };
        let load = |file: &MappedFile, range, shape: &[i64], options| {
            file.tensor(range, shape, Kind::Float, options).unwrap()
        };
        let copy = load(&file, 8..16_384, &[2, 2047], &options);
        assert!(!inside(&file, &copy));
        file.keep_mapped();
        let view = load(&file, 8..16_384, &[2, 2047], &options);
        assert!(inside(&file, &view));
        assert_eq!(view, copy);
        // Another type, or bytes that do not lie on whole elements.
        let coarse = LoadOptions {
            kind: Kind::BFloat16,
            ..options
        };
        assert!(!inside(&file, &load(&file, 0..16, &[4], &coarse)));
        assert!(!inside(&file, &load(&file, 2..10, &[2], &options)));
        drop(file);
        assert_eq!(view.double_value(&[1, 2046]), 4095.0);
    }
}
