//! The exponential behind every softmax over a row of logits: the same bits on every processor.

/// exp(x) for x ≤ 0 with a relative error below 2e-7; 0 below −87, where f32 would be denormal.
///
/// Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes' `expf`); written
/// without fused products, whose presence depends on the processor.
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "it must take on its caller's instruction set"
)]
pub fn exp_nonpositive(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves the rounded integer in the low bits
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { value * scale }
}
