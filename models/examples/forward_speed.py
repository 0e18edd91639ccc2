"""Hugging Face transformers measured as forward_speed.rs measures caskd.

    OMP_NUM_THREADS=2 python forward_speed.py FILE.gguf [B T] [f32|bf16] [rounds]
"""

import pathlib
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

args = sys.argv[1:] + [None] * 5
path = pathlib.Path(args[0])
batch, positions, rounds = int(args[1] or 8), int(args[2] or 128), int(args[4] or 5)
dtype = torch.bfloat16 if args[3] == "bf16" else torch.float32
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).to(dtype).eval()
ids = ((torch.arange(batch * positions) * 7919 + 13) % model.config.vocab_size).view(batch, positions)


def report(name, run):
    run()
    wall = cpu = float("inf")
    for _ in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        run()
        wall, cpu = min(wall, time.perf_counter() - started), min(cpu, time.process_time() - used)
    tokens = batch * positions
    print(f"torch {name:14} [{batch},{positions}] {args[3] or 'f32'}: {tokens / wall:.0f} tokens/s, {tokens / cpu:.0f} per CPU second", flush=True)


with torch.no_grad():
    report("blocks", lambda: model.model(ids, use_cache=False))
    report("blocks+head", lambda: model(ids, use_cache=False))

names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")).train()


def step():
    model.base_model.model.model(ids, use_cache=False).last_hidden_state.float().mean().backward()
    model.zero_grad()


report("lora fwd+bwd", step)
