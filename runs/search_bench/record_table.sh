#!/usr/bin/env bash
# Trains the demo's student once with each of the 120 configurations of table_space.toml, and writes table.json.
#
#     CASKD_TEACHER=…/SmolLM2-135M-Instruct.Q4_1.gguf runs/search_bench/record_table.sh [OUT [TRIALS]]
#
# Takes about 20 minutes of an idle core. What is already in OUT (default target/search_bench/table) is kept; with
# TRIALS it stops after so many. Data, teacher and pruning are the demo's, the trials cheap: 3% of the data, bf16.
set -euo pipefail
cd "$(dirname "$0")/../.."
teacher="${CASKD_TEACHER:?set CASKD_TEACHER to the GGUF file that make teacher fetches}"
caskd="${CARGO_TARGET_DIR:-target}/release/caskd"
out="${1:-${CARGO_TARGET_DIR:-target}/search_bench/table}"
here=runs/search_bench
data=examples/data/instructions.jsonl
mkdir -p "$out"
[ -d "$out/student" ] || "$caskd" prune --model "$teacher" --ratio 0.25 --calibration $data --out "$out/student"
"$caskd" build --teacher "$teacher" --data $data --tier exact --layers last,middle --max-len 256 --dtype bf16 \
    --out "$out/cache" --resume
# Every point of the space is tried once, whatever the sampler; sabo measures S(x) on the way.
"$caskd" search --cache "$out/cache" --student "$out/student" --space $here/table_space.toml --sampler sabo \
    --fraction 0.03 --validation 0.03 --set batch_size=2 --set learning_rate=2e-3 --set checkpoint_every=0 \
    --set dtype=bf16 --trials "${2:-120}" --out "$out/study" --resume
python3 $here/table_of_study.py "$out/study/study.sqlite" $here/table_space.toml > "$out/table.json"
