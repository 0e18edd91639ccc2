//! The closed sets of losses: each kind's name, its struct, its default.

use serde::{Deserialize, Serialize};

use super::{
    Atkd, Bild, BildStudentLed, BildTeacherLed, CrossEntropy, Distillm2, Dkd, DualScaling, GhostKl,
    HiddenCosine, HiddenLoss, JensenShannon, Kl, KnowledgeAlignment, LogitLoss,
    LogitStandardization, MultiLevel, Nkd, NormKd, PatientKd, RandomSamplingKd, ReverseKl, SkewKl,
    SkewReverseKl, TopKKl, TotalVariation, Uld, UniformTailKl,
};

/// An enum over loss structs, told apart in TOML by `kind = "…"`.
macro_rules! kinds {
    ($(#[$meta:meta])* $set:ident of $role:ident { $($kind:literal = $loss:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind")]
        pub enum $set {
            $(
                #[doc = concat!("`", $kind, "`")]
                #[serde(rename = $kind)]
                $loss($loss),
            )+
        }

        impl $set {
            /// Every kind's name.
            pub const NAMES: &'static [&'static str] = &[$($kind),+];

            /// As in `kind = "…"`.
            pub fn name(&self) -> &'static str {
                match self {
                    $($set::$loss(_) => $kind,)+
                }
            }

            /// The kind of that name with its published settings.
            pub fn with_defaults(name: &str) -> Option<$set> {
                match name {
                    $($kind => Some($set::$loss($loss::default())),)+
                    _ => None,
                }
            }

            /// What it computes.
            pub fn loss(&self) -> &dyn $role {
                match self {
                    $($set::$loss(loss) => loss,)+
                }
            }
        }
    };
}

kinds! {
    /// The losses on logits.
    LogitKind of LogitLoss {
        "cross-entropy" = CrossEntropy,
        "kl" = Kl,
        "reverse-kl" = ReverseKl,
        "jensen-shannon" = JensenShannon,
        "total-variation" = TotalVariation,
        "skew-kl" = SkewKl,
        "skew-reverse-kl" = SkewReverseKl,
        "distillm-2" = Distillm2,
        "top-k-kl" = TopKKl,
        "ghost-kl" = GhostKl,
        "uniform-tail-kl" = UniformTailKl,
        "random-sampling-kd" = RandomSamplingKd,
        "dual-scaling" = DualScaling,
        "norm-kd" = NormKd,
        "logit-standardization" = LogitStandardization,
        "multi-level" = MultiLevel,
        "dkd" = Dkd,
        "nkd" = Nkd,
        "atkd" = Atkd,
        "bild" = Bild,
        "bild-teacher-led" = BildTeacherLed,
        "bild-student-led" = BildStudentLed,
        "uld" = Uld,
    }
}

kinds! {
    /// The losses on hidden states.
    HiddenKind of HiddenLoss {
        "knowledge-alignment" = KnowledgeAlignment,
        "patient-kd" = PatientKd,
        "hidden-cosine" = HiddenCosine,
    }
}
