"""The table of what is held: command lines, and how much of what comes of them is kept.

A line runs in a folder of the case's own, after the lines before it; `{fixtures}` and `{out}` stand for the folders.
Every file that is in the folder afterwards is held as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class Keep(Enum):
    """How much of what comes of a case is expected to come again."""

    DOCUMENTS = auto()
    """All of it, readable; of files in binary their digests."""
    DIGESTS = auto()
    """All of it, as digests: `python -m tests.golden NAME` shows what is behind them."""
    SHAPES = auto()
    """Keys and types, of what a processor's floating point or a framework's version decides."""


@dataclass(frozen=True, slots=True)
class Case:
    """Some command lines that run one after another."""

    name: str
    lines: tuple[str, ...]
    keep: Keep = Keep.DIGESTS
    given: Mapping[str, str] = field(default_factory=dict)
    """What is in the folder before: texts, or copies where the text begins with `{fixtures}`.

    In a text, `{version}` stands for prunectl's own.
    """
    needs: tuple[str, ...] = ()
    """Modules without which the case is skipped."""
    without: tuple[str, ...] = ()
    """Modules that are not to be found meanwhile."""


def digests(name: str, *lines: str, needs: str = "", **given: str) -> Case:
    """A case of which digests are kept."""
    return Case(name, lines, Keep.DIGESTS, _named(given), tuple(needs.split()))


def documents(name: str, *lines: str, needs: str = "", **given: str) -> Case:
    """A case that is kept readable."""
    return Case(name, lines, Keep.DOCUMENTS, _named(given), tuple(needs.split()))


def shapes(name: str, *lines: str, needs: str = "", **given: str) -> Case:
    """A case of which only keys and types are kept."""
    return Case(name, lines, Keep.SHAPES, _named(given), tuple(needs.split()))


def _named(given: Mapping[str, str]) -> dict[str, str]:
    """Return file names: `prunectl_toml` is prunectl.toml, `_m_pt_prunectl` the stamp beside m.pt."""
    names = {name: name.replace("_", ".") for name in given}
    return {names[name]: content for name, content in given.items()}


MODELS = (
    "before_torch_1.6.pt",
    "checkpoint_with_optimizer.pt",
    "chunked_and_gzipped.h5",
    "deflated.keras",
    "digits_cnn.h5",
    "digits_cnn.keras",
    "digits_cnn.onnx",
    "digits_cnn.pt",
    "digits_cnn.pt2",
    "digits_cnn.safetensors",
    "digits_cnn.tflite",
    "digits_cnn_checkpoint.index",
    "digits_cnn_savedmodel",
    "digits_cnn_torchscript.pt",
    "every_variable_twice",
    "external_data/model.onnx",
    "float_data.onnx",
    "lambda_layer.keras",
    "masks_of_torch_prune.pt",
    "recurrent.keras",
    "tied_and_views.pt",
    "two_of_four_zero.safetensors",
    "two_shards/model.safetensors.index.json",
    "weights_in_branches.onnx",
    "weights_only.h5",
    "whole_module.pt",
    "wrapped_by_tfmot.h5",
)
WITH_GRAPHS = (
    *("digits_cnn.h5", "digits_cnn.keras", "digits_cnn.onnx", "digits_cnn.pt2", "digits_cnn.tflite"),
    *("digits_cnn_savedmodel", "lambda_layer.keras", "recurrent.keras", "weights_in_branches.onnx"),
)
PACKED = (
    "digits_cnn.h5",
    "digits_cnn.keras",
    "digits_cnn.pt",
    "digits_cnn.pt2",
    "digits_cnn.onnx",
    "tied_and_views.pt",
)
SMALL = "{fixtures}/two_of_four_zero.safetensors"
PT, H5, ONNX = "{fixtures}/digits_cnn.pt", "{fixtures}/digits_cnn.h5", "{fixtures}/digits_cnn.onnx"
ST, TWO, DIGITS = "{fixtures}/digits_cnn.safetensors", "{fixtures}/digits_cnn.keras", "{fixtures}/digits.npz"
SHARDS = "{fixtures}/two_shards/model.safetensors.index.json"
FEW = f"'{DIGITS}?limit=32'"
TUNE = f"finetune {PT} -o out.pt --builder {{fixtures}}/digits_torch.py:DigitsCNN --device cpu --data {FEW}"
NET = "--builder {fixtures}/digits_torch.py:DigitsCNN"


def _out(model: str) -> str:
    """Return how an output beside a model of that name is called; folders and files of many parts have their own."""
    if "." not in model.rpartition("/")[2]:
        return "out"
    return f"out.{'safetensors.index.json' if model.endswith('.index.json') else model.rpartition('.')[2]}"


MANIFEST = """{"request": {
  "batch_size": 32, "cluster": "", "compression": null, "custom_objects": "", "data": "", "exclude": ["conv1*"],
  "inputs": [], "is_packed": true, "is_repaired": false, "layers": [["fc2", 0.2]], "loss": "", "model": "",
  "nan": "error", "only": "", "params": [], "pattern": "", "policy": "default", "samples": 128,
  "scope": "global", "seed": 3, "sparsity": 0.5, "strategy": "lamp", "target_gzip": null, "target_packed": null
}, "schema": "prunectl.manifest/1"}"""
STAMP = """{"asked": {
  "allow_empty": false, "batch_size": null, "begin": "", "builder": "", "cluster": "", "compression": null,
  "custom_objects": "", "data": "", "dead": false, "end": "", "exclude": [], "frequency": null, "initial_sparsity":
  "", "inputs": [], "latency": false, "layer": [], "layers": "", "loss": "", "max_drop": "", "max_ratio": "",
  "metric": "", "min_channels": null, "nan": "error", "pack": false, "param": [], "pattern": "", "policy":
  "default", "power": null, "recipe": null, "repair": "", "repair_steps": null, "round_to": null, "samples": null,
  "schedule": "", "schedule_param": [], "scope": "layer", "seed": 0, "sparsity": "75%", "strategy": "magnitude",
  "target_flops": "", "target_gzip": "", "target_packed": "", "target_params": "", "tried": null, "trust": false,
  "wrap": false
}, "code": {}, "command": "prune", "read": {
  "a.safetensors": "c01fbb40089d99a79849b36e7944bf74d75f2bf1a26cd85e2d1ace186023d2b4"
}, "schema": "prunectl.stamp/1", "version": "{version}", "written": {
  "out.safetensors": "7d296197749ec1f221ac886f497aee545f7a6c86655d78ad0a96559a4b56c5a3"
}}"""

INSPECT = (
    documents("inspect/small", f"inspect {SMALL} --json"),
    documents("inspect/pattern-histogram", f"inspect {SMALL} --pattern 2:4 --hist --json"),
    documents("inspect/flops-plain", f"inspect {H5} --flops"),
    documents("inspect/flops-csv", f"inspect {ONNX} --flops --format csv"),
    documents("inspect/flops-markdown", "inspect {fixtures}/digits_cnn.pt2 --flops --format markdown"),
    documents("inspect/lambda", "inspect {fixtures}/lambda_layer.keras --json"),
    documents("inspect/whole-module", "inspect {fixtures}/whole_module.pt --json"),
    documents("inspect/no-zeros", f"inspect {SMALL} --no-zeros --json"),
    digests("inspect/several", f"inspect {SMALL} {ST} missing.h5 --json"),
    digests("inspect/layers-sort", f"inspect {PT} --layers 're:fc.*' --sort sparsity --json"),
    digests("inspect/blocks", f"inspect {ST} --pattern block:1x4 --json"),
    digests("inspect/channels", f"inspect {ST} --pattern channel --json"),
    shapes("inspect/html", f"inspect {SMALL} --html page.html --json"),
    digests("inspect/groups", f"inspect {ONNX} --groups --json", needs="onnx onnxruntime"),
    documents("inspect/sensitivity", f"inspect {SMALL} --sensitivity --json"),
    shapes("inspect/sensitivity-data", f"inspect {ONNX} --sensitivity --data {FEW} --json", needs="onnx onnxruntime"),
    *(digests(f"inspect/{model}", f"inspect {{fixtures}}/{model} --json") for model in MODELS),
    *(digests(f"inspect/flops/{model}", f"inspect {{fixtures}}/{model} --flops --json") for model in WITH_GRAPHS),
)
SIZE = (
    documents("size/small", f"size {SMALL} --json"),
    documents("size/gates", f"size {SMALL} --max-gzip 100B --max-raw 1MB --min-sparsity 60% --json"),
    digests("size/baseline", f"size {ST} --against {SMALL} --max-growth 2% --json"),
    documents("size/quiet", f"size -q {SMALL}"),
    documents("size/plain", f"size {SMALL} {ST} {PT}"),
    documents(
        "size/codecs", f"size {SMALL} --codec xz -q", f"size {SMALL} --codec none -q", f"size {SMALL} --level 9 -q"
    ),
    digests("size/folder", "size {fixtures}/digits_cnn_savedmodel --max-packed 10KB --json"),
    *(digests(f"size/{model}", f"size {{fixtures}}/{model} --json") for model in MODELS),
)
PRUNE = (
    documents("prune/small", f"prune {SMALL} -o out.safetensors -s 75% --manifest out.json --json"),
    documents("prune/dry-run", f"prune {SMALL} -s 75% --dry-run --json"),
    documents("prune/plain", f"prune {ST} -o out.safetensors -s 50%"),
    *(
        digests(f"prune/{model}", f"prune {{fixtures}}/{model} -o {_out(model)} -s 80% --manifest m.json --json")
        for model in MODELS
    ),
    *(
        digests(f"prune/pack/{model}", f"prune {{fixtures}}/{model} -o {_out(model)} -s 80% --pack --json")
        for model in PACKED
    ),
    digests("prune/global", f"prune {PT} -o out.pt -s 0.9 --scope global --manifest m.json --json"),
    digests("prune/erk", f"prune {PT} -o out.pt -s 0.9 --scope erk --manifest m.json --json"),
    digests("prune/random", f"prune {ST} -o out.safetensors -s 0.6 --strategy random --seed 3 --json"),
    digests(
        "prune/random-weighted", f"prune {ST} -o out.safetensors -s 0.6 --strategy random-weighted --seed 2 --json"
    ),
    digests("prune/lamp-global", f"prune {ONNX} -o out.onnx -s 0.9 --strategy lamp --scope global --json"),
    digests("prune/compression", f"prune {ST} -o out.safetensors --compression 8 --json"),
    digests("prune/target-gzip", f"prune {SMALL} -o out.safetensors --target-gzip 350B --manifest m.json --json"),
    digests("prune/target-packed", f"prune {H5} -o out.h5 --target-packed 30KB --json"),
    digests("prune/two-of-four", f"prune {ONNX} -o out.onnx --pattern 2:4 --exclude fc2 --manifest m.json --json"),
    digests("prune/one-of-four", f"prune {H5} -o out.h5 --pattern 1:4 --json"),
    digests("prune/block", f"prune {H5} -o out.h5 -s 70% --pattern block:1x4 --manifest m.json --json"),
    digests("prune/block-max", f"prune {ST} -o out.safetensors -s 70% --pattern block:4x4:max --json"),
    digests("prune/cluster", f"prune {ST} -o out.safetensors -s 50% --cluster 16 --manifest m.json --json"),
    digests("prune/cluster-start", f"prune {ST} -o out.safetensors -s 50% --cluster 8:linear --json"),
    digests("prune/policy-all", f"prune {ST} -o out.safetensors -s 50% --policy all --json"),
    digests("prune/policy-skip-classifier", f"prune {H5} -o out.h5 -s 50% --policy skip-classifier --json"),
    digests("prune/policy-min-size", f"prune {TWO} -o out.keras -s 50% --policy min-size:1000 --json"),
    digests("prune/policy-xnnpack", f"prune {H5} -o out.h5 -s 50% --policy xnnpack --json"),
    digests(
        "prune/only-layers", f"prune {PT} -o out.pt -s 50% --layers 'fc*' --layer fc2=20% --manifest m.json --json"
    ),
    digests("prune/in-place", "prune out.safetensors --in-place -s 50% --json", out_safetensors=ST),
    digests("prune/force", f"prune {ST} -o out.safetensors --force -s 50% --json", out_safetensors="anything"),
    documents(
        "prune/recipe",
        f"prune {SMALL} -o a.safetensors -s 60% --strategy random --seed 5 --manifest m.json -q",
        f"prune {SMALL} -o b.safetensors --recipe m.json --json",
    ),
    digests("prune/recipe-of-0.1", f"prune {ST} -o out.safetensors --recipe m.json --json", m_json=MANIFEST),
    digests(
        "prune/strategy-file",
        f"prune {ST} -o out.safetensors -s 50% --strategy {{out}}/own.py:largest --param power=2 --json",
        own_py="import numpy as np\n\n\ndef largest(weights, power=1.0):\n    return 1 / (power + np.abs(weights))\n",
    ),
)
CHANNELS = (
    digests(
        "prune/channel/dry-run", f"prune {ONNX} --dry-run --pattern channel -s 50% --json", needs="onnx onnxruntime"
    ),
    digests(
        "prune/channel/onnx",
        f"prune {ONNX} -o out.onnx --pattern channel -s 50% --manifest m.json --json",
        needs="onnx onnxruntime",
    ),
    digests(
        "prune/channel/flops",
        f"prune {ONNX} -o out.onnx --pattern channel --target-flops -50% --round-to 2 --min-channels 2 --json",
        needs="onnx onnxruntime",
    ),
    digests(
        "prune/channel/params",
        f"prune {ONNX} -o out.onnx --pattern channel --target-params 4K --max-ratio 80% "
        "--strategy geometric-median --json",
        needs="onnx onnxruntime",
    ),
    digests(
        "prune/channel/random",
        f"prune {ONNX} -o out.onnx --pattern channel -s 25% --strategy random --seed 4 --scope global --json",
        needs="onnx onnxruntime",
    ),
    digests(
        "prune/channel/recipe",
        f"prune {ONNX} -o a.onnx --pattern channel -s 25% --manifest m.json -q",
        f"prune {ONNX} -o b.onnx --recipe m.json -q",
        needs="onnx onnxruntime",
    ),
    digests(
        "prune/channel/torch",
        f"prune {PT} -o out.pt --pattern channel -s 50% {NET} --input 1,1,8,8 --manifest m.json --json",
        needs="torch",
    ),
    digests(
        "prune/channel/h5",
        f"prune {H5} -o out.h5 --pattern channel -s 50% --manifest m.json --json",
        needs="tensorflow tf_keras",
    ),
)
CALIBRATED = (
    shapes(
        "prune/data/activation-magnitude",
        f"prune {ONNX} -o out.onnx -s 80% --strategy activation-magnitude --data {FEW} --manifest m.json --json",
        needs="onnx onnxruntime",
    ),
    shapes(
        "prune/data/obs",
        f"prune {ONNX} -o out.onnx -s 80% --strategy obs --data {FEW} --samples 32 --json",
        needs="onnx onnxruntime",
    ),
    shapes(
        "prune/data/max-drop",
        f"prune {ONNX} -o out.onnx --max-drop 5pp --data {FEW} --tried tried --json",
        needs="onnx onnxruntime",
    ),
)
WRAPPED = (
    digests("prune/wrap/torch", f"prune {PT} -o out.pt -s 80% --wrap --exclude 'conv1*' --json", needs="torch"),
    digests("prune/wrap/safetensors", f"prune {ST} -o out.safetensors -s 80% --wrap --json", needs="torch"),
    digests(
        "prune/wrap/schedule",
        f"prune {H5} -o out.h5 -s 80% --schedule polynomial --begin 100 --end 400 --frequency 20 --power 2 --json",
        "inspect out.h5 --json",
        "strip out.h5 -o plain.h5 --json",
        needs="tensorflow tf_keras tensorflow_model_optimization",
    ),
)
STRIP = (
    documents("strip/small", f"strip {SMALL} -o out.safetensors --json"),
    documents("strip/dry-run", "strip {fixtures}/masks_of_torch_prune.pt --dry-run --json"),
    documents("strip/plain", "strip {fixtures}/checkpoint_with_optimizer.pt -o out.pt"),
    *(digests(f"strip/{model}", f"strip {{fixtures}}/{model} -o {_out(model)} --json") for model in MODELS),
    *(digests(f"strip/pack/{model}", f"strip {{fixtures}}/{model} -o {_out(model)} --pack --json") for model in PACKED),
    *(digests(f"strip/half/{model}", f"strip {{fixtures}}/{model} -o {_out(model)} --half --json") for model in MODELS),
    digests("strip/only-optimizer", "strip {fixtures}/checkpoint_with_optimizer.pt -o out.pt --only optimizer --json"),
    digests("strip/only-masks", "strip {fixtures}/wrapped_by_tfmot.h5 -o out.h5 --only masks,wrappers --json"),
)
DIFF = (
    documents(
        "diff/gates",
        f"prune {SMALL} -o out.safetensors -s 75% -q",
        f"diff {SMALL} out.safetensors --fail-on growth:1%,nonzero,shape,changed --json",
    ),
    digests("diff/across", f"diff {ONNX} {PT} --json"),
    documents("diff/across-plain", f"diff {H5} {ONNX}"),
    digests("diff/formats", f"diff {TWO} {H5} --fail-on shape,dtype --json"),
    digests("diff/different", f"diff {SMALL} {ST} --fail-on shape --json"),
)
VERIFY = (
    documents(
        "verify/holds",
        f"prune {SMALL} -o out.safetensors -s 75% --manifest m.json -q",
        f"verify out.safetensors --manifest m.json --against {SMALL} --json",
    ),
    documents(
        "verify/other",
        f"prune {SMALL} -o out.safetensors -s 75% --manifest m.json -q",
        f"verify {SMALL} --manifest m.json --against out.safetensors --json",
    ),
    digests(
        "verify/h5",
        f"prune {H5} -o out.h5 -s 75% --manifest m.json -q",
        f"verify out.h5 --manifest m.json --against {H5} --json",
        f"verify {H5} --manifest m.json",
    ),
)
BUDGETS = """
baseline = "prunectl-baseline.json"

[[budget]]
path = "*.safetensors"
max-raw = {fail = "600B", warn = "500B"}
max-gzip = "100B"
min-sparsity = {warn = "60%"}
max-growth = "2%"
min-nm = "2:4"
message = "ask before you raise this"

[[budget.layer]]
name = "fc*"
max-sparsity = "40%"

[[budget]]
name = "masks"
path = "big.pt"
max-params = "9K"
keep-zeros = "sparse.pt"

[[budget]]
name = "missing"
path = "missing.h5"
max-raw = "1B"
"""
NO_WORSE = """[[budget]]
path = "small.onnx"
max-drop = {fail = "1pp", data = "test.npz?limit=32", against = "small.onnx"}
"""
EASY = "[[budget]]\npath = 'small.safetensors'\nmax-raw = '1MB'\n"
REPORTS = ("human", "plain", "json", "markdown", "junit", "sarif", "github", "gitlab", "openmetrics")
BASELINE = """{"models": {"small.safetensors": {
  "gzip": 300, "params": 128, "prunable_zero": 64, "raw": 500, "reason": "once"
}}, "schema": "prunectl.baseline/1"}"""
SUFFIXES = {"json": "json", "junit": "xml", "sarif": "sarif", "gitlab": "json", "markdown": "md"}
CHECK = (
    documents("check/passes", "check --json", "check", small_safetensors=SMALL, prunectl_toml=EASY),
    documents("check/fails", "check --json", small_safetensors=SMALL, big_pt=PT, sparse_pt=PT, prunectl_toml=BUDGETS),
    *(
        documents(
            f"check/report/{name}",
            f"check --report {name}:report.{SUFFIXES.get(name, 'txt')} -q",
            small_safetensors=SMALL,
            big_pt=PT,
            sparse_pt=PT,
            prunectl_toml=BUDGETS,
        )
        for name in REPORTS
    ),
    documents(
        "check/baseline",
        "check --update-baseline --reason 'the first' --json",
        "check --json",
        small_safetensors=SMALL,
        prunectl_toml=f"baseline = 'baseline.json'\non-missing = 'fail'\n{EASY}max-growth = '1%'\n",
    ),
    documents(
        "check/baseline-of-0.1",
        "check --json",
        small_safetensors=SMALL,
        baseline_json=BASELINE,
        prunectl_toml=f"baseline = 'baseline.json'\n{EASY}max-growth = '1%'\n",
    ),
    documents(
        "check/names",
        "check masks --json",
        "check no-such --json",
        small_safetensors=SMALL,
        big_pt=PT,
        sparse_pt=PT,
        prunectl_toml=BUDGETS,
    ),
    documents(
        "check/pyproject",
        "check --json",
        small_safetensors=SMALL,
        pyproject_toml="[[tool.prunectl.budget]]\npath = '*.safetensors'\nmax-raw = '1B'\n",
    ),
    documents("check/unknown-key", "check --json", prunectl_toml="[[budget]]\npath = 'a.h5'\nmax-gzpi = '1MB'\n"),
    documents(
        "check/max-drop",
        "check --json",
        small_onnx=ONNX,
        test_npz=DIGITS,
        needs="onnx onnxruntime",
        prunectl_toml=NO_WORSE,
    ),
)
INIT = (
    documents("init/one", "init --json", "init", "check -q", small_safetensors=SMALL),
    digests("init/several", "init . --margin 25% --json", a_pt=PT, b_h5=H5, c_onnx=ONNX, d_keras=TWO),
    documents("init/nothing", "init --json"),
)
OTHERS = (
    shapes("doctor/json", "doctor --json"),
    documents("plugins/json", "plugins --json"),
    documents("plugins/plain", "plugins"),
    shapes("version", "--version"),
)
BUILDS = (
    documents(
        "build/if-changed",
        f"prune {SMALL} -o out.safetensors -s 75% --if-changed --depfile out.d --manifest out.json -q",
        f"prune {SMALL} -o out.safetensors -s 75% --if-changed --depfile out.d --manifest out.json --json",
        f"prune {SMALL} -o out.safetensors -s 60% --if-changed --depfile out.d --manifest out.json --json",
    ),
    documents("build/strip", "strip {fixtures}/masks_of_torch_prune.pt -o out.pt --if-changed --depfile out.d -q"),
    documents(
        "build/shards",
        f"prune {SHARDS} -o m.safetensors.index.json -s 50% --if-changed --depfile out.d -q",
    ),
    documents("build/export", f"export {ST} -o out.npz --if-changed --depfile out.d -q"),
    documents(
        "build/recipe",
        f"prune {SMALL} -o a.safetensors -s 60% --manifest m.json -q",
        f"prune {SMALL} -o b.safetensors --recipe m.json --if-changed --depfile b.d -q",
    ),
    documents(
        "build/stamp-of-0.1",
        "prune a.safetensors -o out.safetensors -s 75% -q",
        "prune a.safetensors -o out.safetensors -s 75% --if-changed --json",
        a_safetensors=SMALL,
        _out_safetensors_prunectl=STAMP,
    ),
    documents(
        "build/somebody-else",
        f"prune {SMALL} -o out.safetensors -s 75% --if-changed --json",
        out_safetensors="a thing of value",
    ),
)
EXPORT = (
    documents("export/npz", f"export {SMALL} -o out.npz --json"),
    documents("export/safetensors", f"export {PT} -o out.safetensors --metadata a=b --card card.md -q"),
    digests("export/half", f"export {PT} -o out.safetensors --half --json"),
    digests("export/bf16", f"export {PT} -o out.safetensors --bf16 --json"),
    *(digests(f"export/npz/{model}", f"export {{fixtures}}/{model} -o out.npz --json") for model in MODELS),
    digests("export/safetensors-of-masks", "export {fixtures}/masks_of_torch_prune.pt -o out.safetensors --json"),
    shapes("export/onnx-int8", f"export {ONNX} -o out.onnx --int8 --json", needs="onnx onnxruntime"),
    shapes(
        "export/onnx-sparse",
        f"prune {ONNX} -o p.onnx -s 90% -q",
        "export p.onnx -o out.onnx --sparse --json",
        needs="onnx onnxruntime",
    ),
    shapes(
        "export/torchscript", f"export {PT} -o out.pt --to torchscript {NET} --input 'x:2,1,8,8' --json", needs="torch"
    ),
    shapes("export/code", f"export {PT} -o weights.pt --code {NET} --input 'x:?,1,8,8' --json", needs="torch"),
    shapes("export/keras", f"export {H5} -o out.keras --json", needs="tensorflow tf_keras"),
)
FINETUNE = (
    shapes(
        "finetune/torch",
        f"{TUNE} --epochs 1 -s 50% --val-split 25% --checkpoint-dir kept --logdir logs --json",
        f"{TUNE} --epochs 1 -s 50% --val-split 25% --checkpoint-dir kept --resume --force --json",
        needs="torch",
    ),
    shapes(
        "finetune/steps",
        f"finetune {PT} -o out.pt {NET} --data {FEW} --steps 2 --device cpu --if-changed --depfile out.d --json",
        needs="torch",
    ),
)
SWEEP = (
    shapes(
        "sweep/onnx",
        f"sweep {ONNX} -o points --data {FEW} --patterns unstructured,2:4 --strategies lamp --sparsities 50% --json",
        f"sweep {ONNX} -o points --data {FEW} --patterns unstructured,2:4 --strategies lamp --sparsities 50%",
        needs="onnx onnxruntime",
    ),
)
MISTAKES = (
    documents("mistake/option", "inspect --no-such --json", "prune a.h5 --sparsty 80% --json"),
    documents("mistake/command", "pruen a.h5 --json"),
    documents("mistake/nothing-to-do", f"prune {ST} -o out.safetensors --json", f"prune {ST} -s 50% --json"),
    documents(
        "mistake/sparsity",
        f"prune {ST} -o out.safetensors -s 180% --json",
        f"prune {ST} -o out.safetensors -s much --json",
    ),
    documents("mistake/two-goals", f"prune {ST} -o out.safetensors -s 80% --target-gzip 1KB --json"),
    documents("mistake/strategy", f"prune {ST} -o out.safetensors -s 80% --strategy magnitud --json"),
    documents("mistake/pattern", f"prune {ST} -o out.safetensors --pattern 2x4 --json"),
    documents("mistake/policy", f"prune {ST} -o out.safetensors -s 80% --policy defualt --json"),
    documents("mistake/scope", f"prune {ST} -o out.safetensors -s 80% --scope local --json"),
    documents(
        "mistake/mode",
        f"prune {ST} -o out.safetensors -s 80% --end 100 --json",
        f"prune {ST} -o out.safetensors -s 80% --dead --json",
    ),
    documents("mistake/no-tensor", f"prune {ST} -o out.safetensors -s 80% --layers nothing --json"),
    documents("mistake/exists", f"prune {ST} -o out.safetensors -s 80% --json", out_safetensors="a thing of value"),
    documents("mistake/same-file", "prune a.safetensors -o a.safetensors -s 80% --json", a_safetensors=ST),
    documents("mistake/needs-data", f"prune {ONNX} -o out.onnx -s 80% --strategy obs --json"),
    documents(
        "mistake/recipe",
        f"prune {ST} -o out.safetensors --recipe m.json --json",
        m_json='{"schema": "prunectl.manifest/1", "request": {"sparsty": 0.5}}',
    ),
    documents("mistake/size-limit", f"size {SMALL} --max-gzip much --json", f"size {SMALL} --max-growth 2% --json"),
    documents("mistake/strip-part", f"strip {ST} -o out.safetensors --only mask --json"),
    documents("mistake/fail-on", f"diff {ST} {ST} --fail-on grwoth:2% --json"),
    documents("mistake/export-format", f"export {ST} -o out.xyz --json", f"export {ST} -o out.tflite --json"),
    documents("mistake/topic", "help exit-code"),
    documents(
        "input/missing",
        "inspect missing.h5 --json",
        "prune missing.h5 -o out.h5 -s 80% --json",
        "diff a.h5 b.h5 --json",
    ),
    documents("input/not-a-model", "inspect a.h5 --json", "size a.h5 --json", a_h5="no model at all"),
    documents("input/empty", "inspect a.pt --json", a_pt=""),
    documents("input/not-strippable", "strip {fixtures}/digits_cnn.tflite -o out.tflite --half --json"),
    documents("input/whole-module", "prune {fixtures}/whole_module.pt -o out.pt -s 80% --json"),
    documents("input/data", f"finetune {PT} -o out.pt {NET} --data missing.npz --epochs 1 --json", needs="torch"),
    documents(
        "input/untrusted",
        "finetune {fixtures}/lambda_layer.keras -o out.keras --data random:8 --epochs 1 --json",
        "finetune {fixtures}/whole_module.pt -o out.pt --data random:8 --epochs 1 --json",
    ),
    documents("input/manifest", f"verify {ST} --manifest m.json --json", m_json="{}"),
    documents("work/no-folder", f"prune {ST} -o no/such/out.safetensors -s 80% --json"),
    Case("missing-extra/zstd", (f"size {SMALL} --codec zstd --json",), Keep.DOCUMENTS, without=("zstandard",)),
    Case(
        "missing-extra/torch",
        (f"finetune {PT} -o out.pt {NET} --data {FEW} --epochs 1 --json",),
        Keep.DOCUMENTS,
        without=("torch",),
    ),
    documents("work/target", f"prune {SMALL} -o out.safetensors --target-gzip 1B --json"),
)

CASES = (
    *(*INSPECT, *SIZE, *PRUNE, *CHANNELS, *CALIBRATED, *WRAPPED, *STRIP, *DIFF, *VERIFY, *CHECK, *INIT, *OTHERS),
    *(*BUILDS, *EXPORT, *FINETUNE, *SWEEP, *MISTAKES),
)
