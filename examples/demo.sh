#!/bin/sh
# The main job on the digits model that ships with the project.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/${BIN:-.venv/bin}:$PATH" COLUMNS="${COLUMNS:-100}"

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

show prunectl inspect fixtures/digits_cnn.h5 --flops --format human
show prunectl inspect fixtures/wrapped_by_tfmot.h5 --format human --rows 6
show prunectl size fixtures/digits_cnn.h5 fixtures/digits_cnn.keras fixtures/digits_cnn.pt fixtures/digits_cnn.onnx --format human
show prunectl size fixtures/digits_cnn.h5 --max-gzip 100KB --format human
