#!/usr/bin/env bash
# A SLURM cluster of four nodes that are all this machine, for tests/scripts/test_slurm.py, as root:
#     tests/scripts/cluster.sh start FOLDER
#     tests/scripts/cluster.sh stop FOLDER
# Everything is written to FOLDER. With SLURM_CONF=FOLDER/slurm.conf the commands of SLURM find it.
# Partitions: `low` and `low_no_grace` give way to `high`, which requeues their jobs, the first one
# 60 s after a SIGTERM.
set -euo pipefail

usage() {
    echo "usage: tests/scripts/cluster.sh start|stop FOLDER" >&2
    exit 2
}

[[ $# == 2 ]] || usage
mkdir -p "$2"
folder=$(realpath "$2")
export SLURM_CONF=$folder/slurm.conf
# Names that every machine can resolve to itself.
nodes=(127.0.0.1 127.0.0.2 127.0.0.3 127.0.0.4)

start() {
    mkdir -p "$folder"/{state,spool,run}
    host=$(hostname -s)
    # Away from the default ports, from those of the jobs, and from another cluster of this kind.
    port=$((31000 + $$ % 300 * 5))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credentials have expired: 2 min by default.
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
# A container has no cgroups to hand out.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
# Seconds from SIGTERM to SIGKILL, 30 by default.
KillWait=15
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=2
GresTypes=gpu
$(for i in "${!nodes[@]}"; do
        echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=${nodes[i]} Port=$((port + 1 + i))" \
            "CPUs=2 Gres=gpu:2"
    done)
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=low_no_grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
    echo "AutoDetect=off" >"$folder/gres.conf"
    # Any device file will do: what counts is which of them SLURM shows to a task.
    echo "Name=gpu File=/dev/null,/dev/zero" >>"$folder/gres.conf"
    head -c 1024 /dev/urandom >"$folder/run/munge.key"
    chmod 600 "$folder/run/munge.key"
    # By force: it wants a socket that every user can reach, and all daemons here are of one user.
    /usr/sbin/munged --force --key-file="$folder/run/munge.key" --socket="$folder/run/munge.socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/run/munge.seed"
    /usr/sbin/slurmctld -f "$SLURM_CONF" -c
    for node in "${nodes[@]}"; do
        /usr/sbin/slurmd -f "$SLURM_CONF" -N "$node"
    done
    for _ in {1..60}; do
        if [[ $(sinfo --noheader --states=idle --partition=low --format=%D) == "${#nodes[@]}" ]]
        then
            exit 0
        fi
        sleep 0.5
    done
    sinfo -N >&2
    echo "error: the nodes did not come up within 30 s; see the logs in $folder" >&2
    exit 1
}

stop() {
    for name in slurmctld "${nodes[@]/#/slurmd-}" munged; do
        if [[ -f $folder/run/$name.pid ]]; then
            kill "$(<"$folder/run/$name.pid")" || true
        fi
    done
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
