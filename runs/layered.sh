#!/usr/bin/env bash
# Teachers larger than memory.
#
#   runs/layered.sh ratio             SmolLM2 layer by layer against itself in memory: tokens/s, and the same bytes
#   runs/layered.sh large [FOLDER]    a random teacher of Llama-7B's shape (13.5 GB in FOLDER, removed afterwards) under 4 GiB
#
# Text: $CASKD_TEXT, else the demo's held-out text. caskd: $CASKD, else target/release/caskd.
set -euo pipefail
cd "$(dirname "$0")/.."
caskd=$(realpath "${CASKD:-target/release/caskd}")
text=$(realpath "${CASKD_TEXT:-examples/data/heldout.txt}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
field() { python3 -c 'import json, sys; report = json.load(sys.stdin); print(*(report[name] for name in sys.argv[1:]))' "$@"; }

case ${1:-} in
ratio)
    teacher="${CASKD_TEACHER:-$(scripts/fetch.sh teacher)}"
    head -c "${CASKD_BYTES:-150000}" "$text" >"$scratch/text.txt"
    for dtype in f32 bf16; do
        build=("$caskd" build --teacher "$teacher" --data "$scratch/text.txt" --no-fidelity --dtype "$dtype" --tier exact --json)
        # One byte less than it takes whole.
        budget=$(($("${build[@]}" --estimate --memory-budget 100GiB | field in_memory_bytes) - 1))
        "${build[@]}" --memory-budget 100GiB --out "$scratch/whole-$dtype" >"$scratch/whole.json"
        "${build[@]}" --memory-budget "$budget" --out "$scratch/layered-$dtype" >"$scratch/layered.json"
        diff -r "$scratch/whole-$dtype" "$scratch/layered-$dtype" && echo "$dtype: the same bytes"
        python3 - "$scratch" "$dtype" <<'PYTHON'
import json, sys
folder, dtype = sys.argv[1:]
whole, layered = (json.load(open(f"{folder}/{name}.json")) for name in ("whole", "layered"))
assert whole["block_positions"] == 0 and layered["block_positions"] > 0
print(f"{dtype}: whole {whole['tokens_per_second']:.0f} tokens/s, layer by layer {layered['tokens_per_second']:.0f}: "
      f"{layered['tokens_per_second'] / whole['tokens_per_second']:.2f} of it; {layered['positions']} positions in blocks of "
      f"{layered['block_positions']}; {layered['waiting_seconds']:.1f} s of {layered['teacher_seconds']:.1f} s waited for weights")
for name, report in (("whole", whole), ("layered", layered)):
    parts = report["teacher_seconds"] + report["encoding_seconds"]
    print(f"{dtype}, {name}: pass {report['pass_seconds']:.1f} s = {report['pass_seconds'] / parts:.3f} of teacher + encoding ({parts:.1f} s), "
          f"the whole build without its fidelity report {report['seconds'] / parts:.3f}; "
          f"statistics {100 * report['statistics_seconds'] / report['teacher_seconds']:.1f}%, encoding "
          f"{100 * report['encoding_seconds'] / report['teacher_seconds']:.1f}% of the teacher's time")
PYTHON
    done
    ;;
large)
    folder=$(mktemp -d -p "${2:-.}" random-7b-XXXX)
    trap 'rm -rf "$scratch" "$folder"' EXIT
    "${CASKD_PYTHON:-python3}" runs/random_teacher.py "$folder/teacher" --shape 7b
    du -sh "$folder/teacher"
    # Bytes are tokens here.
    head -c "${CASKD_BYTES:-2048}" "$text" >"$scratch/text.txt"
    build=("$caskd" build --teacher "$folder/teacher" --data "$scratch/text.txt" --dtype bf16 --tier sparse --layers middle --max-len 512 --memory-budget "${CASKD_BUDGET:-3584MiB}")
    "${build[@]}" --estimate
    runs/limited.sh 4G "${build[@]}" --out "$folder/cache" --json
    "$caskd" verify "$folder/cache" --deep
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
