#!/bin/sh
# The whole way of a model, on the digits network that ships with the project: look, prune, train, strip, export, weigh.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/${BIN:-.venv/bin}:$PATH" COLUMNS="${COLUMNS:-100}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The pixels of the digits go from 0 to 16, as the network was trained.
data="fixtures/digits.npz?norm=/16"

show() {
    printf '\n$ prunectl %s\n' "$*" | sed "s|$out/||g"
    prunectl "$@" --format human | sed "s|$out/||g"
}

show inspect fixtures/digits_cnn.h5 --flops
show prune fixtures/digits_cnn.h5 -o "$out/pruned.h5" --sparsity 90% --scope global
show finetune "$out/pruned.h5" -o "$out/tuned.h5" --data "$data" --val-split 20% --epochs 5
show strip "$out/tuned.h5" -o "$out/small.h5" --pack
show size fixtures/digits_cnn.h5 "$out/pruned.h5" "$out/small.h5"
show export "$out/small.h5" -o "$out/small.onnx" --data "$data"
show export "$out/small.h5" -o "$out/small.tflite" --int8 --data "$data"
show size fixtures/digits_cnn.h5 "$out/small.onnx" "$out/small.tflite"
