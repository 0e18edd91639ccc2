"""Turns a study in which every point of a space was tried into a tabular benchmark.

    python runs/search_bench/table_of_study.py study.sqlite space.toml > table.json
"""

import json
import sqlite3
import sys


def main():
    path, space = sys.argv[1:]
    with open(space) as file:
        space = file.read()
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    meta = dict(database.execute("SELECT key, value FROM meta"))
    depends_on = json.loads(meta["depends_on"])
    measured = {(p, s): v for p, s, v in database.execute("SELECT part, settings, value FROM discrepancy")}

    def part(name, params):
        """The measured part of S(x), which the study keeps by the settings it depends on, in the space's order."""
        settings = {key: value for key, value in params.items() if key in depends_on[name]}
        return measured[(name, json.dumps(settings, separators=(",", ":")))]

    lines = []
    for text, value, error, seed in database.execute(
        "SELECT params, value, error, seed FROM trial WHERE state IN ('complete', 'failed') ORDER BY params"
    ):
        params = json.loads(text)
        row = {"params": params, "value": value, "logits": part("logits", params), "hidden": part("hidden", params)}
        if error:
            row["error"] = error
        lines.append(json.dumps(row | {"seed": seed}))
    # One configuration a line keeps the file readable in a diff.
    print('{"space_toml": ' + json.dumps(space) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}")


if __name__ == "__main__":
    main()
