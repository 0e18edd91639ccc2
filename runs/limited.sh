#!/usr/bin/env bash
# Runs a command under a hard memory limit and says the most that it took.
#
#   runs/limited.sh 4G COMMAND...
#
# By a control group of its own (version 2 or 1, which takes root), whose page cache counts and is given back under pressure;
# as a user by systemd-run. Swap does not help: there must be none, or it is limited too.
set -euo pipefail
limit=$1
shift
bytes=$(numfmt --from=iec "$limit")
name=caskd-limited-$$
if [ -w /sys/fs/cgroup/cgroup.procs ] && grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null; then
    group=/sys/fs/cgroup/$name
    mkdir "$group"
    echo "$bytes" >"$group/memory.max"
    echo 0 >"$group/memory.swap.max" 2>/dev/null || true
    peak=$group/memory.peak
elif [ -w /sys/fs/cgroup/memory ]; then
    group=/sys/fs/cgroup/memory/$name
    mkdir "$group"
    echo "$bytes" >"$group/memory.limit_in_bytes"
    peak=$group/memory.max_usage_in_bytes
else
    exec systemd-run --user --scope --quiet -p "MemoryMax=$bytes" -p MemorySwapMax=0 "$@"
fi
code=0
(
    echo "$BASHPID" >"$group/cgroup.procs"
    exec "$@"
) || code=$?
killed=$(grep -h '^oom_kill ' "$group/memory.events" "$group/memory.oom_control" 2>/dev/null || true)
echo "most memory, page cache included: $(numfmt --to=iec "$(cat "$peak" 2>/dev/null || echo 0)") of $limit; ${killed:-oom_kill 0}; exit $code" >&2
rmdir "$group" || true
exit "$code"
