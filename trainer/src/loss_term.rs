//! One weighted term of a loss, as `[[loss]]` entries write it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::{Table, Value};

use crate::config::nearest_of;
use crate::losses::{
    BadKey, HiddenKind, HiddenPositions, LogitKind, LogitReduction, Normalization, Projection,
    Requirement,
};
use crate::recipe::Layers;
use crate::schedule::Schedule;
use crate::{Error, Result};

/// One weighted term of the loss. In TOML: `[[loss]]` with `kind = "kl"`, `weight = …`, the keys that
/// all terms on logits (or on hidden states) have, and the keys of its kind.
#[derive(Debug, Clone, PartialEq)]
pub struct LossTerm {
    /// Factor in the total.
    pub weight: f64,
    /// How that factor changes over the run.
    pub schedule: Schedule,
    /// What is weighted.
    pub loss: TermLoss,
}

/// On logits or on hidden states.
#[derive(Debug, Clone, PartialEq)]
pub enum TermLoss {
    /// At target positions.
    Logits {
        /// The loss.
        loss: LogitKind,
        /// Over target positions.
        reduction: LogitReduction,
        /// Of both models' logits, ahead of the loss.
        logits_norm: Normalization,
    },
    /// At positions of its choice.
    Hidden {
        /// The loss.
        loss: HiddenKind,
        /// Which layers.
        layers: Layers,
        /// At which positions.
        positions: HiddenPositions,
        /// From the student's width to the teacher's.
        projection: Projection,
    },
}

/// Names that other tools give to keys, and ours.
const ALIASES: [(&str, &str); 2] = [("tau", "temperature"), ("top_k", "k")];

impl LossTerm {
    /// A term on logits with weight 1, reduced to the mean, without normalisation ahead.
    pub fn logits(loss: LogitKind) -> LossTerm {
        LossTerm {
            weight: 1.0,
            schedule: Schedule::default(),
            loss: TermLoss::Logits {
                loss,
                reduction: LogitReduction::Mean,
                logits_norm: Normalization::None,
            },
        }
    }

    /// A term on hidden states with weight 1: last layer, all positions.
    pub fn hidden(loss: HiddenKind) -> LossTerm {
        LossTerm {
            weight: 1.0,
            schedule: Schedule::default(),
            loss: TermLoss::Hidden {
                loss,
                layers: Layers::Last,
                positions: HiddenPositions::All,
                projection: Projection::Pool,
            },
        }
    }

    /// The term of a kind with the published settings.
    ///
    /// # Errors
    /// A kind that does not exist; the error names those that do.
    pub fn with_defaults(kind: &str) -> Result<LossTerm> {
        let on_logits = LogitKind::with_defaults(kind).map(LossTerm::logits);
        let on_hidden = || HiddenKind::with_defaults(kind).map(LossTerm::hidden);
        on_logits
            .or_else(on_hidden)
            .ok_or_else(|| Error::UnknownLoss {
                kind: kind.to_owned(),
                nearest: nearest_of(kind, LossTerm::kinds().map(str::to_owned)),
                known: LossTerm::kinds().collect::<Vec<_>>().join(", "),
            })
    }

    /// Every kind's name.
    pub fn kinds() -> impl Iterator<Item = &'static str> {
        let all = LogitKind::NAMES.iter().chain(HiddenKind::NAMES);
        all.copied()
    }

    /// From the keys of one `[[loss]]` entry. Validate it afterwards.
    ///
    /// # Errors
    /// No kind or an unknown one, a key that this kind does not have (the error names the nearest),
    /// a value that its key does not take.
    pub fn from_table(table: &Table) -> Result<LossTerm> {
        let kind = match table.get("kind") {
            Some(Value::String(kind)) => kind.as_str(),
            other => {
                return Err(Error::UnknownLoss {
                    kind: other.map(ToString::to_string).unwrap_or_default(),
                    nearest: None,
                    known: LossTerm::kinds().collect::<Vec<_>>().join(", "),
                });
            }
        };
        let mut keys = LossTerm::with_defaults(kind)?.to_table();
        for (name, value) in table {
            let key = canonical(name, &keys);
            if key != name && table.contains_key(key) {
                return Err(Error::BadLossValue {
                    kind: kind.to_owned(),
                    key: name.to_owned(),
                    value: value.to_string(),
                    message: format!("`{key}`, for which it stands, is given too"),
                });
            }
            if !keys.contains_key(key) {
                return Err(Error::UnknownLossKey {
                    kind: kind.to_owned(),
                    key: key.to_owned(),
                    nearest: nearest_of(key, keys.keys().cloned()),
                    known: keys
                        .keys()
                        .filter(|key| *key != "kind")
                        .cloned()
                        .collect::<Vec<_>>()
                        .join(", "),
                });
            }
            keys.insert(key.to_owned(), value.clone());
        }
        let weight = taken(&mut keys, kind, "weight")?;
        let schedule = Schedule {
            schedule: taken(&mut keys, kind, "schedule")?,
            final_weight: taken(&mut keys, kind, "final_weight")?,
            warmup_share: taken(&mut keys, kind, "warmup_share")?,
        };
        let loss = if LogitKind::NAMES.contains(&kind) {
            TermLoss::Logits {
                reduction: taken(&mut keys, kind, "reduction")?,
                logits_norm: taken(&mut keys, kind, "logits_norm")?,
                loss: of_kind(keys, kind)?,
            }
        } else {
            TermLoss::Hidden {
                layers: taken(&mut keys, kind, "layers")?,
                positions: taken(&mut keys, kind, "positions")?,
                projection: taken(&mut keys, kind, "projection")?,
                loss: of_kind(keys, kind)?,
            }
        };
        Ok(LossTerm {
            weight,
            schedule,
            loss,
        })
    }

    /// All its keys, those at their defaults too.
    pub fn to_table(&self) -> Table {
        // Plain numbers, strings and lists: nothing here that TOML could not express.
        let mut table = match &self.loss {
            TermLoss::Logits { loss, .. } => Table::try_from(loss),
            TermLoss::Hidden { loss, .. } => Table::try_from(loss),
        }
        .unwrap_or_default();
        table.insert("weight".to_owned(), Value::Float(self.weight));
        table.extend(Table::try_from(self.schedule).unwrap_or_default());
        let common: Vec<(&str, Option<Value>)> = match &self.loss {
            TermLoss::Logits {
                reduction,
                logits_norm,
                ..
            } => vec![
                ("reduction", Value::try_from(reduction).ok()),
                ("logits_norm", Value::try_from(logits_norm).ok()),
            ],
            TermLoss::Hidden {
                layers,
                positions,
                projection,
                ..
            } => vec![
                ("layers", Value::try_from(layers).ok()),
                ("positions", Value::try_from(positions).ok()),
                ("projection", Value::try_from(projection).ok()),
            ],
        };
        for (key, value) in common {
            if let Some(value) = value {
                table.insert(key.to_owned(), value);
            }
        }
        table
    }

    /// As in `kind = "…"`.
    pub fn kind(&self) -> &'static str {
        match &self.loss {
            TermLoss::Logits { loss, .. } => loss.name(),
            TermLoss::Hidden { loss, .. } => loss.name(),
        }
    }

    /// What it asks of the cache; normalised logits are only to be had whole. `None` for hidden
    /// states, whose layers say it.
    pub fn requirement(&self) -> Option<Requirement> {
        let TermLoss::Logits {
            loss, logits_norm, ..
        } = &self.loss
        else {
            return None;
        };
        let requirement = loss.loss().requirement();
        Some(match (requirement, logits_norm) {
            (Requirement::Nothing, _) | (_, Normalization::None) => requirement,
            _ => Requirement::FullLogits,
        })
    }

    /// Checks every value and that they fit together.
    ///
    /// # Errors
    /// The first value that is not possible.
    pub fn validate(&self) -> Result<()> {
        let refused = |BadKey {
                           key,
                           value,
                           message,
                       }: BadKey| Error::BadLossValue {
            kind: self.kind().to_owned(),
            key: key.to_owned(),
            value,
            message: message.to_owned(),
        };
        if !(self.weight >= 0.0 && self.weight.is_finite()) {
            return Err(refused(BadKey {
                key: "weight",
                value: self.weight.to_string(),
                message: "it must not be below 0",
            }));
        }
        self.schedule.validate().map_err(refused)?;
        match &self.loss {
            TermLoss::Logits {
                loss, logits_norm, ..
            } => {
                if let LogitKind::Kl(kl) = loss
                    && kl.tail != crate::losses::Tail::Refuse
                    && *logits_norm != Normalization::None
                {
                    return Err(refused(BadKey {
                        key: "tail",
                        value: serde_json::json!(kl.tail).to_string(),
                        message: "the mass of the tail is known without logits_norm only",
                    }));
                }
                loss.loss().validate()
            }
            TermLoss::Hidden { layers, .. }
                if *layers == Layers::None || *layers == Layers::Listed(vec![]) =>
            {
                return Err(refused(BadKey {
                    key: "layers",
                    value: serde_json::json!(layers).to_string(),
                    message: "it names none, and the loss would be 0",
                }));
            }
            TermLoss::Hidden { loss, .. } => loss.loss().validate(),
        }
        .map_err(refused)
    }
}

/// The key that a name stands for, among `keys`.
pub(crate) fn canonical<'a>(name: &'a str, keys: &Table) -> &'a str {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    match alias {
        Some((_, key)) if keys.contains_key(*key) => key,
        _ => name,
    }
}

/// Takes the value of one key out of the table.
fn taken<T: for<'de> Deserialize<'de>>(keys: &mut Table, kind: &str, key: &str) -> Result<T> {
    let value = keys.remove(key).unwrap_or(Value::Boolean(false));
    let shown = value.to_string();
    value
        .try_into()
        .map_err(|error: toml::de::Error| Error::BadLossValue {
            kind: kind.to_owned(),
            key: key.to_owned(),
            value: shown,
            message: error.message().to_owned(),
        })
}

/// The kind from its own keys, one of which may have an impossible type of value: found by setting
/// one at a time.
fn of_kind<T: for<'de> Deserialize<'de>>(keys: Table, kind: &str) -> Result<T> {
    let defaults = LossTerm::with_defaults(kind)?.to_table();
    let culprit = keys.clone();
    T::deserialize(Value::Table(keys)).map_err(|error: toml::de::Error| {
        let changed = culprit
            .iter()
            .find(|(key, value)| {
                let mut alone: Table = culprit
                    .keys()
                    .filter_map(|key| Some((key.clone(), defaults.get(key)?.clone())))
                    .collect();
                alone.insert((*key).clone(), (*value).clone());
                T::deserialize(Value::Table(alone)).is_err()
            })
            .map(|(key, value)| (key.clone(), value.to_string()));
        let (key, value) = changed.unwrap_or_default();
        Error::BadLossValue {
            kind: kind.to_owned(),
            key,
            value,
            message: error.message().to_owned(),
        }
    })
}

impl Serialize for LossTerm {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_table().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LossTerm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let table = Table::deserialize(deserializer)?;
        LossTerm::from_table(&table).map_err(|error| {
            let hint = error
                .hint()
                .map_or_else(String::new, |hint| format!(" ({hint})"));
            serde::de::Error::custom(format!("{error}{hint}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LossTerm> {
        LossTerm::from_table(&text.parse().unwrap())
    }

    #[test]
    fn every_kind_round_trips_and_its_defaults_are_possible() {
        for kind in LossTerm::kinds() {
            let term = LossTerm::with_defaults(kind).unwrap();
            assert_eq!(term.kind(), kind);
            term.validate().unwrap();
            let text = toml::to_string(&term).unwrap();
            assert_eq!(parse(&text).unwrap(), term, "{text}");
            let json = serde_json::to_string(&term).unwrap();
            assert_eq!(serde_json::from_str::<LossTerm>(&json).unwrap(), term);
        }
    }

    #[test]
    fn common_keys_and_aliases() {
        let term = parse(
            "kind = \"bild\"\nweight = 0.5\ntau = 2\ntop_k = 4\nlogits_norm = \"max-min\"\nreduction = \"paper\"",
        )
        .unwrap();
        let TermLoss::Logits {
            loss: LogitKind::Bild(bild),
            reduction,
            logits_norm,
        } = &term.loss
        else {
            panic!("{term:?}")
        };
        assert_eq!((bild.k, bild.temperature, term.weight), (4, 2.0, 0.5));
        assert_eq!(
            (*reduction, *logits_norm),
            (LogitReduction::Paper, Normalization::MaxMin)
        );
        assert_eq!(term.requirement(), Some(Requirement::FullLogits));
        let hidden = parse("kind = \"patient-kd\"\nlayers = [1, 2]").unwrap();
        assert_eq!(hidden.requirement(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |text: &str, expected: &str| {
            let error = parse(text).and_then(|term| term.validate()).unwrap_err();
            let said = format!("{error} / {}", error.hint().unwrap_or_default());
            assert!(said.contains(expected), "{text:?} gave {said:?}");
            assert!(error.is_user());
        };
        check("weight = 1", "needs a kind");
        check("kind = \"revers-kl\"", "did you mean `reverse-kl`?");
        check("kind = \"xyzzyxyzzyxyzzy\"", "hidden-cosine");
        check("kind = \"kl\"\nheat = 2", "loss `kl` has no key `heat`");
        check(
            "kind = \"kl\"\ntemprature = 2",
            "did you mean `temperature`?",
        );
        check("kind = \"uld\"\nk = 2", "it has final_weight, logits_norm");
        check(
            "kind = \"kl\"\ntemperature = \"hot\"",
            "`temperature` = \"hot\"",
        );
        check("kind = \"kl\"\nweight = \"much\"", "`weight` = \"much\"");
        check("kind = \"kl\"\nweight = -1", "below 0");
        check("kind = \"kl\"\ntau = 0", "above 0");
        check("kind = \"kl\"\ntau = nan", "above 0");
        check("kind = \"kl\"\ntail = \"ghost\"\ntau = 2", "temperature 1");
        check(
            "kind = \"kl\"\ntail = \"ghost\"\nlogits_norm = \"max-min\"",
            "logits_norm",
        );
        check("kind = \"bild\"\nk = 1", "at least 2");
        check("kind = \"bild\"\nk = -1", "`k` = -1");
        check("kind = \"jensen-shannon\"\nbeta = 1", "above 0 and below 1");
        check("kind = \"hidden-cosine\"\nlayers = []", "names none");
        check("kind = \"patient-kd\"\nlayers = \"none\"", "names none");
        check("kind = \"multi-level\"\ntemperatures = []", "one at least");
        check("kind = \"multi-level\"\ntemperatures = [1, 0]", "above 0");
        check(
            "kind = \"knowledge-alignment\"\nlogits_norm = \"max-min\"",
            "no key `logits_norm`",
        );
    }
}
