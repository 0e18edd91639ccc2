#!/usr/bin/env bash
# Task scores and their speed against lm-evaluation-harness, a task at a time, one program after the other.
#
# usage: runs/lm_eval/speed.sh MODEL FOLDER [LIMIT] [f32|bf16]
#
# FOLDER holds prepared task files (hellaswag.jsonl, arc_easy.jsonl, winogrande.jsonl, boolq.jsonl, lambada.jsonl); those
# that are missing are left out. $CASKD_PYTHON must have what compare.py needs.
set -uo pipefail
cd "$(dirname "$0")/../.."
model=$1 folder=$2 limit=${3:-40} dtype=${4:-f32}
case $dtype in f32) theirs=float32 ;; bf16) theirs=bfloat16 ;; *) echo "the type is f32 or bf16" >&2 && exit 2 ;; esac
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for task in hellaswag arc_easy winogrande boolq lambada; do
    [ -f "$folder/$task.jsonl" ] || continue
    "${CASKD:-target/release/caskd}" eval --model "$model" --task "$folder/$task.jsonl" --limit "$limit" --dtype "$dtype" \
        --per-item "$out/items.jsonl" --json >"$out/scores.json" 2>"$out/err" || { cat "$out/err" >&2; exit 1; }
    "$CASKD_PYTHON" runs/lm_eval/compare.py "$model" "$task=$folder/$task.jsonl" --items "$out/items.jsonl" \
        --scores "$out/scores.json" --limit "$limit" --dtype "$theirs" 2>"$out/err"
    case $?,$dtype in 0,* | 3,bf16) ;; *) tail -5 "$out/err" >&2 && exit 1 ;; esac
done
