#!/usr/bin/env python3
"""Scores task files with lm-evaluation-harness and compares with `caskd eval --per-item`.

usage: compare.py TEACHER.gguf ITEMS.jsonl TASK=FILE.jsonl ... [--limit N]

ITEMS.jsonl is what `caskd eval --per-item` wrote for the same tasks, in the same order. The files
are in a prepared form (query/choices/gold, contexts/continuation/gold, or context/continuation).
Needs lm_eval, torch, transformers, gguf. Prints a line a task: largest and median difference of
the log-likelihoods, both accuracies, items a second of the harness.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
from gguf import GGUFReader
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def requests_of(item):
    if "query" in item:
        return [(item["query"], " " + choice) for choice in item["choices"]]
    if "contexts" in item:
        return [(context, " " + item["continuation"]) for context in item["contexts"]]
    return [(item["context"], " " + item["continuation"])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("items")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    folder, file = os.path.split(args.teacher)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    # The class that transformers make of a GGUF tokenizer puts <bos> first whatever the file says.
    adds_bos = GGUFReader(args.teacher).get_field("tokenizer.ggml.add_bos_token")
    harness = HFLM(
        pretrained=network,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        device="cpu",
        add_bos_token=bool(adds_bos and adds_bos.contents()),
    )

    ours = {}
    for line in open(args.items):
        item = json.loads(line)
        ours.setdefault(item["task"], []).append(item)
    worst = 0.0
    for task in args.tasks:
        name, path = task.split("=", 1)
        items = [json.loads(line) for line in open(path) if line.strip()][: args.limit]
        instances, owners = [], []
        for index, item in enumerate(items):
            for pair in requests_of(item):
                instances.append(Instance("loglikelihood", item, pair, len(instances)))
                owners.append(index)
        started = time.monotonic()
        results = harness.loglikelihood(instances, disable_tqdm=True)
        seconds = time.monotonic() - started
        theirs = [[] for _ in items]
        greedy = [True] * len(items)
        for owner, (sum_, is_greedy) in zip(owners, results):
            theirs[owner].append(sum_)
            greedy[owner] &= is_greedy
        if name == "lambada":
            right = [float(flag) for flag in greedy]
        else:
            right = [float(max(range(len(row)), key=row.__getitem__) == item["gold"]) for row, item in zip(theirs, items)]
        mine = ours[name]
        assert len(mine) == len(items), f"{name}: {len(mine)} items in {args.items}, {len(items)} in {path}"
        differences = [abs(a - b) for row, item in zip(theirs, mine) for a, b in zip(row, item["loglikelihoods"])]
        worst = max(worst, *differences)
        print(
            f"{name}: {len(items)} items, log-likelihoods differ by {max(differences):.2e} at most"
            f" ({statistics.median(differences):.1e} median), acc {statistics.mean(right):.4f} (harness)"
            f" {statistics.mean(item['acc'] for item in mine):.4f} (caskd), harness {len(items) / seconds:.2f} items/s"
        )
    sys.exit(0 if worst < 1e-2 else 1)


if __name__ == "__main__":
    main()
