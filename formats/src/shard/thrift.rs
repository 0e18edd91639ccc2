//! As much of Thrift's compact protocol as page headers and offset indexes need.
//!
//! Everything is bounded by the slice: no length is believed, nothing is allocated, nesting ends at a fixed depth.
//! `None` is malformed input.

/// Deeper than anything in a page header.
const MAX_DEPTH: u32 = 8;

const BOOLEAN_TRUE: u8 = 1;
const BOOLEAN_FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
pub(super) const I32: u8 = 5;
pub(super) const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
pub(super) const LIST: u8 = 9;
const SET: u8 = 10;
pub(super) const STRUCT: u8 = 12;

/// What is left of a slice.
pub(super) struct Thrift<'a>(pub(super) &'a [u8]);

impl Thrift<'_> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A signed integer of any width.
    pub(super) fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// An integer that counts something.
    pub(super) fn count(&mut self) -> Option<usize> {
        usize::try_from(self.integer()?).ok()
    }

    /// Number and type of a structure's next field; `Some(None)` at its end. `last` is the number of the field before.
    #[expect(
        clippy::option_option,
        reason = "malformed input and the end are different things"
    )]
    pub(super) fn field(&mut self, last: &mut i64) -> Option<Option<(i64, u8)>> {
        let header = self.byte()?;
        if header == 0 {
            return Some(None);
        }
        let step = i64::from(header >> 4);
        *last = if step == 0 {
            self.integer()?
        } else {
            last.checked_add(step)?
        };
        Some(Some((*last, header & 0x0F)))
    }

    /// Element type and length of a list; no list is longer than the bytes that are left.
    pub(super) fn list(&mut self) -> Option<(u8, usize)> {
        let header = self.byte()?;
        let length = match header >> 4 {
            15 => usize::try_from(self.varint()?).ok()?,
            short => usize::from(short),
        };
        (length <= self.0.len()).then_some((header & 0x0F, length))
    }

    /// Passes over a field's value.
    pub(super) fn skip(&mut self, kind: u8) -> Option<()> {
        self.skip_to(kind, MAX_DEPTH)
    }

    fn skip_to(&mut self, kind: u8, depth: u32) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            BOOLEAN_TRUE | BOOLEAN_FALSE => Some(()),
            BYTE => self.byte().map(drop),
            I16 | I32 | I64 => self.varint().map(drop),
            DOUBLE => self.take(8),
            BINARY => {
                let length = usize::try_from(self.varint()?).ok()?;
                self.take(length)
            }
            LIST | SET => {
                let (element, length) = self.list()?;
                for _ in 0..length {
                    match element {
                        // In a list a boolean takes a byte.
                        BOOLEAN_TRUE | BOOLEAN_FALSE => self.byte().map(drop)?,
                        element => self.skip_to(element, depth)?,
                    }
                }
                Some(())
            }
            STRUCT => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip_to(kind, depth)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    fn take(&mut self, count: usize) -> Option<()> {
        self.0 = self.0.get(count..)?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(bytes: &[u8]) -> Option<usize> {
        let mut thrift = Thrift(bytes);
        thrift.skip(STRUCT)?;
        Some(bytes.len() - thrift.0.len())
    }

    #[test]
    fn structures_end_where_they_end() {
        let cases: [(&[u8], Option<usize>); 9] = [
            (&[0], Some(1)),
            (&[], None),
            (&[0x15, 0x08, 0], Some(3)),
            (&[0x15, 0x80], None),
            // A list of two structures, then a binary of three bytes.
            (&[0x19, 0x2C, 0, 0, 0x18, 3, 1, 2, 3, 0, 77], Some(10)),
            (&[0x18, 9, 1], None),
            // More elements than bytes.
            (&[0x19, 0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0x07], None),
            (&[0x1C; 40], None),
            (&[0x1F, 0], None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(skipped(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn integers_are_zigzag_and_at_most_ten_bytes() {
        assert_eq!(Thrift(&[0x01]).integer(), Some(-1));
        assert_eq!(Thrift(&[0xD0, 0x0F]).integer(), Some(1000));
        assert_eq!(Thrift(&[0xFF; 12]).integer(), None);
        assert_eq!(Thrift(&[0x01]).count(), None);
    }
}
