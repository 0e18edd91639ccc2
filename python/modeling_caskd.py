"""Networks that caskd pruned, for transformers: blocks of the sizes in `caskd_layers` of config.json.

`caskd export-model --pruned own-config` puts this file beside the weights; load the folder with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

import copy

import torch
from torch import nn
from transformers import BloomForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention


def _resize(blocks, config):
    """Gives each block of a Llama-like network its own heads and FFN channels."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, (block, sizes) in enumerate(zip(blocks, config.caskd_layers)):
        own = copy.deepcopy(config)
        own.head_dim = head_dim
        own.num_attention_heads = sizes["heads"]
        own.num_key_value_heads = sizes["kv_heads"]
        own.intermediate_size = sizes["intermediate_size"]
        block.self_attn = type(block.self_attn)(own, index)
        block.mlp = type(block.mlp)(own)


class CaskdLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        _resize(self.model.layers, config)
        self.post_init()


class CaskdMistralForCausalLM(MistralForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        _resize(self.model.layers, config)
        self.post_init()


class CaskdQwen2ForCausalLM(Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        _resize(self.model.layers, config)
        self.post_init()


class _FewerHeads(BloomAttention):
    """Attention of the heads that are left, each with the position bias of its place among all heads."""

    def __init__(self, config, index, places):
        super().__init__(config, index)
        width = len(places) * self.head_dim
        self.places, self.all_heads, self.num_heads = places, config.n_head, len(places)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width)
        self.dense = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states, residual, alibi, *rest, **named):
        own = torch.tensor(self.places, device=alibi.device)
        alibi = alibi.unflatten(0, (-1, self.all_heads)).index_select(1, own).flatten(0, 1)
        return super().forward(hidden_states, residual, alibi, *rest, **named)


class CaskdBloomForCausalLM(BloomForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for index, places in enumerate(getattr(config, "caskd_heads", None) or []):
            if len(places) < config.n_head:
                self.transformer.h[index].self_attention = _FewerHeads(config, index, places)
        for block, sizes in zip(self.transformer.h, config.caskd_layers):
            channels = sizes["intermediate_size"]
            block.mlp.dense_h_to_4h = nn.Linear(config.hidden_size, channels)
            block.mlp.dense_4h_to_h = nn.Linear(channels, config.hidden_size)
        self.post_init()


# Trained further and saved by transformers, a model takes this file along.
for _model in (CaskdLlamaForCausalLM, CaskdMistralForCausalLM, CaskdQwen2ForCausalLM, CaskdBloomForCausalLM):
    _model.register_for_auto_class("AutoModelForCausalLM")
