#!/usr/bin/env bash
# Every class of a data set by one method with the paper's settings, and a table of what is in runs/SET:
#   experiments/published/run.sh SET METHOD [words of the command line]
# SET is a file of this folder, METHOD one of conf/variants. LAUNCH is put before each run, on a cluster for example
#   LAUNCH="srun --gpus 1 python -m panda_lightning" experiments/published/run.sh cifar10 ewc --model.fisher FILE
# FILE is ImageNet's Fisher diagonal in the convention that lambda 1e4 is meant for (protocol of the paper: batches of 32):
#   panda fisher --backbone resnet152.tv_in1k --data imagenet/val --labels true --batch 32 -o FILE
# Float32 without TF32; --trainer.precision bf16-mixed is quicker and not the paper's.
set -euo pipefail
set=$1 method=$2
shift 2
key=--data.normal_class
case $set in
cifar10 | fashion_mnist) classes="0 1 2 3 4 5 6 7 8 9" ;;
cifar100) classes="0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19" ;;
cats_vs_dogs) classes="cat dog" ;;
dior) classes="0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18" ;;
hyper_kvasir) classes=normal ;;
mvtec)
  key=--data.category
  classes="bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper"
  ;;
*) echo "$set is not a file of this folder" >&2 && exit 2 ;;
esac
case $method in
dn2 | ocsvm | spade | patchcore) verb=test ;;
*) verb=fit ;;
esac
for class in $classes; do
  # shellcheck disable=SC2086
  ${LAUNCH:-python -m panda_lightning} "$verb" --config "conf/$set.yaml" --config "experiments/published/$set.yaml" \
    --config "conf/variants/$method.yaml" "$key" "$class" "$@"
done
[ "${LAUNCH:-}" = echo ] || python experiments/table.py "runs/$set"
