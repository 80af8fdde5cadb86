#!/bin/sh
# Makes the folder of a run that may be stopped at any moment, and prints the words that let the run live in it. The same command
# again goes on from the newest whole checkpoint there, under the same id in W&B:
#   lightning fit --config conf/cifar10.yaml $(sh experiments/cluster/run_folder.sh runs/NAME [STEPS]) --config conf/variants/ses.yaml
# They come after the data set's config, whose loggers and callbacks they replace, and before variants, which add theirs. STEPS: a
# checkpoint also every so many steps, for runs that are killed without a word; else at each epoch, and when a signal says so.
set -eu
run=$1
mkdir -p "$run"
cat > "$run/run.yaml.$$" <<EOF
trainer:
  logger:
    - class_path: CSVLogger
      init_args: {save_dir: $run, name: ""}
    - class_path: AutoWandbLogger
      init_args: {save_dir: $run, id: $(echo "$run" | tr -c 'A-Za-z0-9_\n' -)}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: $run/checkpoints, filename: last, enable_version_counter: false}
    - class_path: SaveOnSignal
      init_args: {every_n_steps: ${2:-null}}
ckpt_path: last
EOF
mv "$run/run.yaml.$$" "$run/run.yaml" # whole at any moment, for processes that start together
echo "--config $run/run.yaml"
