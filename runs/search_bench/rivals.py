"""Optuna's samplers on the surfaces of `search/examples/surfaces`, one run after the other.

    target/release/examples/surfaces --table 1 > tables.json
    python runs/search_bench/rivals.py --tables tables.json --out rivals.jsonl

The surfaces are not written twice: the example prints their values, and this script looks them up. Every finished run
is one line of the output, and runs that are already there are not made again, so a stopped benchmark goes on.
GPSampler takes about a second a trial; its runs come last, all surfaces in turn.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # seconds per suggestion are meant for one core

import optuna

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
SAMPLERS = {
    "optuna-tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "optuna-tpe-univariate": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=False),
    "optuna-gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
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


def regrets(table, number, name, run, trials):
    """Simple regret after each trial, and the seconds of the suggestions."""
    study = optuna.create_study(sampler=SAMPLERS[name](run))
    best, curve, seconds = (math.inf, math.inf), [], 0.0
    for t in range(trials):
        begun = time.perf_counter()
        trial = study.ask()
        index = suggest(trial)
        seconds += time.perf_counter() - begun
        clean, sigma = table["clean"][index], table["sigma"][index]
        value = clean + sigma * znorm(run * 10000 + t, number, index)
        study.tell(trial, value)
        if value < best[0]:
            best = (value, clean - table["least"])
        curve.append(round(best[1], 6))
    return curve, seconds / trials


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", required=True, help="output of the example with --table 1")
    parser.add_argument("--out", required=True, help="JSON lines; what is there is kept")
    parser.add_argument("--names", default=",".join(SAMPLERS))
    parser.add_argument("--surfaces", default="1,2,3,4,5,6", help="numbers of the surfaces")
    parser.add_argument("--first-run", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=50)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    if "optuna-gp" in args.names:
        import torch

        torch.set_num_threads(1)
    with open(args.tables) as file:
        tables = json.load(file)["tables"]
    surfaces = {int(number) for number in args.surfaces.split(",")}
    done = set()
    if os.path.exists(args.out):
        with open(args.out) as file:
            done = {(r["sampler"], r["surface"], r["run"]) for r in map(json.loads, file) if len(r["regret"]) >= args.trials}
    with open(args.out, "a") as out:
        for name in args.names.split(","):
            for run in range(args.first_run, args.first_run + args.seeds):
                for number, table in enumerate(tables, 1):
                    if number not in surfaces or (name, table["surface"], run) in done:
                        continue
                    curve, seconds = regrets(table, number, name, run, args.trials)
                    row = {
                        "surface": table["surface"],
                        "sampler": name,
                        "run": run,
                        "regret": curve,
                        "seconds_per_suggestion": round(seconds, 5),
                        "version": optuna.__version__,
                    }
                    print(json.dumps(row), file=out, flush=True)
                print(f"{name} run {run} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
