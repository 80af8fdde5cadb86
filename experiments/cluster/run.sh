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
case $status in
75 | 138 | 143) # told to end: with a checkpoint of the moment, or by SIGUSR1 or SIGTERM before training had begun
    scontrol requeue "$SLURM_JOB_ID" ;;
13[0-9]) # a process was killed
    [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
