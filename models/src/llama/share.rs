//! Another network on the same base weights.

use super::{Attention, Block, Llama, Mlp, RmsNorm, Rotary};
use crate::LoadedModel;
use crate::linear::Linear;

impl LoadedModel {
    /// The same model once more, without adapters: the base weights are shared, not copied, so that many students
    /// in turn can be trained on weights that were loaded once.
    #[must_use]
    pub fn share(&self) -> LoadedModel {
        LoadedModel {
            network: self.network.share(),
            tokenizer: self.tokenizer.clone(),
            fingerprint: self.fingerprint.clone(),
            digest: self.digest.clone(),
            name: self.name.clone(),
            bos: self.bos,
            eos: self.eos,
            tokenizer_config: self.tokenizer_config.clone(),
        }
    }
}

impl Llama {
    /// A network without adapters on the same base weights. Nothing changes them in place: merging and pruning put
    /// new tensors into the network they are called on.
    #[must_use]
    pub fn share(&self) -> Llama {
        Llama {
            config: self.config.clone(),
            embedding: self.embedding.shallow_clone(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            norm: self.norm.share(),
            head: self.head.shallow_clone(),
            rotary: Rotary {
                frequencies: self.rotary.frequencies.clone(),
            },
            lora: None,
            dropout_seed: 0,
        }
    }
}

impl Block {
    fn share(&self) -> Block {
        Block {
            input_norm: self.input_norm.share(),
            attention: Attention {
                q_proj: self.attention.q_proj.share(),
                k_proj: self.attention.k_proj.share(),
                v_proj: self.attention.v_proj.share(),
                o_proj: self.attention.o_proj.share(),
                head_dim: self.attention.head_dim,
            },
            post_attention_norm: self.post_attention_norm.share(),
            mlp: Mlp {
                gate_proj: self.mlp.gate_proj.share(),
                up_proj: self.mlp.up_proj.share(),
                down_proj: self.mlp.down_proj.share(),
            },
        }
    }
}

impl RmsNorm {
    fn share(&self) -> RmsNorm {
        RmsNorm {
            weight: self.weight.shallow_clone(),
            eps: self.eps,
        }
    }
}

impl Linear {
    fn share(&self) -> Linear {
        Linear::new(
            self.weight.shallow_clone(),
            self.bias.as_ref().map(tch::Tensor::shallow_clone),
        )
    }
}
