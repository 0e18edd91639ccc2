//! Settings of a study.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the next configuration is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// Uniformly at random among what was not tried.
    Random,
    /// A scrambled Sobol sequence.
    Sobol,
    /// Tree-structured Parzen estimator.
    Tpe,
    /// Gaussian process with expected improvement (the paper's naive Bayesian search).
    Gp,
    /// Gaussian process with logits-aware expected improvement (BayesKD, Eqs. 10–12).
    Sabo,
}

impl SamplerKind {
    /// All samplers.
    pub const ALL: [Self; 5] = [Self::Random, Self::Sobol, Self::Tpe, Self::Gp, Self::Sabo];

    /// The name on the command line and in the study.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sobol => "sobol",
            Self::Tpe => "tpe",
            Self::Gp => "gp",
            Self::Sabo => "sabo",
        }
    }
}

impl std::fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for SamplerKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| Error::Setting {
                setting: "sampler",
                message: format!("there is no `{text}`; choose random, sobol, tpe, gp or sabo"),
            })
    }
}

/// Whether small or large values are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Small values are good.
    #[default]
    Minimize,
    /// Large values are good.
    Maximize,
}

impl Direction {
    /// What a value is multiplied by so that small is good.
    pub fn sign(self) -> f64 {
        match self {
            Self::Minimize => 1.0,
            Self::Maximize => -1.0,
        }
    }
}

/// Cheap trials first: a ladder of fidelities, on which the best climb.
///
/// All trials of the study are run on the first rung. The best `promote` of them go on to the second, the best
/// `keep` share of those to the third, and so on. Where the ranks of two neighbouring rungs agree less than
/// `trust` (Spearman), the lower one is distrusted, and twice as many are promoted from it. The study's best trial
/// is the best of its highest rung.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Ladder {
    /// What grows from rung to rung.
    pub climb: Climb,
    /// Share of the data or of the steps at each rung, ascending, in (0, 1]; at least two.
    pub shares: Vec<f64>,
    /// Trials that are promoted to the second rung.
    pub promote: u64,
    /// Share of a later rung's trials that is promoted (at least one).
    pub keep: f64,
    /// Least rank correlation at which a rung is trusted.
    pub trust: f64,
}

/// What grows from rung to rung of a [`Ladder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Climb {
    /// The share of the data: each rung is a new training with a fresh seed.
    Data,
    /// The share of the steps of one training, which is paused at each rung and goes on from its checkpoint at the
    /// next (successive halving).
    Steps,
}

/// The options of [`SamplerKind::Sabo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SaboOptions {
    /// α of Eq. 10, the weight of S(x).
    pub alpha: f64,
    /// λ1 of Eq. 12, the weight of the logits discrepancy D.
    pub lambda1: f64,
    /// λ2 of Eq. 12, the weight of the hidden-state discrepancy A.
    pub lambda2: f64,
    /// ξ of Eqs. 10 and 11.
    pub xi: f64,
    /// α is divided by 1 + (finished trials / `decay`)²; `None` keeps it constant, as the paper does.
    pub decay: Option<f64>,
    /// D and A are each standardised over the candidates before they are weighed, and EI is on the surrogate's
    /// unit scale, so that α means the same on every metric.
    pub standardize: bool,
    /// Prefers a small S(x) instead of a large one.
    pub inverted: bool,
}

impl SaboOptions {
    /// LAEI exactly as Eqs. 10–12: constant α, raw S, EI in units of the metric, the best observed value as f(x⁺).
    pub fn laei() -> Self {
        Self {
            alpha: 1.0,
            decay: None,
            standardize: false,
            ..Self::default()
        }
    }

    /// True where Eqs. 10–12 are taken to the letter.
    pub fn is_laei(&self) -> bool {
        !self.standardize && self.decay.is_none() && !self.inverted
    }
}

impl Default for SaboOptions {
    fn default() -> Self {
        Self {
            alpha: 0.1,
            lambda1: 1.0,
            lambda2: 1.0,
            xi: 0.0,
            decay: Some(10.0),
            standardize: true,
            inverted: false,
        }
    }
}

/// What a study is. All but `trials`, `lease_seconds` and `max_attempts` is fixed when the study is created.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StudyConfig {
    /// How configurations are chosen.
    pub sampler: SamplerKind,
    /// Seed of the study.
    pub seed: u64,
    /// Number of trials after which the study is complete; may grow when it is resumed.
    pub trials: u64,
    /// Share of the data that each trial trains on, in (0, 1].
    pub fraction: f64,
    /// Whether small or large values are good.
    pub direction: Direction,
    /// Trials of a space-filling start before the first model (`gp`, `sabo`, `tpe`).
    pub startup: u64,
    /// Options of `sabo`.
    pub sabo: SaboOptions,
    /// Seconds after which a silent worker's trial is taken up by another. Living workers renew their lease.
    pub lease_seconds: f64,
    /// A trial whose worker died this many times is given up as failed.
    pub max_attempts: u64,
    /// Cheap trials first, the best few on more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ladder: Option<Ladder>,
}

impl Default for StudyConfig {
    fn default() -> Self {
        Self {
            sampler: SamplerKind::Sabo,
            seed: 0,
            trials: 30,
            fraction: 0.05,
            direction: Direction::Minimize,
            startup: 5,
            sabo: SaboOptions::default(),
            lease_seconds: 60.0,
            max_attempts: 10,
            ladder: None,
        }
    }
}

impl StudyConfig {
    /// Checks every setting.
    pub fn validate(&self) -> Result<()> {
        let check = |good: bool, setting: &'static str, message: &str| {
            if good {
                Ok(())
            } else {
                Err(Error::Setting {
                    setting,
                    message: message.to_owned(),
                })
            }
        };
        let sabo = &self.sabo;
        check(
            self.fraction > 0.0 && self.fraction <= 1.0,
            "fraction",
            "it must be above 0 and at most 1",
        )?;
        check(
            self.lease_seconds.is_finite() && self.lease_seconds > 0.0,
            "lease-seconds",
            "it must be positive",
        )?;
        check(
            self.max_attempts > 0,
            "max-attempts",
            "it must be at least 1",
        )?;
        check(
            [sabo.alpha, sabo.lambda1, sabo.lambda2, sabo.xi]
                .iter()
                .all(|weight| weight.is_finite()),
            "sabo",
            "its weights must be finite",
        )?;
        check(
            sabo.decay
                .is_none_or(|decay| decay.is_finite() && decay > 0.0),
            "sabo.decay",
            "it must be positive",
        )?;
        if let Some(ladder) = &self.ladder {
            check(
                ladder.shares.len() >= 2
                    && ladder.shares.windows(2).all(|pair| pair[0] < pair[1])
                    && ladder
                        .shares
                        .iter()
                        .all(|share| *share > 0.0 && *share <= 1.0),
                "fractions",
                "they must ascend, at least two of them, above 0 and at most 1",
            )?;
            check(ladder.promote > 0, "promote", "it must be at least 1")?;
            check(
                ladder.keep > 0.0 && ladder.keep <= 1.0,
                "keep",
                "it must be above 0 and at most 1",
            )?;
            check(
                (-1.0..=1.0).contains(&ladder.trust),
                "trust",
                "a rank correlation lies in [-1, 1]",
            )?;
        }
        i64::try_from(self.seed)
            .map(|_| ())
            .or_else(|_| check(false, "seed", "it must be below 2^63"))
    }
}
