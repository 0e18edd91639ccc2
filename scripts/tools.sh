#!/usr/bin/env bash
# Names every missing tool with the way to install it.
set -u
missing=0
need() {
    if ! command -v "$1" >/dev/null 2>&1; then
        printf 'error: `%s` is missing\nhint: %s\n' "$1" "$2" >&2
        missing=1
    fi
}
need cargo 'install Rust 1.95 or newer with rustup (rustup.rs), or: rustup toolchain install stable'
need c++ 'install a C++17 compiler: apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)'
if [ -z "${LIBTORCH:-}" ] && [ -z "${LIBTORCH_USE_PYTORCH:-}" ]; then
    need python3 'it fetches libtorch; install it with: apt-get install python3 python3-pip (Debian, Ubuntu) or dnf install python3 python3-pip (Fedora)'
fi
if command -v rustc >/dev/null 2>&1; then
    version=$(rustc --version | cut -d' ' -f2)
    if [ "$(printf '1.95.0\n%s\n' "${version%%-*}" | sort -V | head -n 1)" != 1.95.0 ]; then
        printf 'error: rustc %s is too old, 1.95 is needed\nhint: rustup update stable\n' "$version" >&2
        missing=1
    fi
fi
[ "$missing" -eq 0 ] || exit 2
