//! The configuration of a run: flat TOML keys, overridden one by one from the command line.

use std::path::PathBuf;

use caskd_models::LoraConfig;
use serde::{Deserialize, Serialize};

use crate::loss_term::{LossTerm, canonical};
use crate::losses::{HiddenPositions, HiddenReduction, LogitReduction, Normalization, Sigma, Tail};
use crate::recipe::{KdType, Layers};
use crate::{Error, Result};

/// Everything that decides a run, apart from student and cache. In TOML every key is optional.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of the order, the adapters and the dropout.
    pub seed: u64,
    /// Passes over the data.
    pub epochs: u32,
    /// Ends the run early; the learning rate then falls to 0 at this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Sequences of one forward pass.
    pub batch_size: usize,
    /// Forward passes of one optimizer step. Means are taken over all targets of the step.
    pub gradient_accumulation: usize,
    /// Peak learning rate: linear warm-up, then cosine decay to 0.
    pub learning_rate: f64,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of AdamW's two moments.
    pub betas: [f64; 2],
    /// ε of AdamW.
    pub eps: f64,
    /// Gradients longer than this (L2 norm over all parameters) are shortened to it; 0 turns it off.
    pub max_grad_norm: f64,
    /// Share of the sequences to train on, chosen by a stable hash of their tokens.
    pub fraction: f64,
    /// Shards of a cache whose sequences are shuffled together, in a seeded order of the shards; 0 takes all of them.
    pub shuffle_shards: usize,
    /// Batches among which sequences of like length come together, to save padding; 1 turns it off.
    pub bucket_batches: usize,
    /// Train even where the cache's fidelity report says that the gradient of a loss is off by more than 10%.
    pub allow_low_fidelity: bool,
    /// Steps between checkpoints; 0 writes one only when stopped.
    pub checkpoint_every: u64,
    /// What trains: adapters, or all weights.
    pub mode: Mode,
    /// Put the frozen projections into 8 bits, with a scale for each output.
    pub quantize: Quantize,
    /// Run each block again on the way back, and hold the activations of one block in place of all.
    pub recompute: bool,
    /// The teacher's folder or GGUF file, for a student with another tokenizer (losses `uld` and `cross-entropy`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_tokenizer: Option<String>,
    /// Kind of the frozen weights. Adapters, losses and the optimizer are f32 in any case.
    pub dtype: Dtype,
    /// "cpu" or "cuda:N".
    pub device: String,
    /// Batches read ahead.
    pub prefetch: usize,
    /// How the cache is read.
    pub io: CacheIo,
    /// Folders in which shards are looked for that do not lie beside their cache's manifest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<PathBuf>,
    /// Folder for TensorBoard's event files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensorboard: Option<PathBuf>,

    /// Weight of the hard-label cross-entropy (Table 2: hard label weight).
    pub hard_weight: f64,
    /// Weight of L_d + L_k (Table 2: soft label weight); 0 is plain fine-tuning without a teacher.
    pub soft_weight: f64,
    /// Temperature of KL, base scaling value of Dual-Scaling (Table 2: starting scaling value).
    pub scaling_value: f64,
    /// Of both models' logits, ahead of the soft loss (Table 2).
    pub logits_norm: Normalization,
    /// Of both models' hidden states, ahead of Eq. 7 (Table 2).
    pub hidden_norm: Normalization,
    /// Layers of Knowledge Alignment: "none", "last", "last-middle", or a list of teacher layers.
    pub layers: Layers,
    /// The soft loss on logits (Table 2).
    pub kd_type: KdType,
    /// σ of Dual-Scaling: "position" or "sample".
    pub sigma: Sigma,
    /// No gradient through the student's σ.
    pub detach_sigma: bool,
    /// γ of Eq. 1.
    pub gamma: f64,
    /// Multiply the soft loss by scaling_value²; left out: yes for KL, no for Dual-Scaling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_squared: Option<bool>,
    /// "mean" over targets or the paper's sum / N².
    pub logit_reduction: LogitReduction,
    /// "mean" over the width or the paper's sum.
    pub hidden_reduction: HiddenReduction,
    /// "all" positions or only "targets".
    pub hidden_positions: HiddenPositions,
    /// β_l of Eq. 7, the same for every layer.
    pub beta: f64,
    /// What KL on a sparse cache takes the tail to be: "refuse", "uniform", "ghost".
    pub tail: Tail,

    /// The adapters.
    pub lora: LoraConfig,
    /// Explicit loss terms in place of the recipe keys from `hard_weight` to `tail`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loss: Vec<LossTerm>,
}

/// What trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Adapters on a frozen base.
    #[default]
    Lora,
    /// All weights, kept in f32 whatever the passes compute in.
    Full,
}

/// How the frozen projections are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantize {
    /// In the type that passes compute in.
    #[default]
    None,
    /// In 8 bits; the passes go back block by block, running each again.
    Int8,
}

/// Kind of the frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// 32-bit.
    #[default]
    F32,
    /// bfloat16 weights and matrix products; softmax and reductions in f32.
    Bf16,
}

/// How the cache's files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheIo {
    /// Memory-mapped.
    #[default]
    Mmap,
    /// Plain reads, for network file systems.
    Read,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            seed: 0,
            allow_low_fidelity: false,
            epochs: 1,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            learning_rate: 1e-3,
            warmup_ratio: 0.05,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            max_grad_norm: 1.0,
            fraction: 1.0,
            shuffle_shards: 32,
            bucket_batches: 16,
            checkpoint_every: 50,
            mode: Mode::Lora,
            quantize: Quantize::None,
            recompute: false,
            teacher_tokenizer: None,
            dtype: Dtype::F32,
            device: "cpu".to_owned(),
            prefetch: 4,
            io: CacheIo::Mmap,
            shards: Vec::new(),
            tensorboard: None,
            hard_weight: 1.0,
            soft_weight: 1.0,
            scaling_value: 1.0,
            logits_norm: Normalization::None,
            hidden_norm: Normalization::None,
            layers: Layers::None,
            kd_type: KdType::Kl,
            sigma: Sigma::Position,
            detach_sigma: true,
            gamma: 1.0,
            temperature_squared: None,
            logit_reduction: LogitReduction::Mean,
            hidden_reduction: HiddenReduction::Mean,
            hidden_positions: HiddenPositions::All,
            beta: 1.0,
            tail: Tail::Refuse,
            lora: LoraConfig::default(),
            loss: Vec::new(),
        }
    }
}

/// The keys that `[[loss]]` entries replace.
pub(crate) const RECIPE_KEYS: [&str; 16] = [
    "hard_weight",
    "soft_weight",
    "scaling_value",
    "logits_norm",
    "hidden_norm",
    "layers",
    "kd_type",
    "sigma",
    "detach_sigma",
    "gamma",
    "temperature_squared",
    "logit_reduction",
    "hidden_reduction",
    "hidden_positions",
    "beta",
    "tail",
];

/// Keys that change how a run is carried out but not what it computes: a resumed run may differ.
const KEYS_WITHOUT_EFFECT: [&str; 5] = [
    "checkpoint_every",
    "prefetch",
    "io",
    "shards",
    "tensorboard",
];

impl TrainConfig {
    /// Reads and validates TOML.
    pub fn from_toml(text: &str) -> Result<TrainConfig> {
        let table: toml::Table =
            text.parse()
                .map_err(|error: toml::de::Error| Error::ConfigSyntax {
                    message: error.to_string().trim_end().to_owned(),
                })?;
        let mut config = TrainConfig::default();
        for (key, value) in flattened(&table) {
            config.set_value(&key, value)?;
        }
        config.validate()?;
        Ok(config)
    }

    /// The whole configuration as TOML, every default written out.
    pub fn to_toml(&self) -> Result<String> {
        let mut table = self.to_table();
        if !self.loss.is_empty() {
            for key in RECIPE_KEYS {
                table.remove(key);
            }
        }
        toml::to_string(&table).map_err(|error| Error::ConfigSyntax {
            message: error.to_string(),
        })
    }

    /// Sets one key (dotted: `lora.rank`, `loss.0.temperature`) from text: a TOML value, or a bare string.
    /// Validate when all are set.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let parsed = format!("value = {value}").parse::<toml::Table>();
        let value = match parsed {
            Ok(mut table) if table.len() == 1 => table.remove("value"),
            _ => None,
        }
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        self.set_value(key, value)
    }

    /// Checks every value and that they fit together.
    pub fn validate(&self) -> Result<()> {
        let positive =
            |key: &str, value: f64| in_range(key, value, value > 0.0, "it must be above 0");
        let not_negative =
            |key: &str, value: f64| in_range(key, value, value >= 0.0, "it must not be below 0");
        let share = |key: &str, value: f64| {
            in_range(
                key,
                value,
                (0.0..1.0).contains(&value),
                "it must be in [0, 1)",
            )
        };
        let count =
            |key: &str, value: u64| in_range(key, value as f64, value > 0, "it must be at least 1");
        count("epochs", u64::from(self.epochs))?;
        count("max_steps", self.max_steps.unwrap_or(1))?;
        count("batch_size", self.batch_size as u64)?;
        count("gradient_accumulation", self.gradient_accumulation as u64)?;
        count("prefetch", self.prefetch as u64)?;
        count("bucket_batches", self.bucket_batches as u64)?;
        positive("learning_rate", self.learning_rate)?;
        share("warmup_ratio", self.warmup_ratio)?;
        not_negative("weight_decay", self.weight_decay)?;
        share("betas", self.betas[0])?;
        share("betas", self.betas[1])?;
        positive("eps", self.eps)?;
        not_negative("max_grad_norm", self.max_grad_norm)?;
        let fraction_fits = self.fraction > 0.0 && self.fraction <= 1.0;
        in_range(
            "fraction",
            self.fraction,
            fraction_fits,
            "it must be above 0 and at most 1",
        )?;
        in_range(
            "lora.rank",
            self.lora.rank as f64,
            self.lora.rank > 0,
            "it must be at least 1",
        )?;
        // At 0 nothing would reach the adapters, and nothing come of them.
        in_range(
            "lora.alpha",
            self.lora.alpha,
            self.lora.alpha > 0.0 && self.lora.alpha.is_finite(),
            "it must be above 0",
        )?;
        share("lora.dropout", self.lora.dropout)?;
        self.device()?;
        if self.mode == Mode::Full && self.recompute {
            return Err(Error::BadValue {
                key: "recompute".to_owned(),
                value: "true".to_owned(),
                message: "it is for adapters; mode = \"full\" trains the embedding too".to_owned(),
            });
        }
        if self.mode == Mode::Full && self.quantize != Quantize::None {
            return Err(Error::BadValue {
                key: "quantize".to_owned(),
                value: "\"int8\"".to_owned(),
                message: "with mode = \"full\" there is no frozen base".to_owned(),
            });
        }
        self.refuse_recipe_beside_losses()?;
        let terms = self.terms();
        if terms.is_empty() {
            let (key, others) = if self.loss.is_empty() {
                ("soft_weight", "hard_weight is")
            } else {
                ("loss.0.weight", "the others are")
            };
            return Err(Error::BadValue {
                key: key.to_owned(),
                value: "0".to_owned(),
                message: format!("{others} 0 too, so there is no loss to train on"),
            });
        }
        terms.iter().try_for_each(LossTerm::validate)
    }

    /// How to open the cache.
    pub fn io(&self) -> caskd_formats::Io {
        match self.io {
            CacheIo::Mmap => caskd_formats::Io::Mmap,
            CacheIo::Read => caskd_formats::Io::Read,
        }
    }

    /// Kind of the frozen weights.
    pub fn kind(&self) -> tch::Kind {
        match self.dtype {
            Dtype::F32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }

    /// The device by name.
    pub fn device(&self) -> Result<tch::Device> {
        let unavailable = || Error::NoDevice {
            device: self.device.clone(),
        };
        match self.device.as_str() {
            "cpu" => Ok(tch::Device::Cpu),
            name => {
                let index = name
                    .strip_prefix("cuda:")
                    .and_then(|index| index.parse::<usize>().ok());
                let index = index.ok_or_else(unavailable)?;
                if (index as i64) < tch::Cuda::device_count() {
                    Ok(tch::Device::Cuda(index))
                } else {
                    Err(unavailable())
                }
            }
        }
    }

    /// The first key in which two configurations differ and a resumed run must not, with both values.
    pub(crate) fn first_difference(&self, now: &TrainConfig) -> Option<(String, String, String)> {
        let (then, now) = (flattened(&self.to_table()), flattened(&now.to_table()));
        let value = |of: &[(String, toml::Value)], key: &str| {
            of.iter()
                .find(|(name, _)| name == key)
                .map_or_else(|| "not set".to_owned(), |(_, value)| value.to_string())
        };
        let keys = then.iter().chain(&now).map(|(key, _)| key.as_str());
        keys.filter(|key| !KEYS_WITHOUT_EFFECT.contains(key))
            .find(|key| value(&then, key) != value(&now, key))
            .map(|key| (key.to_owned(), value(&then, key), value(&now, key)))
    }

    fn set_value(&mut self, key: &str, value: toml::Value) -> Result<()> {
        if let Some((index, of_term)) = key
            .strip_prefix("loss.")
            .and_then(|rest| rest.split_once('.'))
        {
            let term = index.parse::<usize>().ok();
            let count = self.loss.len();
            let Some(term) = term.and_then(|index| self.loss.get_mut(index)) else {
                return Err(Error::BadValue {
                    key: key.to_owned(),
                    value: value.to_string(),
                    message: format!(
                        "there are {count} [[loss]] entries, and the first one is loss.0"
                    ),
                });
            };
            let mut table = term.to_table();
            table.insert(canonical(of_term, &table).to_owned(), value);
            *term = LossTerm::from_table(&table)?;
            return Ok(());
        }
        if !known_keys().iter().any(|known| known == key) {
            return Err(Error::UnknownKey {
                key: key.to_owned(),
                nearest: nearest_key(key),
            });
        }
        if let ("loss", toml::Value::Array(terms)) = (key, &value)
            && let Some(terms) = terms
                .iter()
                .map(toml::Value::as_table)
                .collect::<Option<Vec<_>>>()
        {
            self.loss = terms
                .into_iter()
                .map(LossTerm::from_table)
                .collect::<Result<_>>()?;
            return Ok(());
        }
        let shown = value.to_string();
        let mut table = self.to_table();
        match key.split_once('.') {
            Some((parent, child)) => {
                if let Some(toml::Value::Table(nested)) = table.get_mut(parent) {
                    nested.insert(child.to_owned(), value);
                }
            }
            None => drop(table.insert(key.to_owned(), value)),
        }
        *self = table
            .try_into()
            .map_err(|error: toml::de::Error| Error::BadValue {
                key: key.to_owned(),
                value: shown,
                message: error.message().to_owned(),
            })?;
        Ok(())
    }

    pub(crate) fn to_table(&self) -> toml::Table {
        // Plain numbers, strings and lists: nothing here that TOML could not express.
        toml::Table::try_from(self).unwrap_or_default()
    }

    fn refuse_recipe_beside_losses(&self) -> Result<()> {
        if self.loss.is_empty() {
            return Ok(());
        }
        let (now, default) = (self.to_table(), TrainConfig::default().to_table());
        match RECIPE_KEYS
            .iter()
            .find(|&&key| now.get(key) != default.get(key))
        {
            Some(&key) => Err(Error::RecipeBesideLosses {
                key: key.to_owned(),
            }),
            None => Ok(()),
        }
    }
}

fn in_range(key: &str, value: f64, fits: bool, message: &str) -> Result<()> {
    if fits && value.is_finite() {
        return Ok(());
    }
    Err(Error::BadValue {
        key: key.to_owned(),
        value: value.to_string(),
        message: message.to_owned(),
    })
}

/// Every key, dotted where nested (`lora.rank`); `loss` counts as one.
pub(crate) fn known_keys() -> Vec<String> {
    let every_option_set = TrainConfig {
        max_steps: Some(1),
        temperature_squared: Some(true),
        teacher_tokenizer: Some(String::new()),
        tensorboard: Some(PathBuf::new()),
        shards: vec![PathBuf::new()],
        ..TrainConfig::default()
    };
    let mut keys: Vec<String> = flattened(&every_option_set.to_table())
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    keys.push("loss".to_owned());
    keys
}

/// Keys and values with one level of nesting dotted.
pub(crate) fn flattened(table: &toml::Table) -> Vec<(String, toml::Value)> {
    let mut flat = Vec::new();
    for (key, value) in table {
        match value {
            toml::Value::Table(nested) => {
                flat.extend(
                    nested
                        .iter()
                        .map(|(child, value)| (format!("{key}.{child}"), value.clone())),
                );
            }
            value => flat.push((key.clone(), value.clone())),
        }
    }
    flat
}

/// The known key of least edit distance, when it is near enough to be meant.
fn nearest_key(key: &str) -> Option<String> {
    nearest_of(key, known_keys())
}

/// Of some names (dotted ones count by their last part too) the one of least edit distance, when it
/// is near enough to be meant.
pub(crate) fn nearest_of(name: &str, known: impl IntoIterator<Item = String>) -> Option<String> {
    let normal = name.to_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|known| {
            let plain = known.replace('-', "_");
            let last = plain.rsplit('.').next().unwrap_or_default();
            let distance = edit_distance(&normal, &plain).min(edit_distance(&normal, last));
            (distance, known)
        })
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(normal.len()) / 2)
        .map(|(_, known)| known)
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_round_trips_and_overrides_apply() {
        let mut config =
            TrainConfig::from_toml("epochs = 2\nlayers = [3, 6]\n[lora]\nrank = 4\n").unwrap();
        config.set("lora.alpha", "32").unwrap();
        config.set("layers", "last-middle").unwrap();
        config.set("temperature_squared", "false").unwrap();
        config.set("learning_rate", "1").unwrap();
        assert_eq!(
            (config.epochs, config.lora.rank, config.lora.alpha),
            (2, 4, 32.0)
        );
        assert_eq!(
            (config.layers.clone(), config.temperature_squared),
            (Layers::LastMiddle, Some(false))
        );
        assert_eq!(
            TrainConfig::from_toml(&config.to_toml().unwrap()).unwrap(),
            config
        );
        let explicit = "[[loss]]\nkind = \"kl\"\nweight = 0.5\ntemperature = 4\n\
                        [[loss]]\nkind = \"knowledge-alignment\"\nlayers = \"last\"\n";
        let explicit = TrainConfig::from_toml(explicit).unwrap();
        assert_eq!(explicit.terms().len(), 2);
        let mut hotter = explicit.clone();
        hotter.set("loss.0.tau", "8").unwrap();
        hotter.set("loss.1.layers", "last-middle").unwrap();
        hotter.set("loss.0.logits_norm", "min-max").unwrap();
        hotter.set("lora.targets", "q_proj, v_proj").unwrap();
        assert_eq!(hotter.lora.targets, ["q_proj", "v_proj"]);
        let text = hotter.to_toml().unwrap();
        assert!(
            ["temperature = 8.0", "\"last-middle\"", "\"max-min\""]
                .iter()
                .all(|part| text.contains(part)),
            "{text}"
        );
        for bad in ["loss.2.temperature", "loss.0.heat", "loss.x.weight"] {
            assert!(hotter.set(bad, "1").is_err(), "{bad}");
        }
        assert_eq!(
            TrainConfig::from_toml(&explicit.to_toml().unwrap()).unwrap(),
            explicit
        );
    }

    #[test]
    fn bad_configurations_are_named() {
        let check = |text: &str, message: &str| {
            let error = TrainConfig::from_toml(text).unwrap_err();
            let said = format!("{error} / {}", error.hint().unwrap_or_default());
            assert!(said.contains(message), "{text:?} gave {said:?}");
            assert!(error.is_user());
        };
        check("lerning_rate = 1", "did you mean `learning_rate`?");
        check("[lora]\nrnk = 3", "did you mean `lora.rank`?");
        check("rank = 3", "did you mean `lora.rank`?");
        check("hard_label_weight = 3", "did you mean `hard_weight`?");
        check(
            "xyzzyxyzzyxyzzy = 3",
            "unknown configuration key `xyzzyxyzzyxyzzy`",
        );
        check("epochs = \"two\"", "`epochs` = \"two\" is not possible");
        check("epochs = 0", "at least 1");
        check("[lora]\nalpha = 0", "above 0");
        check("learning_rate = nan", "above 0");
        check("fraction = 1.5", "at most 1");
        check("kd_type = \"mse\"", "dual-scaling");
        check("mode = \"full\"\nquantize = \"int8\"", "no frozen base");
        check("mode = \"half\"", "lora");
        check("layers = \"first\"", "last-middle");
        check("hard_weight = 0\nsoft_weight = 0", "no loss to train on");
        check("[[loss]]\nkind = \"kl\"\nweight = 0", "`loss.0.weight` = 0");
        check("hard_weight = -1", "not be below 0");
        check("device = \"tpu\"", "device `tpu` is not available");
        check("epochs = ", "does not parse");
        check(
            "gamma = 2\n[[loss]]\nkind = \"kl\"",
            "`gamma` has no effect",
        );
        check("[[loss]]\nkind = \"kl\"\nheat = 2", "heat");
        check("[[loss]]\nkind = \"cosine\"", "cosine");
        check(
            "sigma = \"sample\"\ndetach_sigma = false\nkd_type = \"dual-scaling\"",
            "detach_sigma",
        );
        check("tail = \"uniform\"\nscaling_value = 2", "temperature");
    }

    #[test]
    fn differences_are_found_where_they_matter() {
        let config = TrainConfig::default();
        assert_eq!(
            config.first_difference(&TrainConfig {
                prefetch: 9,
                ..config.clone()
            }),
            None
        );
        let (key, then, now) = config
            .first_difference(&TrainConfig {
                max_steps: Some(3),
                ..config.clone()
            })
            .unwrap();
        assert_eq!(
            (key.as_str(), then.as_str(), now.as_str()),
            ("max_steps", "not set", "3")
        );
    }
}
