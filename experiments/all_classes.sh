#!/usr/bin/env bash
# One run a class, and a table of them:
#   experiments/all_classes.sh runs/digits "0 1 2 3 4 5 6 7 8 9" fit --config conf/digits.yaml
# The first word is where the config's runs go, the second the normal classes, the rest the command line.
set -euo pipefail
runs=$1 classes=$2
shift 2
for class in $classes; do
  python -m panda_lightning "$@" --data.normal_class "$class"
done
python "$(dirname "$0")/table.py" "$runs"
