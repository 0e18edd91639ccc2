//! Synthetic response surfaces over Table 2's space, on which samplers are compared. Small values are good.
//!
//! S1 to S4 imitate what is known of distillation: perplexity, a mix of tasks, a cliff behind which training
//! diverges, and a rugged surface. S5 and S6 were written after the samplers were finished, to be tuned on by nobody.

use caskd_search::{Params, Value};

/// A configuration by its levels, in the order of Table 2.
#[derive(Debug, Clone, Copy)]
pub struct Levels {
    pub hard: usize,
    pub soft: usize,
    /// Scaling value less one.
    pub scaling: usize,
    pub logits_norm: usize,
    pub hidden_norm: usize,
    pub layers: usize,
    pub kd_type: usize,
}

/// Names of the surfaces, from number 1.
pub const SURFACES: [&str; 6] = [
    "S1 ppl",
    "S2 task mix",
    "S3 cliff",
    "S4 rugged",
    "S5 ridge",
    "S6 mirage",
];

pub const HARD: [f64; 4] = [0.1, 1.0, 10.0, 20.0];
pub const SOFT: [f64; 6] = [1e-8, 1e-7, 1e-3, 1.0, 10.0, 20.0];
const NORMS: [&str; 3] = ["none", "max-min", "standardize"];
const LAYERS: [&str; 3] = ["none", "last", "last-middle"];
const KINDS: [&str; 2] = ["kl", "dual-scaling"];

impl Levels {
    pub fn of(params: &Params) -> Self {
        let number = |name: &str, levels: &[f64]| {
            let value = params.get(name).and_then(Value::as_f64);
            levels
                .iter()
                .position(|level| Some(*level) == value)
                .expect(name)
        };
        let text = |name: &str, levels: &[&str]| {
            let value = params.get(name).and_then(Value::as_str);
            levels
                .iter()
                .position(|level| Some(*level) == value)
                .expect(name)
        };
        let scaling: Vec<f64> = (1..=20).map(f64::from).collect();
        Self {
            hard: number("hard_weight", &HARD),
            soft: number("soft_weight", &SOFT),
            scaling: number("scaling_value", &scaling),
            logits_norm: text("logits_norm", &NORMS),
            hidden_norm: text("hidden_norm", &NORMS),
            layers: text("layers", &LAYERS),
            kd_type: text("kd_type", &KINDS),
        }
    }

    /// Mixed radix, `hard` most significant: 0…25919.
    pub fn index(self) -> u64 {
        let digits = [
            (self.soft, 6),
            (self.scaling, 20),
            (self.logits_norm, 3),
            (self.hidden_norm, 3),
            (self.layers, 3),
            (self.kd_type, 2),
        ];
        digits
            .into_iter()
            .fold(self.hard, |index, (digit, radix)| index * radix + digit) as u64
    }

    pub fn from_index(index: u64) -> Self {
        let mut rest = index as usize;
        let mut digit = |radix: usize| {
            let digit = rest % radix;
            rest /= radix;
            digit
        };
        let (kd_type, layers, hidden_norm, logits_norm) = (digit(2), digit(3), digit(3), digit(3));
        let (scaling, soft, hard) = (digit(20), digit(6), digit(4));
        Self {
            hard,
            soft,
            scaling,
            logits_norm,
            hidden_norm,
            layers,
            kd_type,
        }
    }
}

/// How much of the data a trial sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fidelity {
    Full,
    FivePercent,
}

/// The surface without noise.
pub fn clean(surface: usize, c: Levels, fidelity: Fidelity) -> f64 {
    let (sh, lvl) = match fidelity {
        Fidelity::Full => (0.0, 0.0),
        Fidelity::FivePercent => (-2.0, 1.5),
    };
    let t = Terms::new(c, sh);
    match surface {
        1 => 22.0 + t.core + lvl,
        2 => {
            let aligned = c.layers > 0 && c.hidden_norm == 2;
            let centre = 15.0 - 4.0 * c.kd_type as f64 - if aligned { 3.0 } else { 0.0 } + sh;
            45.0 + 3.0 * sigmoid((t.s - 12.0) / 3.0)
                + 8.0 * (1.0 - sigmoid((t.s - centre) / 1.5))
                + 0.35 * (t.core - t.q)
                + lvl
        }
        3 => {
            let weight = well(t.v, 0.5 * t.u + t.o);
            let mut y = 22.0 + t.q + t.pkd + t.pka + t.pln + weight + t.ph + lvl;
            if t.d > 0.0 {
                y += 15.0 * t.d + 20.0 * t.d * t.d;
            }
            if t.d > 0.8 {
                y += 100.0;
            }
            y.min(200.0)
        }
        4 => {
            const F: u64 = 0xBA5E5;
            let hidden = if c.layers > 0 { c.hidden_norm } else { 0 };
            let cell = ((c.logits_norm * 3 + hidden) * 3 + c.layers) * 2 + c.kd_type;
            22.0 + 0.6 * t.core
                + znorm(F, 101, cell as u64)
                + 0.5 * znorm(F, 102, (c.hard * 6 + c.soft) as u64)
                + 0.5 * znorm(F, 103, (c.scaling * 2 + c.kd_type) as u64)
                + lvl
        }
        _ => super::own::clean(surface, c, fidelity),
    }
}

/// Standard deviation of the noise.
pub fn sigma(surface: usize, c: Levels, fidelity: Fidelity) -> f64 {
    let full = match surface {
        1 => 0.3,
        2 => 0.5,
        3 => 0.3 * (1.0 + 2.0 * Terms::new(c, 0.0).d.max(0.0)),
        4 if c.soft >= 3 => 0.6,
        4 => 0.4,
        _ => super::own::sigma(surface, c),
    };
    match fidelity {
        Fidelity::Full => full,
        Fidelity::FivePercent => 2.0 * full,
    }
}

/// One noisy measurement at full fidelity.
pub fn observe(surface: usize, c: Levels, seed: u64) -> f64 {
    clean(surface, c, Fidelity::Full)
        + sigma(surface, c, Fidelity::Full) * znorm(seed, surface as u64, c.index())
}

/// The least value of a surface.
pub fn minimum(surface: usize) -> f64 {
    (0..25_920)
        .map(|index| clean(surface, Levels::from_index(index), Fidelity::Full))
        .fold(f64::INFINITY, f64::min)
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn softplus(x: f64) -> f64 {
    (-x.abs()).exp().ln_1p() + x.max(0.0)
}

/// A well of depth 4 around `centre`.
fn well(v: f64, centre: f64) -> f64 {
    4.0 * (1.0 - (-0.5 * ((v - centre) / 3.0).powi(2)).exp())
}

/// What the surfaces share.
pub struct Terms {
    pub s: f64,
    pub u: f64,
    pub v: f64,
    pub o: f64,
    pub q: f64,
    pub pkd: f64,
    pub pka: f64,
    pub pln: f64,
    pub ph: f64,
    pub core: f64,
    /// Distance beyond the cliff.
    pub d: f64,
}

impl Terms {
    pub fn new(c: Levels, sh: f64) -> Self {
        let (u, v) = (HARD[c.hard].log10(), SOFT[c.soft].log10());
        let s = (c.scaling + 1) as f64;
        let aligned = c.layers > 0;
        let dual = c.kd_type as f64;
        let shift = if aligned {
            [0.0, 2.0, -3.0][c.hidden_norm]
        } else {
            0.0
        };
        let best = 9.0 + 5.0 * dual + shift + sh;
        let q = if c.kd_type == 0 { 9.0 } else { 5.0 }
            * ((s - best) / 10.0).powi(2)
            * if s < best { 1.6 } else { 1.0 };
        let pkd = 2.29 * (1.0 - dual);
        let pka = [2.85, 1.1, 0.0][c.layers]
            + match (aligned, c.hidden_norm, c.layers) {
                (true, 0, 1) => 1.4,
                (true, 0, _) => 3.2,
                (true, 2, _) => 0.6,
                _ => 0.0,
            };
        let pln = [0.9, 0.3, 0.0][c.logits_norm]
            + if c.kd_type == 1 && c.logits_norm == 2 {
                0.7
            } else {
                0.0
            };
        let o = [0.0, 0.5, 1.0][c.logits_norm];
        let pw = well(v, -1.0 + 0.5 * u + o);
        let pdiv = 1.5 * softplus(4.0 * (v - [0.2, 0.9, 1.4][c.logits_norm] - 0.4 * dual));
        let ph = 0.8 * (u - 0.3).powi(2);
        let d = v
            + 0.35 * u
            + if c.kd_type == 0 {
                0.05 * (s - 10.0)
            } else {
                0.0
            }
            - [-0.5, 0.6, 1.1][c.logits_norm];
        Self {
            s,
            u,
            v,
            o,
            q,
            pkd,
            pka,
            pln,
            ph,
            core: q + pkd + pka + pln + pw + pdiv + ph,
            d,
        }
    }
}

/// One step of SplitMix64.
pub fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A standard normal number as a function of its three keys.
pub fn znorm(seed: u64, stream: u64, index: u64) -> f64 {
    let a = splitmix64(splitmix64(seed) ^ (stream << 32).wrapping_add(index + 1));
    let b = splitmix64(a);
    let scale = 2f64.powi(53);
    let u1 = ((a >> 11) as f64 + 1.0) / scale;
    let u2 = (b >> 11) as f64 / scale;
    (-2.0 * u1.ln()).sqrt() * (std::f64::consts::TAU * u2).cos()
}
