#!/bin/sh
# Every method on small images with settings that fit two cores; prints a line a run.
#   sh experiments/methods.sh DATA OUTLIERS OUT [digits|fashion_mnist|cifar10 ...]
# DATA holds CIFAR-10 and Fashion-MNIST, OUTLIERS is a folder of other images (Tiny-ImageNet). Bundled network, 64 px, for the PANDA
# family; 32 px for those from scratch. 1,500 training and 1,000 test images; 6 epochs (PANDA family), 20 + 20 (Deep SVDD), 10 of a
# WideResNet-10-2 (RotNet, 500 test images). None of these is the published schedule.
set -eu
data=$1 outliers=$2 out=$3
shift 3
quiet="--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.logger CSVLogger --trainer.logger.save_dir $out"

run() { # set, class, method, verb, words
    name=$1 class=$2 method=$3 verb=$4
    shift 4
    variant=${method%%-*}
    printf '%s | %s | %s | ' "$name" "$class" "$method"
    # shellcheck disable=SC2086
    python -m panda_lightning "$verb" --config "conf/$name.yaml" --config "conf/variants/$variant.yaml" --data.root "$data" \
        --data.normal_class "$class" --data.train_limit 1500 $quiet --trainer.logger.name "$name-$class-$method" "$@" 2>&1 |
        grep -oE '^AUROC.*|test/auroc[a-z_]* +│ +[0-9.]+' | tr -s ' │' ' ' | tail -1 || echo failed
}

for name in ${*:-digits fashion_mnist cifar10}; do
    case $name in
    digits) classes="8 9" ;;
    fashion_mnist) classes="0 5" ;;
    cifar10) classes="airplane automobile" ;;
    esac
    family="--model.backbone panda_tiny --data.image_size 64 --data.crop squash --data.test_limit 1000"
    for class in $classes; do
        # shellcheck disable=SC2086
        {
            run "$name" "$class" dn2 test $family
            for method in early ses ewc msc; do
                run "$name" "$class" "$method" fit $family --trainer.max_epochs 6
            done
            run "$name" "$class" oe fit $family --trainer.max_epochs 6 --data.outliers "$outliers"
        }
        run "$name" "$class" ocsvm test --data.test_limit 1000
        run "$name" "$class" ocsvm-oracle test --data.test_limit 1000 --model.select test --model.inputs pixels
        run "$name" "$class" deep_svdd fit --data.test_limit 1000 --trainer.max_epochs 40 --model.pretrain_epochs 20
        run "$name" "$class" mhrot fit --data.test_limit 500 --trainer.max_epochs 10 --trainer.check_val_every_n_epoch 10 \
            --model.depth 10 --model.width 2
    done
done
