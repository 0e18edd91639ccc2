//! f16 patterns to f32: the inner loop of decoding.
//!
//! Where the processor converts (F16C, AVX2) it does, eight values at a time and straight from the byte planes;
//! elsewhere the library does.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::unchecked;

/// Values of the two byte planes of f16 patterns, appended to `out`.
pub(crate) fn widen_planes(low: &[u8], high: &[u8], out: &mut Vec<f32>) {
    if !unchecked::widen_planes(low, high, out) {
        widen_planes_plainly(low, high, out);
    }
}

fn widen_planes_plainly(low: &[u8], high: &[u8], out: &mut Vec<f32>) {
    let pairs = low.iter().zip(high);
    let patterns: Vec<u16> = pairs
        .map(|(low, high)| u16::from(*low) | u16::from(*high) << 8)
        .collect();
    out.extend(patterns.reinterpret_cast::<half::f16>().to_f32_vec());
}

/// The logits `max` − value of one position, appended to `out`.
pub(crate) fn subtract_from(max: f32, patterns: &[u16], out: &mut [f32]) {
    patterns
        .reinterpret_cast::<half::f16>()
        .convert_to_f32_slice(out);
    for logit in out {
        *logit = max - *logit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_is_widened_as_the_library_does() {
        for length in [0, 1, 7, 8, 15, 16, 17, 1023, 1024, 1025, 65_536] {
            let patterns: Vec<u16> = (0..length).map(|index| (index * 7919) as u16).collect();
            let low: Vec<u8> = patterns.iter().map(|pattern| *pattern as u8).collect();
            let high: Vec<u8> = patterns
                .iter()
                .map(|pattern| (pattern >> 8) as u8)
                .collect();
            let mut values = vec![5.0];
            widen_planes(&low, &high, &mut values);
            let mut plain = Vec::new();
            widen_planes_plainly(&low, &high, &mut plain);
            for ((pattern, value), plain) in patterns.iter().zip(&values[1..]).zip(&plain) {
                let expected = half::f16::from_bits(*pattern).to_f32();
                let is_same = expected.is_nan() && value.is_nan() && plain.is_nan()
                    || expected.to_bits() == value.to_bits() && value.to_bits() == plain.to_bits();
                assert!(is_same, "{pattern:04x}");
            }
            assert_eq!(values.len(), patterns.len() + 1);
        }
    }
}
