"""Makes the tiny GGUF files beside it, and what Hugging Face transformers (with the gguf package) makes of them.

    python make_gguf.py

Random networks, written as llama.cpp's converter writes them: its names, its order of rows, its types. `mixed` holds one
tensor of every type that caskd reads; the types that the gguf package only reads are random blocks.
Written with gguf 0.19, transformers 4.57, torch 2.13.
"""

import json
import pathlib

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).parent
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<unk>", "<s>", "</s>", *LETTERS, "ab", "cd", "abcd"]
MERGES = ["a b", "c d", "ab cd"]
KINDS = [3, 3, 3] + [1] * (len(TOKENS) - 3)


def write(name, architecture, numbers, floats, tensors):
    writer = GGUFWriter(HERE / f"{name}.gguf", architecture)
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in floats.items():
        writer.add_float32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor, (values, kind) in tensors.items():
        writer.add_tensor(tensor, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = AutoModelForCausalLM.from_pretrained(HERE, gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    ids = torch.randint(0, len(TOKENS), (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
    golden = {"input_ids": ids, "logits": out.logits, "loss": out.loss}
    golden |= {f"hidden.{i}": h[..., ::5] for i, h in enumerate(out.hidden_states)}
    # Values of every weight, as the gguf package dequantises it.
    golden |= {f"weight.{k}": v.flatten()[::23][:100] for k, v in model.named_parameters()}
    save_file({k: v.detach().contiguous().clone() for k, v in golden.items()}, HERE / f"{name}.safetensors")


def normal(rng, *shape, mean=0.0, scale=0.3):
    return rng.normal(mean, scale, shape).astype(np.float32)


def stored(values, kind):
    """An array of f32 as a tensor of a type that the gguf package can write."""
    return (values, kind) if kind == Type.F32 else (quantize(values, kind), kind)


def random_blocks(rng, rows, columns, kind):
    """Random blocks of a type of llama.cpp's k-quants (256 values each): random bits under small scales."""
    size = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(4e-4).tobytes(), np.uint8)
    if kind == Type.Q6_K:
        blocks[..., 208:210] = scale
    else:
        # The scale and that of the minima, both f16.
        blocks[..., 0:2] = scale
        blocks[..., 2:4] = scale
    return blocks.reshape(rows, -1), kind


def mixed():
    rng = np.random.default_rng(0)
    width, channels = 256, 32
    f32 = lambda *shape, **settings: stored(normal(rng, *shape, **settings), Type.F32)
    tensors = {
        "token_embd.weight": random_blocks(rng, len(TOKENS), width, Type.Q6_K),
        "output_norm.weight": f32(width, mean=1.0, scale=0.1),
        "output.weight": stored(normal(rng, len(TOKENS), width, scale=0.1), Type.Q5_1),
        "blk.0.attn_norm.weight": f32(width, mean=1.0, scale=0.1),
        "blk.0.attn_q.weight": random_blocks(rng, 16, width, Type.Q4_K),
        "blk.0.attn_k.weight": random_blocks(rng, 8, width, Type.Q5_K),
        "blk.0.attn_v.weight": stored(normal(rng, 8, width), Type.Q8_0),
        "blk.0.attn_output.weight": stored(normal(rng, width, 16), Type.F16),
        "blk.0.ffn_norm.weight": f32(width, mean=1.0, scale=0.1),
        "blk.0.ffn_gate.weight": stored(normal(rng, channels, width), Type.Q4_0),
        "blk.0.ffn_up.weight": stored(normal(rng, channels, width), Type.Q4_1),
        "blk.0.ffn_down.weight": stored(normal(rng, width, channels), Type.BF16),
    }
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": channels,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8, "attention.value_length": 8,
        "rope.dimension_count": 8,
    }
    write("gguf_mixed", "llama", numbers, {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500.0}, tensors)


def qwen2():
    rng = np.random.default_rng(1)
    width, channels = 16, 24
    f32 = lambda *shape, **settings: stored(normal(rng, *shape, **settings), Type.F32)
    tensors = {"token_embd.weight": f32(len(TOKENS), width), "output_norm.weight": f32(width, mean=1.0, scale=0.1)}
    for i in range(2):
        tensors |= {
            f"blk.{i}.attn_norm.weight": f32(width, mean=1.0, scale=0.1),
            f"blk.{i}.attn_q.weight": f32(16, width), f"blk.{i}.attn_q.bias": f32(16),
            f"blk.{i}.attn_k.weight": f32(8, width), f"blk.{i}.attn_k.bias": f32(8),
            f"blk.{i}.attn_v.weight": f32(8, width), f"blk.{i}.attn_v.bias": f32(8),
            f"blk.{i}.attn_output.weight": f32(width, 16),
            f"blk.{i}.ffn_norm.weight": f32(width, mean=1.0, scale=0.1),
            f"blk.{i}.ffn_gate.weight": f32(channels, width), f"blk.{i}.ffn_up.weight": f32(channels, width),
            f"blk.{i}.ffn_down.weight": f32(width, channels),
        }
    numbers = {
        "block_count": 2, "context_length": 64, "embedding_length": width, "feed_forward_length": channels,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }
    write("gguf_qwen2", "qwen2", numbers, {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1000.0}, tensors)


def bloom():
    rng = np.random.default_rng(2)
    width = 12
    f32 = lambda *shape, **settings: stored(normal(rng, *shape, **settings), Type.F32)
    norm = lambda name: {f"{name}.weight": f32(width, mean=1.0, scale=0.1), f"{name}.bias": f32(width)}
    tensors = {"token_embd.weight": f32(len(TOKENS), width)} | norm("token_embd_norm") | norm("output_norm")
    for i in range(2):
        # All queries, then all keys, then all values.
        tensors |= norm(f"blk.{i}.attn_norm") | norm(f"blk.{i}.ffn_norm") | {
            f"blk.{i}.attn_qkv.weight": f32(3 * width, width), f"blk.{i}.attn_qkv.bias": f32(3 * width),
            f"blk.{i}.attn_output.weight": f32(width, width), f"blk.{i}.attn_output.bias": f32(width),
            f"blk.{i}.ffn_up.weight": f32(4 * width, width), f"blk.{i}.ffn_up.bias": f32(4 * width),
            f"blk.{i}.ffn_down.weight": f32(width, 4 * width), f"blk.{i}.ffn_down.bias": f32(width),
        }
    numbers = {
        "block_count": 2, "context_length": 64, "embedding_length": width, "feed_forward_length": 4 * width,
        "attention.head_count": 3, "attention.head_count_kv": 3,
    }
    write("gguf_bloom", "bloom", numbers, {"attention.layer_norm_epsilon": 1e-5}, tensors)


SPACE = "\u2581"
STRINGS = [
    "", "a", " a", "the cat", "  the  cat ", "that\nthen", "Hat", "naïve 🙂", "the<s>cat", "</s> the", "aaaa", "cathe", "\t", "thethe",
]


def sentence_piece():
    """A file that holds only a tokenizer, and the ids that transformers makes with it."""
    pieces = [SPACE, *"ahetcnHs", "th", "at", "he", "the", SPACE + "t", SPACE + "th", SPACE + "the", "cat", SPACE + "c", "aa", SPACE + SPACE]
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + pieces
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    # Pieces of several characters by their place, single ones last, as SentencePiece's trainer scores them.
    scores = [0.0] * 259 + [-float(i) if len(p) > 1 else -100.0 for i, p in enumerate(pieces)]
    writer = GGUFWriter(HERE / "gguf_sentence_piece.gguf", "llama")
    writer.add_uint32("llama.context_length", 64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = AutoTokenizer.from_pretrained(HERE, gguf_file="gguf_sentence_piece.gguf")
    rows = [{"text": s, "ids": theirs(s)["input_ids"]} for s in STRINGS]
    (HERE / "gguf_sentence_piece.json").write_text(json.dumps(rows, ensure_ascii=True, indent=0) + "\n")


if __name__ == "__main__":
    sentence_piece()
    mixed()
    qwen2()
    bloom()
