"""Our samplers next to Optuna's: mean simple regret, paired Wilcoxon tests, Holm's correction.

    python runs/search_bench/compare.py --ours ours.json --rivals rivals.jsonl --json results.json --markdown results.md

The first tables are of runs 0 to 19. Where there are more, the same tables of runs 0 to 59 and of all of them follow. A rival
counts on a surface where it made all runs of the table. Both options also read the JSON that this script wrote, so that
one side can be measured anew.

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
FIRST = 20
SECOND = 60
OURS = ("sabo", "gp", "tpe")


def holm(p_values):
    """Adjusted p-values of Holm's step-down procedure."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def probability(p):
    return f"{p:.4f}" if p >= 5e-5 else "below 0.0001"


def standard_error(a):
    return float(np.std(a, ddof=1) / np.sqrt(len(a)))


def at(curve, t):
    """Regret after t trials. Of further runs only the numbers at TRIALS are kept."""
    return curve[TRIALS.index(t)] if len(curve) == len(TRIALS) else curve[t - 1]


def rounded(curve):
    """To the digits that are written: the same configuration has the same regret in every file, so ties are ties."""
    return [round(x, 4) for x in curve]


def rows_of(path):
    """Results of the example, of rivals.py (one a line), or of this script."""
    with open(path) as file:
        if path.endswith(".jsonl"):
            rows = [json.loads(line) for line in file]
            return [r | {"runs": [r["run"]], "regret": [r["regret"]]} for r in rows], []
        whole = json.load(file)
    for r in whole["results"]:
        r.setdefault("runs", [r.get("first_run", 0) + i for i in range(len(r["regret"]))])
        r.setdefault("seconds_per_suggestion", r.get("seconds_per_trial"))
    return whole["results"] + whole.get("further", []), whole.get("timing", [])


def load(args):
    """{(surface, sampler): {run: curve}}, {(surface, sampler): seconds per suggestion}, and the same as the first for the
    regret of our recommendations, at the numbers of TRIALS. Times are those of the first runs."""
    curves, recommended, seconds, timing = {}, {}, {}, []
    for path, is_rival in [(p, False) for p in args.ours] + [(p, True) for p in args.rivals]:
        rows, times = rows_of(path)
        timing += [] if is_rival else times
        for r in rows:
            key = (r["surface"], r["sampler"])
            if r["sampler"].startswith("optuna") != is_rival:
                continue
            curves.setdefault(key, {}).update(zip(r["runs"], map(rounded, r["regret"])))
            recommended.setdefault(key, {}).update(zip(r["runs"], map(rounded, r.get("recommended", []))))
            if r["runs"][0] < FIRST:
                seconds.setdefault(key, []).append(r["seconds_per_suggestion"])
    recommended = {key: runs for key, runs in recommended.items() if runs}
    return curves, {k: float(np.median(v)) for k, v in seconds.items()}, timing, recommended


def only(curves, wanted):
    """The runs for which `wanted` holds."""
    some = {key: {run: c for run, c in sorted(runs.items()) if wanted(run)} for key, runs in curves.items()}
    return {key: runs for key, runs in some.items() if runs}


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
            of = lambda n: np.array([at(curves[(surface, n)][run], t) for run in runs])
            best = min(complete, key=lambda n: of(n).mean())
            a, b = of(mine), of(best)
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


def tables(curves, surfaces, names, tests, total):
    """Lines of Markdown: means, and the tests."""
    lines = [f"Mean simple regret ± standard error (runs in brackets where fewer than {total}).", ""]
    lines.append("| surface | trials | " + " | ".join(names) + " |")
    lines.append("|---" * (len(names) + 2) + "|")
    for surface in surfaces:
        for t in TRIALS:
            cells = []
            for name in names:
                runs = curves.get((surface, name), {})
                a = np.array([at(c, t) for c in runs.values()])
                few = f" ({len(a)})" if len(a) < total else ""
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
                f"| {r['rival_regret']:.2f} | {probability(r['p'])} | {probability(r['p_holm'])} | {probability(r['p_holm_all'])} |"
            )
    return lines


def times(seconds, timing, names):
    lines = ["Seconds per suggestion. Means over a run (median of the runs, ours with the evaluation) are wall time, which other work on the\nmachine lengthens; those at a number of observations are time of one core, exact to its scheduler's tick of 4 ms.", ""]
    for name in names:
        values = [v for (_, n), v in seconds.items() if n == name]
        if values:
            lines.append(f"- {name}: {np.median(values):.4f}")
    for row in timing:
        cells = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "observations")
        lines.append(f"- at {row['observations']} observations: {cells}")
    return lines


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
    families = {}
    last = max(run for runs in curves.values() for run in runs)
    sections = []
    for total in sorted({min(total, last + 1) for total in (FIRST, SECOND, last + 1)} | {FIRST}):
        some, advice = only(curves, lambda run: run < total), only(recommended, lambda run: run < total)
        # A sampler is shown where it made all runs on some surface, and ours are compared where they made all runs on all.
        made = lambda name: [len(some.get((surface, name), {})) == total for surface in surfaces]
        shown = [n for n in names if any(made(n))]
        tests = families.setdefault(f"runs 0 to {total - 1}", [])
        for mine in OURS:
            if all(made(mine)):
                tests += compare(some, surfaces, rivals, mine)
                if all((surface, mine) in advice for surface in surfaces):
                    tests += compare(some, surfaces, rivals, mine, advice)
        sections += [f"## Runs 0 to {total - 1}", ""] + tables(some, surfaces, shown, tests, total) + [""]
    sections += ["## Time", ""] + times(seconds, timing, names)
    text = "\n".join(sections) + "\n"
    print(text)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.write(text)
    if args.json:
        rows = lambda some, curve: [
            {"surface": key[0], "sampler": key[1], "runs": list(runs), "regret": [curve(c) for c in runs.values()]}
            | ({"recommended": [recommended[key][run] for run in runs]} if key in recommended else {})
            for key, runs in some.items()
        ]
        results = rows(only(curves, lambda run: run < FIRST), lambda c: c)
        for row in results:
            row["seconds_per_suggestion"] = seconds[(row["surface"], row["sampler"])]
        further = rows(only(curves, lambda run: run >= FIRST), lambda c: [at(c, t) for t in TRIALS])
        dump = json.dumps({"tests": families, "timing": timing, "results": results, "further": further}, indent=1)
        # One curve a line keeps the file readable in a diff.
        dump = re.sub(r"\[\s+((?:[-\d.e]+,\s+)*[-\d.e]+)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", dump)
        with open(args.json, "w") as file:
            file.write(dump + "\n")


if __name__ == "__main__":
    main()
