#!/usr/bin/env bash
# Stop what start.sh started in SLURM_TEST_DIR. Ends only processes named by
# pid files in that directory (and checks that the pid still is that program).
#   stop.sh          stop; the state stays, a later start goes on from it
#   stop.sh --wipe   stop and delete the directory
set -uo pipefail
dir=${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}
[ -d "$dir/run" ] || { echo "slurm: nothing in $dir" >&2; exit 0; }

is() { # is PID NAME
    [ -n "$1" ] && [ -d "/proc/$1" ] && tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -q -- "$2" &&
        ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
}
stop() { # stop PIDFILE NAME SECONDS
    local pid n
    pid=$(cat "$1" 2>/dev/null) || return 0
    if is "$pid" "$2"; then
        kill -TERM "$pid" 2>/dev/null
        for ((n = $3 * 10; n > 0; n--)); do is "$pid" "$2" || break; sleep 0.1; done
        is "$pid" "$2" && { echo "slurm: $2 ($pid) did not stop on SIGTERM, killed" >&2; kill -KILL "$pid"; }
    fi
    rm -f "$1"
}

# Running jobs would outlive their slurmd (a slurmstepd is its own process): cancel them first.
export SLURM_CONF=$dir/etc/slurm.conf
pid=$(cat "$dir/run/slurmctld.pid" 2>/dev/null || true)
if is "$pid" slurmctld; then
    timeout 10 scancel --full --state=PENDING --user=root >/dev/null 2>&1
    timeout 10 scancel --full --user=root >/dev/null 2>&1
    for ((n = 150; n > 0; n--)); do
        [ -z "$(timeout 5 squeue -h -t R,CG,S 2>/dev/null)" ] && break
        sleep 0.1
    done
fi
for f in "$dir"/run/slurmd-*.pid; do [ -e "$f" ] && stop "$f" slurmd 15; done
stop "$dir/run/slurmctld.pid" slurmctld 20
stop "$dir/run/slurmdbd.pid" slurmdbd 20
stop "$dir/run/mariadbd.pid" mariadbd 30
stop "$dir/run/munged.pid" munged 10
# Empty cgroup folders that slurmd leaves behind (rmdir refuses any that is in use)
if grep -qs '^CgroupPlugin=autodetect' "$dir/etc/cgroup.conf"; then
    find /sys/fs/cgroup -depth -type d -path '*/slurm_n[0-9]*' -exec rmdir {} + 2>/dev/null
fi
[ "${1:-}" = --wipe ] && rm -rf -- "$dir"
echo "slurm: stopped" >&2
