#!/usr/bin/env bash
# Perplexity of a model after pruning by each method.
#
# usage: runs/prune_quality.sh MODEL CALIBRATION.jsonl TEXT OUT
#
# Prints a line a method: what is left of the parameters, and the perplexity a token on TEXT (bf16, windows of 512).
# METHODS="wanda taylor" measures only some.
set -euo pipefail
model=$1 calibration=$2 text=$3 out=$4
caskd=${CASKD:-target/release/caskd}
mkdir -p "$out"

perplexity() {
    "$caskd" eval --model "$1" --text "$text" --dtype bf16 --json |
        python3 -c 'import json, sys; print("%.2f" % json.load(sys.stdin)["text"][0]["perplexity"])'
}

echo "dense: perplexity $(perplexity "$model")"
for method in ${METHODS:-magnitude wanda taylor}; do
    for how in "--ratio 0.25" "--sparsity unstructured" "--sparsity 2:4"; do
        student="$out/$method-${how##* }"
        data=()
        [ "$method" = magnitude ] || data=(--calibration "$calibration")
        # shellcheck disable=SC2086
        share=$("$caskd" prune --model "$model" --method "$method" $how "${data[@]}" --out "$student" --json |
            python3 -c 'import json, sys; print("%.4f" % json.load(sys.stdin)["final_ratio"])')
        echo "$method $how: $share of the parameters left, perplexity $(perplexity "$student")"
        rm -rf "$student"
    done
done
