#!/usr/bin/env bash
# Builds a cache with a Slurm array: plans here, then submits the workers and, after them, the commit.
#
#   deploy/slurm-build.sh CACHE WORKERS -- --teacher llama-70b/ --data book.txt --tier compact --dtype bf16
#
# What follows `--` goes to `caskd build --plan`. CACHE, teacher and data must lie where every node sees them. More options
# for the workers' sbatch (partition, account, time, GPUs) go into SBATCH_WORKER, those of the workers' caskd (a device, a
# memory budget) into CASKD_WORKER:
#
#   SBATCH_WORKER='--gres=gpu:1 --time=8:00:00' CASKD_WORKER='--device cuda:0' deploy/slurm-build.sh ...
#
# Run again it goes on where it was: finished tasks are kept, whoever did them.
set -euo pipefail

usage() {
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ $# -ge 4 ] && [ "$3" = -- ] || usage
cache=$1 workers=$2
shift 3
case $workers in '' | *[!0-9]* | 0) usage ;; esac
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$cache/manifest.json" ]; then
    echo "\`$cache\` is finished" >&2
    exit 0
fi
caskd build --plan --resume --out "$cache" "$@"
cache=$(cd "$cache" && pwd)

export CASKD_CACHE_DIR=$cache
# shellcheck disable=SC2086 # several words on purpose
array=$(sbatch --parsable --array="0-$((workers - 1))" --export=ALL ${SBATCH_WORKER:-} "$here/slurm-worker.sbatch")
echo "workers: job $array"
# shellcheck disable=SC2016 # expanded where the job runs
commit=$(sbatch --parsable --dependency="afterok:${array%%;*}" --job-name=caskd-commit --export=ALL \
    --wrap='exec caskd build --commit --out "$CASKD_CACHE_DIR"')
echo "commit: job $commit"
