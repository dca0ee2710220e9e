"""The texts of `prunectl help TOPIC`."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill, indent

from prunectl.analysis.sizes import CodecName
from prunectl.commands._help_page import common_options, two_columns
from prunectl.commands.completion import PATTERNS
from prunectl.errors import InputError, MissingExtraError, UsageError, WorkError
from prunectl.exporting.routes import TARGETS
from prunectl.formats.registry import FORMATS
from prunectl.plugins import group
from prunectl.pruning.choices import Choice, choices
from prunectl.pruning.strategies import STRATEGIES, Requires
from prunectl.reporting.ci import REPORT_FORMATS
from prunectl.reporting.report import SCHEMA, Layout
from prunectl.reporting.reporter import BUG, CANCELLED
from prunectl.training.data.spec import GENERAL, IMAGE_OPTIONS, RECORD_OPTIONS, TABLE_OPTIONS, TEXT_OPTIONS

WIDTH = 80
"""The default width of a terminal, in characters."""


def builds_text() -> str:
    """The topic `builds`."""
    return f"""
Builds: make and CI

prune, strip, finetune and export take:

  --depfile FILE  write a make dependency file that lists all inputs
  --if-changed    skip the run if the output is up to date

  %.p.h5: %.h5
          prunectl prune $< -o $@ -s 80% --if-changed --depfile $@.d
          @touch $@
  -include *.d

An output is up to date if the same version made it with the same options from
files with the same content, and nobody has changed it since. The digests are in
.OUT.prunectl beside the output: cache both or neither. --if-changed overwrites
what prunectl wrote; an output that somebody has changed needs --force. It
refuses --data that is a function, as it cannot know what the function reads.
Outputs are written whole or not at all, even if the build is killed.

prunectl init writes budgets, prunectl check compares models with them, and
--report FORMAT:PATH writes the result for your CI:

  {", ".join(REPORT_FORMATS)}
"""


def completion_text() -> str:
    """The topic `completion`."""
    return """
Completion in bash, zsh and fish

  prunectl --install-completion     install it for the current shell
  prunectl --show-completion bash   only print the script

The shell completes commands, options and their values, and the names of layers
and tensors of the model that stands earlier on the line:

  prunectl prune model.h5 --layer <Tab>
  prunectl prune model.h5 --strategy <Tab>
  prunectl help <Tab>

Completion reads the list of tensors of the model, but no weights.
"""


def data_text() -> str:
    """The topic `data`."""
    return f"""
Data: how to name examples, the same in every command

  train.npz                   arrays x and y, or x_train and y_train
  train.npz[imgs,labels]      arrays by name; several inputs as [a+b,labels]
  x.npy,y.npy                 one file per array
  images/                     images; each subfolder is a class
  table.csv?target=label      a table; also .parquet
  '*.tfrecord?schema=f.json'  TFRecord files
  corpus.txt, corpus.jsonl    text, for a folder with its tokenizer
  package.module:function     a function that returns (x, y) or batches of them
  ./file.py:function          the same, from a file
  random:64                   64 random examples, to test that a command runs

Options follow a question mark, separated by &:

  norm=unit  norm=/16   divide by 255, or by 16; also imagenet and MEAN:STD
  shape=1x28x28         reshape each input
  limit=1000            use only the first 1000 examples
  classes=0,3,5         use only these labels; relabel=1 numbers them from 0
  onehot=10             turn labels into one-hot targets of 10 classes
  flatten               make each input one-dimensional

For all: {", ".join(GENERAL)}.
For images: {", ".join(IMAGE_OPTIONS)}. For tables: {", ".join(TABLE_OPTIONS)}.
For TFRecords: {", ".join(RECORD_OPTIONS)}. For text: {", ".join(TEXT_OPTIONS)}.

Quote a SPEC that contains ? * [ or &. Shapes, types, labels and NaN are checked
before anything runs, and every automatic choice is reported.
"""


KEYS = {
    "schema": SCHEMA,
    "tool": "name and version",
    "command": "name of the command",
    "ok": "whether the exit code is 0",
    "exit_code": "see prunectl help exit-codes",
    "models": "one per input: path, format, bytes, params, layers ...",
    "gates": "one per limit: metric, limit, actual, ok",
    "artifacts": "one per file written: path, bytes",
    "warnings": "sentences",
    "error": "code, kind, message, hint, did_you_mean; null on success",
}


def json_text() -> str:
    """The topic `json`."""
    return f"""
JSON and other output for scripts

--json prints one object to standard output, even if a command fails:

{aligned(KEYS.items())}

Bytes and counts are integers, ratios are between 0 and 1, and keys are sorted.
Later versions add keys, but never remove any.

  prunectl inspect model.h5 --json | jq '.models[0].prunable_sparsity'

--format chooses among {", ".join(Layout)}. In a pipe the
default is plain: tab-separated rows without a header, never cropped. Notes,
progress and errors go to standard error. -q prints no notes, and where there is
a short answer only that: size -q prints the compressed bytes.
"""


MEANINGS: dict[int, str] = {
    0: "success; every limit was kept",
    1: "a limit was exceeded or a check failed: check, size, diff, verify",
    UsageError.exit_code: "wrong usage: an option, a name or a value; or the output exists already",
    InputError.exit_code: "the input is missing, damaged, not a model, or needs --trust",
    MissingExtraError.exit_code: "an optional package is missing; the error says how to install it",
    WorkError.exit_code: "the work failed or its result was rejected; nothing was written",
    BUG: "a bug in prunectl; --debug shows the traceback",
    CANCELLED: "stopped by Ctrl-C",
    141: "the reader of the output closed the pipe (SIGPIPE)",
    143: "stopped by SIGTERM",
}


def exit_codes_text() -> str:
    """The topic `exit-codes`."""
    return f"""
Exit codes

{aligned((str(code), line) for code, line in MEANINGS.items())}

Only a limit or a check gives 1, so a build can tell "too big" from "broken":

  prunectl size model.h5 --max-gzip 5MB
  case $? in 0) ship ;; 1) echo "too big" ;; *) echo "broken" ;; esac

With several inputs all are processed, and the worst code is returned. Whatever
the code, outputs are written whole or not at all.
"""


_KINDS = {
    "strategy": "takes weights, returns scores of the same shape; the lowest are pruned",
    "schedule": "takes (done, initial, final), returns the sparsity",
    "policy": "takes a tensor, returns why not to prune it, or nothing",
    "channel strategy": "takes one row of weights per channel, returns a score per row",
}


def extending_text() -> str:
    """The topic `extending`."""
    return f"""
Extending: your own strategies, schedules and policies

Options that take such a name also take a function: ./file.py:name,
package.module:name, or the entry point of an installed package.

  # mine.py
  import numpy as np
  def small_squares(weights):
      return np.square(weights)

  prunectl prune model.h5 -o out.h5 -s 80% --strategy ./mine.py:small_squares

Entry points, and what each function does:

{aligned((group(kind), line) for kind, line in _KINDS.items())}

--param K=V (for schedules, --schedule-param) is passed to the function as a
keyword argument. prunectl plugins lists what is built in, and what other
packages have installed.
"""


def formats_text() -> str:
    """The topic `formats`."""
    read = aligned((row.title, " ".join(filter(None, row.suffixes)) or "(a folder)") for row in FORMATS)
    written = indent(fill(", ".join(target.name for target in TARGETS), WIDTH - 2), "  ")
    return f"""
Formats

Read without a framework:

{read}

The content of a file decides its format; the name matters only if the content
is ambiguous. You can also name a Hugging Face folder, or the prefix of a
TensorFlow checkpoint.

Written by prunectl export, which compares each result with its source:

{written}
"""


def output_text() -> str:
    """The topic `output`."""
    return f"""
Output: the options of every command

{common_options(WIDTH)}

Standard output has only what was asked for: tables on a terminal, tab-separated
rows in a pipe, one object with --json. Notes, hints, progress and errors go to
standard error. NO_COLOR, FORCE_COLOR and COLUMNS are honoured.
"""


def patterns_text() -> str:
    """The topic `patterns`."""
    return f"""
Patterns: the shape of the zeros

{aligned(PATTERNS.items())}

unstructured is the default. It keeps the most accuracy, and makes files smaller
once they are compressed, but nothing faster by itself.

N:M sets at least N of every M weights along the inputs to zero. It counts
zeros, not kept weights: 2:4 is 50 % sparse and runs on the sparse tensor cores
of NVIDIA GPUs; 1:4 is 1 zero in every 4, 25 % sparse; 3:4 is 75 % sparse. The
pattern sets the sparsity, so leave out --sparsity. Inputs that M does not
divide are padded, as in tfmot.

block:RxC zeroes blocks of R inputs x C outputs, ranked by their mean magnitude
(:avg) or by their largest weight (:max).

channel removes whole channels, filters, units and heads with their dependency
group, and is compared with the original before it is written. layers removes
blocks from a Hugging Face folder, and adjusts its config.json.

  prunectl inspect fast.onnx --pattern 2:4
  prunectl prune model.onnx -o thin.onnx --pattern channel -s 50%
  prunectl prune llama -o short --pattern layers --blocks 4
"""


def recipes_text() -> str:
    """The topic `recipes`."""
    return """
Recipes: how to record, repeat and verify a run

prune --manifest FILE records a run: every option, the digests of input and
output, and how many weights were pruned in each tensor.

prune --recipe FILE repeats it. The same input then gives the same bytes, on any
machine; you name only the input and the output again.

  prunectl prune model.h5 -o small.h5 -s 80% --manifest run.json
  prunectl prune model.h5 -o again.h5 --recipe run.json
  cmp small.h5 again.h5

verify compares a file with the record and with its source: the digests, the
zeros of every tensor, kept weights unchanged, no zero lost.

  prunectl verify small.h5 --manifest run.json --against model.h5

A recipe refers to data files and to your own functions by path; it does not
contain them.
"""


def schedules_text() -> str:
    """The topic `schedules`."""
    curves = ((choice.name, choice.summary.replace("``", "")) for choice in builtin_rows("schedules"))
    return f"""
Schedules: how sparsity rises during training

{aligned(curves)}

  --sparsity 90%          final sparsity
  --initial-sparsity 50%  sparsity at --begin; unset: 0
  --begin 10% --end 75%   first pruning step, and when the final sparsity is due
  --frequency 100         steps between two pruning steps
  --schedule-param K=V    parameter of the schedule, e.g. power=2

Write a point in training as 2000 (steps; a step is one batch), 20% (of all
steps) or 3ep (epochs).

  prunectl finetune model.h5 -o sparse.h5 --data train.npz -s 90% --end 60%
  prunectl plugins schedules --plot      draws the curves

prune --schedule NAME --end STEP writes a Keras 2 model with tfmot's wrappers
and the schedule inside, for your own training script.
"""


def selectors_text() -> str:
    """The topic `selectors`."""
    policies = aligned((choice.name, choice.summary) for choice in builtin_rows("policies"))
    return f"""
Selectors and policies

A selector is a glob that matches names of tensors or layers, or re: with a
regular expression that matches any part of them. Quote it, as the shell expands
stars. prunectl inspect MODEL lists all names.

  'conv*'           conv1 and everything in it
  fc1.weight        this tensor
  're:block[0-9]+'  every name that contains block and a number

A selector that matches nothing is an error (exit code 2) with similar names.

  --layer 'fc*=90%'   a sparsity for these; the last match wins
  --layers 'conv*'    only the kernels of these; other tensors (a bias, an
                      embedding) only if no kernel matches: 'conv1.bias'
  --exclude head      never these; repeatable, and wins over the others
  --policy NAME       which tensors may be pruned:

{policies}

The report says which tensors were not pruned, and why.
"""


def sizes_text() -> str:
    """The topic `sizes`."""
    return f"""
Sizes and ratios

  400KB  1.5MB    powers of 1000
  5MiB            powers of 1024
  5242880         bytes
  0.8  80%        a ratio; a bare 80 is refused, as it is ambiguous

A model has three sizes:

  raw         bytes of the file, or of all files in the folder
  packed      after lossless compression inside the file (--pack), which every
              loader undoes by itself
  compressed  size of a download, or inside an app package

Zeros do not make a raw file smaller, but they make it compress better. To get a
smaller file, prune with --pack, or remove channels (prunectl help patterns).

Codecs of prunectl size: {", ".join(CodecName)}. gzip is stock zlib at level 6,
byte for byte as Python's gzip.compress(data, 6, mtime=0). A folder is measured
as a sorted tar without times.

Sparsity is the share of zeros among the prunable weights: kernels, not biases,
norms, embeddings or routers.
"""


_BLANK = "\n\n"
_NEEDS = {
    Requires.NOTHING: "From the weights alone",
    Requires.GRADIENTS: "From gradients: prune --data SPEC (magnitude-gradient: also finetune)",
    Requires.INPUTS: "From layer inputs (activations): prune --data SPEC",
    Requires.PRODUCTS: "From the Gram matrix of the layer inputs: prune --data SPEC",
    Requires.TRAINING: "From training: finetune, or sweep --epochs with a schedule",
}


def strategies_text() -> str:
    """The topic `strategies`."""
    parts = [
        f"{title}:\n{aligned((each.name, each.summary) for each in STRATEGIES if each.needs is needs)}"
        for needs, title in _NEEDS.items()
        if any(each.needs is needs for each in STRATEGIES)
    ]
    return f"""
Strategies: how weights are ranked

The lowest scores are pruned first. Each strategy prunes first:

{_BLANK.join(parts)}

Equal scores are pruned in file order: the same bytes on any machine. Magnitude,
LAMP and gradients of the loss rank all layers together (--scope global), others
each layer by itself; erk prunes large layers more. --repair reconstructs kept
weights on the same data, --repair outputs trains them. Channels: prunectl
plugins channels. Your own: ./file.py:name (prunectl help extending).
"""


def trust_text() -> str:
    """The topic `trust`."""
    return """
Trust: when code inside a file may run

inspect, size, check, diff, verify, strip and prune by weights only read bytes
and run nothing: pickles are parsed, never loaded.

Commands that run the model (finetune, export, sweep; --data, --groups, --wrap,
--pattern channel, max-drop) load it in its framework, after checking everything
that it names against an allow-list. What is not on it would run as code:

  whole modules of PyTorch   torch.save(model), a pickle of classes
  Lambda layers of Keras     Python code inside the file
  functions of TensorFlow    in a Keras file, if they do more than compute
  operations of a SavedModel or TorchScript that read or write files
  layers with a file or URL  a vocabulary, weights, another model
  programs of torch.export   pickled inputs, operators of other libraries

Such files are refused with exit code 3 unless you give --trust. Give it only
for files whose author you would let run a script.

  --builder net.py:Net        builds the network for a file of weights alone
  --custom-objects mod:DICT   defines custom Keras layers
  --import MOD                imports a module first

All three are your own code, and need no --trust.

A recipe or a file of budgets may also come from a stranger. Code that it names,
such as data = "./data.py:load", runs only with --trust. In CI, check pull
requests from forks without it.
"""


def builtin_rows(kind: str) -> list[Choice]:
    """The built-in choices of a kind, without plug-ins: these texts are the same wherever prunectl runs."""
    return [choice for choice in choices(kind) if choice.source == "built in"]


def aligned(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and their meanings, in two columns."""
    return "\n".join(two_columns(pairs, WIDTH))
