"""Makes a CPU libtorch folder from pip wheels: unpack_libtorch.py TORCH CUDART CUPTI OUT.

Only the CPU library and what it links against are taken. `libtorch.so` is a linker script
instead of the umbrella library, which would pull the 470 MB CUDA library in.
"""

import pathlib
import shutil
import sys
import zipfile

torch, cudart, cupti, out = sys.argv[1:]
out = pathlib.Path(out)
lib = out / "lib"
lib.mkdir(parents=True)


def unpack(wheel, wanted):
    """Copies each member of the wheel for which wanted(name) gives a target path."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = wanted(name)
            if target is None or name.endswith("/"):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def from_torch(name):
    if name.startswith("torch/include/"):
        return out / name.removeprefix("torch/")
    base = name.rsplit("/", 1)[-1]
    if name.startswith("torch/lib/") and base in ("libtorch_cpu.so", "libc10.so"):
        return lib / base
    if base.startswith("libgomp") and ".so" in base:
        return lib / base
    return None


def library(stem):
    return lambda name: lib / name.rsplit("/", 1)[-1] if name.rsplit("/", 1)[-1].startswith(stem) else None


unpack(torch, from_torch)
unpack(cudart, library("libcudart.so"))
unpack(cupti, library("libcupti.so"))
(lib / "libtorch.so").write_text("INPUT(libtorch_cpu.so libc10.so)\n")
(out / "build-version").write_text("2.13.0\n")
missing = [name for name in ("libtorch_cpu.so", "libc10.so") if not (lib / name).exists()]
if missing or not (out / "include/torch/csrc/api/include/torch/torch.h").exists():
    sys.exit(f"error: the torch wheel lacks {missing or 'its headers'}")
