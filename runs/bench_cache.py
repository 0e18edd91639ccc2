#!/usr/bin/env python3
"""How fast a cache decodes, as ratios measured in one run.

    runs/bench_cache.py [--positions N] [--rounds N] [--large N] [--json]

Makes a cache of the tier sparse (K = 64) with one f16 layer of width 576, writes the same data as naive nested-list
Parquet (zstd, pyarrow) and in the layout of MosaicML's MDS (uncompressed, samples of arrays, read as its reader reads
them: seek, read, cut, np.frombuffer), and decodes each in turn, several rounds, one thread, page cache warm. Times are
CPU seconds, medians over the rounds. What is handed out: ids u32, mask, five f32 statistics, 64 ids u32 and logits f32,
the layer in f32, by the position; the rivals are also measured with the layer left in f16, as they store it.

What two threads gain is beside what they gain in a plain copy and in arithmetic that touches no memory: the machine's own
limits.

Where MosaicML's package `mosaicml-streaming` can be imported, its own writer and reader are measured too.

Needs numpy and pyarrow, and `cargo build --release -p caskd-formats --example decode_speed`.
"""

import argparse
import json
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
from caskd_reader import STATISTICS, Cache  # noqa: E402

try:
    from streaming import MDSWriter
    from streaming.base.format import reader_from_json
except ImportError:
    MDSWriter = None

ROWS_PER_FILE = 256


class Decoder:
    """The Rust half, a process that answers commands."""

    def __init__(self, program, folder):
        self.process = subprocess.Popen(
            [program, "serve", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def samples(folder):
    """The arrays of every sequence, by column; None and zero-dimensional values left out."""
    for sequence in Cache(folder).sequences():
        yield {
            "token_ids": sequence["token_ids"],
            "loss_mask": sequence["loss_mask"],
            **{name: sequence["statistics"][name] for name in STATISTICS},
            "ids": sequence["top_k"]["ids"],
            "logits": sequence["top_k"]["logits"],
            "hidden": sequence["hidden"][15].astype(np.float16),
        }


def write_nested(folder, sequences):
    """Parquet as one would write it without thinking: a row a sequence, lists in lists."""

    def lists(values):
        flat = pa.array(np.concatenate([value.reshape(-1) for value in values]))
        if values[0].ndim == 2:
            width = values[0].shape[1]
            inner = np.arange(0, len(flat) + 1, width, dtype=np.int32)
            flat = pa.ListArray.from_arrays(pa.array(inner), flat)
        outer = np.cumsum([0] + [len(value) for value in values]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(outer), flat)

    for first in range(0, len(sequences), ROWS_PER_FILE):
        group = sequences[first : first + ROWS_PER_FILE]
        columns = {name: lists([sequence[name] for sequence in group]) for name in group[0]}
        pq.write_table(pa.table(columns), folder / f"{first:08}.parquet", compression="zstd", compression_level=1)


def read_nested(folder, widens):
    for path in sorted(folder.iterdir()):
        table = pq.read_table(path, use_threads=False, memory_map=True)
        for column in table.columns:
            values = column.combine_chunks()
            while isinstance(values, pa.ListArray):
                values = values.flatten()
            array = values.to_numpy(zero_copy_only=False)
            if widens and array.dtype == np.float16:
                array.astype(np.float32)


def write_mds(folder, sequences):
    """Shards of samples: offsets, then for every sample the sizes of its columns and the columns."""
    names = list(sequences[0])
    for first in range(0, len(sequences), ROWS_PER_FILE):
        group = sequences[first : first + ROWS_PER_FILE]
        bodies = []
        for sequence in group:
            columns = []
            for name in names:
                value = sequence[name].astype(np.uint8) if sequence[name].dtype == bool else sequence[name]
                shape = np.array(value.shape, np.uint32)
                code = {"uint8": 8, "uint32": 32, "float32": 34, "float16": 18}[value.dtype.name]
                columns.append(bytes([code, value.ndim << 2 | 2]) + shape.tobytes() + value.tobytes())
            bodies.append(struct.pack(f"<{len(columns)}I", *map(len, columns)) + b"".join(columns))
        start = 4 + 4 * (len(bodies) + 1)
        offsets = np.cumsum([start] + [len(body) for body in bodies]).astype(np.uint32)
        (folder / f"{first:08}.mds").write_bytes(struct.pack("<I", len(bodies)) + offsets.tobytes() + b"".join(bodies))


def read_mds(folder, columns, widens):
    types = {8: np.uint8, 32: np.uint32, 34: np.float32, 18: np.float16}
    for path in sorted(folder.iterdir()):
        with open(path, "rb", 0) as file:
            (count,) = np.frombuffer(file.read(4), np.uint32)
        for index in range(count):
            # The reader opens the file for every sample.
            with open(path, "rb", 0) as file:
                file.seek((1 + index) * 4)
                begin, end = np.frombuffer(file.read(8), np.uint32)
                file.seek(begin)
                data = file.read(end - begin)
            at, sizes = 0, []
            for _ in range(columns):
                (size,) = np.frombuffer(data[at : at + 4], np.uint32)
                sizes.append(size)
                at += 4
            for size in sizes:
                value = data[at : at + size]
                at += size
                dimensions = value[1] >> 2
                shape = np.frombuffer(value[2 : 2 + 4 * dimensions], np.uint32)
                array = np.frombuffer(value[2 + 4 * dimensions :], types[value[0]]).reshape(shape)
                if widens and array.dtype == np.float16:
                    array.astype(np.float32)


def write_streaming(folder, sequences):
    """The same by MosaicML's own package."""
    columns = {name: f"ndarray:{'uint8' if value.dtype == bool else value.dtype.name}" for name, value in sequences[0].items()}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for sequence in sequences:
            writer.write({name: value.astype(np.uint8) if value.dtype == bool else value for name, value in sequence.items()})


def read_streaming(folder, widens):
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        for sample in reader_from_json(str(folder), "", shard):
            for array in sample.values():
                if widens and array.dtype == np.float16:
                    array.astype(np.float32)


def timed(work, *arguments):
    # Of the whole process: pyarrow has threads of its own even when it is asked for none.
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", type=int, default=50, help="size of the large cache, in small ones; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    program = str(target / "release/examples/decode_speed")
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(program, pathlib.Path(folder), arguments)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        print()
        return
    for name, value in results.items():
        print(f"{name:<50} {value:>14,.3f}" if isinstance(value, float) else f"{name:<50} {value:>14,}")


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(program, folder, arguments):
    cache = folder / "cache"
    subprocess.run([program, "make", cache, str(arguments.positions)], check=True)
    sequences = list(samples(cache))
    rivals = [("nested", write_nested), ("mds", write_mds)]
    if MDSWriter is not None:
        rivals.append(("streaming", write_streaming))
    for name, write in rivals:
        (folder / name).mkdir()
        write(folder / name, sequences)
    columns = len(sequences[0])
    del sequences
    decoder = Decoder(program, cache)
    commands = ["scan", "one-thread", "threads", "copy", "copy-threads", "count", "count-threads", "native", "subset"]
    times = {name: [] for name in commands}
    times |= {name: [] for name in ["nested", "nested f16", "mds", "mds f16", "streaming", "streaming f16"]}
    walls = {name: [] for name in commands}
    answers = {}
    for number in range(arguments.rounds + 1):
        found = {}
        for command in commands:
            answers[command] = decoder(command)
            found[command] = answers[command]["seconds"]
        # The rivals are slow and steady; fewer rounds do.
        if number < 6:
            found["nested"] = timed(read_nested, folder / "nested", True)
            found["nested f16"] = timed(read_nested, folder / "nested", False)
            found["mds"] = timed(read_mds, folder / "mds", columns, True)
            found["mds f16"] = timed(read_mds, folder / "mds", columns, False)
            if MDSWriter is not None:
                found["streaming"] = timed(read_streaming, folder / "streaming", True)
                found["streaming f16"] = timed(read_streaming, folder / "streaming", False)
        if number == 0:
            continue
        for name, seconds in found.items():
            times[name].append(seconds)
        for name in walls:
            walls[name].append(answers[name]["wall"])
    decoder.close()
    median = {name: statistics.median(values) for name, values in times.items() if values}
    # One after the other in each round, so that a neighbour who comes and goes slows both down.
    wall = {name: statistics.median(one / two for one, two in zip(walls[name], walls[two_threads]))
            for name, two_threads in [("one-thread", "threads"), ("copy", "copy-threads"), ("count", "count-threads")]}
    positions = arguments.positions
    share = answers["subset"]["positions"] / positions
    results = {
        "positions": positions,
        "bytes handed out, a position": answers["scan"]["bytes"] / positions,
        "cache, bytes a position": size(cache) / positions,
        "nested-list Parquet, bytes a position": size(folder / "nested") / positions,
        "MDS, bytes a position": size(folder / "mds") / positions,
        "decode, M positions a CPU second": positions / median["scan"] / 1e6,
        "native columns, M positions a CPU second": positions / median["native"] / 1e6,
        "copy, GB a CPU second": answers["copy"]["bytes"] / median["copy"] / 1e9,
        "decode : nested-list Parquet": median["nested"] / median["scan"],
        "decode : nested-list Parquet, layer left in f16": median["nested f16"] / median["scan"],
        "decode : MDS": median["mds"] / median["scan"],
        "decode : MDS, layer left in f16": median["mds f16"] / median["scan"],
        **{f"decode : MDS by its own package{note}": median[name] / median["scan"]
           for name, note in [("streaming", ""), ("streaming f16", ", layer left in f16")] if name in median},
        "decode : copy of the bytes handed out": median["copy"] / median["scan"],
        "5% subset : its share of a scan": median["subset"] / (median["scan"] * share),
        "two threads : one, by CPU time": 2 * median["one-thread"] / median["threads"],
        "two threads : one, by wall time": wall["one-thread"],
        "two threads : one, a plain copy, by wall time": wall["copy"],
        "two threads : one, registers only, by wall time": wall["count"],
        "private memory, MiB": private_memory(program, cache),
    }
    if arguments.large:
        large = folder / "large"
        subprocess.run([program, "make", large, str(positions * arguments.large)], check=True)
        results["large cache, MiB"] = size(large) / 2**20
        results[f"private memory at {arguments.large}x, MiB"] = private_memory(program, large)
    return results


def private_memory(program, folder):
    """Of a process that lists and decodes every row."""
    decoder = Decoder(program, folder)
    decoder("rows")
    anonymous = decoder("scan")["anonymous"]
    decoder.close()
    return anonymous / 2**20


if __name__ == "__main__":
    main()
