//! What a build is asked to do, and its resolution against the teacher.

use std::path::PathBuf;
use std::str::FromStr;

use caskd_formats::{CodeTarget, HiddenCodec, LayerSpec, Tier};
use tch::Kind;

use crate::data::DataOptions;
use crate::teacher::Placement;
use crate::{Error, Result};

/// Everything that [`crate::build()`] needs to know. The first group decides the cache's bytes.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The teacher: a Hugging Face folder or a GGUF file.
    pub teacher: PathBuf,
    /// Records (`.jsonl`, `.json`, `.parquet`) or running text (`.txt`), in this order.
    pub data: Vec<PathBuf>,
    /// How they become sequences.
    pub preparation: DataOptions,
    /// How much of the teacher's logits the cache can give back.
    pub tier: Tier,
    /// Kept entries K of the sorted logits; `None`: 64, or in the compact tier what serves the rate best.
    pub top_k: Option<usize>,
    /// What the compact tier's transform code is fitted to.
    pub code_target: CodeTarget,
    /// Hidden states to keep for alignment losses.
    pub layers: LayerChoice,
    /// How hidden states are stored.
    pub hidden_codec: HiddenCodec,
    /// Longest sequence in tokens; longer ones are cut and counted.
    pub max_len: usize,
    /// The type the teacher computes in: `Float` or `BFloat16`.
    pub kind: Kind,
    /// Tokens (padding included) of one teacher batch at most, if more than one sequence is in it.
    pub batch_tokens: usize,

    /// The cache's folder.
    pub out: PathBuf,
    /// Where the teacher runs, and in how much memory.
    pub placement: Placement,
    /// Go on with an interrupted build.
    pub resume: bool,
    /// Measure the cache on a sample before it is finished.
    pub fidelity: bool,
}

/// K where the user names none, in the sparse and the exact tier.
pub(crate) const USUAL_TOP_K: usize = 64;

/// `--layers`: which hidden states are kept beside what the tier needs itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerChoice {
    /// The last and the middle one in the exact tier; none in the others, where a hidden state in 8 bits would cost several
    /// times what the tier takes for itself.
    Usual,
    /// None.
    None,
    /// Named ones, in the numbering of Hugging Face's `output_hidden_states`.
    Layers(Vec<LayerName>),
}

/// One layer as the user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerName {
    /// After the last block and the final norm (L).
    Last,
    /// After block L/2.
    Middle,
    /// After block i; 0 is the embedding.
    Number(u32),
}

impl FromStr for LayerChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text.trim() == "none" {
            return Ok(Self::None);
        }
        text.split(',')
            .map(|word| match word.trim() {
                "last" => Ok(LayerName::Last),
                "middle" => Ok(LayerName::Middle),
                number => number.parse().map(LayerName::Number).map_err(|_| {
                    format!("`{number}` is none of: last, middle, none, a layer number")
                }),
            })
            .collect::<std::result::Result<_, _>>()
            .map(Self::Layers)
    }
}

impl LayerChoice {
    /// The layers to keep, ascending and distinct: the chosen ones, and layer L where the exact
    /// tier rebuilds logits from it.
    pub(crate) fn resolve(
        &self,
        num_layers: u32,
        width: usize,
        tier: Tier,
        codec: HiddenCodec,
    ) -> Result<Vec<LayerSpec>> {
        let mut layers: Vec<u32> = match self {
            Self::Usual if tier == Tier::Exact => vec![num_layers / 2, num_layers],
            Self::Usual | Self::None => Vec::new(),
            Self::Layers(names) => names
                .iter()
                .map(|name| match name {
                    LayerName::Last => num_layers,
                    LayerName::Middle => num_layers / 2,
                    LayerName::Number(number) => *number,
                })
                .collect(),
        };
        if let Some(beyond) = layers.iter().find(|&&layer| layer > num_layers) {
            return Err(Error::Option {
                problem: format!("the teacher has no layer {beyond}"),
                hint: format!(
                    "layers go from 0 (embeddings) to {num_layers} (after the final norm)"
                ),
            });
        }
        if tier == Tier::Exact {
            layers.push(num_layers);
        }
        layers.sort_unstable();
        layers.dedup();
        Ok(layers
            .into_iter()
            .map(|layer| LayerSpec {
                layer,
                width,
                codec,
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, tier: Tier, expected: &[u32]) {
        let choice: LayerChoice = text.parse().unwrap();
        let layers = choice.resolve(30, 8, tier, HiddenCodec::Int8).unwrap();
        assert_eq!(
            layers.iter().map(|spec| spec.layer).collect::<Vec<_>>(),
            expected,
            "{text}"
        );
    }

    #[test]
    fn layers_are_resolved_against_the_teacher() {
        check("last,middle", Tier::Sparse, &[15, 30]);
        check("none", Tier::Sparse, &[]);
        check("none", Tier::Exact, &[30]);
        for (tier, expected) in [
            (Tier::Sparse, &[][..]),
            (Tier::Exact, &[15, 30]),
            (Tier::Compact, &[]),
        ] {
            let layers = LayerChoice::Usual.resolve(30, 8, tier, HiddenCodec::Int8);
            let layers: Vec<u32> = layers.unwrap().iter().map(|spec| spec.layer).collect();
            assert_eq!(layers, expected, "{tier:?}");
        }
        check("7, 0,7", Tier::Exact, &[0, 7, 30]);
    }

    #[test]
    fn a_layer_that_the_teacher_lacks_is_refused() {
        let choice: LayerChoice = "31".parse().unwrap();
        let error = choice
            .resolve(30, 8, Tier::Sparse, HiddenCodec::Int8)
            .unwrap_err();
        assert!(error.to_string().contains("no layer 31"), "{error}");
        assert!("lasst".parse::<LayerChoice>().is_err());
    }
}
