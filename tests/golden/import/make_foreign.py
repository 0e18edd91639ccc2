"""Writes small files in DistillKit's documented layouts, and what is in them.

    python3 make_foreign.py        # needs numpy and pyarrow

The encoders here are written from the layout that cache-builder/src/import/distillkit.rs describes, in numpy; they use
no code of DistillKit. Beside each Parquet file stands the compression configuration that a reader needs. `expected.json`
holds the values that a reader must find: not the teacher's, but what the lossy code made of them.
"""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent
VOCABULARY, POSITIONS, SEQUENCES = 256, 9, 3
FLOATS = {"float16": np.float16, "float32": np.float32}


def teacher(seed):
    """Log-probabilities [T, V] and tokens [T]."""
    random = np.random.default_rng(seed)
    logits = random.gumbel(size=(POSITIONS, VOCABULARY)) * 2
    tokens = random.integers(0, VOCABULARY, POSITIONS)
    log_sum_exp = np.log(np.exp(logits).sum(-1, keepdims=True))
    return tokens, logits, logits - log_sum_exp


def largest(values, k):
    ids = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    return ids, np.take_along_axis(values, ids, -1)


def pack(numbers, bits):
    """Numbers of `bits` bits, from the highest bit of the first byte on."""
    stream = [number >> bit & 1 for number in numbers for bit in reversed(range(bits))]
    stream += [0] * (-len(stream) % 8)
    return [int("".join(map(str, stream[at : at + 8])), 2) for at in range(0, len(stream), 8)]


def encode(values, config):
    """Bytes of one position [k] and what a reader gets back."""
    exact_type, term_type = FLOATS[config["exact_dtype"]], FLOATS[config["term_dtype"]]
    if config["delta_encoding"]:
        values = np.diff(values, prepend=0.0)
    exact = values[: config["exact_k"]].astype(exact_type)
    out, rest = list(exact.tobytes()), values[config["exact_k"] :]
    approximation = np.zeros(len(rest))
    if config["polynomial_terms"]:
        ranks = np.arange(len(rest), dtype=np.float64)
        if config["normalize_t"]:
            ranks = ranks / (len(rest) - 1)
        terms = np.stack([np.sqrt(ranks) if term == "sqrt" else ranks**term for term in config["polynomial_terms"]], -1)
        terms = terms.astype(term_type)
        coefficients = np.linalg.lstsq(terms.astype(np.float64), rest, rcond=None)[0].astype(term_type)
        approximation = (terms * coefficients).sum(-1).astype(np.float64)
        out += list(coefficients.tobytes())
    done, residual = 0, (rest - approximation)
    for bin in config["residual_bins"]:
        bits, count = bin["element_bits"], bin["num_elements"]
        part = residual[done : done + count]
        scale = FLOATS[bin["scale_dtype"]](max(np.abs(part).max() / 2 ** (bits - 1 if bits > 1 else 0), 1e-4))
        if bits == 1:
            levels = (part > 0).astype(int)
            approximation[done : done + count] += (levels * 2 - 1) * float(scale)
        else:
            lowest = -(2 ** (bits - 1))
            levels = np.clip(np.round(part / float(scale)), lowest, -lowest - 1).astype(int) - lowest
            approximation[done : done + count] += (levels + lowest) * float(scale)
        out += list(scale.tobytes()) + pack(levels.tolist(), bits)
        done += count
    decoded = np.concatenate([exact.astype(np.float64), approximation])
    if config["delta_encoding"]:
        decoded = np.cumsum(decoded)
    return out, decoded.astype(exact_type).astype(np.float64)


def encode_legacy(values, config):
    """Exact values, coefficients of a polynomial in 1/rank, and what a reader gets back."""
    exact, rest = values[: config["exact_k"]].astype(np.float16), values[config["exact_k"] :]
    ranks = np.arange(1, len(rest) + 1, dtype=np.float64)
    columns = [ranks ** (-power if config["invert_polynomial"] else power) for power in range(config["polynomial_degree"] + 1)]
    if config["with_sqrt_term"]:
        columns.append(np.sqrt(ranks))
    terms = np.stack(columns, -1)
    coefficients = np.linalg.lstsq(terms, rest, rcond=None)[0].astype(np.float32)
    decoded = np.concatenate([exact.astype(np.float64), terms @ coefficients.astype(np.float64)])
    return exact.astype(np.float32), coefficients, decoded


def words(ids, bits):
    """Ids from the lowest bit of 64-bit words."""
    in_a_word = 64 // bits
    parts = [ids[at : at + in_a_word] for at in range(0, len(ids), in_a_word)]
    return [sum(int(number) << bits * place for place, number in enumerate(part)) for part in parts]


def write_config(name, config):
    lines = []
    for key, value in config.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{key}:")
            for entry in value:
                inner = [f"{name}: {number}" for name, number in entry.items()]
                lines += [f"  - {inner[0]}"] + [f"    {line}" for line in inner[1:]]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    (HERE / f"{name}.yml").write_text("\n".join(lines) + "\n")


def u8_lists(rows):
    return pa.array(rows, pa.list_(pa.list_(pa.uint8())))


def current(name, config, seed):
    tokens_column, values_column, ids_column, rows = [], [], [], []
    for sequence in range(SEQUENCES):
        tokens, _, log_probabilities = teacher(seed + sequence)
        ids, values = largest(log_probabilities, config["k"])
        encoded = [encode(row, config) for row in values]
        tokens_column.append(tokens.tolist())
        # The last position is missing, as with vLLM.
        values_column.append([part for part, _ in encoded][:-1])
        ids_column.append([pack(row.tolist(), 8) for row in ids][:-1])
        rows.append([{"ids": i.tolist(), "values": v.tolist()} for i, (_, v) in zip(ids, encoded)][:-1])
    table = pa.table(
        {
            "input_ids": pa.array(tokens_column, pa.list_(pa.uint64())),
            "compressed_logprobs": u8_lists(values_column),
            "bytepacked_indices": u8_lists(ids_column),
        }
    )
    pq.write_table(table, HERE / f"{name}.parquet")
    write_config(name, config)
    return {"name": name, "values": "log-probabilities", "rows": rows}


def legacy(name, config, seed):
    columns = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": []}
    rows = []
    for sequence in range(SEQUENCES):
        tokens, logits, _ = teacher(seed + sequence)
        ids, values = largest(logits - logits.mean(-1, keepdims=True), config["k"])
        encoded = [encode_legacy(row, config) for row in values]
        columns["input_ids"].append(tokens.tolist())
        columns["packed_indices"].append([words(row.tolist(), 8) for row in ids])
        columns["exact_values"].append([exact.tolist() for exact, _, _ in encoded])
        columns["coeffs"].append([coefficients.tolist() for _, coefficients, _ in encoded])
        # Nothing follows the last token.
        rows.append([{"ids": i.tolist(), "values": v.tolist()} for i, (_, _, v) in zip(ids, encoded)][:-1])
    of_lists = lambda kind: pa.list_(pa.list_(kind))
    kinds = [pa.list_(pa.uint64()), of_lists(pa.uint64()), of_lists(pa.float32()), of_lists(pa.float32())]
    arrays = [pa.array(column, kind) for column, kind in zip(columns.values(), kinds)]
    pq.write_table(pa.table(dict(zip(columns, arrays))), HERE / f"{name}.parquet")
    write_config(name, config)
    return {"name": name, "values": "logits", "rows": rows}


CASES = [
    current(
        "logprobs",
        {
            "d": VOCABULARY,
            "k": 24,
            "exact_k": 12,
            "exact_dtype": "float32",
            "polynomial_terms": [0, 1, 2, "sqrt"],
            "term_dtype": "float32",
            "residual_bins": [
                {"scale_dtype": "float16", "element_bits": 7, "num_elements": 5},
                {"scale_dtype": "float32", "element_bits": 1, "num_elements": 4},
            ],
            "delta_encoding": True,
            "normalize_t": False,
        },
        1,
    ),
    current(
        "half",
        {
            "d": VOCABULARY,
            "k": 12,
            "exact_k": 6,
            "exact_dtype": "float16",
            "polynomial_terms": None,
            "term_dtype": "float32",
            "residual_bins": [{"scale_dtype": "float16", "element_bits": 9, "num_elements": 6}],
            "delta_encoding": False,
            "normalize_t": False,
        },
        10,
    ),
    legacy(
        "legacy",
        {"k": 20, "exact_k": 5, "polynomial_degree": 3, "vocab_size": VOCABULARY, "invert_polynomial": True, "with_sqrt_term": True},
        20,
    ),
]
(HERE / "expected.json").write_text(json.dumps({"cases": CASES}, indent=None) + "\n")
