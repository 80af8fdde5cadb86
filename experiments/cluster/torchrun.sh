#!/bin/sh
# A run without a scheduler, on each of its machines, in the project's folder:
#   NODES=2 HOST=first-machine sh experiments/cluster/torchrun.sh runs/NAME conf/cifar10.yaml --config conf/variants/early.yaml
# torchrun ends all processes when one dies and starts them again, up to three times; they go on from the newest checkpoint. runs/ is
# on a disk that all machines share. GPUS: processes on this machine.
set -eu
# A store of its own for each try: in the one that torchrun shares with its processes, the addresses of the dead are still found
# (torch 2.14; FAULTS.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
run=$1 config=$2
shift 2
words=$(sh experiments/cluster/run_folder.sh "$run" "${STEPS:-200}")
# shellcheck disable=SC2086
exec python -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:=$(nvidia-smi -L | wc -l)}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" --rdzv-id "$(basename "$run")" \
    -m panda_lightning "${VERB:-fit}" --config "$config" $words "$@" \
    --trainer.num_nodes "${NODES:-1}" --trainer.devices "$GPUS" --trainer.strategy ddp
