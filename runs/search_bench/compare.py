"""Our samplers next to Optuna's: mean simple regret, paired Wilcoxon tests, Holm's correction.

    python runs/search_bench/compare.py --ours ours.json --rivals rivals.jsonl --json results.json --markdown results.md

Pairs are runs with the same number: they share the noise of every (trial, configuration). The best rival is picked per
surface and number of trials by its mean, which favours the rival. Regret is that of the configuration with the least
noisy observation, for everyone; what our studies recommend beside it (least posterior mean) is compared separately with
what Optuna recommends (least observation).
"""

import argparse
import json
import re

import numpy as np
from scipy.stats import wilcoxon

TRIALS = (30, 50)
OURS = ("sabo", "gp", "tpe")


def holm(p_values):
    """Adjusted p-values of Holm's step-down procedure."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def standard_error(a):
    return float(np.std(a, ddof=1) / np.sqrt(len(a)))


def load(args):
    """{(surface, sampler): {run: curve}}, {(surface, sampler): seconds per suggestion}, and the same as the first for the
    regret of our recommendations, at the numbers of TRIALS."""
    curves, recommended, seconds, timing = {}, {}, {}, []
    for path in args.ours:
        with open(path) as file:
            ours = json.load(file)
        timing += ours.get("timing", [])
        for r in ours["results"]:
            key = (r["surface"], r["sampler"])
            curves.setdefault(key, {}).update({r["first_run"] + i: c for i, c in enumerate(r["regret"])})
            if "recommended" in r:
                recommended.setdefault(key, {}).update({r["first_run"] + i: c for i, c in enumerate(r["recommended"])})
            seconds[key] = [r["seconds_per_trial"]]
    for path in args.rivals:
        with open(path) as file:
            for r in map(json.loads, file):
                curves.setdefault((r["surface"], r["sampler"]), {})[r["run"]] = r["regret"]
                seconds.setdefault((r["surface"], r["sampler"]), []).append(r["seconds_per_suggestion"])
    return curves, {k: float(np.median(v)) for k, v in seconds.items()}, timing, recommended


def compare(curves, surfaces, rivals, mine, recommended=None):
    """One row per surface and number of trials, with p-values corrected over the surfaces at that number of trials
    (`p_holm`) and over all rows (`p_holm_all`)."""
    rows = []
    for surface in surfaces:
        own = curves[(surface, mine)]
        theirs = {run: dict(zip(TRIALS, values)) for run, values in recommended[(surface, mine)].items()} if recommended else None
        for t in TRIALS:
            # A rival counts where it finished every run of ours; half a benchmark is no comparison.
            complete = [n for n in rivals if set(own) <= set(curves.get((surface, n), {}))]
            if not complete:
                continue
            runs = sorted(own)
            at = lambda n: np.array([curves[(surface, n)][run][t - 1] for run in runs])
            best = min(complete, key=lambda n: at(n).mean())
            a, b = at(mine), at(best)
            if theirs:
                a = np.array([theirs[run][t] for run in runs])
            p = float(wilcoxon(a, b, alternative="less").pvalue) if (a != b).any() else 1.0
            rows.append(
                {"surface": surface, "trials": t, "sampler": mine, "recommended": bool(recommended), "rival": best, "runs": len(runs),
                 "regret": float(a.mean()), "rival_regret": float(b.mean()), "p": p}
            )
    for row, q in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm_all"] = q
    for t in TRIALS:
        family = [row for row in rows if row["trials"] == t]
        for row, q in zip(family, holm([row["p"] for row in family])):
            row["p_holm"] = q
    return rows


def markdown(curves, seconds, timing, surfaces, names, tests):
    lines = ["Mean simple regret ± standard error (runs in brackets where fewer than 20).", ""]
    lines.append("| surface | trials | " + " | ".join(names) + " |")
    lines.append("|---" * (len(names) + 2) + "|")
    for surface in surfaces:
        for t in TRIALS:
            cells = []
            for name in names:
                runs = curves.get((surface, name), {})
                a = np.array([c[t - 1] for c in runs.values()])
                few = f" ({len(a)})" if len(a) < 20 else ""
                cells.append(f"{a.mean():.2f} ± {standard_error(a):.2f}{few}" if len(a) > 1 else "–")
            lines.append(f"| {surface} | {t} | " + " | ".join(cells) + " |")
    for recommended, title in (
        (False, "Against the best rival by mean: regret of the least noisy observation."),
        (True, "The same with the regret of what our study recommends, the least posterior mean of what it evaluated. Optuna recommends\nits least observation."),
    ):
        rows = [r for r in tests if r["recommended"] == recommended]
        if not rows:
            continue
        lines += ["", title, "One-sided paired Wilcoxon; Holm over the surfaces at one number of trials, and over all rows of a sampler.", ""]
        lines.append("| sampler | surface | trials | regret | best rival | its regret | p | Holm, surfaces | Holm, all |\n|---|---|---|---|---|---|---|---|---|")
        for r in rows:
            lines.append(
                f"| {r['sampler']} | {r['surface']} | {r['trials']} | {r['regret']:.2f} | {r['rival']} "
                f"| {r['rival_regret']:.2f} | {r['p']:.4f} | {r['p_holm']:.4f} | {r['p_holm_all']:.4f} |"
            )
    lines += ["", "Seconds per suggestion. Means over a run (median of the runs, ours with the evaluation) are wall time, which other work on the\nmachine lengthens; those at a number of observations are time of one core, exact to its scheduler's tick of 4 ms.", ""]
    for name in names:
        values = [v for (_, n), v in seconds.items() if n == name]
        if values:
            lines.append(f"- {name}: {np.median(values):.4f}")
    for row in timing:
        cells = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "observations")
        lines.append(f"- at {row['observations']} observations: {cells}")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", required=True)
    parser.add_argument("--rivals", nargs="+", required=True)
    parser.add_argument("--json", help="write every number here")
    parser.add_argument("--markdown", help="write the tables here")
    args = parser.parse_args()
    curves, seconds, timing, recommended = load(args)
    surfaces = list(dict.fromkeys(s for s, _ in curves))
    names = list(dict.fromkeys(n for _, n in curves))
    rivals = [n for n in names if n.startswith("optuna")]
    tests = []
    for mine in OURS:
        if all((surface, mine) in curves for surface in surfaces):
            tests += compare(curves, surfaces, rivals, mine)
            if all((surface, mine) in recommended for surface in surfaces):
                tests += compare(curves, surfaces, rivals, mine, recommended)
    text = markdown(curves, seconds, timing, surfaces, names, tests)
    print(text)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    if args.json:
        results = [
            {"surface": s, "sampler": n, "runs": sorted(runs), "seconds_per_suggestion": seconds[(s, n)],
             "regret": [[round(x, 4) for x in runs[run]] for run in sorted(runs)]}
            | ({"recommended": [[round(x, 4) for x in recommended[(s, n)][run]] for run in sorted(runs)]} if (s, n) in recommended else {})
            for (s, n), runs in curves.items()
        ]
        dump = json.dumps({"tests": tests, "timing": timing, "results": results}, indent=1)
        # One curve a line keeps the file readable in a diff.
        dump = re.sub(r"\[\s+((?:[-\d.e]+,\s+)*[-\d.e]+)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", dump)
        with open(args.json, "w") as file:
            file.write(dump + "\n")


if __name__ == "__main__":
    main()
