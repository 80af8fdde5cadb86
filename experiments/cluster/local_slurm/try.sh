#!/bin/bash
# The batch files on the Slurm that setup.sh starts, two tasks a job, digits on CPUs: a run left alone, one preempted by a job of
# higher priority, one told to end, one of whose tasks is killed with SIGKILL, and an array. In the project's folder, W&B offline:
#   SLURM_CONF=DIR/slurm.conf bash experiments/cluster/local_slurm/try.sh OUT > experiments/cluster/local_slurm/OUTPUT.md
set -u
out=$(realpath -m "$1")
mkdir -p "$out"
export WANDB_MODE=offline STEPS=5
words="conf/digits.yaml --data.image_size 32 --data.test_limit 200 --trainer.max_epochs ${EPOCHS:-24} --model.grad_clip 0.3
    --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false"
small="--cpus-per-task=1 --gpus-per-node=0 --parsable"

submit() { # name: two tasks
    # shellcheck disable=SC2086
    RUN="$out/$1" sbatch $small --ntasks-per-node=2 --output="$out/$1.out" experiments/cluster/single.sbatch $words
}

training() { # name: wait until it has trained a while
    until [ -f "$out/$1/checkpoints/last.ckpt" ]; do sleep 0.5; done
}

ended() { # job: wait for its end; Slurm lets a requeued job wait for two minutes, which are not needed here
    while state=$(squeue -h -j "$1" -o %T 2> /dev/null) && [ -n "$state" ]; do
        [ "$state" = PENDING ] && scontrol update JobId="$1" StartTime=now 2> /dev/null
        sleep 1
    done
}

report() { # name, what was done
    runs=$(find "$out/$1/wandb" -maxdepth 1 -name 'offline-run-*' | sed 's/.*-[0-9]*_[0-9]*-//' | sort | uniq -c | awk '{print $1 " x " $2}')
    starts=$(find "$out/$1" -maxdepth 1 -name 'version_*' | wc -l)
    from=$(grep -o 'ckpt_path=last: .*' "$out/$1.out" | sed 's|.*/||; s/ckpt_path=last: //' | tr '\n' ';')
    auroc=$(awk -F, '{ sub(/\r/, "") } FNR == 1 { for (i = 1; i <= NF; i++) if ($i == "val/auroc") c = i } FNR > 1 && $c != "" { last = $c } END { print last }' \
        "$(find "$out/$1" -name metrics.csv | sort -V | tail -1)")
    echo "| $1 | $2 | $starts | $from | ${runs#"$PWD"} | $auroc |"
}

wanted() { # whether ONLY names it, where set
    case " ${ONLY:-$1} " in *" $1 "*) ;; *) false ;; esac
}

echo "| run | what happened | starts | begun from | pieces in W&B and their id | last AUROC |"
echo "|---|---|---|---|---|---|"

ended "$(submit undisturbed)"
report undisturbed nothing

if wanted preempted; then
    job=$(submit preempted)
    training preempted
    sbatch --partition=high --nodes=1 --ntasks=2 --wrap "sleep 5" --output=/dev/null > /dev/null
    ended "$job"
    report preempted "a job of higher priority came"
fi

if wanted told; then
    job=$(submit told)
    training told
    scancel --signal=USR1 "$job"
    ended "$job"
    report told "SIGUSR1, as before the end of its time"
fi

if wanted killed; then
    job=$(submit killed)
    training killed
    victim=$(pgrep -f "$out/killed/run.yaml .*--trainer.strategy ddp" | while read -r pid; do
        tr '\0' '\n' < "/proc/$pid/environ" | grep -q '^SLURM_PROCID=1$' && grep -qv srun "/proc/$pid/comm" && echo "$pid"
    done | tail -1)
    kill -9 "$victim"
    since=$(date +%s)
    while squeue -h -s | grep -q "^$job\.[0-9]"; do sleep 0.5; done
    seconds=$(($(date +%s) - since))
    ended "$job"
    report killed "SIGKILL of one task; the other was gone within $((seconds + 1)) s"
fi

if wanted array; then
    # shellcheck disable=SC2086
    job=$(cd "$PWD" && sbatch $small --array=0-1 --job-name="$(basename "$out")" --output="$out/array-%a.out" experiments/cluster/array.sbatch $words)
    ended "$job"
    for class in 0 1; do
        grep -h -o '^AUROC .* epochs,' "$out/array-$class.out" | sed "s/^/\nArray, class $class: /"
    done
fi
