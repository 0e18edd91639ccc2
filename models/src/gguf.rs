//! GGUF files (llama.cpp's format): metadata, dequantised weights under Hugging Face names.
//!
//! Reading and dequantising is candle's; what names and metadata mean is in `gguf_config.rs`.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{Device, Storage, cpu_backend::CpuStorage};
use tch::{Kind, Tensor};

use crate::gguf_config::gguf_name;
use crate::mapped::MappedFile;
use crate::weights::WeightSource;
use crate::{Error, LoadOptions, Result};

/// An opened GGUF file.
pub(crate) struct GgufFile {
    file: MappedFile,
    content: Content,
}

impl GgufFile {
    /// Maps the file and checks its header: no length or offset in it leads beyond its end.
    pub(crate) fn open(path: &Path) -> Result<GgufFile> {
        let file = MappedFile::open(path)?;
        if alignment(file.bytes()) == Some(0) {
            return Err(damaged(path, "its alignment is 0"));
        }
        let content = Content::read(&mut Cursor::new(file.bytes()))
            .map_err(|e| damaged(path, first_line(&e.to_string())))?;
        for (name, tensor) in &content.tensor_infos {
            let elements = tensor
                .shape
                .dims()
                .iter()
                .try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
            let end = elements
                .filter(|n| n.is_multiple_of(tensor.ggml_dtype.block_size() as u64))
                .map(|n| n / tensor.ggml_dtype.block_size() as u64)
                .and_then(|blocks| blocks.checked_mul(tensor.ggml_dtype.type_size() as u64))
                .and_then(|bytes| {
                    bytes
                        .checked_add(tensor.offset)?
                        .checked_add(content.tensor_data_offset)
                });
            if end.is_none_or(|end| end > file.bytes().len() as u64) {
                return Err(damaged(
                    path,
                    format!("tensor `{name}` reaches beyond the end of the file"),
                ));
            }
        }
        Ok(GgufFile { file, content })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Whether the file holds a tensor.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        self.content.tensor_infos.contains_key(tensor)
    }

    pub(crate) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    pub(crate) fn tensor_shape(&self, tensor: &str) -> Option<&[usize]> {
        let info = self.content.tensor_infos.get(tensor)?;
        Some(info.shape.dims())
    }

    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        value
            .to_string()
            .map(String::as_str)
            .map_err(|_| self.wrong_type(key))
    }

    pub(crate) fn number(&self, key: &str) -> Result<usize> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            other => other.to_u64().ok(),
        };
        number
            .map(|n| Some(n as usize))
            .ok_or_else(|| self.wrong_type(key))
    }

    pub(crate) fn float(&self, key: &str) -> Result<f64> {
        match self.value(key).ok_or_else(|| self.missing(key))? {
            // The shortest decimal of the f32, so that 1e-5 comes back as 1e-5.
            Value::F32(x) => Ok(x.to_string().parse().unwrap_or(f64::from(*x))),
            Value::F64(x) => Ok(*x),
            _ => Err(self.wrong_type(key)),
        }
    }

    pub(crate) fn array(&self, key: &str) -> Result<&[Value]> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        value
            .to_vec()
            .map(Vec::as_slice)
            .map_err(|_| self.wrong_type(key))
    }

    pub(crate) fn wrong_type(&self, key: &str) -> Error {
        damaged(
            self.path(),
            format!("`{key}` has an unexpected type or value"),
        )
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingField {
            path: self.path().to_owned(),
            field: key.to_owned(),
        }
    }
}

impl GgufFile {
    /// A tensor by the file's own name, in f32 on the CPU.
    pub(crate) fn plain(&self, stored: &str, shape: &[i64]) -> Result<Tensor> {
        let rows = 0..shape[0] as usize;
        self.read(stored, shape, rows, &LoadOptions::default())
    }

    /// What the file says of a tensor of this shape, and where its bytes begin.
    fn find(&self, stored: &str, shape: &[i64]) -> Result<(&TensorInfo, usize)> {
        let path = self.path();
        let info = self.content.tensor_infos.get(stored);
        let info = info.ok_or_else(|| Error::MissingTensor {
            path: path.to_owned(),
            name: stored.to_owned(),
        })?;
        let found: Vec<i64> = info.shape.dims().iter().map(|&n| n as i64).collect();
        if found != shape {
            return Err(Error::Shape {
                path: path.to_owned(),
                name: stored.to_owned(),
                expected: shape.to_vec(),
                found,
            });
        }
        let dtype = info.ggml_dtype;
        let row_elements = info.shape.elem_count() / info.shape.dims()[0].max(1);
        let start = (self.content.tensor_data_offset + info.offset) as usize;
        if !row_elements.is_multiple_of(dtype.block_size()) || !start.is_multiple_of(4) {
            let message = format!("tensor `{stored}` does not lie on whole blocks");
            return Err(damaged(path, message));
        }
        Ok((info, start))
    }

    /// Rows of a tensor by the file's own name.
    fn read(
        &self,
        stored: &str,
        shape: &[i64],
        rows: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let path = self.path();
        let (info, start) = self.find(stored, shape)?;
        let dtype = info.ggml_dtype;
        let row_elements = info.shape.elem_count() / info.shape.dims()[0].max(1);
        let row_bytes = row_elements / dtype.block_size() * dtype.type_size();
        let bytes = start + row_bytes * rows.start..start + row_bytes * rows.end;
        let mut dims = info.shape.dims().to_vec();
        dims[0] = rows.len();
        let shape: Vec<i64> = dims.iter().map(|&n| n as i64).collect();
        let plain = match dtype {
            GgmlDType::F32 => Some(Kind::Float),
            GgmlDType::F16 => Some(Kind::Half),
            GgmlDType::BF16 => Some(Kind::BFloat16),
            _ => None,
        };
        if let Some(kind) = plain {
            return self.file.tensor(bytes, &shape, kind, options);
        }
        let unreadable = |e: candle_core::Error| {
            damaged(path, format!("`{stored}`: {}", first_line(&e.to_string())))
        };
        let wide = qtensor_from_ggml(dtype, &self.file.bytes()[bytes.clone()], dims, &Device::Cpu)
            .and_then(|quantized| quantized.dequantize(&Device::Cpu))
            .map_err(unreadable)?;
        self.file.release(bytes);
        let (storage, layout) = wide.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
            let message = format!("`{stored}` does not dequantise to f32");
            return Err(damaged(path, message));
        };
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        let tensor = Tensor::f_from_slice(&values[range]).map_err(Error::torch("copy a weight"))?;
        Ok(tensor
            .view(shape.as_slice())
            .to_kind(options.kind)
            .to_device(options.device))
    }
}

impl GgufFile {
    fn stored_name(&self, name: &str) -> Result<String> {
        gguf_name(name).ok_or_else(|| Error::MissingTensor {
            path: self.path().to_owned(),
            name: name.to_owned(),
        })
    }
}

impl WeightSource for GgufFile {
    fn rows(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<usize>,
        options: &LoadOptions,
    ) -> Result<Tensor> {
        let tensor = self.read(&self.stored_name(name)?, shape, rows, options)?;
        self.reorder(name, tensor)
    }

    fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        self.find(&self.stored_name(name)?, shape).map(|_| ())
    }

    fn keep_mapped(&mut self) {
        self.file.keep_mapped();
    }

    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.file.hash_into(&mut hasher);
        hasher.finalize().to_hex().to_string()
    }
}

/// `general.alignment` of a file of version 2 or 3. candle divides by it, whatever it is.
fn alignment(file: &[u8]) -> Option<u64> {
    const VALUE_BYTES: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    let mut rest = file;
    let mut take = |count: usize| {
        let (taken, behind) = rest.split_at_checked(count)?;
        rest = behind;
        Some(taken)
    };
    let number = |bytes: &[u8]| {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(wide)
    };
    // Magic, version, number of tensors.
    let head = take(16)?;
    if number(&head[4..8]) < 2 {
        return None;
    }
    for _ in 0..number(take(8)?) {
        let length = number(take(8)?) as usize;
        let key = take(length)?;
        let mut kind = number(take(4)?) as u32;
        let mut count = 1;
        if kind == ARRAY {
            kind = number(take(4)?) as u32;
            count = number(take(8)?) as usize;
        }
        if kind == STRING {
            for _ in 0..count {
                let length = number(take(8)?) as usize;
                take(length)?;
            }
            continue;
        }
        // Lists of lists stand in no known file.
        let size = *VALUE_BYTES.get(kind as usize).filter(|size| **size > 0)?;
        let value = take(count.checked_mul(size)?)?;
        if key == b"general.alignment" && count == 1 {
            return Some(number(value));
        }
    }
    None
}

pub(crate) fn damaged(path: &Path, message: impl Into<String>) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        format: "GGUF",
        message: message.into(),
    }
}

/// candle's errors carry a backtrace after their first line.
fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}
