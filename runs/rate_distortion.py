#!/usr/bin/env python3
"""Rate against distortion of teacher caches: caskd's tiers against plain top-k, random-sampling KD and published formats.

    runs/rate_distortion.py --teacher MODEL.gguf --text TEXT.txt --out OUT [--caskd target/release/caskd]
        [--rates 75,130,220] [--positions 2048] [--max-len 256] [--dtype bf16] [--student MODEL ...]

Builds a cache of each kind with caskd (OUT/<name>, kept: a second run reuses it), has `caskd fidelity` measure it, and exports
the teacher's logits of a few sequences once, from which the rivals are made: logits kept to the top k (the rest -inf, or the
uniform tail), and N draws from the distribution (Anshumann et al. 2025, arXiv 2503.16870). Gradients are those of the
teacher without a quarter of its FFN channels by magnitude, and of every further `--student`. Writes OUT/table.md and OUT/rate-distortion.svg. Needs numpy, and nothing else.
"""

import argparse
import json
import math
import pathlib
import struct
import subprocess
import sys

import numpy as np

KEYS = ["1", "2", "4", "8", "16", "20", "dual-scaling"]
# What formats that publish their layout keep of a position, in bytes: see the lab log.
PUBLISHED = {
    "llama.cpp, 16-bit log-probabilities of the whole vocabulary": lambda v: 2 * v + 8,
    "fp16 logits and 32-bit ids of the top 64": lambda v: 64 * 6,
    "DistillKit's recommended settings": lambda v: 300,
}


def caskd(arguments, *command):
    line = [arguments.caskd, *map(str, command), "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)} ended with {done.returncode}")
    return json.loads(done.stdout)


def cache(arguments, name, *options):
    folder = arguments.out / name
    if not (folder / "manifest.json").exists():
        resume = ["--resume"] if folder.exists() else []
        caskd(arguments, "build", "--teacher", arguments.teacher, "--data", arguments.text, "--out", folder,
              "--dtype", arguments.dtype, "--max-len", arguments.max_len, "--layers", "none", "--no-fidelity", *options, *resume)
    reports = []
    for number, student in enumerate([None, *arguments.student]):
        report = arguments.out / (f"{name}.{number}.json" if number else f"{name}.json")
        if not report.exists():
            found = caskd(arguments, "fidelity", folder, "--teacher", arguments.teacher,
                          "--positions", arguments.positions, *(["--student", student] if student else []))
            report.write_text(json.dumps(found, indent=2))
        reports.append(json.loads(report.read_text()))
    return reports


def tensors(path, name):
    """One tensor of a safetensors file, mapped."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(length))[name]
    kinds = {"F32": "<f4", "I64": "<i8", "U8": "u1"}
    return np.memmap(path, kinds[about["dtype"]], "r", 8 + length + about["data_offsets"][0], tuple(about["shape"]))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def rivals(logits, rows, seed=0):
    """Yields (name, bytes, {temperature: KL}) of formats that keep a part of the distribution at temperature 1."""
    random = np.random.default_rng(seed)
    vocabulary = logits.shape[-1]
    bytes_of_id = 2 if vocabulary <= 65536 else 4
    sums = {}

    def add(name, size, key, value):
        total = sums.setdefault(name, (size, dict.fromkeys(KEYS, 0.0)))[1]
        total[key] += value / rows

    for row in range(rows):
        z = logits[row].astype(np.float64)
        order = np.argsort(-z)
        log_p = log_softmax(z)
        draws = np.bincount(random.choice(vocabulary, 50, p=np.exp(log_p) / np.exp(log_p).sum()), minlength=vocabulary)
        for key in KEYS:
            scale = z.std() * 4 if key == "dual-scaling" else float(key)
            teacher = log_softmax(z / scale)
            p = np.exp(teacher)
            for k in (8, 64):
                kept = order[:k]
                tail = z.copy()
                rest = max(1 - np.exp(log_p[kept]).sum(), 1e-12)
                outside = np.ones(vocabulary, bool)
                outside[kept] = False
                # log-softmax of the logits: the mass that the kept ones leave, spread evenly.
                tail = log_p.copy()
                tail[outside] = math.log(rest / (vocabulary - k))
                add(f"top-{k}, uniform tail", k * (2 + bytes_of_id) + 4, key, (p * (teacher - log_softmax(tail / scale))).sum())
                # Renormalised over the kept ones, KL(student) has no teacher outside: the other direction is finite.
                own = log_softmax(z[kept] / scale)
                add(f"top-{k}, renormalised", k * (2 + bytes_of_id), key, (np.exp(own) * (own - teacher[kept])).sum())
            drawn = np.flatnonzero(draws)
            own = log_softmax(np.log(draws[drawn]) / scale)
            add("random sampling, 50 draws", len(drawn) * (1 + bytes_of_id), key, (np.exp(own) * (own - teacher[drawn])).sum())
    return sums


def svg(points, published, path):
    """KL against bytes, both logarithmic; one panel for temperature 1 and one for 4. Of the published formats (name, bytes)
    only the bytes are known: dashed lines, where they lie among the others."""
    width, height, margin = 460, 340, 60
    xs = [size for _, size, _ in points]
    low_x, high_x = math.log10(min(xs) / 1.6), math.log10(max(xs) * 1.6)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height + 105}" font-family="sans-serif" font-size="11">',
           '<rect width="100%" height="100%" fill="white"/>']
    colours = {"caskd": "#0b6e4f", "other": "#b3541e"}
    for panel, key in enumerate(("1", "4")):
        ys = [max(kl[key], 1e-6) for _, _, kl in points]
        low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 0.1)
        left = panel * width
        x = lambda size: left + margin + (math.log10(size) - low_x) / (high_x - low_x) * (width - margin - 20)
        y = lambda kl: 30 + (high_y - math.log10(max(kl, 1e-6))) / max(high_y - low_y, 1) * (height - margin)
        out.append(f'<text x="{left + width / 2}" y="18" text-anchor="middle" font-size="13">KL(teacher || cached) at temperature {key}, nats</text>')
        for power in range(low_y, high_y + 1):
            out.append(f'<line x1="{left + margin}" x2="{left + width - 20}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}" stroke="#ddd"/>'
                       f'<text x="{left + margin - 6}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>')
        for tick in (10, 20, 50, 100, 200, 500, 1000, 2000):
            if low_x <= math.log10(tick) <= high_x:
                out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="30" y2="{height - 30}" stroke="#eee"/>'
                           f'<text x="{x(tick):.1f}" y="{height - 14}" text-anchor="middle">{tick}</text>')
        out.append(f'<text x="{left + width / 2}" y="{height + 4}" text-anchor="middle">bytes a position</text>')
        for number, (_, size) in enumerate(published, len(points) + 1):
            if low_x <= math.log10(size) <= high_x:
                out.append(f'<line x1="{x(size):.1f}" x2="{x(size):.1f}" y1="30" y2="{height - 30}" stroke="#777" stroke-dasharray="4 3"/>'
                           f'<text x="{x(size) + 4:.1f}" y="42" fill="#777">{number}</text>')
        line = sorted((size, kl[key]) for name, size, kl in points if name.startswith("caskd compact"))
        out.append('<polyline fill="none" stroke="#0b6e4f" points="' + " ".join(f"{x(s):.1f},{y(k):.1f}" for s, k in line) + '"/>')
        for number, (name, size, kl) in enumerate(points, 1):
            colour = colours["caskd" if name.startswith("caskd") else "other"]
            out.append(f'<circle cx="{x(size):.1f}" cy="{y(kl[key]):.1f}" r="4" fill="{colour}"/>'
                       f'<text x="{x(size) + 6:.1f}" y="{y(kl[key]) - 5:.1f}" fill="{colour}">{number}</text>')
    legend = [(name, size) for name, size, _ in points] + published
    for number, (name, size) in enumerate(legend, 1):
        column, row = divmod(number - 1, (len(legend) + 2) // 3)
        out.append(f'<text x="{margin + column * 230}" y="{height + 26 + row * 15}">{number}  {name} ({size:,.0f} B)</text>')
    out.append("</svg>")
    path.write_text("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--caskd", default="target/release/caskd")
    parser.add_argument("--student", action="append", default=[], help="a further student, whose gradient is measured too")
    parser.add_argument("--rates", default="75,130,220")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--max-len", type=int, default=256)
    parser.add_argument("--rival-positions", type=int, default=128)
    parser.add_argument("--dtype", default="bf16")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    reports = {f"caskd compact, rate {rate}": cache(arguments, f"compact-{rate}", "--tier", "compact", "--rate", rate)
               for rate in arguments.rates.split(",")}
    reports["caskd exact"] = cache(arguments, "exact", "--tier", "exact")
    reports["caskd sparse, top-64"] = cache(arguments, "sparse", "--tier", "sparse")

    exported = arguments.out / "logits.safetensors"
    if not exported.exists():
        subprocess.run([arguments.caskd, "export", str(arguments.out / "exact"), "--to", "safetensors", "--out", str(exported),
                        "--logits", "--limit", "1"], check=True, stdout=subprocess.DEVNULL)
    logits = tensors(exported, "logits")[0]
    rows = min(arguments.rival_positions, int(tensors(exported, "lengths")[0]))
    step = max(1, int(tensors(exported, "lengths")[0]) // rows)
    others = rivals(logits[::step], rows)

    columns = ["kept as", "bytes a position", *(f"KL@{key}" for key in KEYS), "gradient error at T = " + ", ".join(KEYS),
               *(f"the same, {pathlib.Path(student).name}" for student in arguments.student)]
    head = "| " + " | ".join(columns) + " |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    points = []
    unknown = ["–"] * (1 + len(arguments.student))

    def line(name, size, kl, errors):
        lines.append("| " + " | ".join([name, size, *kl, *errors]) + " |")

    for name, measured in reports.items():
        kl, size = measured[0]["kl"], measured[0]["bytes_per_position"]
        points.append((name, size, kl))
        errors = [" ".join(f"{100 * report['gradient_error'][key]:.1f}%" for key in KEYS) for report in measured]
        line(name, f"{size:.0f}", [f"{kl[key]:.2g}" for key in KEYS], errors)
    for name, (size, kl) in others.items():
        points.append((name, size, kl))
        line(name, f"{size:.0f}", [f"{kl[key]:.2g}" for key in KEYS], unknown)
    published = [(name, size(logits.shape[-1])) for name, size in PUBLISHED.items()]
    for name, size in published:
        line(name, f"{size:,}", ["–"] * len(KEYS), unknown)
    text = "\n".join(lines) + "\n"
    (arguments.out / "table.md").write_text(text)
    svg(points, published, arguments.out / "rate-distortion.svg")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
