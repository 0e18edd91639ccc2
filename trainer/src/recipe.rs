//! From the recipe's keys (BayesKD Table 2) to loss terms.

use serde::de::{SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::TrainConfig;
use crate::loss_term::{LossTerm, TermLoss};
use crate::losses::{
    CrossEntropy, DualScaling, HiddenKind, Kl, KnowledgeAlignment, LogitKind, Projection,
    matched_layer,
};
use crate::schedule::Schedule;

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
            .filter(|term| !term.schedule.is_nothing(term.weight))
            .collect()
    }

    fn recipe(&self) -> Vec<LossTerm> {
        let soft = match self.kd_type {
            KdType::Kl => LogitKind::Kl(Kl {
                temperature: self.scaling_value,
                temperature_squared: self.temperature_squared.unwrap_or(true),
                tail: self.tail,
            }),
            KdType::DualScaling => LogitKind::DualScaling(DualScaling {
                scaling_value: self.scaling_value,
                gamma: self.gamma,
                sigma: self.sigma,
                detach_sigma: self.detach_sigma,
                temperature_squared: self.temperature_squared.unwrap_or(false),
            }),
        };
        let mut terms = vec![
            LossTerm {
                weight: self.hard_weight,
                ..LossTerm::logits(LogitKind::CrossEntropy(CrossEntropy {}))
            },
            LossTerm {
                weight: self.soft_weight,
                schedule: Schedule::default(),
                loss: TermLoss::Logits {
                    loss: soft,
                    reduction: self.logit_reduction,
                    logits_norm: self.logits_norm,
                },
            },
        ];
        if self.layers != Layers::None {
            terms.push(LossTerm {
                weight: self.soft_weight,
                schedule: Schedule::default(),
                loss: TermLoss::Hidden {
                    loss: HiddenKind::KnowledgeAlignment(KnowledgeAlignment {
                        beta: self.beta,
                        hidden_norm: self.hidden_norm,
                        reduction: self.hidden_reduction,
                    }),
                    layers: self.layers.clone(),
                    positions: self.hidden_positions,
                    projection: Projection::Pool,
                },
            });
        }
        terms
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
            .map(|term| (term.kind(), term.weight))
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
