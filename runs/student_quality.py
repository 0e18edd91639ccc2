#!/usr/bin/env python3
"""What losses and tiers make of a pruned student: one pass of LoRA over the same data, judged the same way.

    runs/student_quality.py --teacher MODEL --data RECORDS.jsonl [RECORDS.jsonl ...] --text HELDOUT.txt --out OUT
        [--caskd target/release/caskd] [--ratio 0.3] [--limit 400] [--max-len 256] [--dtype bf16] [--fraction 1.0] [--seeds 1] [--only WORD]

Prunes the teacher (FFN channels, by Wanda on the data's own tokens), builds a sparse (top-64), an exact and two compact caches
(75 and 130 bytes a position), and trains the student with 0.1 · CE + each loss from each tier that serves it; top-k KL stands
for caches of top-k log-probabilities. Everything that is done lies in OUT and is not done again. Writes OUT/table.md: perplexity
on the text, and KL to the teacher and perplexity on responses that no training saw; the mean over the seeds, and with several
the standard deviation. Needs Python alone.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys

CACHES = {
    "exact": ["--tier", "exact"],
    "compact, 130 bytes": ["--tier", "compact", "--rate", "130"],
    "compact, 75 bytes": ["--tier", "compact", "--rate", "75"],
    "sparse, top-64": ["--tier", "sparse", "--top-k", "64"],
}
REBUILT = ["exact", "compact, 130 bytes", "compact, 75 bytes"]
TOP_K = ["sparse, top-64"]
# Name, the terms beside 0.1 · CE, the tiers it runs on. KL has the factor T² that keeps its gradient's size.
LOSSES = [
    ("CE alone", "", ["exact"]),
    ("Dual-Scaling, b = 1", 'kind = "dual-scaling"\nweight = 1\nscaling_value = 1', REBUILT),
    ("KL, T = 4", 'kind = "kl"\nweight = 1\ntemperature = 4\ntemperature_squared = true', REBUILT),
    ("top-64 KL, T = 4", 'kind = "top-k-kl"\nweight = 1\nk = 64\ntemperature = 4\ntemperature_squared = true', TOP_K),
    ("KL, T = 1", 'kind = "kl"\nweight = 1', REBUILT),
    ("KL with ghost tail, T = 1", 'kind = "ghost-kl"\nweight = 1', TOP_K),
    ("top-64 KL, T = 1", 'kind = "top-k-kl"\nweight = 1\nk = 64\ntemperature = 1', TOP_K),
    ("reverse KL, T = 1", 'kind = "reverse-kl"\nweight = 1', ["exact"]),
    ("skew KL", 'kind = "skew-kl"\nweight = 1', ["exact"]),
    ("BiLD, k = 8, T = 3", 'kind = "bild"\nweight = 1', ["exact", *TOP_K]),
]


def caskd(arguments, *command):
    line = [str(arguments.caskd), *map(str, command), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)} ended with {done.returncode}")
    return json.loads(done.stdout)


def once(folder, done, make):
    """Makes `folder` where the file `done` in it is missing, or a run's without its summary; goes on with an interrupted try."""
    file = folder / done
    if not file.exists() or (done == "run.json" and "summary" not in json.loads(file.read_text())):
        make(["--resume"] if folder.exists() else [])
    return folder


def judge(arguments, model, out):
    """Perplexity on the text, and KL and perplexity on the responses kept apart."""
    report = out.with_suffix(".eval.json")
    if not report.exists():
        found = caskd(arguments, "eval", "--model", model, "--text", arguments.text, "--cache", arguments.out / "exact",
                      "--split", "validation", "--dtype", arguments.dtype)
        report.write_text(json.dumps(found, indent=2))
    found = json.loads(report.read_text())
    return found["text"][0]["perplexity"], found["cache"][0]["kl"], found["cache"][0]["perplexity"]


def table(rows):
    lines = ["| trained with | from | text | KL to the teacher | responses |", "|---|---|---|---|---|"]
    for loss, tier, scores in rows:
        cells = []
        for column, digits in zip(zip(*scores), (2, 3, 2)):
            spread = f" ± {statistics.stdev(column):.{digits}f}" if len(column) > 1 else ""
            cells.append(f"{statistics.mean(column):.{digits}f}{spread}")
        lines.append(f"| {loss} | {tier} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--caskd", default="target/release/caskd")
    parser.add_argument("--ratio", default="0.3")
    parser.add_argument("--limit", default="400")
    parser.add_argument("--max-len", default="256")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--fraction", default="1.0")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    data = [word for file in arguments.data for word in ("--data", file)]
    caches = {}
    for name, tier in CACHES.items():
        folder = out / re.sub("[^a-z0-9]+", "-", name)
        caches[name] = once(folder, "manifest.json", lambda resume, folder=folder, tier=tier: caskd(
            arguments, "build", "--teacher", arguments.teacher, *data, "--out", folder, *tier, "--layers", "none",
            "--limit", arguments.limit, "--max-len", arguments.max_len, "--validation", "0.15", "--dtype", arguments.dtype, *resume))
    student = once(out / "student", "config.json", lambda _: caskd(
        arguments, "prune", "--model", arguments.teacher, "--method", "wanda", "--parts", "ffn", "--ratio", arguments.ratio,
        "--cache", caches["exact"], "--out", out / "student"))

    rows = [("teacher", "", [judge(arguments, arguments.teacher, out / "teacher")])]
    rows.append(("student before training", "", [judge(arguments, student, out / "untrained")]))
    for loss, terms, tiers in LOSSES:
        if arguments.only not in loss:
            continue
        for tier in tiers:
            scores = []
            for seed in range(arguments.seeds):
                run = out / re.sub("[^a-z0-9]+", "-", f"{loss} {tier} {seed}".lower())
                config = run.with_suffix(".toml")
                hard = '[[loss]]\nkind = "cross-entropy"\nweight = 0.1\n'
                config.write_text(f'seed = {seed}\nfraction = {arguments.fraction}\ndtype = "{arguments.dtype}"\n{hard}{"[[loss]]" if terms else ""}\n{terms}\n')
                once(run, "run.json", lambda resume, run=run, config=config, tier=tier: caskd(
                    arguments, "train", "--cache", caches[tier], "--student", student, "--config", config, "--out", run,
                    "--allow-low-fidelity", *resume))
                scores.append(judge(arguments, run, run))
                print(f"{loss} from {tier}, seed {seed}: {scores[-1]}", file=sys.stderr)
            rows.append((loss, tier, scores))
            (out / "table.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
