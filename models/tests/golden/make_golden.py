"""Makes the golden numbers beside it with Hugging Face transformers.

    python make_golden.py tiny [NAME ...]      tiny random networks, saved with their outputs
    python make_golden.py teacher FILE.gguf    numbers of the real teacher, and its tokenizer's ids

Needs torch, transformers, tokenizers, gguf, safetensors. The seven networks of `LLAMA` were written with torch 2.13 and
transformers 5.23, the others and the teacher's numbers with transformers 4.57: both forms of `config.json` are read.
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).parent

LLAMA = {
    "mha_tied": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True),
    "gqa_untied": dict(hidden_size=18, num_attention_heads=6, num_key_value_heads=2, head_dim=6, rope_theta=500000.0),
    "mqa_tied": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-3, tie_word_embeddings=True, rope_theta=100.0),
    "biases": dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama3_rope": dict(
        num_attention_heads=2, num_key_value_heads=2,
        rope_scaling=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "bf16_sharded": dict(num_attention_heads=4, num_key_value_heads=2),
    "f16": dict(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1),
}


OTHERS = {
    "llama_linear_rope": dict(num_attention_heads=2, num_key_value_heads=2, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "qwen2_tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1000.0),
    "qwen2_untied": dict(hidden_size=18, num_attention_heads=3, num_key_value_heads=1),
    "qwen2_window": dict(
        num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3,
        use_sliding_window=True, sliding_window=5, max_window_layers=1,
    ),
    "mistral_full": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=None),
    "mistral_window": dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=4),
    "bloom_4": dict(n_head=4),
    "bloom_3_untied": dict(n_head=3, hidden_size=18, tie_word_embeddings=False),
    "bloom_5_post_norm": dict(n_head=5, hidden_size=20, apply_residual_connection_post_layernorm=True),
    "bloom_7_bare": dict(n_head=7, hidden_size=14, n_layer=1),
}


def tiny(names):
    for seed, (name, changes) in enumerate((LLAMA | OTHERS).items()):
        if names and name not in names:
            continue
        torch.manual_seed(seed)
        kind = name.split("_")[0] if name.split("_")[0] in ("qwen2", "mistral", "bloom") else "llama"
        if kind == "bloom":
            settings = dict(vocab_size=41, hidden_size=16, n_layer=2, initializer_range=0.4, bos_token_id=1, eos_token_id=2)
        else:
            settings = dict(
                vocab_size=41, hidden_size=16, intermediate_size=18, num_hidden_layers=2, max_position_embeddings=64,
                initializer_range=0.4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            )
        config = AutoConfig.for_model(kind, **(settings | changes))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if key.endswith("bias"):
                    value.normal_(0, 0.3)
                elif "norm" in key or "ln_f" in key:
                    value.normal_(1, 0.2)
        dtype = {"bf16_sharded": torch.bfloat16, "f16": torch.float16}.get(name, torch.float32)
        model = model.to(dtype)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        # Without its head a network is saved without the first part of every name, as the BLOOM models are published.
        saved = model.transformer if name.endswith("_bare") else model
        saved.save_pretrained(folder, max_shard_size="8KB" if "sharded" in name else "1GB")
        (folder / "generation_config.json").unlink(missing_ok=True)

        # Stored in half precision, computed in f32: what the loader has to give. Loaded anew, because
        # `.to(bfloat16)` rounds the rotary frequencies too.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            out = model(ids, labels=ids, output_hidden_states=True)
        numbers = {"input_ids": ids, "logits": out.logits, "loss": out.loss}
        numbers |= {f"hidden.{i}": h for i, h in enumerate(out.hidden_states)}
        save_file({k: v.contiguous().clone() for k, v in numbers.items()}, folder / "golden.safetensors")
        tiny_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}\n')


def tiny_tokenizer(vocab_size):
    """Words w3, w4, ... between three special tokens: enough to be loaded, compared and saved."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TEXT = (
    "A cask keeps what was poured into it, long after the press has gone quiet. In the same way a cache keeps "
    "what a large network said about a text, so that smaller ones can learn from it at any hour. The teacher "
    "reads every sentence once; 128 students, or 4,096 of them, may read its notes as often as they like.\n\n"
    "def area(width, height):\n    return width * height  # in square metres\n\nWhat follows from that? "
)

STRINGS = [
    "", " ", "  ", "Hello world", " Hello  world ", "hello\nworld\n\n\n", "\t\tindented\r\nlines\r\n", "a" * 40,
    "I'm sure they'll say we've won, don't you think he'd agree?", "DON'T SHOUT, I'LL HEAR", "1234567890", "3.14159, -2e10 and 1,000,000",
    "in 2024 there were 12 of 300", "x1y22z333", "½ ² Ⅷ ٣ 五 ①②", "naïve café Ångström", "e\u0301 combining accents", "Straße, GROẞ",
    "Привет, мир! Как дела?", "你好，世界。今天天气很好", "こんにちは世界", "한국어 문장입니다", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया",
    "🙂🙃 👩‍👩‍👧 🇫🇷 ❤️", "zero\u200bwidth and\u00a0no-break", "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    "def f(x):\n    return x**2 if x > 0 else -x\n", "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';", "<html><body class=\"a\">&amp;</body></html>",
    "https://example.org/a?b=c&d=%20#frag", "C:\\path\\to\\file_name-01.tar.gz", "∀x∈ℝ: x² ≥ 0 ⇒ √(x²) = |x|", "--- *** ___ !!! ??? ...",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "text<|endoftext|>text", "<|im_end|>  <file_sep><repo_name>x/y", "<|im_start",
    "trailing spaces   ", "   leading spaces", "tab\tbetween\twords", "mixedCASE and_snake and-kebab", "\u0000\u0001\u007f\ufeff\ufffd",
    "### Instruction:\nGive three tips.\n\n### Response:\n",
]


def reference_tokenizer(path):
    """The teacher's published tokenizer.json, rebuilt from the GGUF's vocabulary: digits alone, then GPT-2's byte level."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer


def teacher(path):
    path = pathlib.Path(path)
    tokenizer = reference_tokenizer(path)
    # transformers rebuilds the same tokenizer from the GGUF, but for the digits.
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for s in STRINGS:
        if not any(c.isnumeric() for c in s):
            assert theirs(s, add_special_tokens=False)["input_ids"] == tokenizer.encode(s).ids, s
    strings = [{"text": s, "ids": tokenizer.encode(s).ids} for s in STRINGS]
    (HERE / "teacher_tokenizer.json").write_text(json.dumps(strings, ensure_ascii=True, indent=0) + "\n")

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    text = tokenizer.encode(TEXT).ids
    rows = [(text * 3)[:160], text[::-1][:64] + (text * 3)[:96]]
    ids = torch.tensor(rows)
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
    columns = torch.tensor([0, 1, 2, 28, 198, 216, 260, 1000, 5000, 20000, 40000, 49151])
    numbers = {
        "input_ids": ids,
        "columns": columns,
        "logits": out.logits[:, :, columns],
        "log_sum_exp": out.logits.logsumexp(-1),
        "argmax": out.logits.argmax(-1),
        "loss": out.loss,
    }
    for layer in [0, 1, 15, 29, 30]:
        numbers[f"hidden.{layer}"] = out.hidden_states[layer][:, ::16, ::48]
    save_file({k: v.contiguous().clone() for k, v in numbers.items()}, HERE / "teacher.safetensors")


if __name__ == "__main__":
    tiny(sys.argv[2:]) if sys.argv[1] == "tiny" else teacher(sys.argv[2])
