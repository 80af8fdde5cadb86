#!/bin/sh
# What is to be measured where a GPU is: sh experiments/gpu.sh DATA OUT. Nothing of it has been run yet.
# DATA holds cifar-10-batches-py. About half an hour on one H200, by its arithmetic.
set -e
data=$1 out=$2
mkdir -p "$out"
python -m pytest -m gpu | tee "$out/tests.txt"
python experiments/bench/layers.py resnet152 224 512 mobilenetv2_100 224 512 | tee "$out/layers.md"
python experiments/bench/search.py --dims 2048 | tee "$out/search.md"
python experiments/bench --architecture resnet152 --train 5000 --test 10000 --epochs 1 --repeats 1 -o "$out/resnet152.md"
# the published recipe on one class: seconds per epoch are in report's table
lightning fit --config conf/cifar10.yaml --data.root "$data" --data.normal_class airplane --trainer.precision bf16-mixed \
  --model.prefix_cache_gb 64 --trainer.logger CSVLogger --trainer.logger.save_dir "$out" | tee "$out/airplane.txt"
# ten classes in one process: DN2 beside five epochs of Early
panda table --config conf/cifar10.yaml --methods dn2,early --folder "$out/table" \
  --words="--data.root=$data --trainer.precision=bf16-mixed --trainer.max_epochs=5"
# segmentation: all categories of MVTec AD below DATA/mvtec, and its times
python experiments/bench/segmentation.py | tee "$out/segmentation.md"
for method in spade patchcore; do
  python experiments/mvtec.py "$data/mvtec" $method --trainer.enable_model_summary false | tee "$out/mvtec-$method.txt"
done
