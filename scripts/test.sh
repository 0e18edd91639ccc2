#!/usr/bin/env bash
# Every test: cargo-nextest where it is installed, else cargo test; then the documentation's examples.
set -euo pipefail
cd "$(dirname "$0")/.."
# The numeric crates share one profile, so that the dependencies are compiled once.
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release --workspace --locked --no-fail-fast
else
    cargo test --release --workspace --locked --no-fail-fast --lib --bins --tests
fi
cargo test --release --workspace --locked --doc
