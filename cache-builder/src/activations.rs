//! What waits between two blocks: one tensor for each batch, in memory or in a file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::error::torch;
use crate::{Error, Result};

/// One tensor for each batch.
pub(crate) enum Activations {
    Memory(Vec<Option<Tensor>>),
    Spilled(Spill),
}

/// A file without a name: whatever ends this process frees its space.
pub(crate) struct Spill {
    folder: PathBuf,
    file: File,
    places: Vec<Option<Place>>,
    end: u64,
    buffer: Vec<u8>,
}

#[derive(Clone)]
struct Place {
    start: u64,
    shape: Vec<i64>,
    kind: Kind,
}

impl Place {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

impl Activations {
    /// Room for so many batches, in a file in `spill` where that is given.
    pub(crate) fn new(batches: usize, spill: Option<&Path>) -> Result<Activations> {
        let Some(folder) = spill else {
            return Ok(Activations::Memory((0..batches).map(|_| None).collect()));
        };
        let file = tempfile::tempfile_in(folder).map_err(spill_error(folder))?;
        Ok(Activations::Spilled(Spill {
            folder: folder.to_owned(),
            file,
            places: vec![None; batches],
            end: 0,
            buffer: Vec::new(),
        }))
    }

    /// Keeps a batch's tensor, in place of the one before it.
    pub(crate) fn put(&mut self, batch: usize, x: &Tensor) -> Result<()> {
        match self {
            Activations::Memory(tensors) => {
                tensors[batch] = Some(x.shallow_clone());
                Ok(())
            }
            Activations::Spilled(spill) => spill.put(batch, x),
        }
    }

    /// Gives a batch's tensor back, on a device.
    ///
    /// # Panics
    /// When none was put.
    pub(crate) fn take(&mut self, batch: usize, device: Device) -> Result<Tensor> {
        match self {
            Activations::Memory(tensors) => Ok(tensors[batch]
                .take()
                .unwrap_or_else(|| panic!("batch {batch} has no activations"))
                .to_device(device)),
            Activations::Spilled(spill) => spill.take(batch, device),
        }
    }
}

impl Spill {
    fn put(&mut self, batch: usize, x: &Tensor) -> Result<()> {
        let x = x.to_device(Device::Cpu).contiguous();
        let (shape, kind) = (x.size(), x.kind());
        let reused = self.places[batch]
            .as_ref()
            .filter(|place| place.shape == shape && place.kind == kind);
        let place = Place {
            start: reused.map_or(self.end, |place| place.start),
            shape,
            kind,
        };
        let bytes = place.bytes();
        self.end = self.end.max(place.start + bytes as u64);
        self.buffer.resize(bytes, 0);
        x.f_copy_data_u8(&mut self.buffer, x.numel())
            .map_err(torch("copying activations"))?;
        self.file
            .seek(SeekFrom::Start(place.start))
            .and_then(|_| self.file.write_all(&self.buffer))
            .map_err(spill_error(&self.folder))?;
        self.places[batch] = Some(place);
        Ok(())
    }

    fn take(&mut self, batch: usize, device: Device) -> Result<Tensor> {
        let place = self.places[batch]
            .as_ref()
            .unwrap_or_else(|| panic!("batch {batch} has no activations"));
        self.buffer.resize(place.bytes(), 0);
        self.file
            .seek(SeekFrom::Start(place.start))
            .and_then(|_| self.file.read_exact(&mut self.buffer))
            .map_err(spill_error(&self.folder))?;
        Tensor::f_from_data_size(&self.buffer, &place.shape, place.kind)
            .and_then(|x| x.f_to_device(device))
            .map_err(torch("reading activations"))
    }
}

fn spill_error(folder: &Path) -> impl Fn(std::io::Error) -> Error {
    let folder = folder.to_owned();
    move |source| Error::Spill {
        folder: folder.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        for spill in [None, Some(folder.path())] {
            let mut store = Activations::new(3, spill).unwrap();
            let tensor = |shift: i64, kind: Kind| {
                let values = Tensor::arange(12 + shift, (Kind::Float, Device::Cpu)) * 0.37;
                values.view([2, -1]).to_kind(kind)
            };
            for (batch, shift) in [(0, 0), (1, 2), (2, 4)] {
                store.put(batch, &tensor(shift, Kind::BFloat16)).unwrap();
            }
            // Another one of the same size, and one that has grown.
            store.put(1, &(tensor(2, Kind::BFloat16) + 1.0)).unwrap();
            store.put(0, &tensor(40, Kind::Float)).unwrap();
            let check = |found: Tensor, expected: &Tensor| {
                assert_eq!(
                    (found.size(), found.kind()),
                    (expected.size(), expected.kind())
                );
                assert!(found.equal(expected));
            };
            let mut take = |batch| store.take(batch, Device::Cpu).unwrap();
            check(take(2), &tensor(4, Kind::BFloat16));
            check(take(1), &(tensor(2, Kind::BFloat16) + 1.0));
            check(take(0), &tensor(40, Kind::Float));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = Activations::new(1, Some(Path::new("/no/such/folder")))
            .err()
            .unwrap();
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
        assert!(error.is_user());
    }
}
