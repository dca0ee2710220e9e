#!/bin/sh
# A model from 37 kB of download to 5 kB, on the digits network that ships with the project: look, try, prune to what
# accuracy allows, quantise, measure. Everything is kept in demo/, to play with.
set -eu
cd "$(dirname "$0")/.."
export PATH="${DEMO_BIN:-$PWD/${BIN:-.venv/bin}}:$PATH" COLUMNS="${COLUMNS:-100}"
rm -rf demo
mkdir demo
cp fixtures/digits_cnn.onnx fixtures/digits.npz demo/
cd demo
# The pixels of the digits go from 0 to 16, as the network was trained.
data="digits.npz?norm=/16"

show() {
    printf '\n$ prunectl'
    for word in "$@"; do
        case $word in *[*?\ ]*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    prunectl "$@" --format human
}

show inspect digits_cnn.onnx --flops
show sweep digits_cnn.onnx -o trials --data "$data" --val-split 30% --strategies magnitude,obs --scopes global
show prune digits_cnn.onnx -o small.onnx -s 80% --strategy obs --scope global --data "$data"
show export small.onnx -o int8.onnx --int8 --data "$data"
show size digits_cnn.onnx small.onnx int8.onnx
show size int8.onnx --max-gzip 6KB

cat << 'END'

The models and their data are kept in demo/. To go on with them:

  . .venv/bin/activate
  cd demo
  prunectl inspect small.onnx      # or prunectl help
END
