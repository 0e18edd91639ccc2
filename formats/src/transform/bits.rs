//! Bits that no model predicts: bit i of a stream lies in byte ⌊i/8⌋ at bit i mod 8, a value's lowest bit first.

use crate::frame::{Fault, damaged};

/// Appends values bit by bit.
#[derive(Default)]
pub(crate) struct BitWriter {
    bytes: Vec<u8>,
    pending: u64,
    held: u32,
}

impl BitWriter {
    /// The low `count` bits of `value`, at most 32.
    pub(crate) fn push(&mut self, value: u32, count: u32) {
        let mask = (1_u64 << count) - 1;
        self.pending |= (u64::from(value) & mask) << self.held;
        self.held += count;
        while self.held >= 8 {
            self.bytes.push(self.pending as u8);
            self.pending >>= 8;
            self.held -= 8;
        }
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        if self.held > 0 {
            self.bytes.push(self.pending as u8);
        }
        self.bytes
    }
}

/// Takes values in the order in which they were pushed.
pub(crate) struct BitReader<'a> {
    bytes: std::slice::Iter<'a, u8>,
    pending: u64,
    held: u32,
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> BitReader<'a> {
        BitReader {
            bytes: bytes.iter(),
            pending: 0,
            held: 0,
        }
    }

    /// The next `count` bits, at most 32.
    pub(crate) fn take(&mut self, count: u32) -> Result<u32, Fault> {
        while self.held < count {
            let Some(byte) = self.bytes.next() else {
                return damaged("the plain bits end early");
            };
            self.pending |= u64::from(*byte) << self.held;
            self.held += 8;
        }
        let value = self.pending & ((1_u64 << count) - 1);
        self.pending >>= count;
        self.held -= count;
        Ok(value as u32)
    }

    /// Nothing but the padding of the last byte, which is 0, may be left.
    pub(crate) fn end(self) -> Result<(), Fault> {
        if self.held < 8 && self.pending == 0 && self.bytes.as_slice().is_empty() {
            Ok(())
        } else {
            damaged("there are too many plain bits")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back() {
        let values: Vec<(u32, u32)> = (0..200)
            .map(|i| ((i * 2_654_435_761_u32) >> (i % 31), 32 - i % 32))
            .collect();
        let mut writer = BitWriter::default();
        for (value, count) in &values {
            writer.push(*value, *count);
        }
        let bytes = writer.finish();
        let mut reader = BitReader::new(&bytes);
        for (value, count) in &values {
            let mask = ((1_u64 << count) - 1) as u32;
            assert_eq!(reader.take(*count).unwrap(), value & mask);
        }
        reader.end().unwrap();
        assert!(BitReader::new(&bytes[..3]).take(32).is_err());
        assert!(BitReader::new(&bytes).end().is_err());
    }
}
