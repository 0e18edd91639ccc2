"""An outside witness: pyarrow, DuckDB and python/caskd_reader.py read the same values as the Rust reader.

    read_with_pyarrow.py CACHE EXPECTED.json

EXPECTED.json is a list of what the Rust reader decoded, a `null` among logits stands for minus infinity. Prints a line
per check and exits with 1 at the first difference.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "python"))
from caskd_reader import STATISTICS, Cache  # noqa: E402


def floats(values):
    return np.array([-np.inf if value is None else float(value) for value in values], np.float64).astype(np.float32)


def same(what, found, expected):
    if not np.array_equal(np.asarray(found), np.asarray(expected)):
        sys.exit(f"{what}: {found} is not {expected}")


def pyarrow_reads_native_columns(folder, expected):
    paths = [folder / shard["file"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    same("rows", len(rows), len(expected))
    for row, sequence in zip(rows, expected):
        same("source", row["source"], sequence["source"])
        same("positions", row["positions"], len(sequence["token_ids"]))
        same("split_hash", row["split_hash"], sequence["split_hash"])
        same("split_hash", row["split_hash"], int.from_bytes(row["token_digest"][:8], "little"))
        same("token_ids", row["token_ids"], sequence["token_ids"])
        same("loss_mask", row["loss_mask"], sequence["loss_mask"])
        same("targets", row["targets"], sum(sequence["loss_mask"][1:]))
        for name in STATISTICS:
            same(name, np.array(row[name], np.float32), floats(sequence["statistics"][name]))


def duckdb_reads_native_columns(folder, expected):
    try:
        import duckdb
    except ImportError:
        print("SKIPPED duckdb: not importable")
        return
    shards = str(folder / "shards" / "*.parquet")
    columns = ", ".join(["source", "split_hash", "targets", "token_ids", "loss_mask", *STATISTICS])
    rows = duckdb.execute(f"SELECT {columns} FROM read_parquet('{shards}') ORDER BY filename, file_row_number").fetchall()
    same("duckdb rows", len(rows), len(expected))
    for (source, split_hash, targets, token_ids, loss_mask, *statistics), sequence in zip(rows, expected):
        same("duckdb source", source, sequence["source"])
        same("duckdb split_hash", split_hash, sequence["split_hash"])
        same("duckdb targets", targets, sum(sequence["loss_mask"][1:]))
        same("duckdb token_ids", token_ids, sequence["token_ids"])
        same("duckdb loss_mask", loss_mask, sequence["loss_mask"])
        for name, values in zip(STATISTICS, statistics):
            same(f"duckdb {name}", np.array(values, np.float32), floats(sequence["statistics"][name]))
    # The query of docs/FORMAT.md.
    top = duckdb.execute(
        "SELECT source, i, log_sum_exp[i] - max[i] AS nats FROM (SELECT source, log_sum_exp, max,"
        f" unnest(range(1, positions + 1)) AS i FROM read_parquet('{shards}')) ORDER BY nats DESC LIMIT 10"
    ).fetchall()
    same("duckdb query", len(top), min(10, sum(len(sequence["token_ids"]) for sequence in expected)))
    print("duckdb: same native columns")


def reader_decodes_everything(folder, expected):
    cache = Cache(folder)
    sequences = list(cache.sequences())
    same("reader rows", len(sequences), len(expected))
    for found, sequence in zip(sequences, expected):
        if sequence["top_k"] is None:
            same("top_k", "top_k" in found, False)
        else:
            same("top_k ids", found["top_k"]["ids"].reshape(-1), sequence["top_k"]["ids"])
            same("top_k logits", found["top_k"]["logits"].reshape(-1), floats(sequence["top_k"]["logits"]))
        if sequence["coefficients"] is None:
            same("coefficients", "coefficients" in found, False)
        else:
            same("coefficients", found["coefficients"].reshape(-1), sequence["coefficients"])
        same("layers", sorted(found["hidden"]), [state["layer"] for state in sequence["hidden"]])
        for state in sequence["hidden"]:
            same(f"hidden.{state['layer']}", found["hidden"][state["layer"]].reshape(-1), floats(state["values"]))
        if sequence["logits"] is not None:
            logits = cache.rebuild_logits(found).reshape(-1)
            if not np.allclose(logits, floats(sequence["logits"]), rtol=1e-5, atol=1e-5):
                sys.exit("rebuilt logits differ")


def main():
    folder, expected = pathlib.Path(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
    pyarrow_reads_native_columns(folder, expected)
    print("pyarrow: same native columns")
    duckdb_reads_native_columns(folder, expected)
    reader_decodes_everything(folder, expected)
    print("caskd_reader.py: same top-k, hidden states and logits")


if __name__ == "__main__":
    main()
