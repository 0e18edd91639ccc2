#!/usr/bin/env bash
# The benchmark of the samplers: six response surfaces and the table of trained configurations, ours next to Optuna's.
#
#     CASKD_PYTHON=…/bin/python runs/search_bench/run.sh [OUT]
#
# Needs a Python with optuna, scipy and torch. What is already in OUT (default target/search_bench) is kept: a stopped
# run goes on where it was; Optuna's GPSampler alone takes hours on one busy core. The numbers end in
# runs/search_bench/results.json and results.md: runs 0 to 19 against all three, then RUNS (default 100) of them
# against both TPEs, and GP_RUNS (default 60) against GPSampler on GP_SURFACES (default: where it is the best rival first).
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${CASKD_PYTHON:?set CASKD_PYTHON to a Python with optuna, scipy and torch}"
target="${CARGO_TARGET_DIR:-target}"
out="${1:-$target/search_bench}"
further=$((${RUNS:-100} - 20))
here=runs/search_bench
mkdir -p "$out"
cargo build --release --locked -p caskd-search --example surfaces --example tabular

"$target/release/examples/surfaces" --table 1 > "$out/tables.json"
surfaces() { "$target/release/examples/surfaces" "$@"; }
rivals() { "$python" $here/rivals.py --tables "$out/tables.json" --out "$out/rivals.jsonl" "$@"; }
(
    rivals
    if [ $further -gt 0 ]; then
        rivals --first-run 20 --seeds $further --names optuna-tpe,optuna-tpe-univariate
        for surface in ${GP_SURFACES:-1 4 5 3 2 6}; do
            rivals --first-run 20 --seeds $((${GP_RUNS:-60} - 20)) --names optuna-gp --surfaces "$surface"
        done
    fi
) &
others=$!
surfaces --samplers sabo,gp,tpe,random --timing 100,500 > "$out/ours.json"
ours=("$out/ours.json")
if [ $further -gt 0 ]; then
    surfaces --samplers sabo,gp --first-run 20 --seeds $further > "$out/ours_further.json"
    ours+=("$out/ours_further.json")
fi
wait $others
"$python" $here/compare.py --ours "${ours[@]}" --rivals "$out/rivals.jsonl" \
    --json $here/results.json --markdown $here/results.md

if [ -f $here/table.json ]; then
    "$target/release/examples/tabular" $here/table.json > "$out/tabular.json"
    "$python" $here/tabular.py --table $here/table.json --ours "$out/tabular.json" --markdown $here/tabular.md
fi
