//! S5 and S6: surfaces of our own on which nothing was tuned.
//!
//! S5 "ridge": a curved valley along which soft weight and scaling value make up for each other, at a slope that
//! depends on the kind of distillation. S6 "mirage": a wide basin around plain KL that is not the best one, a narrow
//! better one around dual scaling, a corner in which training diverges, and noise that grows with the hard weight.

use super::response::{Fidelity, Levels, Terms, sigmoid};

pub fn clean(surface: usize, c: Levels, fidelity: Fidelity) -> f64 {
    let shift = if fidelity == Fidelity::Full { 0.0 } else { 1.0 };
    let t = Terms::new(c, 0.0);
    let dual = c.kd_type as f64;
    let aligned = c.layers > 0;
    if surface == 5 {
        let along = (t.v + 3.0) / 4.0 + (1.0 - 0.6 * dual) * (t.s - 10.0) / 6.0;
        let across = (along - 0.25 * c.logits_norm as f64).abs();
        let valley = 6.0 * across.powf(1.5) / (1.0 + 0.3 * across);
        let drift = 0.08 * (t.s - 7.0).abs();
        let hidden = if aligned {
            [0.8, 0.0, 0.5][c.hidden_norm]
        } else {
            0.0
        };
        12.0 + valley
            + drift
            + 0.5 * (t.u - 0.5).powi(2)
            + [1.5, 0.4, 0.0][c.layers]
            + hidden
            + 0.8 * (1.0 - dual)
            + shift
    } else {
        let bump = |depth: f64, at: (f64, f64), width: (f64, f64)| {
            let z = ((t.s - at.0) / width.0).powi(2) + ((t.v - at.1) / width.1).powi(2);
            depth * (-0.5 * z).exp()
        };
        let wide = bump(5.0, (5.0, -4.0), (5.0, 3.0)) * (1.0 - 0.4 * dual);
        let fit = dual
            * [0.35, 0.55, 1.0][c.layers]
            * if aligned {
                [0.5, 1.0, 0.8][c.hidden_norm]
            } else {
                0.6
            };
        let narrow = bump(8.0, (16.0, -0.5), (2.5, 1.8)) * fit;
        let norm = [0.0, 0.5, 0.9][c.logits_norm] * (1.0 - 1.3 * dual);
        let corner = if t.v > 0.9 && t.u > 0.9 && c.logits_norm == 0 {
            400.0
        } else {
            0.0
        };
        30.0 - wide - narrow + norm + 1.2 * sigmoid(3.0 * (t.u - 0.8)) + corner + shift
    }
}

pub fn sigma(surface: usize, c: Levels) -> f64 {
    if surface == 5 {
        0.25
    } else {
        [0.2, 0.3, 0.45, 0.5][c.hard]
    }
}
