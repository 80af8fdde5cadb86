# What the batch files share (they source it, in the project's folder): RUN CONFIG [words of `lightning fit`]. Starts the run in its
# folder and, where it was told to end or a process died, asks Slurm for another go. VERB=test for methods without training.
run=$1 config=$2
shift 2
words=$(sh experiments/cluster/run_folder.sh "$run" "${STEPS:-200}")
trap : TERM # at preemption it goes to this script too, which has the last word below
status=0
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 python -m panda_lightning "${VERB:-fit}" --config "$config" $words "$@" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp || status=$?
tries=3
case $status in
75 | 138 | 143) tries=1000 ;; # told to end: with a checkpoint of the moment, or by SIGUSR1 or SIGTERM before training had begun
13[0-9]) ;;                   # a process was killed
*) tries=0 ;;                 # done, or an error that another go would meet again
esac
# A job that a person has cancelled is no longer RUNNING, and is left alone.
if [ "${SLURM_RESTART_COUNT:-0}" -lt "$tries" ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
