"""Reads a caskd cache with pyarrow and numpy only, from docs/FORMAT.md and without any caskd code.

    from caskd_reader import Cache
    cache = Cache("CACHE")
    for sequence in cache.sequences():
        sequence["token_ids"], sequence["top_k"]["logits"], sequence["hidden"][30]
    logits = cache.rebuild_logits(sequence)          # exact tier: float32 [T, V]

    python caskd_reader.py CACHE [--limit N]         # one JSON line per sequence

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
CODECS = {("topk-f16-steps", 1): 1, ("int8-channel", 1): 2, ("f16-planes", 1): 3}
HEADER = struct.Struct("<QBBHIII")
RAW = 1 << 31
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

    def planes(self, count):
        low = self.section(count).astype(np.uint16)
        return low | self.section(count).astype(np.uint16) << 8


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


def read_shard(path):
    """Yields every sequence of one shard; needs nothing but the file."""
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
    for batch in file.iter_batches(batch_size=16):
        for index in range(batch.num_rows):
            yield decode_row(batch, index, about["columns"], metadata)


def decode_row(batch, index, columns, metadata):
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
        if column["name"] == "top_k":
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
    """An open cache."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise CacheError(f"format version {self.manifest['format_version']} is unknown")
        self._head = None

    def sequences(self):
        """Every sequence in cache order."""
        for shard in self.manifest["shards"]:
            yield from read_shard(self.folder / shard["file"])

    def head(self):
        """The LM head, float32 [V, D]; None where the cache has none."""
        about = self.manifest["head"]
        if about is None or self._head is not None:
            return self._head
        data = (self.folder / about["file"]).read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        tensor = json.loads(data[8 : 8 + length])["lm_head.weight"]
        start, end = tensor["data_offsets"]
        body = data[8 + length + start : 8 + length + end]
        if tensor["dtype"] == "BF16":
            weights = (np.frombuffer(body, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            weights = np.frombuffer(body, {"F32": "<f4", "F16": "<f2"}[tensor["dtype"]]).astype(np.float32)
        self._head = weights.reshape(tensor["shape"])
        return self._head

    def rebuild_logits(self, sequence):
        """Logits of the whole vocabulary, float32 [T, V]."""
        head = self.head()
        if head is None:
            raise CacheError("a sparse cache has no head")
        return sequence["hidden"][self.manifest["teacher"]["num_layers"]] @ head.T


def main():
    parser = argparse.ArgumentParser(description="print a caskd cache, one JSON line per sequence")
    parser.add_argument("cache")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    for number, sequence in enumerate(Cache(arguments.cache).sequences()):
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
