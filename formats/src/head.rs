//! The teacher's LM head as safetensors.

use crate::spec::HeadDtype;

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
#[derive(Debug)]
pub struct Head {
    /// Rows V.
    pub vocab_size: usize,
    /// Columns D.
    pub width: usize,
    /// Element type.
    pub dtype: HeadDtype,
    data: bytes::Bytes,
}

impl Head {
    /// \[V·D\] row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }
}
