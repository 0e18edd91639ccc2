//! Codecs `int8-channel` and `f16-planes`: hidden states.

use half::f16;

use crate::frame::{
    Codec, Decoder, Encoder, F16_PLANES, Fault, Favour, Header, INT8_CHANNEL, damaged,
    positions_per_blob,
};
use crate::sequence::HiddenState;
use crate::spec::{HiddenCodec, LayerSpec};
use crate::widen::widen_planes;

/// A channel whose magnitude exceeds this multiple of its 90% quantile has outliers. A normal distribution would reach
/// it once in 10²².
const OUTLIER: f32 = 6.0;

/// Outliers are stored apart only while they are at most one value in so many of their channel.
const RARE: usize = 64;

pub(crate) fn codec_of(codec: HiddenCodec) -> Codec {
    match codec {
        HiddenCodec::Int8 => INT8_CHANNEL,
        HiddenCodec::F16 => F16_PLANES,
    }
}

fn header(spec: &LayerSpec, first: usize, count: usize) -> Header {
    Header {
        codec: codec_of(spec.codec),
        layer: spec.layer as u16,
        first: first as u32,
        count: count as u32,
        width: spec.width as u32,
    }
}

/// Checks one sequence's hidden state; says what is wrong.
pub(crate) fn check(
    hidden: &HiddenState,
    spec: &LayerSpec,
    positions: usize,
) -> Result<(), String> {
    if hidden.width != spec.width || hidden.values.len() != positions * spec.width {
        return Err(format!(
            "width {} with {} values, expected width {} with {}",
            hidden.width,
            hidden.values.len(),
            spec.width,
            positions * spec.width
        ));
    }
    let fits = |value: &f32| match spec.codec {
        HiddenCodec::Int8 => value.is_finite(),
        HiddenCodec::F16 => f16::from_f32(*value).is_finite(),
    };
    match hidden.values.iter().position(|value| !fits(value)) {
        None => Ok(()),
        Some(at) => {
            let (value, position) = (hidden.values[at], at / spec.width);
            let why = if value.is_finite() {
                "does not fit in f16, store the layer as int8"
            } else {
                "is not finite"
            };
            Err(format!(
                "{value} at position {position}, channel {}, {why}",
                at % spec.width
            ))
        }
    }
}

/// One scale per channel over all the shard's sequences of a layer.
pub(crate) fn channel_scales(states: &[&HiddenState], width: usize) -> Vec<f32> {
    // Channels are gathered a few at a time, so that a cache line is read once and not once a channel.
    const TOGETHER: usize = 16;
    let count: usize = states.iter().map(|state| state.values.len() / width).sum();
    let mut gathered = vec![0.0; TOGETHER * count];
    let mut scales = Vec::with_capacity(width);
    for first in (0..width).step_by(TOGETHER) {
        let channels = TOGETHER.min(width - first);
        let rows = states
            .iter()
            .flat_map(|state| state.values.chunks_exact(width));
        for (index, row) in rows.enumerate() {
            for (channel, value) in row[first..first + channels].iter().enumerate() {
                gathered[channel * count + index] = value.abs();
            }
        }
        scales.extend(
            gathered
                .chunks_exact_mut(count.max(1))
                .take(channels)
                .map(scale),
        );
    }
    scales
}

fn scale(magnitudes: &mut [f32]) -> f32 {
    let absmax = magnitudes.iter().copied().fold(0.0, f32::max);
    let count = magnitudes.len();
    let ninth = (count - 1) * 9 / 10;
    let (_, quantile, above) = magnitudes.select_nth_unstable_by(ninth, f32::total_cmp);
    let limit = OUTLIER * *quantile;
    let outliers = above.iter().filter(|magnitude| **magnitude > limit).count();
    if limit > 0.0 && limit < absmax && outliers * RARE <= count {
        limit / 127.0
    } else {
        absmax / 127.0
    }
}

/// The blobs of one checked hidden state; `scales` only for int8.
pub(crate) fn encode(
    encoder: &mut Encoder,
    hidden: &HiddenState,
    spec: &LayerSpec,
    scales: &[f32],
) -> std::io::Result<Vec<Vec<u8>>> {
    let positions = hidden.values.len() / spec.width;
    let step = positions_per_blob(spec.width * spec.codec.bytes());
    let mut blobs = Vec::with_capacity(positions.div_ceil(step));
    for first in (0..positions).step_by(step) {
        let count = step.min(positions - first);
        let values = &hidden.values[first * spec.width..(first + count) * spec.width];
        encoder.begin(header(spec, first, count));
        match spec.codec {
            HiddenCodec::Int8 => {
                let (quantised, exceptions) = quantise(values, scales);
                encoder.section(&quantised)?;
                encoder.plain(&((exceptions.len() / 8) as u32).to_le_bytes());
                encoder.plain(&exceptions);
            }
            HiddenCodec::F16 => {
                let patterns: Vec<u16> = values
                    .iter()
                    .map(|value| f16::from_f32(*value).to_bits())
                    .collect();
                encoder.planes(&patterns, Favour::Speed)?;
            }
        }
        blobs.push(encoder.finish().to_vec());
    }
    Ok(blobs)
}

/// Signed bytes, and the pairs (index, value) that do not fit.
fn quantise(values: &[f32], scales: &[f32]) -> (Vec<u8>, Vec<u8>) {
    let mut quantised = Vec::with_capacity(values.len());
    let mut exceptions = Vec::new();
    for (row_index, row) in values.chunks_exact(scales.len()).enumerate() {
        for (channel, (value, scale)) in row.iter().zip(scales).enumerate() {
            let level = if *scale > 0.0 {
                (value / scale).round()
            } else {
                0.0
            };
            if level.abs() <= 127.0 {
                quantised.push(level as i8 as u8);
            } else {
                quantised.push(0);
                exceptions.extend_from_slice(
                    &((row_index * scales.len() + channel) as u32).to_le_bytes(),
                );
                exceptions.extend_from_slice(&value.to_le_bytes());
            }
        }
    }
    (quantised, exceptions)
}

/// Decodes the blobs of one row of `positions` positions into `out`, whose memory is used again.
pub(crate) fn decode<'a>(
    decoder: &mut Decoder,
    blobs: impl Iterator<Item = &'a [u8]>,
    spec: &LayerSpec,
    scales: &[f32],
    positions: usize,
    out: &mut HiddenState,
) -> Result<(), Fault> {
    out.layer = spec.layer;
    out.width = spec.width;
    let values = &mut out.values;
    values.clear();
    let mut first = 0;
    for blob in blobs {
        let (count, mut payload) = decoder.open(
            blob,
            header(spec, first, 0),
            positions - first,
            spec.width * spec.codec.bytes(),
        )?;
        let start = values.len();
        match spec.codec {
            HiddenCodec::Int8 => {
                let quantised = decoder.section(&mut payload, count * spec.width)?;
                values.reserve(quantised.len());
                for row in quantised.chunks_exact(spec.width) {
                    values.extend(
                        row.iter()
                            .zip(scales)
                            .map(|(level, scale)| f32::from(*level as i8) * scale),
                    );
                }
                let exceptions = payload.word()? as usize;
                let pairs = payload.take(exceptions.saturating_mul(8))?;
                for pair in pairs.chunks_exact(8) {
                    let index = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]) as usize;
                    let value = f32::from_le_bytes([pair[4], pair[5], pair[6], pair[7]]);
                    match values[start..].get_mut(index) {
                        Some(place) if value.is_finite() => *place = value,
                        _ => return damaged("an exception lies outside the blob or is not finite"),
                    }
                }
            }
            HiddenCodec::F16 => {
                let (low, high) = decoder.planes(&mut payload, count * spec.width)?;
                widen_planes(low, high, values);
            }
        }
        payload.end()?;
        first += count;
    }
    if first != positions {
        return damaged(format!("the blobs cover {first} of {positions} positions"));
    }
    Ok(())
}
