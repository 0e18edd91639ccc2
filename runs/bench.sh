#!/usr/bin/env bash
# The benchmarks. The rival's half (PyTorch with transformers, Optuna) runs where $CASKD_PYTHON has
# those packages, in the same run, so that ratios compare like with like; without it only our half does.
set -euo pipefail
cd "$(dirname "$0")/.."
teacher="${CASKD_TEACHER:-$(scripts/fetch.sh teacher)}"
python="${CASKD_PYTHON:-}"
rival() {
    if [ -z "$python" ]; then echo "(no rival: set CASKD_PYTHON to a Python with torch, transformers and optuna)"; else "$python" "$@"; fi
}
cargo build --release --locked -p caskd-models --example forward_speed
cargo build --release --locked -p caskd-cache-builder --example teacher_speed
echo "== the teacher's pass as a build makes it"
rival runs/teacher_speed.py target/release/examples/teacher_speed "$teacher"
cargo build --release --locked -p caskd-trainer --example step_speed
cargo build --release --locked -p caskd-search --example surfaces
for kind in f32 bf16; do
    for shape in '8 128' '4 512'; do
        echo "== forward pass and LoRA step, [$shape], $kind"
        # shellcheck disable=SC2086
        target/release/examples/forward_speed "$teacher" $shape "$kind" 3
        # shellcheck disable=SC2086
        rival models/examples/forward_speed.py "$teacher" $shape "$kind" 3
    done
    echo "== LoRA step from the cache, [8 128], $kind"
    target/release/examples/step_speed "$teacher" examples/data/heldout.txt "$kind" 4
done
echo "== a LoRA step from the cache against PyTorch, transformers and peft"
cargo build --release --locked --bin caskd
OMP_NUM_THREADS=2 rival runs/train_step.py "$teacher"
echo "== task scores against lm-evaluation-harness"
if [ -n "$python" ] && [ -n "${CASKD_TASKS:-}" ]; then
    CASKD_PYTHON="$python" runs/lm_eval/speed.sh "$teacher" "$CASKD_TASKS"
else
    echo "(needs a rival's Python as above, and a folder of prepared task files in CASKD_TASKS)"
fi
echo "== the cache: decoding against pyarrow, MDS and a plain copy"
cargo build --release --locked -p caskd-formats --example decode_speed
rival runs/bench_cache.py
echo "== building: layer by layer against in memory, the whole build against its parts"
cargo build --release --locked -p caskd
CASKD_TEACHER="$teacher" runs/layered.sh ratio
echo "== search: mean simple regret on the response surfaces"
target/release/examples/surfaces --seeds 5
