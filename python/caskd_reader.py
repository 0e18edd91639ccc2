"""Reads a caskd cache with pyarrow and numpy only, from docs/FORMAT.md and without any caskd code.

    from caskd_reader import Cache
    cache = Cache("CACHE")
    for sequence in cache.sequences():
        sequence["token_ids"], sequence["top_k"]["logits"], sequence["hidden"][30]
    logits = cache.rebuild_logits(sequence)          # exact and compact tier: float32 [T, V]

    python caskd_reader.py CACHE [--limit N] [--shards DIR]    # one JSON line per sequence

Digests need blake3 and xxhash, which are not required here: where they can be imported, checksums are compared.
"""

import argparse
import base64
import json
import pathlib
import struct
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

try:
    import xxhash
except ImportError:
    xxhash = None
try:
    import blake3
except ImportError:
    blake3 = None

FORMAT_VERSION = 1
STATISTICS = ("mean", "std", "min", "max", "log_sum_exp")
CODECS = {
    ("topk-f16-steps", 1): 1,
    ("int8-channel", 1): 2,
    ("f16-planes", 1): 3,
    ("transform-rans", 1): 4,
    ("topk-ranked", 1): 5,
}
HEADER = struct.Struct("<QBBHIII")
RAW = 1 << 31
FREQUENCY_BITS = 12
LOWEST_STATE = 1 << 16
LONG_GAP = 255
TOP_K_STEPS = np.float32(32)
ZSTD = pa.Codec("zstd")


class CacheError(Exception):
    """The cache is damaged, or of a version that this reader does not know."""


class Payload:
    """What is left of a blob."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def take(self, count):
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise CacheError("a blob ends early")
        self.at += count
        return piece

    def section(self, length):
        (word,) = struct.unpack("<I", self.take(4))
        stored = self.take(word & ~RAW)
        data = bytes(stored) if word & RAW else ZSTD.decompress(stored, decompressed_size=length).to_pybytes()
        if len(data) != length:
            raise CacheError("a section has the wrong length")
        return np.frombuffer(data, np.uint8)

    def word(self):
        return struct.unpack("<I", self.take(4))[0]

    def coded(self):
        """One stream of coded symbols: its length, then its bytes."""
        return self.take(self.word())

    def bits(self, counts):
        """Values of the given numbers of bits, one after the other, lowest bit first."""
        counts = np.asarray(counts, np.int64).reshape(-1)
        data = self.take(-(-int(counts.sum()) // 8))
        ends = np.cumsum(counts)
        # Eight bytes from the one where a value begins: at most 7 + 32 bits of them matter.
        padded = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(8, np.uint8)]).astype(np.uint64)
        start = ends - counts
        window = np.zeros(len(counts), np.uint64)
        for byte in range(5):
            window |= padded[np.minimum((start >> 3) + byte, len(padded) - 1)] << np.uint64(8 * byte)
        mask = (np.uint64(1) << counts.astype(np.uint64)) - np.uint64(1)
        return (window >> (start & 7).astype(np.uint64)) & mask

    def exceptions(self, kind):
        """(index, value) pairs that replace what the stream says."""
        count = self.word()
        return np.frombuffer(self.take(8 * count), [("index", "<u4"), ("value", kind)])

    def planes(self, count):
        low = self.section(count).astype(np.uint16)
        return low | self.section(count).astype(np.uint16) << 8


class Tables:
    """Frequency tables of a basis, one for each column of a matrix of symbols."""

    def __init__(self, sizes, frequencies):
        self.columns = []
        for size, end in zip(sizes, np.cumsum(sizes)):
            own = frequencies[end - size : end].astype(np.uint32)
            if own.sum() != 1 << FREQUENCY_BITS:
                raise CacheError("a frequency table does not add up to 4096")
            symbols = np.repeat(np.arange(size), own)
            starts = np.cumsum(own) - own
            self.columns.append((symbols, own[symbols], np.arange(1 << FREQUENCY_BITS, dtype=np.uint32) - starts[symbols].astype(np.uint32)))

    def decode(self, data, positions):
        """Symbols [positions, columns] of an interleaved rANS stream; all lanes at once."""
        lanes = 1 << (min(max(positions // 16, 1), 32).bit_length() - 1)
        state = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.uint32)
        words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint32)
        out = np.empty((positions, len(self.columns)), np.int32)
        at = 0
        for first in range(0, positions, lanes):
            here = min(lanes, positions - first)
            live = state[:here]
            for column, (symbols, frequency, place) in enumerate(self.columns):
                slot = live & np.uint32((1 << FREQUENCY_BITS) - 1)
                out[first : first + here, column] = symbols[slot]
                live = frequency[slot] * (live >> np.uint32(FREQUENCY_BITS)) + place[slot]
                short = np.flatnonzero(live < LOWEST_STATE)
                if len(short):
                    more = words[at : at + len(short)]
                    if len(more) < len(short):
                        raise CacheError("the coded symbols end early")
                    live[short] = live[short] << np.uint32(16) | more
                    at += len(short)
            state[:here] = live
        if at != len(words) or (state != LOWEST_STATE).any():
            raise CacheError("the coded symbols do not end where they should")
        return out


class Basis:
    """`basis-<16 hex>.safetensors` of a compact cache."""

    def __init__(self, path):
        tensors = read_safetensors(path)
        self.mean, self.synthesis = tensors["mean"], tensors["synthesis"]
        self.tail_shift = tensors.get("tail_shift", np.zeros(1, np.float32))[0]
        self.shift = tensors["levels.shift"].astype(np.int64)
        self.lowest = tensors["levels.lowest"].astype(np.int64)
        self.levels = Tables(tensors["levels.symbols"], tensors["levels.frequencies"])
        self.id_order = tensors["top_k.id_order"]
        self.top_k = Tables(tensors["top_k.symbols"], tensors["top_k.frequencies"])


def read_safetensors(path):
    """{name: array} of a safetensors file; BF16 becomes float32."""
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U16": "<u2", "I16": "<i2", "U8": "u1"}
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    tensors = {}
    for name, about in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        values = np.frombuffer(data[8 + length + start : 8 + length + end], kinds[about["dtype"]])
        if about["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values.reshape(about["shape"])
    return tensors


def blobs(row, column, layer, width, positions):
    """Yields (first position, number of positions, payload) of every blob of a row; checks the headers."""
    codec_id = CODECS[column["codec"], column["version"]]
    first = 0
    for blob in row:
        checksum, codec, version, found_layer, found_first, count, found_width = HEADER.unpack_from(blob)
        if xxhash is not None and xxhash.xxh3_64_intdigest(blob[8:]) != checksum:
            raise CacheError(f"{column['name']}: a blob's checksum does not match")
        if (codec, version) != (codec_id, column["version"]):
            raise CacheError(f"{column['name']}: codec {codec} version {version} is unknown")
        if (found_layer, found_first, found_width) != (layer, first, width) or not 0 < count <= positions - first:
            raise CacheError(f"{column['name']}: a blob's header contradicts its row")
        yield first, count, Payload(memoryview(blob)[HEADER.size :])
        first += count
    if first != positions:
        raise CacheError(f"{column['name']}: the blobs cover {first} of {positions} positions")


def decode_top_k(row, column, maximum):
    """{ids [T, K] uint32, logits [T, K] float32} from a row's blobs and its `max`."""
    k, vocab_size = column["parameters"]["k"], column["parameters"]["vocab_size"]
    ids, logits = [], []
    for first, count, payload in blobs(row, column, 0, k, len(maximum)):
        patterns = np.zeros((count, k), np.uint16)
        if k > 1:
            steps = payload.planes(count * (k - 1)).reshape(count, k - 1)
            patterns[:, 1:] = np.cumsum(steps, axis=1, dtype=np.uint32)
        distance = patterns.view(np.float16).astype(np.float32)
        logits.append(maximum[first : first + count, None] - distance)
        piece = payload.planes(count * k).astype(np.uint32)
        for bit in range(16, (vocab_size - 1).bit_length()):
            plane = np.unpackbits(payload.section(-(-count * k // 8)), bitorder="little")[: count * k]
            piece |= plane.astype(np.uint32) << np.uint32(bit)
        ids.append(piece.reshape(count, k))
    return {"ids": np.concatenate(ids), "logits": np.concatenate(logits)}


def decode_ranked_top_k(row, column, maximum, basis):
    """{ids [T, K] uint32, logits [T, K] float32} of codec `topk-ranked`."""
    k = column["parameters"]["k"]
    ids, logits = [], []
    for first, count, payload in blobs(row, column, 0, k, len(maximum)):
        symbols = basis.top_k.decode(payload.coded(), count)
        buckets, gaps = symbols[:, :k], symbols[:, k:].astype(np.int64).reshape(-1)
        low = payload.bits(np.maximum(buckets - 1, 0)).astype(np.int64).reshape(count, k)
        ranks = np.where(buckets > 0, (1 << np.maximum(buckets - 1, 0)) | low, 0)
        ids.append(basis.id_order[ranks])
        pairs = payload.exceptions("<u4")
        gaps[pairs["index"]] = pairs["value"]
        steps = np.zeros((count, k), np.int64)
        steps[:, 1:] = np.cumsum(gaps.reshape(count, k - 1), axis=1)
        logits.append(maximum[first : first + count, None] - steps.astype(np.float32) / TOP_K_STEPS)
    return {"ids": np.concatenate(ids), "logits": np.concatenate(logits)}


def decode_coefficients(row, column, positions, basis):
    """int16 [T, r]: the levels of codec `transform-rans`."""
    rank = column["parameters"]["rank"]
    out = []
    for first, count, payload in blobs(row, column, 0, rank, positions):
        upper = basis.levels.decode(payload.coded(), count) + basis.lowest
        low = payload.bits(np.broadcast_to(basis.shift, (count, rank))).astype(np.int64).reshape(count, rank)
        levels = ((upper << basis.shift) | low).reshape(-1)
        pairs = payload.exceptions("<i4")
        levels[pairs["index"]] = pairs["value"]
        out.append(levels.astype(np.int16).reshape(count, rank))
    return np.concatenate(out)


def decode_hidden(row, column, layer, positions, scales):
    """float32 [T, D] from a row's blobs."""
    width = column["parameters"]["width"]
    out = np.empty((positions, width), np.float32)
    for first, count, payload in blobs(row, column, layer, width, positions):
        if column["codec"] == "f16-planes":
            values = payload.planes(count * width).view(np.float16).astype(np.float32)
        else:
            levels = payload.section(count * width).view(np.int8).reshape(count, width)
            values = (levels.astype(np.float32) * scales).reshape(-1)
            (exceptions,) = struct.unpack("<I", payload.take(4))
            pairs = np.frombuffer(payload.take(8 * exceptions), [("index", "<u4"), ("value", "<f4")])
            values[pairs["index"]] = pairs["value"]
        out[first : first + count] = values.reshape(count, width)
    return out


def read_shard(path, basis=None):
    """Yields every sequence of one shard; needs nothing but the file, and in the compact tier its basis."""
    file = pq.ParquetFile(path)
    metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()} \
        if file.schema_arrow.metadata else {}
    metadata |= {key.decode(): value.decode() for key, value in file.metadata.metadata.items()}
    about = json.loads(metadata["caskd"])
    if about["format_version"] != FORMAT_VERSION:
        raise CacheError(f"{path}: format version {about['format_version']} is unknown")
    for column in about["columns"]:
        if (column["codec"], column["version"]) not in CODECS:
            raise CacheError(f"{path}, column {column['name']}: codec {column['codec']} version {column['version']} is unknown")
    if "basis" in about and basis is None:
        basis = Basis(pathlib.Path(path).parent.parent / about["basis"])
    for batch in file.iter_batches(batch_size=16):
        for index in range(batch.num_rows):
            yield decode_row(batch, index, about["columns"], metadata, basis)


def decode_row(batch, index, columns, metadata, basis):
    cell = lambda name: batch.column(name)[index]
    values = lambda name, kind: cell(name).values.to_numpy(zero_copy_only=False).astype(kind, copy=False)
    sequence = {
        "source": cell("source").as_py(),
        "token_digest": cell("token_digest").as_py(),
        "split_hash": cell("split_hash").as_py(),
        "targets": cell("targets").as_py(),
        "token_ids": values("token_ids", np.uint32),
        "loss_mask": values("loss_mask", bool),
        "statistics": {name: values(name, np.float32) for name in STATISTICS},
        "hidden": {},
    }
    positions = len(sequence["token_ids"])
    check_row(cell, sequence)
    for column in columns:
        row = [blob.as_py() for blob in cell(column["name"])]
        if column["codec"] == "topk-ranked":
            sequence["top_k"] = decode_ranked_top_k(row, column, sequence["statistics"]["max"], basis)
        elif column["codec"] == "transform-rans":
            sequence["coefficients"] = decode_coefficients(row, column, positions, basis)
        elif column["name"] == "top_k":
            sequence["top_k"] = decode_top_k(row, column, sequence["statistics"]["max"])
        else:
            layer = int(column["name"].removeprefix("hidden."))
            scales = metadata.get(f"caskd.scales.{column['name']}")
            scales = None if scales is None else np.frombuffer(base64.b64decode(scales), "<f4")
            sequence["hidden"][layer] = decode_hidden(row, column, layer, positions, scales)
    return sequence


def check_row(cell, sequence):
    token_bytes = sequence["token_ids"].astype("<u4").tobytes()
    if blake3 is not None and blake3.blake3(token_bytes).digest() != sequence["token_digest"]:
        raise CacheError(f"{sequence['source']}: the token digest does not match")
    if xxhash is None:
        return
    positions = len(sequence["token_ids"])
    name = sequence["source"].encode()
    canonical = {
        "keys_checksum": sequence["token_digest"]
        + struct.pack("<QII", sequence["split_hash"], cell("positions").as_py(), sequence["targets"]),
        "tokens_checksum": struct.pack("<I", len(name)) + name + struct.pack("<I", positions) + token_bytes
        + sequence["loss_mask"].astype(np.uint8).tobytes(),
        "statistics_checksum": b"".join(sequence["statistics"][name].astype("<f4").tobytes() for name in STATISTICS),
    }
    for column, data in canonical.items():
        if xxhash.xxh3_64_intdigest(data) != cell(column).as_py():
            raise CacheError(f"{sequence['source']}: {column} does not match")


class Cache:
    """An open cache; shards that it lacks are looked for by their names in the folders `shards`."""

    def __init__(self, folder, shards=()):
        self.shards = [pathlib.Path(folder) / "shards", *map(pathlib.Path, shards)]
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise CacheError(f"format version {self.manifest['format_version']} is unknown")
        self._head = None
        code = self.manifest.get("code")
        self.basis = None if code is None else Basis(self.folder / code["basis"]["file"])

    def sequences(self):
        """Every sequence in cache order."""
        for shard in self.manifest["shards"]:
            places = [place / pathlib.PurePosixPath(shard["file"]).name for place in self.shards]
            found = next((place for place in places if place.exists()), None)
            if found is None:
                raise CacheError(f"{shard['file']} is in none of {', '.join(map(str, self.shards))}")
            yield from read_shard(found, self.basis)

    def head(self):
        """The LM head, float32 [V, D]; None where the cache has none."""
        about = self.manifest["head"]
        if about is None or self._head is not None:
            return self._head
        self._head = read_safetensors(self.folder / about["file"])["lm_head.weight"].astype(np.float32)
        return self._head

    def rebuild_logits(self, sequence):
        """Logits of the whole vocabulary, float32 [T, V]."""
        head = self.head()
        if head is None:
            raise CacheError("a sparse cache has no head")
        if self.basis is None:
            hidden, tail_shift = sequence["hidden"][self.manifest["teacher"]["num_layers"]], 0
        else:
            hidden = sequence["coefficients"].astype(np.float32) @ self.basis.synthesis.T + self.basis.mean
            tail_shift = self.basis.tail_shift
        logits = hidden @ head.T
        shift = sequence["statistics"]["mean"] - logits.mean(axis=1, dtype=np.float64)
        logits += shift.astype(np.float32)[:, None] - tail_shift
        if "top_k" in sequence:
            top_k = sequence["top_k"]
            np.put_along_axis(logits, top_k["ids"].astype(np.int64), top_k["logits"], axis=1)
        return logits


def main():
    parser = argparse.ArgumentParser(description="print a caskd cache, one JSON line per sequence")
    parser.add_argument("cache")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shards", action="append", default=[], metavar="DIR")
    arguments = parser.parse_args()
    for number, sequence in enumerate(Cache(arguments.cache, arguments.shards).sequences()):
        if arguments.limit is not None and number >= arguments.limit:
            break
        line = {
            "source": sequence["source"],
            "token_ids": sequence["token_ids"].tolist(),
            "loss_mask": sequence["loss_mask"].tolist(),
            "statistics": {name: values.tolist() for name, values in sequence["statistics"].items()},
            "hidden": {layer: list(values.shape) for layer, values in sequence["hidden"].items()},
        }
        if "top_k" in sequence:
            line["top_k"] = {name: values.tolist() for name, values in sequence["top_k"].items()}
        json.dump(line, sys.stdout)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
