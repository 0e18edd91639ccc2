//! Where weights come from: safetensors files, GGUF files, a seed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::mapped::MappedFile;
use crate::rng::SeededRng;
use crate::{Error, LoadOptions, Result};

/// Gives tensors by their Hugging Face name.
pub(crate) trait WeightSource: Send + Sync {
    /// These rows of the tensor `name`, which has exactly this shape, in the options' type on
    /// their device, copied at most once on its way from the file. Nothing may write to it.
    fn rows(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor>;

    /// The whole tensor.
    fn tensor(&self, name: &str, shape: &[i64], options: &LoadOptions) -> Result<Tensor> {
        self.rows(name, shape, 0..shape[0] as usize, options)
    }

    /// Refuses what [`WeightSource::rows`] would refuse, without reading any of it.
    fn check(&self, name: &str, shape: &[i64]) -> Result<()>;

    /// From now on tensors may be the mapped bytes of the files themselves.
    fn keep_mapped(&mut self) {}

    /// blake3 (hex) of the bytes that the weights are read from.
    fn digest(&self) -> String;
}

/// The same tensors, checked and not read: what is loaded from it is empty.
pub(crate) struct Checked<'a>(pub(crate) &'a dyn WeightSource);

impl WeightSource for Checked<'_> {
    fn rows(
        &self,
        name: &str,
        shape: &[i64],
        _: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        self.check(name, shape)?;
        Ok(Tensor::zeros([0], (options.kind, options.device)))
    }

    fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        self.0.check(name, shape)
    }

    fn digest(&self) -> String {
        self.0.digest()
    }
}

/// Normal weights with standard deviation 0.02, norms near one; each tensor has its own stream, so
/// a tensor's values do not depend on the rest of the network.
pub(crate) struct RandomWeights {
    pub(crate) seed: u64,
}

impl WeightSource for RandomWeights {
    fn rows(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let mut rng = SeededRng::named(self.seed, name);
        let mean = if name.ends_with("norm.weight") {
            1.0
        } else {
            0.0
        };
        let count: i64 = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| (mean + 0.02 * rng.normal()) as f32)
            .collect();
        Ok(Tensor::from_slice(&values)
            .view(shape)
            .narrow(0, rows.start as i64, rows.len() as i64)
            .to_kind(options.kind)
            .to_device(options.device))
    }

    fn check(&self, _: &str, _: &[i64]) -> Result<()> {
        Ok(())
    }

    fn digest(&self) -> String {
        String::new()
    }
}

/// The safetensors files of a Hugging Face folder, memory-mapped.
#[derive(Debug)]
pub(crate) struct SafetensorsFolder {
    folder: PathBuf,
    files: Vec<MappedFile>,
    /// Name → where it lies; read once, because parsing a header per tensor is quadratic.
    tensors: BTreeMap<String, Location>,
}

#[derive(Debug)]
struct Location {
    file: usize,
    start: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<i64>,
}

impl SafetensorsFolder {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub(crate) fn open(folder: &Path) -> Result<SafetensorsFolder> {
        SafetensorsFolder::open_files(folder, &weight_files(folder)?)
    }

    pub(crate) fn open_files(folder: &Path, names: &[String]) -> Result<SafetensorsFolder> {
        let mut source = SafetensorsFolder {
            folder: folder.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for name in names {
            let file = MappedFile::open(&folder.join(name))?;
            let damaged = |message: String| Error::Damaged {
                path: file.path().to_owned(),
                format: "safetensors",
                message,
            };
            let parsed =
                SafeTensors::deserialize(file.bytes()).map_err(|e| damaged(e.to_string()))?;
            let base = file.bytes().as_ptr() as usize;
            for (name, view) in parsed.iter() {
                let start = view.data().as_ptr() as usize - base;
                let location = Location {
                    file: source.files.len(),
                    start,
                    end: start + view.data().len(),
                    dtype: view.dtype(),
                    shape: view.shape().iter().map(|&n| n as i64).collect(),
                };
                if source.tensors.insert(name.to_owned(), location).is_some() {
                    return Err(damaged(format!("tensor `{name}` occurs twice")));
                }
            }
            source.files.push(file);
        }
        Ok(source)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

impl SafetensorsFolder {
    /// Where a tensor of this shape lies, and its type.
    fn find(&self, name: &str, shape: &[i64]) -> Result<(&Location, Kind)> {
        // Some files hold the network without its head, whose names lack the first part.
        let bare = || self.tensors.get(name.split_once('.')?.1);
        let location =
            self.tensors
                .get(name)
                .or_else(bare)
                .ok_or_else(|| Error::MissingTensor {
                    path: self.folder.clone(),
                    name: name.to_owned(),
                })?;
        let file = &self.files[location.file];
        if location.shape != shape {
            return Err(Error::Shape {
                path: file.path().to_owned(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: location.shape.clone(),
            });
        }
        let kind = match location.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F16 => Kind::Half,
            other => {
                return Err(Error::unsupported(
                    file.path(),
                    &format!("dtype of {name}"),
                    format!("{other:?}"),
                ));
            }
        };
        Ok((location, kind))
    }
}

impl WeightSource for SafetensorsFolder {
    fn rows(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let (location, kind) = self.find(name, shape)?;
        let row = (location.end - location.start) / shape[0] as usize;
        let bytes = location.start + row * rows.start..location.start + row * rows.end;
        let mut shape = shape.to_vec();
        shape[0] = rows.len() as i64;
        self.files[location.file].tensor(bytes, &shape, kind, options)
    }

    fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        self.find(name, shape).map(|_| ())
    }

    fn keep_mapped(&mut self) {
        self.files.iter_mut().for_each(MappedFile::keep_mapped);
    }

    /// Of the files one after the other, in name order.
    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for file in &self.files {
            file.hash_into(&mut hasher);
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// The file of weights that are not sharded.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Lists the shards of weights that are.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The weight files of a folder in name order.
fn weight_files(folder: &Path) -> Result<Vec<String>> {
    if folder.join(SINGLE_FILE).is_file() {
        return Ok(vec![SINGLE_FILE.to_owned()]);
    }
    let index = folder.join(INDEX);
    if !index.is_file() {
        return Err(Error::NoWeights {
            path: folder.to_owned(),
        });
    }
    shards_of_index(&index)
}

/// The files that an index lists, in name order.
pub(crate) fn shards_of_index(index: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }

    let text = std::fs::read(index).map_err(Error::io("read", index))?;
    let parsed: Index = serde_json::from_slice(&text).map_err(Error::json(index))?;
    let mut files: Vec<String> = parsed.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    // A file name in the index must not lead out of the folder.
    if let Some(bad) = files
        .iter()
        .find(|name| Path::new(name).file_name() != Some(std::ffi::OsStr::new(name)))
    {
        return Err(Error::unsupported(index, "weight_map", bad));
    }
    Ok(files)
}
