//! The teacher's LM head as a safetensors file.

use std::ops::Range;

use bytes::Bytes;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::manifest::HeadInfo;
use crate::spec::HeadDtype;

const TENSOR: &str = "lm_head.weight";

/// The data begins at a multiple of this, so a memory map can be handed to vector instructions.
const ALIGNMENT: usize = 64;

/// The LM head to store.
#[derive(Clone, Copy, Debug)]
pub struct HeadWeights<'a> {
    /// Rows V.
    pub vocab_size: usize,
    /// Columns D.
    pub width: usize,
    /// Element type.
    pub dtype: HeadDtype,
    /// \[V·D\] row-major, little-endian.
    pub bytes: &'a [u8],
}

/// The stored LM head, memory-mapped where the cache is.
#[derive(Clone, Debug)]
pub struct Head {
    /// Rows V.
    pub vocab_size: usize,
    /// Columns D.
    pub width: usize,
    /// Element type.
    pub dtype: HeadDtype,
    data: Bytes,
}

impl Head {
    /// \[V·D\] row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// Some rows as f32, \[rows·D\] row-major; rows beyond V are left out.
    pub fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        let row_bytes = self.width * self.dtype.bytes();
        let (start, end) = (
            rows.start.min(self.vocab_size),
            rows.end.min(self.vocab_size),
        );
        let bytes = &self.data[start.min(end) * row_bytes..end * row_bytes];
        let patterns = || -> Vec<u16> {
            bytes
                .chunks_exact(2)
                .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
                .collect()
        };
        match self.dtype {
            HeadDtype::F32 => bytes
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
            HeadDtype::F16 => patterns().reinterpret_cast::<half::f16>().to_f32_vec(),
            HeadDtype::Bf16 => patterns().reinterpret_cast::<half::bf16>().to_f32_vec(),
        }
    }
}

/// The one name that a head of this digest may have.
pub(crate) fn file_name(digest: &str) -> String {
    format!("head-{}.safetensors", digest.get(..16).unwrap_or(digest))
}

fn dtype_name(dtype: HeadDtype) -> &'static str {
    match dtype {
        HeadDtype::F32 => "F32",
        HeadDtype::F16 => "F16",
        HeadDtype::Bf16 => "BF16",
    }
}

/// The bytes before the data: length of the JSON, JSON, padding.
pub(crate) fn preamble(head: &HeadWeights<'_>) -> Vec<u8> {
    let mut json = format!(
        "{{\"{TENSOR}\":{{\"dtype\":\"{}\",\"shape\":[{},{}],\"data_offsets\":[0,{}]}}}}",
        dtype_name(head.dtype),
        head.vocab_size,
        head.width,
        head.bytes.len()
    );
    let padded = (8 + json.len()).next_multiple_of(ALIGNMENT) - 8;
    json.extend(std::iter::repeat_n(' ', padded - json.len()));
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

/// Parses a whole head file whose digest has been checked.
pub(crate) fn parse(info: &HeadInfo, file: &Bytes) -> Result<Head> {
    let damaged = |message: String| Error::damaged(&info.file, message);
    let tensors = SafeTensors::deserialize(file).map_err(|error| damaged(error.to_string()))?;
    let tensor = tensors
        .tensor(TENSOR)
        .map_err(|error| damaged(error.to_string()))?;
    let dtype = match tensor.dtype() {
        Dtype::F32 => HeadDtype::F32,
        Dtype::F16 => HeadDtype::F16,
        Dtype::BF16 => HeadDtype::Bf16,
        other => {
            return Err(damaged(format!(
                "its type {other:?} is none of F32, F16, BF16"
            )));
        }
    };
    if dtype != info.dtype || tensor.shape() != [info.vocab_size, info.width] {
        return Err(damaged(format!(
            "{dtype:?} {:?} contradicts the manifest",
            tensor.shape()
        )));
    }
    Ok(Head {
        vocab_size: info.vocab_size,
        width: info.width,
        dtype,
        data: file.slice_ref(tensor.data()),
    })
}
