"""A teacher's pass as a build makes it (forward, head, fused statistics, top-64) against Hugging Face transformers' eager
forward with top-64, log-sum-exp and standard deviation in PyTorch, in turns in one run.

    OMP_NUM_THREADS=2 python runs/teacher_speed.py target/release/examples/teacher_speed FILE.gguf [ROUNDS] [f32,bf16]

Ratios are by the wall clock and by the processors' (the sum over threads), on which other processes tell less.
"""

import json
import pathlib
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

example, path = sys.argv[1], pathlib.Path(sys.argv[2])
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
kinds = sys.argv[4].split(",") if len(sys.argv) > 4 else ["f32", "bf16"]
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def theirs(model, ids, wide):
    """Seconds of the fastest round; statistics over the logits in f32 or as they come."""
    best, cpu = float("inf"), float("inf")
    for _ in range(rounds + 1):
        started, used = time.perf_counter(), time.process_time()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
            logits = logits.float() if wide else logits
            logits.topk(64), logits.logsumexp(-1), logits.std(-1)
        best, cpu = min(best, time.perf_counter() - started), min(cpu, time.process_time() - used)
    return best, cpu


def ours(batch, positions, kind):
    command = [example, str(path), str(batch), str(positions), kind, str(rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


print("| shape | type | caskd tokens/s (forward, head, statistics) | transformers tokens/s | ratio, by CPU time |\n|---|---|---|---|---|")
for kind in kinds:
    model = model.to({"f32": torch.float32, "bf16": torch.bfloat16}[kind])
    for batch, positions in [(8, 128), (4, 512)]:
        tokens = batch * positions
        ids = ((torch.arange(tokens) * 7919 + 13) % model.config.vocab_size).view(batch, positions)
        turns = [ours(batch, positions, kind)]
        # The rival may take whichever is the faster for it.
        theirs_of = [theirs(model, ids, wide) for wide in ([False, True] if kind == "bf16" else [False])]
        rival, rival_cpu = (min(times) for times in zip(*theirs_of))
        turns.append(ours(batch, positions, kind))
        mine = min(turns, key=lambda turn: turn["seconds"])
        cpu = min(turn["cpu"] for turn in turns)
        rest = mine["seconds"] - mine["forward"] - mine["head"]
        shares = f"{mine['forward']:.2f} s, {mine['head']:.2f} s, {rest:.2f} s"
        print(f"| [{batch}, {positions}] | {kind} | {tokens / mine['seconds']:.0f} ({shares}) | {tokens / rival:.0f} | {rival / mine['seconds']:.2f}, {rival_cpu / cpu:.2f} |", flush=True)
