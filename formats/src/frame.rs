//! Blobs: the 24-byte header, and the sections that payloads are made of.

use twox_hash::XxHash3_64;
use zstd::bulk::{Compressor, Decompressor};

use crate::error::Error;

pub(crate) const HEADER: usize = 24;

/// Longest payload of one blob before compression, unless one position alone is longer.
pub(crate) const BLOB_LIMIT: usize = (4 << 20) - (64 << 10);

const RAW: u32 = 1 << 31;

/// What a bulk column is stored with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codec {
    pub(crate) id: u8,
    pub(crate) version: u8,
    pub(crate) name: &'static str,
}

pub(crate) const TOP_K_F16_STEPS: Codec = Codec {
    id: 1,
    version: 1,
    name: "topk-f16-steps",
};
pub(crate) const INT8_CHANNEL: Codec = Codec {
    id: 2,
    version: 1,
    name: "int8-channel",
};
pub(crate) const F16_PLANES: Codec = Codec {
    id: 3,
    version: 1,
    name: "f16-planes",
};
pub(crate) const TRANSFORM_RANS: Codec = Codec {
    id: 4,
    version: 1,
    name: "transform-rans",
};
pub(crate) const TOP_K_RANKED: Codec = Codec {
    id: 5,
    version: 1,
    name: "topk-ranked",
};
pub(crate) const CODECS: [Codec; 5] = [
    TOP_K_F16_STEPS,
    INT8_CHANNEL,
    F16_PLANES,
    TRANSFORM_RANS,
    TOP_K_RANKED,
];

/// What is wrong with a blob; the caller adds file, column and row.
#[derive(Debug)]
pub(crate) enum Fault {
    Damaged(String),
    UnknownCodec { id: u8, version: u8 },
}

impl Fault {
    pub(crate) fn at(self, file: &str, column: &str, row: u64) -> Error {
        match self {
            Fault::Damaged(message) => Error::Damaged {
                file: file.to_owned(),
                column: Some(column.to_owned()),
                row: Some(row),
                message,
            },
            Fault::UnknownCodec { id, version } => {
                let name = CODECS
                    .iter()
                    .find(|codec| codec.id == id)
                    .map(|codec| codec.name.to_owned());
                Error::UnknownCodec {
                    file: file.to_owned(),
                    column: column.to_owned(),
                    codec: name.unwrap_or_else(|| format!("number {id}")),
                    version: u32::from(version),
                }
            }
        }
    }
}

pub(crate) fn damaged<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Damaged(message.into()))
}

/// The fields that tie a blob to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) codec: Codec,
    pub(crate) layer: u16,
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) width: u32,
}

/// Positions per blob for values of `bytes` bytes per position.
pub(crate) fn positions_per_blob(bytes: usize) -> usize {
    (BLOB_LIMIT / bytes.max(1)).max(1)
}

/// What the sections of a blob are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Favour {
    /// zstd wherever it saves a twentieth.
    Size,
    /// zstd only where it halves a section: the others are read faster than it unpacks.
    Speed,
}

/// Writes a blob: the header first, the payload by [`Encoder`]'s methods, the checksum by [`Encoder::finish`].
pub(crate) struct Encoder {
    compressor: Compressor<'static>,
    blob: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new() -> std::io::Result<Encoder> {
        Ok(Encoder {
            compressor: Compressor::new(1)?,
            blob: Vec::new(),
        })
    }

    pub(crate) fn begin(&mut self, header: Header) {
        self.blob.clear();
        self.blob.extend_from_slice(&[0; 8]);
        self.blob.push(header.codec.id);
        self.blob.push(header.codec.version);
        self.blob.extend_from_slice(&header.layer.to_le_bytes());
        self.blob.extend_from_slice(&header.first.to_le_bytes());
        self.blob.extend_from_slice(&header.count.to_le_bytes());
        self.blob.extend_from_slice(&header.width.to_le_bytes());
    }

    /// One section; stays uncompressed unless zstd saves a twentieth.
    pub(crate) fn section(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.section_saving(data, data.len() / 20)
    }

    fn section_saving(&mut self, data: &[u8], least: usize) -> std::io::Result<()> {
        let compressed = self.compressor.compress(data)?;
        let (word, bytes) = if compressed.len() + least < data.len() {
            (compressed.len() as u32, compressed.as_slice())
        } else {
            (data.len() as u32 | RAW, data)
        };
        self.blob.extend_from_slice(&word.to_le_bytes());
        self.blob.extend_from_slice(bytes);
        Ok(())
    }

    /// Two sections: low bytes, high bytes.
    pub(crate) fn planes(&mut self, values: &[u16], favour: Favour) -> std::io::Result<()> {
        let least = match favour {
            Favour::Size => values.len() / 20,
            Favour::Speed => values.len() / 2,
        };
        for plane in <[Vec<u8>; 2]>::from(planes_of(values)) {
            self.section_saving(&plane, least)?;
        }
        Ok(())
    }

    pub(crate) fn plain(&mut self, bytes: &[u8]) {
        self.blob.extend_from_slice(bytes);
    }

    pub(crate) fn finish(&mut self) -> &[u8] {
        let checksum = XxHash3_64::oneshot(&self.blob[8..]);
        self.blob[..8].copy_from_slice(&checksum.to_le_bytes());
        &self.blob
    }
}

fn planes_of(values: &[u16]) -> (Vec<u8>, Vec<u8>) {
    let low = values.iter().map(|value| *value as u8);
    let high = values.iter().map(|value| (value >> 8) as u8);
    (low.collect(), high.collect())
}

/// What has been compared before a blob is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// The page around it, a moment ago: hashing it once more would cost a sixth of the decoding.
    Page,
    /// Nothing, or all is to be compared once more.
    Nothing,
}

/// Reads blobs; keeps its context and buffers from one blob to the next.
pub(crate) struct Decoder {
    pub(crate) compared: Compared,
    decompressor: Decompressor<'static>,
    first: Vec<u8>,
    second: Vec<u8>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

/// What is left of a payload.
pub(crate) struct Payload<'a>(&'a [u8]);

impl<'a> Payload<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        match self.0.split_at_checked(count) {
            Some((head, tail)) => {
                self.0 = tail;
                Ok(head)
            }
            None => damaged(format!(
                "the blob ends {} bytes early",
                count - self.0.len()
            )),
        }
    }

    pub(crate) fn word(&mut self) -> Result<u32, Fault> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(crate) fn end(self) -> Result<(), Fault> {
        if self.0.is_empty() {
            Ok(())
        } else {
            damaged(format!("{} bytes too many in the blob", self.0.len()))
        }
    }
}

impl Decoder {
    pub(crate) fn new() -> std::io::Result<Decoder> {
        Ok(Decoder {
            compared: Compared::Nothing,
            decompressor: Decompressor::new()?,
            first: Vec::new(),
            second: Vec::new(),
        })
    }

    /// The context that unpacks zstd frames: making one costs more than most frames.
    pub(crate) fn decompressor(&mut self) -> &mut Decompressor<'static> {
        &mut self.decompressor
    }

    /// Checks checksum and header against what the row says; `left` positions are not yet covered. Returns the number
    /// of positions in this blob and its payload.
    pub(crate) fn open<'p>(
        &self,
        blob: &'p [u8],
        expected: Header,
        left: usize,
        bytes_per_position: usize,
    ) -> Result<(usize, Payload<'p>), Fault> {
        if blob.len() < HEADER {
            return damaged(format!(
                "a blob of {} bytes is shorter than its header",
                blob.len()
            ));
        }
        let word =
            |at: usize| u32::from_le_bytes([blob[at], blob[at + 1], blob[at + 2], blob[at + 3]]);
        let stored = u64::from(word(0)) | u64::from(word(4)) << 32;
        if self.compared == Compared::Nothing && XxHash3_64::oneshot(&blob[8..]) != stored {
            return damaged("the blob's checksum does not match");
        }
        if (blob[8], blob[9]) != (expected.codec.id, expected.codec.version) {
            let known = CODECS
                .iter()
                .find(|codec| (codec.id, codec.version) == (blob[8], blob[9]));
            return match known {
                Some(codec) => damaged(format!(
                    "a blob of codec {} in a column of codec {}",
                    codec.name, expected.codec.name
                )),
                None => Err(Fault::UnknownCodec {
                    id: blob[8],
                    version: blob[9],
                }),
            };
        }
        let layer = u16::from_le_bytes([blob[10], blob[11]]);
        if (layer, word(12), word(20)) != (expected.layer, expected.first, expected.width) {
            return damaged(format!(
                "the blob says layer {layer}, first position {}, width {}, the row says {}, {}, {}",
                word(12),
                word(20),
                expected.layer,
                expected.first,
                expected.width
            ));
        }
        let count = word(16) as usize;
        if count == 0 || count > left {
            return damaged(format!(
                "the blob covers {count} positions, {left} are left"
            ));
        }
        // Bounds every allocation below.
        if count > 1 && count > positions_per_blob(bytes_per_position) {
            return damaged(format!(
                "the blob covers {count} positions, more than any caskd writes"
            ));
        }
        Ok((count, Payload(&blob[HEADER..])))
    }

    /// One section of `length` bytes.
    pub(crate) fn section<'a, 'p: 'a>(
        &'a mut self,
        payload: &mut Payload<'p>,
        length: usize,
    ) -> Result<&'a [u8], Fault> {
        section(&mut self.decompressor, &mut self.first, payload, length)
    }

    /// The low bytes and the high bytes of `count` values.
    pub(crate) fn planes<'a, 'p: 'a>(
        &'a mut self,
        payload: &mut Payload<'p>,
        count: usize,
    ) -> Result<(&'a [u8], &'a [u8]), Fault> {
        let low = section(&mut self.decompressor, &mut self.first, payload, count)?;
        let high = section(&mut self.decompressor, &mut self.second, payload, count)?;
        Ok((low, high))
    }
}

fn section<'a, 'p: 'a>(
    decompressor: &mut Decompressor<'static>,
    buffer: &'a mut Vec<u8>,
    payload: &mut Payload<'p>,
    length: usize,
) -> Result<&'a [u8], Fault> {
    let word = payload.word()?;
    let stored = payload.take((word & !RAW) as usize)?;
    if word & RAW != 0 {
        if stored.len() != length {
            return damaged(format!(
                "a section has {} bytes instead of {length}",
                stored.len()
            ));
        }
        return Ok(stored);
    }
    if !crate::shard::can_unpack_to(stored.len(), length) {
        return damaged("a section claims to be larger than it can be");
    }
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    match decompressor.decompress_to_buffer(stored, &mut buffer[..length]) {
        Ok(found) if found == length => Ok(&buffer[..length]),
        Ok(found) => damaged(format!(
            "a section unpacks to {found} bytes instead of {length}"
        )),
        Err(error) => damaged(format!("a section cannot be unpacked: {error}")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sequence::{HiddenState, TopK};
    use crate::spec::{HiddenCodec, LayerSpec};
    use crate::{hidden, topk};

    pub(crate) const POSITIONS: usize = 6;
    pub(crate) const WIDTH: usize = 5;

    fn layer(codec: HiddenCodec) -> LayerSpec {
        LayerSpec {
            layer: 3,
            width: WIDTH,
            codec,
        }
    }

    /// A sound blob of each codec.
    pub(crate) fn sound(kind: usize) -> Vec<u8> {
        let mut encoder = Encoder::new().unwrap();
        let mut blobs = match kind {
            0 => {
                let row = [9.0, 8.5, 8.5, 1.0, f32::NEG_INFINITY];
                let logits = row.repeat(POSITIONS);
                let ids = (0..logits.len() as u32).map(|id| id * 2600).collect();
                topk::encode(
                    &mut encoder,
                    &TopK {
                        k: WIDTH,
                        ids,
                        logits,
                    },
                    80_000,
                    Favour::Size,
                )
                .unwrap()
            }
            kind => {
                let values = (0..POSITIONS * WIDTH)
                    .map(|value| value as f32 - 7.0)
                    .collect();
                let state = HiddenState {
                    layer: 3,
                    width: WIDTH,
                    values,
                };
                let spec = layer(if kind == 1 {
                    HiddenCodec::Int8
                } else {
                    HiddenCodec::F16
                });
                hidden::encode(&mut encoder, &state, &spec, &[0.1; WIDTH]).unwrap()
            }
        };
        assert_eq!(blobs.len(), 1);
        blobs.remove(0)
    }

    /// Decodes with the checksum repaired, as if by an attacker.
    pub(crate) fn decode(kind: usize, mut blob: Vec<u8>) -> Result<usize, Fault> {
        if blob.len() >= 8 {
            let checksum = XxHash3_64::oneshot(&blob[8..]);
            blob[..8].copy_from_slice(&checksum.to_le_bytes());
        }
        let mut decoder = Decoder::new().unwrap();
        let blobs = std::iter::once(blob.as_slice());
        if kind == 0 {
            let mut top_k = TopK::default();
            topk::decode(
                &mut decoder,
                blobs,
                &[9.0; POSITIONS],
                WIDTH,
                80_000,
                &mut top_k,
            )?;
            Ok(top_k.logits.len() + top_k.ids.len())
        } else {
            let spec = layer(if kind == 1 {
                HiddenCodec::Int8
            } else {
                HiddenCodec::F16
            });
            let mut state = HiddenState::default();
            hidden::decode(
                &mut decoder,
                blobs,
                &spec,
                &[0.1; WIDTH],
                POSITIONS,
                &mut state,
            )?;
            Ok(state.values.len())
        }
    }

    #[test]
    fn codecs_of_tomorrow_are_refused_by_name() {
        let mut blob = sound(0);
        (blob[8], blob[9]) = (1, 2);
        let error = decode(0, blob.clone()).unwrap_err().at("shard", "top_k", 4);
        let text = "`shard`, column top_k: codec topk-f16-steps version 2 is unknown to this caskd";
        assert_eq!(error.to_string(), text);
        (blob[8], blob[9]) = (77, 1);
        let error = decode(0, blob.clone()).unwrap_err().at("shard", "top_k", 4);
        assert_eq!(
            error.to_string(),
            "`shard`, column top_k: codec number 77 version 1 is unknown to this caskd"
        );
        (blob[8], blob[9]) = (3, 1);
        assert!(matches!(decode(0, blob), Err(Fault::Damaged(_))));
    }

    #[test]
    fn exceptions_and_steps_outside_their_range_are_damage() {
        let mut blob = sound(1);
        let index = blob.len() - 8;
        blob[index..index + 4].copy_from_slice(&((POSITIONS * WIDTH) as u32).to_le_bytes());
        assert!(matches!(decode(1, blob), Err(Fault::Damaged(_))));
        let mut encoder = Encoder::new().unwrap();
        let codec = TOP_K_F16_STEPS;
        encoder.begin(Header {
            codec,
            layer: 0,
            first: 0,
            count: 6,
            width: 5,
        });
        encoder.planes(&[0x7000; 24], Favour::Size).unwrap();
        encoder.planes(&[1; 30], Favour::Size).unwrap();
        encoder.section(&[0; 4]).unwrap();
        let blob = encoder.finish().to_vec();
        assert!(matches!(decode(0, blob), Err(Fault::Damaged(_))));
    }

    #[test]
    fn a_top_k_that_favours_speed_holds_the_same_in_more_bytes() {
        let mut noise = crate::fuzz::Noise(3);
        let (k, positions) = (16, 200);
        let row: Vec<f32> = (0..k).map(|rank| 9.0 - 0.25 * rank as f32).collect();
        let top_k = TopK {
            k,
            // zstd saves a third of these, which is worth it where bytes count.
            ids: (0..k * positions).map(|_| noise.below(40) as u32).collect(),
            logits: row.repeat(positions),
        };
        let mut encoder = Encoder::new().unwrap();
        let [small, fast] = [Favour::Size, Favour::Speed].map(|favour| {
            let blobs = topk::encode(&mut encoder, &top_k, 50_000, favour).unwrap();
            let mut decoded = TopK::default();
            let decoder = &mut Decoder::new().unwrap();
            let slices = blobs.iter().map(Vec::as_slice);
            topk::decode(decoder, slices, &[9.0; 200], k, 50_000, &mut decoded).unwrap();
            assert_eq!(decoded, top_k);
            blobs.concat().len()
        });
        assert!(fast > small + k * positions / 4, "{fast} and {small} bytes");
    }
}
