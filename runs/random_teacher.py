#!/usr/bin/env python3
"""Writes a Llama of a real size with random weights, as a Hugging Face folder in bf16: a teacher for measuring what is larger
than memory. Only numpy is needed; one tensor is in memory at a time.

    runs/random_teacher.py OUT [--shape 7b|1b|tiny] [--seed 0]

7b takes 13.5 GB of disk and about two minutes.
"""

import argparse
import json
import os
import pathlib
import struct

import numpy

SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, vocab_size=32000),
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, vocab_size=512),
}
LAYERS_IN_A_FILE = 4


def tensors(shape):
    """Files, each a list of (name, dimensions)."""
    width, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]

    def block(index):
        path = f"model.layers.{index}"
        square = [(f"{path}.self_attn.{name}_proj.weight", (width, width)) for name in "qkvo"]
        return [
            (f"{path}.input_layernorm.weight", (width,)),
            *square,
            (f"{path}.post_attention_layernorm.weight", (width,)),
            (f"{path}.mlp.gate_proj.weight", (inner, width)),
            (f"{path}.mlp.up_proj.weight", (inner, width)),
            (f"{path}.mlp.down_proj.weight", (width, inner)),
        ]

    layers = list(range(shape["num_hidden_layers"]))
    files = [[("model.embed_tokens.weight", (vocab, width))]]
    for first in range(0, len(layers), LAYERS_IN_A_FILE):
        files.append([entry for index in layers[first : first + LAYERS_IN_A_FILE] for entry in block(index)])
    files.append([("model.norm.weight", (width,)), ("lm_head.weight", (vocab, width))])
    return files


def bf16(name, dimensions, rng):
    """Norms are one; all else is normal with the deviation of a trained network's projections."""
    if name.endswith("norm.weight"):
        values = numpy.ones(dimensions, numpy.float32)
    else:
        values = rng.standard_normal(dimensions, numpy.float32) * numpy.float32(0.02)
    return (values.view(numpy.uint32) >> 16).astype("<u2")


def write_safetensors(path, entries, rng):
    header, end = {}, 0
    for name, dimensions in entries:
        size = 2 * int(numpy.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, dimensions in entries:
            file.write(bf16(name, dimensions, rng).tobytes())
        # Out of the page cache: pages that are there already count for no later control group that reads them.
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def byte_tokenizer():
    """The 256 bytes as tokens, by GPT-2's printable stand-ins."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": {stand_in[byte]: byte for byte in range(256)}, "merges": []},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape, out = SHAPES[arguments.shape], arguments.out
    out.mkdir(parents=True)
    rng = numpy.random.default_rng(arguments.seed)
    files = tensors(shape)
    weight_map = {}
    for index, entries in enumerate(files):
        name = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        write_safetensors(out / name, entries, rng)
        weight_map |= {tensor: name for tensor, _ in entries}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "num_key_value_heads": shape["num_attention_heads"], "bos_token_id": None, "eos_token_id": None, **shape,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))


if __name__ == "__main__":
    main()
