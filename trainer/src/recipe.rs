//! From the recipe's keys (BayesKD Table 2) or `[[loss]]` entries to loss terms.

use serde::de::{SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::losses::{
    CrossEntropy, DualScaling, HiddenPositions, HiddenReduction, Kl, KnowledgeAlignment, LogitLoss,
    LogitReduction, Normalization, Sigma, Tail, TopKKl, matched_layer,
};
use crate::{Error, Result, TrainConfig};

/// "KD Type" of Table 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KdType {
    /// KL with one temperature for both models.
    #[default]
    Kl,
    /// Logits Dual-Scaling.
    DualScaling,
}

/// "Knowledge Alignment Strategy" of Table 2: the teacher's layers, numbered as in transformers'
/// `hidden_states` (0 = embeddings, L = after the last block and the final norm).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Layers {
    /// No alignment.
    #[default]
    None,
    /// Layer L.
    Last,
    /// Layers ⌊L/2⌋ and L.
    LastMiddle,
    /// Teacher layers by number; the student's are those at the same relative depth.
    Listed(Vec<u32>),
}

/// A layer of the student and the teacher's layer it is aligned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPair {
    /// Layer of the student.
    pub student: u32,
    /// Layer of the teacher.
    pub teacher: u32,
}

impl Layers {
    /// Pairs for models of the given depths, ascending by the teacher's layer: last with last, middle
    /// with middle, listed ones by relative depth.
    pub fn pairs(&self, teacher_layers: u32, student_layers: u32) -> Vec<LayerPair> {
        let last = LayerPair {
            student: student_layers,
            teacher: teacher_layers,
        };
        let middle = LayerPair {
            student: student_layers / 2,
            teacher: teacher_layers / 2,
        };
        match self {
            Layers::None => vec![],
            Layers::Last => vec![last],
            Layers::LastMiddle => vec![middle, last],
            Layers::Listed(listed) => {
                let mut listed = listed.clone();
                listed.sort_unstable();
                listed.dedup();
                let student = |teacher| matched_layer(teacher, teacher_layers, student_layers);
                listed
                    .into_iter()
                    .map(|teacher| LayerPair {
                        student: student(teacher),
                        teacher,
                    })
                    .collect()
            }
        }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Layers::None => serializer.serialize_str("none"),
            Layers::Last => serializer.serialize_str("last"),
            Layers::LastMiddle => serializer.serialize_str("last-middle"),
            Layers::Listed(layers) => layers.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct NameOrList;
        impl<'de> Visitor<'de> for NameOrList {
            type Value = Layers;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter
                    .write_str("\"none\", \"last\", \"last-middle\" or a list of teacher layers")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<Layers, E> {
                match name {
                    "none" => Ok(Layers::None),
                    "last" => Ok(Layers::Last),
                    "last-middle" => Ok(Layers::LastMiddle),
                    other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                list: A,
            ) -> std::result::Result<Layers, A::Error> {
                Vec::<u32>::deserialize(SeqAccessDeserializer::new(list)).map(Layers::Listed)
            }
        }
        deserializer.deserialize_any(NameOrList)
    }
}

/// One weighted term of the loss. In TOML: `[[loss]]` with `kind = "kl"`, `weight = …` and the keys
/// of its kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum LossTerm {
    /// Hard-label cross-entropy.
    CrossEntropy(CrossEntropyTerm),
    /// KL with a temperature.
    Kl(KlTerm),
    /// Logits Dual-Scaling.
    DualScaling(DualScalingTerm),
    /// Knowledge Alignment of hidden states.
    KnowledgeAlignment(AlignmentTerm),
}

/// Keys of `kind = "cross-entropy"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CrossEntropyTerm {
    /// Factor in the total.
    pub weight: f64,
}

/// Keys of `kind = "kl"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KlTerm {
    /// Factor in the total.
    pub weight: f64,
    /// τ.
    pub temperature: f64,
    /// Multiply by τ².
    pub temperature_squared: bool,
    /// Normalisation ahead.
    pub logits_norm: Normalization,
    /// Over target positions.
    pub reduction: LogitReduction,
    /// On a sparse cache.
    pub tail: Tail,
}

/// Keys of `kind = "dual-scaling"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DualScalingTerm {
    /// Factor in the total.
    pub weight: f64,
    /// Base scaling value (t of Eq. 15).
    pub scaling_value: f64,
    /// γ of Eq. 1.
    pub gamma: f64,
    /// σ per position or per sample.
    pub sigma: Sigma,
    /// No gradient through the student's σ.
    pub detach_sigma: bool,
    /// Multiply by scaling_value².
    pub temperature_squared: bool,
    /// Normalisation ahead.
    pub logits_norm: Normalization,
    /// Over target positions.
    pub reduction: LogitReduction,
}

/// Keys of `kind = "knowledge-alignment"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlignmentTerm {
    /// Factor in the total.
    pub weight: f64,
    /// β of Eq. 7.
    pub beta: f64,
    /// Which layers.
    pub layers: Layers,
    /// Normalisation of the hidden states.
    pub hidden_norm: Normalization,
    /// Over the width.
    pub reduction: HiddenReduction,
    /// At which positions.
    pub positions: HiddenPositions,
}

impl Default for CrossEntropyTerm {
    fn default() -> Self {
        CrossEntropyTerm { weight: 1.0 }
    }
}

impl Default for KlTerm {
    fn default() -> Self {
        KlTerm {
            weight: 1.0,
            temperature: 1.0,
            temperature_squared: true,
            logits_norm: Normalization::None,
            reduction: LogitReduction::Mean,
            tail: Tail::Refuse,
        }
    }
}

impl Default for DualScalingTerm {
    fn default() -> Self {
        DualScalingTerm {
            weight: 1.0,
            scaling_value: 1.0,
            gamma: 1.0,
            sigma: Sigma::Position,
            detach_sigma: true,
            temperature_squared: false,
            logits_norm: Normalization::None,
            reduction: LogitReduction::Mean,
        }
    }
}

impl Default for AlignmentTerm {
    fn default() -> Self {
        AlignmentTerm {
            weight: 1.0,
            beta: 1.0,
            layers: Layers::Last,
            hidden_norm: Normalization::None,
            reduction: HiddenReduction::Mean,
            positions: HiddenPositions::All,
        }
    }
}

impl TrainConfig {
    /// The loss terms: the `[[loss]]` entries, or the recipe
    /// `hard_weight · CE + soft_weight · (L_d + L_k)` (BayesKD Eq. 8 with Table 2's two weights).
    /// Terms of weight 0 are left out, so that nothing is read for them.
    pub fn terms(&self) -> Vec<LossTerm> {
        let terms = if self.loss.is_empty() {
            self.recipe()
        } else {
            self.loss.clone()
        };
        terms
            .into_iter()
            .filter(|term| term.weight() != 0.0)
            .collect()
    }

    fn recipe(&self) -> Vec<LossTerm> {
        let mut terms = vec![LossTerm::CrossEntropy(CrossEntropyTerm {
            weight: self.hard_weight,
        })];
        terms.push(match self.kd_type {
            KdType::Kl => LossTerm::Kl(KlTerm {
                weight: self.soft_weight,
                temperature: self.scaling_value,
                temperature_squared: self.temperature_squared.unwrap_or(true),
                logits_norm: self.logits_norm,
                reduction: self.logit_reduction,
                tail: self.tail,
            }),
            KdType::DualScaling => LossTerm::DualScaling(DualScalingTerm {
                weight: self.soft_weight,
                scaling_value: self.scaling_value,
                gamma: self.gamma,
                sigma: self.sigma,
                detach_sigma: self.detach_sigma,
                temperature_squared: self.temperature_squared.unwrap_or(false),
                logits_norm: self.logits_norm,
                reduction: self.logit_reduction,
            }),
        });
        if self.layers != Layers::None {
            terms.push(LossTerm::KnowledgeAlignment(AlignmentTerm {
                weight: self.soft_weight,
                beta: self.beta,
                layers: self.layers.clone(),
                hidden_norm: self.hidden_norm,
                reduction: self.hidden_reduction,
                positions: self.hidden_positions,
            }));
        }
        terms
    }
}

impl LossTerm {
    /// Factor in the total.
    pub fn weight(&self) -> f64 {
        match self {
            LossTerm::CrossEntropy(term) => term.weight,
            LossTerm::Kl(term) => term.weight,
            LossTerm::DualScaling(term) => term.weight,
            LossTerm::KnowledgeAlignment(term) => term.weight,
        }
    }

    /// As in `kind = "…"`.
    pub fn kind(&self) -> &'static str {
        match self {
            LossTerm::CrossEntropy(_) => "cross-entropy",
            LossTerm::Kl(_) => "kl",
            LossTerm::DualScaling(_) => "dual-scaling",
            LossTerm::KnowledgeAlignment(_) => "knowledge-alignment",
        }
    }

    /// The loss on logits; `None` for terms on hidden states.
    pub(crate) fn logit_loss(&self) -> Option<(Box<dyn LogitLoss>, LogitReduction)> {
        match self {
            LossTerm::CrossEntropy(_) => Some((Box::new(CrossEntropy), LogitReduction::Mean)),
            LossTerm::Kl(term) => {
                let loss: Box<dyn LogitLoss> = match term.tail {
                    Tail::Refuse => Box::new(Kl {
                        temperature: term.temperature,
                        temperature_squared: term.temperature_squared,
                        logits_norm: term.logits_norm,
                    }),
                    tail => Box::new(TopKKl { tail }),
                };
                Some((loss, term.reduction))
            }
            LossTerm::DualScaling(term) => {
                let loss = DualScaling {
                    scaling_value: term.scaling_value,
                    gamma: term.gamma,
                    sigma: term.sigma,
                    detach_sigma: term.detach_sigma,
                    scaling_squared: term.temperature_squared,
                    logits_norm: term.logits_norm,
                };
                Some((Box::new(loss), term.reduction))
            }
            LossTerm::KnowledgeAlignment(_) => None,
        }
    }

    /// The loss on hidden states; `None` for terms on logits.
    pub(crate) fn alignment(&self) -> Option<(KnowledgeAlignment, &AlignmentTerm)> {
        let LossTerm::KnowledgeAlignment(term) = self else {
            return None;
        };
        let loss = KnowledgeAlignment {
            beta: term.beta,
            hidden_norm: term.hidden_norm,
            reduction: term.reduction,
        };
        Some((loss, term))
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let checked = |key: &str, value: f64, fits: bool, message: &str| {
            if fits && value.is_finite() {
                return Ok(());
            }
            let key = format!("{key} (of loss {})", self.kind());
            Err(Error::BadValue {
                key,
                value: value.to_string(),
                message: message.to_owned(),
            })
        };
        checked(
            "weight",
            self.weight(),
            self.weight() >= 0.0,
            "it must not be below 0",
        )?;
        match self {
            LossTerm::CrossEntropy(_) => Ok(()),
            LossTerm::Kl(term) => {
                checked(
                    "temperature",
                    term.temperature,
                    term.temperature > 0.0,
                    "it must be above 0",
                )?;
                if term.tail != Tail::Refuse
                    && (term.temperature != 1.0 || term.logits_norm != Normalization::None)
                {
                    return Err(Error::BadValue {
                        key: "tail".to_owned(),
                        value: serde_json::json!(term.tail).to_string(),
                        message: "the mass of the tail is known at temperature 1 and without logits_norm only"
                            .to_owned(),
                    });
                }
                Ok(())
            }
            LossTerm::DualScaling(term) => {
                checked(
                    "scaling_value",
                    term.scaling_value,
                    term.scaling_value > 0.0,
                    "it must be above 0",
                )?;
                checked("gamma", term.gamma, term.gamma > 0.0, "it must be above 0")?;
                if term.sigma == Sigma::Sample && !term.detach_sigma {
                    return Err(Error::BadValue {
                        key: "detach_sigma".to_owned(),
                        value: "false".to_owned(),
                        message: "gradients through σ need sigma = \"position\"".to_owned(),
                    });
                }
                Ok(())
            }
            LossTerm::KnowledgeAlignment(term) => {
                checked("beta", term.beta, term.beta > 0.0, "it must be above 0")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_is_equation_8_with_table_2s_weights() {
        let config = TrainConfig {
            hard_weight: 0.1,
            soft_weight: 10.0,
            kd_type: KdType::DualScaling,
            layers: Layers::LastMiddle,
            ..TrainConfig::default()
        };
        let terms: Vec<_> = config
            .terms()
            .iter()
            .map(|term| (term.kind(), term.weight()))
            .collect();
        assert_eq!(
            terms,
            [
                ("cross-entropy", 0.1),
                ("dual-scaling", 10.0),
                ("knowledge-alignment", 10.0)
            ]
        );
        let plain = TrainConfig {
            soft_weight: 0.0,
            layers: Layers::Last,
            ..TrainConfig::default()
        };
        assert_eq!(
            plain.terms().iter().map(LossTerm::kind).collect::<Vec<_>>(),
            ["cross-entropy"]
        );
    }

    #[test]
    fn layers_of_different_depths_meet() {
        let check = |layers: Layers, depths: (u32, u32), expected: &[(u32, u32)]| {
            let pairs: Vec<_> = layers
                .pairs(depths.0, depths.1)
                .iter()
                .map(|pair| (pair.teacher, pair.student))
                .collect();
            assert_eq!(pairs, expected, "{layers:?} {depths:?}");
        };
        check(Layers::None, (4, 4), &[]);
        check(Layers::Last, (30, 12), &[(30, 12)]);
        check(Layers::LastMiddle, (30, 30), &[(15, 15), (30, 30)]);
        check(Layers::LastMiddle, (3, 4), &[(1, 2), (3, 4)]);
        check(
            Layers::Listed(vec![30, 0, 10, 10]),
            (30, 12),
            &[(0, 0), (10, 4), (30, 12)],
        );
    }
}
