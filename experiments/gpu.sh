#!/bin/sh
# Measures on a machine with one or several GPUs, and writes one report: sh experiments/gpu.sh DATA OUT [NAME...]
#
# DATA holds cifar-10-batches-py and mvtec, as far as they are there; OUT gets report.md, and NAME.txt of each step.
# Without names: tests layers search segmentation bench scaling run, whose time limits add up to nine minutes on one GPU
# (by arithmetic they should take six; only the tests have been run, on one H200). Longer ones, by name: together layers152
# bench152 published tables mvtec; the last three need weights of the hub, or of a folder (BACKBONE=local-dir:FOLDER).
#
# A step that fails, or takes longer than its limit, does not stop the next. SMALL=1, or no GPU, makes all of it tiny.
# BACKBONE is the network of `run` (else panda_tiny, which is bundled) and of `published`. PYTHON is the interpreter.
data=$1 out=$2
[ -n "$out" ] || { sed -n 2,10p "$0"; exit 2; }
shift 2
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ ! -d "$data" ] || data=$(cd "$data" && pwd)
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
PYTHONPATH=$(pwd)/src${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
report=$out/report.md status=0

"$python" -c "import panda_lightning, faiss, pytest" 2>/dev/null || "$python" -m pip install --quiet -e ".[test]" || exit
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 0 ] || SMALL=1
[ -n "$*" ] || set -- tests layers search segmentation bench scaling run

# step NAME SECONDS COMMAND...: runs it, and puts what it says into the report
step() {
  name=$1 limit=$2
  shift 2
  echo "$name: at most $limit s"
  begin=$(date +%s)
  timeout -k 10 "$limit" "$@" > "$out/$name.txt" 2>&1
  code=$?
  seconds=$(($(date +%s) - begin))
  [ $code -eq 0 ] || status=1
  {
    printf '\n## %s\n\n`%s`\n\nexit code %s, %s s of at most %s s\n\n' "$name" "$*" "$code" "$seconds" "$limit"
    grep '^|' "$out/$name.txt"
    printf '\n```\n'
    grep -v '^|' "$out/$name.txt" | tail -n 40
    printf '```\n'
  } >> "$report"
  echo "| $name | $code | $seconds | $limit |" >> "$out/steps.md"
}

fit() {  # NAME SECONDS CONFIG WORDS...
  name=$1 limit=$2 config=$3
  shift 3
  step "$name" "$limit" "$python" -m panda_lightning fit --config "$config" --trainer.logger CSVLogger \
    --trainer.logger.save_dir "$out" --trainer.enable_progress_bar false "$@"
}

airplane="--data.root $data --data.normal_class airplane --model.prefix_cache_gb 64 --trainer.precision bf16-mixed"

printf '| step | exit code | seconds | limit |\n|---|---|---|---|\n' > "$out/steps.md"
: > "$report"
for wanted; do
  case $wanted${SMALL:+-small} in
    tests) step tests 150 "$python" -m pytest -m gpu ;;
    tests-small) step tests 150 "$python" -m pytest -m gpu tests/test_gpu.py ;;
    layers) step layers 70 "$python" experiments/bench/layers.py resnet18 224 512 ;;
    layers-small) step layers 150 "$python" experiments/bench/layers.py resnet10t 32 2 ;;
    search) step search 40 "$python" experiments/bench/search.py --dims 2048 --banks 10000 100000 ;;
    search-small) step search 60 "$python" experiments/bench/search.py --dims 16 --queries 10 --banks 100 --repeats 1 ;;
    segmentation) step segmentation 80 "$python" experiments/bench/segmentation.py ;;
    segmentation-small)
      step segmentation 150 "$python" experiments/bench/segmentation.py --size 64 --train 4 --test 2 mobilenetv2_050 ;;
    bench)
      step bench 90 "$python" experiments/bench --architecture resnet152 --train 500 --test 1000 --epochs 1 --repeats 1 ;;
    bench-small) step bench 150 "$python" experiments/bench --train 8 --test 8 --epochs 1 --repeats 1 ;;
    scaling) step scaling $((60 + 10 * gpus)) "$python" experiments/bench/scaling.py --architecture resnet50 --most "$gpus" ;;
    scaling-small)
      step scaling 150 "$python" experiments/bench/scaling.py --architecture resnet18 --size 32 --train 8 --test 8 ;;
    run)
      if [ -d "$data/cifar-10-batches-py" ]; then
        # shellcheck disable=SC2086  # words
        fit run 40 conf/cifar10.yaml $airplane --model.backbone "${BACKBONE:-panda_tiny}" --model.ewc_weight 0 \
          --data.test_limit 2000 --trainer.max_epochs 3
      else
        printf '\n%s\n' "There is no $data/cifar-10-batches-py: the run is on scikit-learn's digits." >> "$report"
        fit run 40 conf/digits.yaml --trainer.max_epochs 10
      fi ;;
    run-small)
      printf '\n%s\n' "The run is tiny, and on scikit-learn's digits." >> "$report"
      fit run 60 conf/digits.yaml --trainer.max_epochs 1 --data.train_limit 16 --data.test_limit 16 ;;
    together) step together 300 "$python" experiments/bench/together.py --backbone "${BACKBONE:-panda_tiny}" ;;
    together-small) step together 150 "$python" experiments/bench/together.py --size 32 --train 32 --runs 1 2 ;;
    layers152) step layers152 900 "$python" experiments/bench/layers.py resnet152 224 512 mobilenetv2_100 224 512 ;;
    bench152)
      step bench152 1800 "$python" experiments/bench --architecture resnet152 --train 5000 --test 10000 --epochs 1 \
        --repeats 1 ;;
    published) # the recipe on one class: seconds of an epoch are in its table
      # shellcheck disable=SC2086  # words
      fit published 1800 conf/cifar10.yaml $airplane --model.backbone "${BACKBONE:-resnet152.tv_in1k}" ;;
    tables) # ten classes in one process: DN2 beside five epochs of Early
      step tables 3600 "$python" -m panda_lightning.tools table --config conf/cifar10.yaml --methods dn2,early \
        --folder "$out/table" "--words=--data.root=$data --trainer.precision=bf16-mixed --trainer.max_epochs=5" ;;
    mvtec)
      for method in spade patchcore; do
        step "mvtec-$method" 3600 "$python" experiments/mvtec.py "$data/mvtec" "$method" \
          --trainer.enable_model_summary false
      done ;;
    *)
      echo "$wanted is no step to take here: see the head of $0." | tee -a "$report"
      status=1 ;;
  esac
done
{
  printf '# On a GPU\n\n'
  printf 'commit %s, %s%s\n\n' "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(date -u '+%Y-%m-%d %H:%M')" \
    "${SMALL:+; tiny, for want of a GPU or because SMALL is set: no number here means anything}"
  "$python" - << 'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"{', '.join(names) or 'no GPU'}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}", end="; ")
print(f"Python {platform.python_version()}", end="")
for name in ("torch", "torchvision", "timm", "pytorch-lightning", "faiss-gpu", "faiss-cpu"):
    try:
        print(f", {name} {version(name)}", end="")
    except PackageNotFoundError:
        pass
print("\n")
PYTHON
  cat "$out/steps.md" "$report"
} > "$report.part"
mv "$report.part" "$report"
rm "$out/steps.md"
echo "$report"
exit $status
