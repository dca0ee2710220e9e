#!/bin/sh
# The main job on the digits model that ships with the project.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/${BIN:-.venv/bin}:$PATH" COLUMNS="${COLUMNS:-100}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

show() {
    printf '\n$ prunectl %s\n' "$*" | sed "s|$out/||g"
    prunectl "$@" --format human | sed "s|$out/||g"
}

show inspect fixtures/digits_cnn.h5 --flops
show prune fixtures/digits_cnn.h5 -o "$out/pruned.h5" --sparsity 80% --scope global --pack
show inspect fixtures/wrapped_by_tfmot.h5 --rows 6
show strip fixtures/wrapped_by_tfmot.h5 -o "$out/plain.h5"
show size fixtures/digits_cnn.h5 "$out/pruned.h5" --max-gzip 40KB
