#!/usr/bin/env bash
# Start a real, throw-away Slurm on this one machine, as root, without systemd.
#
#   eval "$(./start.sh)"      # exports SLURM_CONF; progress goes to stderr
#   sinfo; sbatch ...; sacct ...
#   ./stop.sh                 # or stop.sh --wipe
#
# Running it again is harmless: what is up is left alone, what died is started.
# Settings (environment):
#   SLURM_TEST_DIR      state directory            (default /tmp/slurm-test-UID)
#   SLURM_TEST_DBD      1: slurmdbd + MariaDB, so sacct works; 0: none (default 1)
#   SLURM_TEST_NODES    number of simulated nodes  (default 4)
#   SLURM_TEST_CPUS     CPUs each node claims      (default 4)
#   SLURM_TEST_MEM_MB   memory each node claims    (default 8000)
#   SLURM_TEST_GPUS     fake GPUs per node         (default 2)
#   SLURM_TEST_CGROUP   1: track processes and limit memory with cgroups (needs root and a writable
#                       cgroup v1 tree with freezer and memory; default 0)
#   SLURM_TEST_PROCTRACK  used without cgroups       (default proctrack/linuxproc; proctrack/pgid is 2-4 times slower)
#   SLURM_TEST_MAX_ARRAY  MaxArraySize             (default 1001, Slurm's own default)
#   SLURM_TEST_PORT     first of NODES+2 TCP ports on 127.0.0.1 (default 26817)
#   SLURM_TEST_CRED_EXPIRE  seconds a requeued job waits (default 5; Slurm's own default is 120)
#   SLURM_TEST_KILLWAIT seconds from SIGTERM to SIGKILL (default 5; Slurm's own default is 30)
#   SLURM_TEST_GRACE    seconds partition scavenge gets before it is preempted (default 15)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}
dbd=${SLURM_TEST_DBD:-1}
nodes=${SLURM_TEST_NODES:-4}
cpus=${SLURM_TEST_CPUS:-4}
mem=${SLURM_TEST_MEM_MB:-8000}
gpus=${SLURM_TEST_GPUS:-2}
cgroup=${SLURM_TEST_CGROUP:-0}
max_array=${SLURM_TEST_MAX_ARRAY:-1001}
port=${SLURM_TEST_PORT:-26817}
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf 'slurm: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root (the daemons start jobs for other users)"
need="munged slurmctld slurmd sbatch"
[ "$dbd" = 1 ] && need="$need slurmdbd mariadbd mariadb-install-db mariadb"
for c in $need; do
    command -v "$c" >/dev/null || die "no '$c': apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core"
done

# A process of ours is one whose pid file names a live process with that name.
alive() { # alive PIDFILE COMMAND
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ -d "/proc/$pid" ] &&
        tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q -- "$2" &&
        ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status"
}
wait_for() { # wait_for SECONDS WHAT COMMAND...   (each try is bounded: Slurm's clients retry for long)
    local end=$((SECONDS + $1)) what=$2; shift 2
    while ! timeout 15 "$@" >"$dir/run/last-check" 2>&1 </dev/null; do
        if [ $SECONDS -ge $end ] || grep -q 'Parse error' "$dir/run/last-check"; then
            say "$what did not come up; the logs are in $dir/log; the last check said:"
            cat "$dir/run/last-check" >&2
            tail -n 15 "$dir"/log/*.log >&2 || true
            exit 1
        fi
        sleep 0.1
    done
}
# Daemons must not hold the caller's stdout (a pipe, under eval "$(...)").
launch() { # launch LOG COMMAND...
    local log=$1; shift
    setsid "$@" </dev/null >>"$log" 2>&1 &
    echo $!
}

umask 022
mkdir -p "$dir"/{etc,run,log,state,spool,dev}
chmod 755 "$dir" "$dir"/*
host=$(uname -n); host=${host%%.*}
conf=$dir/etc/slurm.conf
if [ "$nodes" -gt 1 ]; then range="n[1-$nodes]"; ports="$((port + 2))-$((port + 1 + nodes))"; ports="[$ports]"
else range=n1; ports=$((port + 2)); fi

# ---- configuration files
proctrack=${SLURM_TEST_PROCTRACK:-proctrack/linuxproc} taskplugin=task/none jobacct=jobacct_gather/linux jobacct_params=JobAcctGatherParams=OverMemoryKill
cgroup_plugin=disabled
if [ "$cgroup" = 1 ]; then
    proctrack=proctrack/cgroup taskplugin=task/cgroup jobacct=jobacct_gather/cgroup jobacct_params='# (memory is limited by cgroups)'
    cgroup_plugin=autodetect
fi
accounting='# no accounting: sacct fails'
if [ "$dbd" = 1 ]; then
    # AccountingStoragePass: the munge socket for slurmdbd; without it the clients try the system's munged
    accounting="AccountingStorageType=accounting_storage/slurmdbd\\nAccountingStorageHost=127.0.0.1"
    accounting+="\\nAccountingStoragePort=$((port + 1))\\nAccountingStoragePass=$dir/run/munge.socket\\nAccountingStorageTRES=gres/gpu"
fi
sed -e "s|@DIR@|$dir|g" -e "s|@HOST@|$host|g" -e "s|@CLUSTER@|testcluster|g" \
    -e "s|@CTLD_PORT@|$port|g" -e "s|@CRED_EXPIRE@|${SLURM_TEST_CRED_EXPIRE:-5}|g" \
    -e "s|@KILLWAIT@|${SLURM_TEST_KILLWAIT:-5}|g" -e "s|@GRACE@|${SLURM_TEST_GRACE:-15}|g" \
    -e "s|@PROCTRACK@|$proctrack|g" -e "s|@TASKPLUGIN@|$taskplugin|g" -e "s|@JOBACCT@|$jobacct|g" \
    -e "s|@JOBACCT_PARAMS@|$jobacct_params|g" -e "s|@SELECT_PARAMS@|CR_CPU_Memory|g" \
    -e "s|@MAX_ARRAY_SIZE@|$max_array|g" -e "s|@ACCOUNTING@|$accounting|g" \
    -e "s|@NODE_RANGE@|$range|g" -e "s|@PORT_RANGE@|$ports|g" -e "s|@CPUS@|$cpus|g" \
    -e "s|@MEM_MB@|$mem|g" -e "s|@GPUS@|$gpus|g" -e "s|@GPU_TYPE@|fake|g" \
    -e "s|@DEF_MEM_PER_CPU@|$((mem / cpus))|g" "$here/slurm.conf.in" >"$conf.new"
grep -q '@[A-Z_]*@' "$conf.new" && die "a placeholder is left in $conf.new"
changed=0
cmp -s "$conf.new" "$conf" || changed=1
mv "$conf.new" "$conf"

# Fake GPUs are links to /dev/null (slurmd wants a device); the digit at the end of each name becomes the index in CUDA_VISIBLE_DEVICES.
if [ "$gpus" -gt 0 ]; then
    for i in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/dev/gpu$i"; done
    echo "NodeName=$range Name=gpu Type=fake File=$dir/dev/gpu[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
else
    : >"$dir/etc/gres.conf"
fi
{
    echo "CgroupPlugin=$cgroup_plugin"
    [ "$cgroup" = 1 ] && printf 'ConstrainRAMSpace=yes\nConstrainSwapSpace=no\nConstrainCores=no\nConstrainDevices=no\nIgnoreSystemd=yes\n'
} >"$dir/etc/cgroup.conf" || true

# ---- munged
[ -s "$dir/etc/munge.key" ] || { (umask 077; head -c 128 /dev/urandom >"$dir/etc/munge.key"); }
if ! alive "$dir/run/munged.pid" munged; then
    rm -f "$dir/run/munge.socket"*
    # --force: as root, not as user munge (then warnings, no errors)
    munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.socket" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
        --seed-file="$dir/run/munge.seed" </dev/null >>"$dir/log/munged.out" 2>&1 || die "munged: $(tail -n 3 "$dir/log/munged.out")"
fi
wait_for 10 munged munge --socket "$dir/run/munge.socket" --no-input

# ---- MariaDB (unix socket only) and slurmdbd
if [ "$dbd" = 1 ]; then
    sock=$dir/run/mariadb.socket
    if [ ! -d "$dir/mariadb/mysql" ]; then
        mariadb-install-db --no-defaults --user=root --datadir="$dir/mariadb" --skip-test-db \
            --auth-root-authentication-method=socket >>"$dir/log/mariadb-install.log" 2>&1 || die "mariadb-install-db: see $dir/log/mariadb-install.log"
    fi
    if ! alive "$dir/run/mariadbd.pid" mariadbd; then
        rm -f "$sock"
        launch "$dir/log/mariadb.log" mariadbd --no-defaults --user=root --datadir="$dir/mariadb" --socket="$sock" \
            --skip-networking --pid-file="$dir/run/mariadbd.pid" --performance-schema=OFF \
            --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 >/dev/null
    fi
    wait_for 60 mariadbd mariadb --no-defaults --socket="$sock" -e "SELECT 1"
    # Made here, not left to slurmdbd: with libmariadb 11.8.9 the connection on which slurmdbd
    # creates a missing database is broken afterwards ("maximum allowed number of columns (=0)").
    mariadb --no-defaults --socket="$sock" -e 'CREATE DATABASE IF NOT EXISTS slurm_acct_db' >>"$dir/log/mariadb-install.log" 2>&1 || die "cannot create the database"
    (
        umask 077
        printf '%s\n' DbdHost="$host" DbdAddr=127.0.0.1 DbdPort=$((port + 1)) SlurmUser=root \
            AuthType=auth/munge AuthInfo=socket="$dir/run/munge.socket" \
            PidFile="$dir/run/slurmdbd.pid" LogFile="$dir/log/slurmdbd.log" DebugLevel=info \
            StorageType=accounting_storage/mysql StorageHost=localhost StorageUser=root StorageLoc=slurm_acct_db \
            >"$dir/etc/slurmdbd.conf"
    )
    if ! alive "$dir/run/slurmdbd.pid" slurmdbd; then
        # slurmdbd knows no option for the database's socket; the client library's variable does it
        SLURM_CONF=$conf MYSQL_UNIX_PORT=$sock launch "$dir/log/slurmdbd.out" slurmdbd -D >"$dir/run/slurmdbd.pid.mine"
    fi
    wait_for 60 slurmdbd env SLURM_CONF="$conf" sacctmgr -n -i show cluster
    # registering the cluster first makes slurmctld's own registration quick and sure
    SLURM_CONF=$conf timeout 20 sacctmgr -n show cluster format=cluster%30 2>/dev/null | grep -qw testcluster ||
        SLURM_CONF=$conf timeout 20 sacctmgr -i add cluster testcluster >>"$dir/log/sacctmgr.log" 2>&1 || true
fi

# ---- slurmctld and one slurmd per simulated node
if alive "$dir/run/slurmctld.pid" slurmctld; then
    [ $changed = 0 ] || say "the settings changed; stop.sh first if the new ones do not show"
else
    launch "$dir/log/slurmctld.out" slurmctld -D -f "$conf" >/dev/null
fi
export SLURM_CONF=$conf
wait_for 60 slurmctld scontrol ping
for i in $(seq 1 "$nodes"); do
    mkdir -p "$dir/spool/n$i"
    alive "$dir/run/slurmd-n$i.pid" slurmd ||
        launch "$dir/log/slurmd-n$i.out" slurmd -D -N "n$i" -f "$conf" >/dev/null
done
export nodes
wait_for 60 "slurmd on every node" bash -c '[ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N | sort -u | wc -l)" = "$nodes" ]'
say "up: $nodes nodes of $cpus CPUs and $gpus fake GPUs, $([ "$dbd" = 1 ] && echo with || echo without) accounting, in $dir"
printf 'export SLURM_CONF=%q\n' "$conf"
