"""Optuna's TPE and GPSampler on the surfaces of `search/examples/surfaces`, and the comparison with our samplers.

    cargo run --release -p caskd-search --example surfaces > ours.json
    cargo run --release -p caskd-search --example surfaces -- --table 1 > tables.json
    python runs/search_bench/rivals.py --tables tables.json --rivals rivals.json      (takes half an hour)
    python runs/search_bench/rivals.py --rivals rivals.json --ours ours.json

The surfaces are not written twice: the example prints their values (`--table 1`), and this script looks them up.
"""

import argparse
import json
import math
import sys
import time
import warnings

import numpy as np
import optuna
import torch
from scipy.stats import wilcoxon

MASK = (1 << 64) - 1
SPACE = {
    "hard_weight": [0.1, 1.0, 10.0, 20.0],
    "soft_weight": [1e-8, 1e-7, 1e-3, 1.0, 10.0, 20.0],
    "scaling_value": list(range(1, 21)),
    "logits_norm": ["none", "max-min", "standardize"],
    "hidden_norm": ["none", "max-min", "standardize"],
    "layers": ["none", "last", "last-middle"],
    "kd_type": ["kl", "dual-scaling"],
}


def splitmix64(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def znorm(seed, stream, index):
    a = splitmix64(splitmix64(seed) ^ (((stream << 32) + index + 1) & MASK))
    b = splitmix64(a)
    u1, u2 = ((a >> 11) + 1) / 2**53, (b >> 11) / 2**53
    return math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)


def suggest(trial):
    """Ordered parameters as integers over their levels, hidden_norm only where it has an effect."""
    levels = {}
    for name in ("hard_weight", "soft_weight"):
        levels[name] = trial.suggest_int(name, 0, len(SPACE[name]) - 1)
    levels["scaling_value"] = trial.suggest_int("scaling_value", 1, 20) - 1
    for name in ("logits_norm", "layers", "kd_type"):
        levels[name] = SPACE[name].index(trial.suggest_categorical(name, SPACE[name]))
    hidden = trial.suggest_categorical("hidden_norm", SPACE["hidden_norm"])
    levels["hidden_norm"] = SPACE["hidden_norm"].index(hidden) if levels["layers"] else 0
    index = 0
    for name, values in SPACE.items():
        index = index * len(values) + levels[name]
    return index


def sampler(name, run):
    if name == "optuna-tpe":
        return optuna.samplers.TPESampler(seed=run)
    if name == "optuna-tpe-multivariate":
        return optuna.samplers.TPESampler(seed=run, multivariate=True)
    return optuna.samplers.GPSampler(seed=run)


def regrets(table, number, name, run, trials):
    study = optuna.create_study(sampler=sampler(name, run))
    best, curve = (math.inf, math.inf), []
    for t in range(trials):
        trial = study.ask()
        index = suggest(trial)
        clean, sigma = table["clean"][index], table["sigma"][index]
        value = clean + sigma * znorm(run * 10000 + t, number, index)
        study.tell(trial, value)
        if value < best[0]:
            best = (value, clean - table["least"])
        curve.append(best[1])
    return curve


def holm(p_values):
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", help="output of the example with --table 1: run the rivals on it")
    parser.add_argument("--rivals", required=True, help="the rivals' results, written with --tables, read without")
    parser.add_argument("--ours", help="output of the example: compare")
    parser.add_argument("--out", help="write all numbers of the comparison here")
    parser.add_argument("--names", default="optuna-tpe,optuna-gp")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=50)
    args = parser.parse_args()
    if args.tables:
        run_rivals(args)
    if args.ours:
        results = json.load(open(args.ours))["results"] + json.load(open(args.rivals))["results"]
        report({(r["surface"], r["sampler"]): r for r in results}, args)


def run_rivals(args):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for name in args.names.split(","):
        for number, table in enumerate(json.load(open(args.tables))["tables"], 1):
            begun = time.time()
            runs = [regrets(table, number, name, run, args.trials) for run in range(args.seeds)]
            seconds = (time.time() - begun) / (args.seeds * args.trials)
            results.append(
                {"surface": table["surface"], "sampler": name, "regret": runs, "seconds_per_trial": seconds}
            )
            mean = np.mean(runs, axis=0)
            print(
                f"{table['surface']:12} {name:12} {mean[29]:.2f} {mean[-1]:.2f} {seconds:.3f} s per trial",
                file=sys.stderr,
                flush=True,
            )
            json.dump({"results": results}, open(args.rivals, "w"))


def report(results, args):
    surfaces = list(dict.fromkeys(s for s, _ in results))
    names = list(dict.fromkeys(n for _, n in results))
    rivals = [n for n in names if n.startswith("optuna")]
    print("| surface | trials | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    tests = []
    for surface in surfaces:
        for t in (30, 50):
            curves = {n: np.array([run[t - 1] for run in results[(surface, n)]["regret"]]) for n in names}
            print(f"| {surface} | {t} | " + " | ".join(f"{curves[n].mean():.2f}" for n in names) + " |")
            best_rival = min(rivals, key=lambda n: curves[n].mean())
            for mine in (n for n in ("gp", "sabo") if n in curves):
                difference = curves[mine] - curves[best_rival]
                p = 1.0 if not difference.any() else wilcoxon(difference, alternative="less").pvalue
                tests.append([surface, t, mine, best_rival, curves[mine].mean(), curves[best_rival].mean(), p])
    for mine in ("gp", "sabo"):
        rows = [row for row in tests if row[2] == mine]
        for row, p in zip(rows, holm([row[-1] for row in rows])):
            row.append(p)
    print("\n| surface | trials | ours | best rival | regret | rival's | p | p (Holm) |\n|---|---|---|---|---|---|---|---|")
    for surface, t, mine, rival, a, b, p, q in tests:
        print(f"| {surface} | {t} | {mine} | {rival} | {a:.2f} | {b:.2f} | {p:.4f} | {q:.4f} |")
    if args.out:
        json.dump({"results": list(results.values()), "tests": tests}, open(args.out, "w"))


if __name__ == "__main__":
    main()
