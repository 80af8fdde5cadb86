#!/usr/bin/env bash
# DN2 with an ImageNet MobileNetV2 on every data set that fits two cores: about 15 minutes.
#   experiments/dn2.sh data
# The argument is the folder of the data sets in their official layouts.
set -euo pipefail
root=$1
backbone=local-dir:../shared/weights/mobilenetv2_100.in1k
dn2() {
  python -m panda_lightning test --config "$1" --config conf/variants/dn2.yaml --data.root "$root" \
    --model.backbone "$backbone" --model.normalize true --trainer.enable_progress_bar false "${@:2}"
}
for class in airplane automobile; do dn2 conf/cifar10.yaml --data.normal_class "$class" --data.image_size 112 --data.crop squash; done
for class in fish people vehicles_1; do dn2 conf/cifar100.yaml --data.normal_class "$class" --data.image_size 112 --data.crop squash; done
for class in T-shirt/top Sandal; do dn2 conf/fashion_mnist.yaml --data.normal_class "$class" --data.image_size 112 --data.crop squash; done
for class in cat dog; do dn2 conf/cats_vs_dogs.yaml --data.normal_class "$class" --data.image_size 160 --data.crop squash; done
dn2 conf/mvtec.yaml --data.category bottle
for runs in cifar10 cifar100 fashion_mnist cats_vs_dogs mvtec; do python experiments/table.py "runs/$runs"; done
