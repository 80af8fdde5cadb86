#!/bin/sh
# A real Slurm of one node on this machine, for trying the batch files: `sh setup.sh start DIR`, `sh setup.sh stop DIR`. Debian's
# packages (apt-get install slurm-wlm munge), as root, in a container too: no systemd, no cgroups, no accounting, daemons started by
# hand, everything they write in DIR. A low-priority and a high-priority partition, so that one job can preempt another.
set -eu
dir=$(realpath -m "$2")
export SLURM_CONF="$dir/slurm.conf"

end() { # a pid file
    [ -f "$1" ] && kill "$(cat "$1")" 2>/dev/null || true
}

case $1 in
start)
    mkdir -p "$dir/state" "$dir/spool" /run/munge
    chown munge: /run/munge
    [ -f /etc/munge/munge.key ] || mungekey
    chown munge: /etc/munge/munge.key
    pgrep -x munged > /dev/null || su munge -s /bin/sh -c "munged --pid-file=/run/munge/munged.pid"
    cat > "$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=30
ReturnToService=2
MpiDefault=none
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
EOF
    printf 'CgroupPlugin=autodetect\nIgnoreSystemd=yes\n' > "$dir/cgroup.conf" # slurmd 22.05 wants one, though nothing uses it
    slurmctld
    slurmd
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sinfo -h -o %t 2>/dev/null | grep -q idle && break
        sleep 1
    done
    sinfo
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
stop)
    end "$dir/slurmd.pid"
    end "$dir/slurmctld.pid"
    end /run/munge/munged.pid
    ;;
esac
