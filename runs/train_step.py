"""A LoRA step from the cache against the same step in PyTorch with transformers and peft.

    OMP_NUM_THREADS=2 python runs/train_step.py FILE.gguf [--text FILE] [--dtypes f32 bf16] [--repeats 3] [--steps 6]

SmolLM2 (or another Llama GGUF), r = 8 on all seven projections, 8 sequences of 128 tokens, every position a
target. Both sides read the same Hugging Face folder. The rival gets the teacher's last hidden states (it multiplies
them by the head, as we do; row `rival`) or its logits outright (row `rival, given logits`: no such product, no cache
to read). Three rows that hold less or train more come only where --only names them: `recompute`, `int8 base`, `all
weights`, each with KL on the exact cache. Each run is a process of its own, and the runs take turns. Seconds are medians over the steps but the first
two, peak memory is the process's VmHWM. Ratios are printed, nothing is asserted.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

BATCH, POSITIONS = 8, 128
WARM_UP = 2
SHORTEST = 60_000  # characters of text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "examples/data/heldout.txt")
    parser.add_argument("--caskd", default="target/release/caskd")
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="+", help="rows to measure")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the model and the caches, kept for a next time")
    parser.add_argument("--rival", nargs=3, metavar=("MODEL", "DTYPE", "TEACHER"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, metavar=("OUT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rival:
        return rival(*args.rival, args.text, args.steps)
    if args.prepare:
        return prepare(args.teacher, *args.prepare)
    with tempfile.TemporaryDirectory() as folder:
        compare(args, args.work or pathlib.Path(folder))


def compare(args, work):
    work.mkdir(exist_ok=True, parents=True)
    # Every step must find eight full sequences: a short text comes several times (its windows then begin elsewhere).
    text = args.text.read_text()
    args.text = work / "text.txt"
    args.text.write_text(text * -(-SHORTEST // len(text)))
    me = [sys.executable, __file__, str(args.teacher), "--text", str(args.text), "--steps", str(args.steps)]
    for dtype in args.dtypes:
        if not (work / f"model-{dtype}").exists():
            subprocess.run([*me, "--prepare", str(work / f"model-{dtype}"), dtype], check=True)
    for tier, more in (("exact", []), ("compact", []), ("sparse", ["--top-k", "64"])):
        if not (work / tier).exists():
            build = [args.caskd, "build", "--teacher", str(args.teacher), "--data", str(args.text), "--max-len", str(POSITIONS)]
            subprocess.run([*build, "--tier", tier, *more, "--out", str(work / tier)], check=True)

    only_hard = ["--set", "soft_weight=0"]
    soft = ["--set", "hard_weight=0", "--allow-low-fidelity"]
    ours = {
        "CE, no teacher": ["exact", *only_hard],
        "KL, exact": ["exact", *soft, "--set", "scaling_value=2"],
        "Dual-Scaling, exact": ["exact", *soft, "--set", "kd_type=dual-scaling", "--set", "scaling_value=2"],
        "KL, compact": ["compact", *soft, "--set", "scaling_value=2"],
        "KL, sparse with a ghost": ["sparse", *soft, "--set", "tail=ghost"],
        "CE + KL, exact": ["exact", "--set", "scaling_value=2"],
    }
    kl = ours["KL, exact"]
    ours_on_demand = {
        "recompute": [*kl, "--set", "recompute=true"],
        "int8 base": [*kl, "--set", "quantize=int8"],
        "all weights": [*kl, "--set", "mode=full", "--set", "learning_rate=1e-4"],
    }
    ours |= {row: settings for row, settings in ours_on_demand.items() if row in (args.only or ())}
    rivals = {"rival": "hidden", "rival, given logits": "given"}
    for dtype in args.dtypes:
        seconds, memory = {}, {}
        for repeat in range(args.repeats):
            for row in [*ours, *rivals]:
                if args.only and row not in args.only:
                    continue
                if row in ours:
                    times, peak = run_ours(args, work, dtype, ours[row], f"{dtype}-{repeat}")
                else:
                    out = subprocess.run([*me, "--rival", str(work / f"model-{dtype}"), dtype, rivals[row]], check=True, stdout=subprocess.PIPE)
                    times, peak = json.loads(out.stdout)
                seconds.setdefault(row, []).append(statistics.median(times[WARM_UP:]))
                memory.setdefault(row, []).append(peak)
        print(f"{dtype}, [{BATCH}, {POSITIONS}], {os.environ.get('OMP_NUM_THREADS', 'all')} threads, median (all) of {args.repeats} runs")
        rival_s, rival_m = (statistics.median(of["rival"]) if "rival" in of else float("nan") for of in (seconds, memory))
        plain = statistics.median(seconds["CE, no teacher"]) if "CE, no teacher" in seconds else float("nan")
        for row, of in seconds.items():
            s, m = statistics.median(of), statistics.median(memory[row])
            line = f"  {row:24} {s:6.3f} s ({', '.join(f'{x:.3f}' for x in of)})  {BATCH * POSITIONS / s:5.0f} tokens/s  {m / 1e6:5.0f} MB"
            line += f"  speed {rival_s / s:.2f} and memory {m / rival_m:.2f} of the rival's"
            print(line + (f"  {s / plain:.2f} of CE" if row in ours else ""), flush=True)


def run_ours(args, work, dtype, settings, name):
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = pathlib.Path(folder) / name
        command = [args.caskd, "train", "--cache", str(work / settings[0]), "--student", str(work / f"model-{dtype}"), "--out", str(out)]
        keys = [f"dtype={dtype}", f"batch_size={BATCH}", f"max_steps={args.steps}", "epochs=100", "checkpoint_every=0"]
        for key in keys:
            command += ["--set", key]
        done = subprocess.run([*command, *settings[1:], "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        full = [step["seconds"] for step in steps if step["tokens"] == BATCH * POSITIONS]
        return full, json.loads(done.stdout)["peak_memory_bytes"]


def prepare(teacher, out, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    AutoModelForCausalLM.from_pretrained(teacher.parent, gguf_file=teacher.name, dtype=torch.float32).to(kind).save_pretrained(out)
    AutoTokenizer.from_pretrained(teacher.parent, gguf_file=teacher.name).save_pretrained(out)


def rival(model, dtype, from_what, text, steps):
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    head = base.lm_head.weight.detach()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    student = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    temperature, times = 2.0, []
    for step in range(steps):
        place = step * BATCH * POSITIONS % (len(tokens) - BATCH * POSITIONS)
        ids = torch.tensor(tokens[place : place + BATCH * POSITIONS]).view(BATCH, POSITIONS)
        with torch.no_grad():
            hidden = base.model(ids, use_cache=False).last_hidden_state.float()
            given = hidden.to(kind) @ head.T if from_what == "given" else None
        started = time.perf_counter()
        with torch.no_grad():
            teacher = given if given is not None else hidden.to(kind) @ head.T
        logits = student(ids, use_cache=False).logits
        log_p = log_softmax(teacher.float() / temperature, -1).flatten(0, 1)
        log_q = log_softmax(logits.float() / temperature, -1).flatten(0, 1)
        loss = kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        del teacher, logits, log_p, log_q, loss, given
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([times, peak]))


if __name__ == "__main__":
    main()
