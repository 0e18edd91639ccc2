//! The configuration as a file for people: every key with its value and what it does.

use std::fmt::Write as _;

use crate::config::{RECIPE_KEYS, flattened};
use crate::{Result, TrainConfig};

/// Headings, and under each its keys with what they do.
const SECTIONS: [(&str, &[(&str, &str)]); 6] = [
    (
        "The run",
        &[
            ("seed", "of the order, the adapters and the dropout"),
            ("epochs", "passes over the data"),
            (
                "max_steps",
                "ends the run early; the learning rate then falls to 0 at this step",
            ),
            ("batch_size", "sequences of one forward pass"),
            (
                "gradient_accumulation",
                "forward passes of one step; means are taken over all its targets",
            ),
            (
                "checkpoint_every",
                "steps between checkpoints; 0 writes one only when stopped",
            ),
            (
                "mode",
                "\"lora\" trains adapters, \"full\" all weights (docs/STUDENTS.md)",
            ),
            ("quantize", "the frozen projections: \"none\", or \"int8\""),
            (
                "recompute",
                "run each block again on the way back: far less memory, a third more time",
            ),
            (
                "teacher_tokenizer",
                "the teacher's folder or GGUF file, for a student with another tokenizer and the loss uld",
            ),
            (
                "dtype",
                "of the frozen weights: \"f32\" or \"bf16\"; adapters, losses and optimizer are f32 in any case",
            ),
            ("device", "\"cpu\" or \"cuda:N\""),
            (
                "allow_low_fidelity",
                "train even where the cache's gradient of a loss is off by more than 10%",
            ),
            ("tensorboard", "folder for TensorBoard's event files"),
        ],
    ),
    (
        "Streaming: the order is a pure function of the seed, the epoch and the sizes of the shards",
        &[
            (
                "fraction",
                "share of the sequences to train on, by a stable hash of their tokens",
            ),
            (
                "shuffle_shards",
                "shards shuffled together, in a seeded order of the shards; 0 takes all of them",
            ),
            (
                "bucket_batches",
                "batches among which sequences of like length come together; 1 turns it off",
            ),
            ("prefetch", "batches read ahead"),
            ("io", "\"mmap\", or \"read\" for network file systems"),
            (
                "shards",
                "list of folders with shards that do not lie beside their cache's manifest",
            ),
        ],
    ),
    (
        "The optimizer: AdamW",
        &[
            (
                "learning_rate",
                "at its peak: linear warm-up, then cosine decay to 0",
            ),
            ("warmup_ratio", "share of the steps that warm up"),
            ("weight_decay", "decoupled"),
            ("betas", "decay of the two moments"),
            ("eps", "added to the denominator"),
            (
                "max_grad_norm",
                "longer gradients (L2 over all parameters) are shortened to it; 0 turns it off",
            ),
        ],
    ),
    (
        "The loss, in the words of BayesKD's Table 2; [[loss]] entries replace all of this section (docs/LOSSES.md)",
        &[
            ("hard_weight", "of the cross-entropy with the hard labels"),
            (
                "soft_weight",
                "of the losses on logits and hidden states; 0 is fine-tuning without a teacher",
            ),
            ("kd_type", "\"kl\" or \"dual-scaling\""),
            (
                "scaling_value",
                "temperature of KL, base scaling value of Dual-Scaling",
            ),
            (
                "logits_norm",
                "ahead of the loss on logits: \"none\", \"max-min\", \"standardize\"",
            ),
            (
                "layers",
                "of Knowledge Alignment: \"none\", \"last\", \"last-middle\", or a list of teacher layers",
            ),
            (
                "hidden_norm",
                "ahead of Knowledge Alignment: \"none\", \"max-min\", \"standardize\"",
            ),
            (
                "sigma",
                "of Dual-Scaling: per \"position\" or per \"sample\"",
            ),
            ("detach_sigma", "no gradient through the student's sigma"),
            ("gamma", "of Eq. 1"),
            (
                "temperature_squared",
                "times scaling_value squared; left out: yes for KL, no for Dual-Scaling",
            ),
            (
                "logit_reduction",
                "\"mean\" over targets, or the \"paper\"'s sum / N^2",
            ),
            (
                "hidden_reduction",
                "\"mean\" over the width, or the \"paper\"'s sum",
            ),
            ("hidden_positions", "\"all\", or only \"targets\""),
            ("beta", "of Eq. 7, for every layer"),
            (
                "tail",
                "of KL on a sparse cache: \"refuse\", \"uniform\", \"ghost\"",
            ),
        ],
    ),
    ("Or explicit terms, for instance", &[("loss", "")]),
    (
        "The adapters",
        &[
            ("lora.rank", "r"),
            ("lora.alpha", "the update is scaled by alpha / rank"),
            (
                "lora.dropout",
                "probability that an input element of an adapter is dropped",
            ),
            ("lora.targets", "projections that get an adapter"),
        ],
    ),
];

const EXAMPLE_OF_TERMS: &str = "\
# [[loss]]
# kind = \"cross-entropy\"
# weight = 0.1
#
# [[loss]]
# kind = \"dual-scaling\"
# weight = 1e-3
# scaling_value = 8
";

impl TrainConfig {
    /// The whole configuration as TOML with a comment on every key; those without a value are
    /// commented out.
    pub fn to_commented_toml(&self) -> Result<String> {
        let values = flattened(&self.to_table());
        let mut text = String::new();
        // Tables come last in TOML: what follows them would belong to them.
        let mut tables = self.loss_table();
        for (heading, keys) in SECTIONS {
            let is_table = keys.iter().all(|(key, _)| key.contains('.'));
            let out = if is_table { &mut tables } else { &mut text };
            let _ = writeln!(out, "# {heading}\n");
            if let Some((table, _)) = keys[0].0.split_once('.') {
                let _ = writeln!(out, "[{table}]");
            }
            for (key, does) in keys {
                if *key == "loss" {
                    if self.loss.is_empty() {
                        out.push_str(EXAMPLE_OF_TERMS);
                    }
                    continue;
                }
                let replaced = !self.loss.is_empty() && RECIPE_KEYS.contains(key);
                let value = values.iter().find(|(name, _)| name == key);
                let plain = key.rsplit('.').next().unwrap_or(key);
                let line = match value {
                    Some((_, value)) if !replaced => format!("{plain} = {value}"),
                    _ => format!("# {plain} ="),
                };
                let _ = writeln!(out, "{line}  # {does}");
            }
            out.push('\n');
        }
        text.push_str(&tables);
        Ok(text.trim_end().to_owned() + "\n")
    }

    /// The `[[loss]]` entries alone.
    fn loss_table(&self) -> String {
        if self.loss.is_empty() {
            return String::new();
        }
        let mut table = toml::Table::new();
        if let Some(loss) = self.to_table().remove("loss") {
            table.insert("loss".to_owned(), loss);
        }
        // It was a part of a table that could be written.
        toml::to_string(&table).unwrap_or_default() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::known_keys;

    #[test]
    fn every_key_is_explained_and_the_text_is_the_configuration() {
        let explained: Vec<&str> = SECTIONS
            .iter()
            .flat_map(|(_, keys)| keys.iter().map(|(key, _)| *key))
            .collect();
        for key in known_keys() {
            assert!(
                explained.contains(&key.as_str()),
                "`{key}` is not explained"
            );
        }
        assert_eq!(explained.len(), known_keys().len());

        let mut changed = TrainConfig::default();
        changed.set("lora.rank", "3").unwrap();
        changed.set("max_steps", "7").unwrap();
        changed.set("tensorboard", "a \"board\"").unwrap();
        changed.set("shards", "[\"near\", \"far\"]").unwrap();
        let terms = "seed = 3\n[[loss]]\nkind = \"kl\"\ntemperature = 4.0\n[[loss]]\nkind = \"cross-entropy\"\n";
        let terms = TrainConfig::from_toml(terms).unwrap();
        for config in [TrainConfig::default(), changed, terms] {
            let text = config.to_commented_toml().unwrap();
            assert_eq!(TrainConfig::from_toml(&text).unwrap(), config, "{text}");
        }
        let example = EXAMPLE_OF_TERMS.replace("# ", "").replace('#', "");
        assert_eq!(TrainConfig::from_toml(&example).unwrap().loss.len(), 2);
    }
}
