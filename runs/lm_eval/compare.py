#!/usr/bin/env python3
"""Scores task files with lm-evaluation-harness and compares with what `caskd eval` found.

usage: compare.py MODEL TASK=FILE.jsonl ... --items ITEMS.jsonl [--scores SCORES.json] [--limit N] [--dtype bfloat16]
       compare.py MODEL wikitext=FILE --scores SCORES.json [--limit N] [--max-len TOKENS]

MODEL is a GGUF file or a Hugging Face folder. ITEMS.jsonl is what `caskd eval --per-item` wrote for the
same tasks, in the same order; the files are in a prepared form (query/choices/gold,
contexts/continuation/gold, or context/continuation). SCORES.json is what the same `caskd eval --json`
printed (wikitext's FILE: JSONL with a `page` a line, or running text). Needs lm_eval, torch, transformers,
gguf. Prints a line a task: largest and median difference of the log-likelihoods, both accuracies, items a
second of the harness, with SCORES of caskd and their ratio; for wikitext both word and byte perplexities.
Ends with 3 where log-likelihoods differ by 1e-2 or more, as they do in bfloat16.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import re
import statistics
import sys
import time

import lm_eval
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


def pages_of(path):
    """The pages of JSONL lines, or of running text that titles (` = Title = `) cut into pages."""
    text = pathlib.Path(path).read_text()
    if path.endswith(".jsonl"):
        return [json.loads(line)["page"] for line in text.splitlines() if line.strip()]
    starts = [found.start() for found in re.finditer(r"^ *= (?!=).*(?<!=) = *$", text, re.MULTILINE)]
    # White space before the first title belongs to its page.
    return [text[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)])]


def compare_wikitext(harness, path, limit, scores):
    """The harness's own functions for the page and the counts; true where both perplexities agree to 1e-4."""
    rules = pathlib.Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", rules)
    wikitext = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wikitext)
    docs = [{"page": page} for page in pages_of(path)][:limit]
    instances = [Instance("loglikelihood_rolling", doc, (wikitext.wikitext_detokenizer(doc),), i) for i, doc in enumerate(docs)]
    started = time.monotonic()
    results = harness.loglikelihood_rolling(instances, disable_tqdm=True)
    seconds = time.monotonic() - started
    counts = [wikitext.process_results(doc, (result,)) for doc, result in zip(docs, results)]
    (mine,) = (task for task in json.load(open(scores))["tasks"] if task["task"] == "wikitext")
    assert mine["items"] == len(docs), f"{mine['items']} pages in {scores}, {len(docs)} in {path}"
    agree = True
    for metric in ("word_perplexity", "byte_perplexity"):
        total, weight = (sum(column) for column in zip(*(count[metric] for count in counts)))
        theirs = math.exp(-total / weight)
        agree &= abs(mine[metric] / theirs - 1) < 1e-4
        print(f"wikitext: {len(docs)} pages, {metric} {theirs:.5f} (harness) {mine[metric]:.5f} (caskd)")
    print(f"wikitext: {-total:.3f} nats (harness) {mine['nats']:.3f} (caskd), harness {seconds:.1f} s, caskd {mine['seconds']:.1f} s")
    return agree


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--items")
    parser.add_argument("--scores")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-len", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    if args.model.is_dir():
        source, adds_bos = {"pretrained_model_name_or_path": args.model}, None
    else:
        source = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
        # The class that transformers make of a GGUF tokenizer puts <bos> first whatever the file says.
        field = GGUFReader(args.model).get_field("tokenizer.ggml.add_bos_token")
        adds_bos = bool(field and field.contents())
    network = AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, args.dtype)).eval()
    common = {"pretrained": network, "tokenizer": AutoTokenizer.from_pretrained(**source), "device": "cpu", "add_bos_token": adds_bos}
    harness = HFLM(**common, batch_size=args.batch_size)

    ours = {}
    for line in open(args.items) if args.items else ():
        item = json.loads(line)
        ours.setdefault(item["task"], []).append(item)
    scored = {task["task"]: task for task in json.load(open(args.scores))["tasks"]} if args.scores else {}
    worst = 0.0
    for task in args.tasks:
        name, path = task.split("=", 1)
        if name == "wikitext":
            rolling = HFLM(**common, batch_size=args.batch_size, max_length=args.max_len)
            if not compare_wikitext(rolling, path, args.limit, args.scores):
                worst = math.inf
            continue
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
        speed = ""
        if name in scored:
            rate = scored[name]["items_per_second"]
            speed = f", caskd {rate:.2f}: {rate * seconds / len(items):.2f} times"
        print(
            f"{name}: {len(items)} items, log-likelihoods differ by {max(differences):.2e} at most"
            f" ({statistics.median(differences):.1e} median), acc {statistics.mean(right):.4f} (harness)"
            f" {statistics.mean(item['acc'] for item in mine):.4f} (caskd), harness {len(items) / seconds:.2f} items/s"
            f"{speed}"
        )
    sys.exit(0 if worst < 1e-2 else 3)


if __name__ == "__main__":
    main()
