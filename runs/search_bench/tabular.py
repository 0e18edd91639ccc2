"""Trials needed to reach the best 5% of a table of trained configurations: ours, and Optuna's TPE.

    target/release/examples/tabular table.json > tabular.json
    python runs/search_bench/tabular.py --table table.json --ours tabular.json --markdown tabular.md
"""

import argparse
import json
import tomllib

import numpy as np
import optuna
from scipy.stats import wilcoxon


def optuna_needed(table, threshold, run):
    """Optuna's TPE on the table: trials needed, and distinct configurations among them. One that it repeats costs a
    trial, as it would in earnest."""
    # A parameter comes after those that its condition names; one level of conditions is all that tables have.
    space = sorted(tomllib.loads(table["space_toml"])["param"], key=lambda p: "when" in p)
    values = {key(row["params"]): row["value"] for row in table["rows"]}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=run))
    limit, tried = 4 * len(values), set()
    for t in range(1, limit + 1):
        trial = study.ask()
        params = {}
        for p in space:
            allowed = {name: v if isinstance(v, list) else [v] for name, v in p.get("when", {}).items()}
            if any(params[name] not in levels for name, levels in allowed.items()):
                params[p["name"]] = p.get("inactive", p.get("values", [None])[0])
            elif p["kind"] == "int":
                params[p["name"]] = trial.suggest_int(p["name"], p["low"], p["high"])
            elif p["kind"] == "ordinal":
                params[p["name"]] = p["values"][trial.suggest_int(p["name"], 0, len(p["values"]) - 1)]
            else:
                params[p["name"]] = trial.suggest_categorical(p["name"], p["values"])
        value = values[key(params)]
        tried.add(key(params))
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif value <= threshold:
            return t, len(tried)
        else:
            study.tell(trial, value)
    return limit, len(tried)


def key(params):
    """Names with values, numbers as floats so that 1 and 1.0 are the same setting."""
    number = lambda v: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v
    return tuple(sorted((name, number(value)) for name, value in params.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True)
    parser.add_argument("--ours", required=True)
    parser.add_argument("--markdown")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with open(args.table) as file:
        table = json.load(file)
    with open(args.ours) as file:
        ours = json.load(file)
    needed = {r["sampler"]: np.array(r["trials_needed"]) for r in ours["results"]}
    first, runs = ours["first_run"], len(next(iter(needed.values())))
    optuna_runs = np.array([optuna_needed(table, ours["threshold"], first + i) for i in range(runs)])
    needed["optuna-tpe"], needed["optuna-tpe, repeats not counted"] = optuna_runs.T
    lines = [
        f"Trials to reach the best 5% (value at most {ours['threshold']:.4g}) of {ours['points']} configurations, {runs} runs; "
        "p: one-sided paired Wilcoxon, fewer trials than Optuna's TPE, repeats not counted.",
        "",
        "| sampler | median | mean ± standard error | quartiles | p |",
        "|---|---|---|---|---|",
    ]
    for name, a in needed.items():
        b = needed["optuna-tpe, repeats not counted"]
        p = f"{wilcoxon(a, b, alternative='less').pvalue:.4f}" if (a != b).any() else "–"
        low, high = np.percentile(a, [25, 75])
        error = a.std(ddof=1) / np.sqrt(len(a))
        lines.append(f"| {name} | {np.median(a):.0f} | {a.mean():.1f} ± {error:.1f} | {low:.0f}–{high:.0f} | {p} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
