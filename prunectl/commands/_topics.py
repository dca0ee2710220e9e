"""The texts of `prunectl help TOPIC`."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill, indent

from prunectl.analysis.sizes import CodecName
from prunectl.commands.completion import PATTERNS
from prunectl.errors import InputError, MissingExtraError, UsageError, WorkError
from prunectl.exporting.routes import TARGETS
from prunectl.formats.registry import FORMATS
from prunectl.plugins import group
from prunectl.pruning.choices import Choice, choices
from prunectl.pruning.strategies import STRATEGIES, Requires
from prunectl.reporting.checks.ci import REPORT_FORMATS
from prunectl.reporting.report import SCHEMA, Layout
from prunectl.reporting.reporter import BUG, CANCELLED
from prunectl.training.data.spec import GENERAL, IMAGE_OPTIONS, RECORD_OPTIONS, TABLE_OPTIONS

WIDTH = 80
"""Of a terminal that nobody has made wider."""


def builds_text() -> str:
    """The topic `builds`."""
    return f"""
Builds: make and CI

prune, strip, finetune and export take:

  --depfile FILE  writes for make which files were read
  --if-changed    does nothing where the output is up to date

  %.p.h5: %.h5
          prunectl prune $< -o $@ -s 80% --if-changed --depfile $@.d
          @touch $@
  -include *.d

Up to date is an output that the same options of the same version made of files
with the same content, and that nobody has changed since. .OUT.prunectl, beside
the output, holds the digests: keep both in a cache, or neither. What prunectl
wrote it may replace; what somebody changed since needs --force. What a function
of --data reads cannot be known, and is refused with --if-changed. An output is
there whole or not at all, also where a build is killed.

prunectl init writes budgets, prunectl check holds models against them, and
--report FORMAT:PATH writes what your CI shows:

  {", ".join(REPORT_FORMATS)}
"""


def completion_text() -> str:
    """The topic `completion`."""
    return """
Completion in bash, zsh and fish

  prunectl --install-completion     for the shell that you are in
  prunectl --show-completion bash   only prints the script

Commands, options and their values are completed, and names of layers and
tensors of the model that stands before them:

  prunectl prune model.h5 --layer <Tab>
  prunectl prune model.h5 --strategy <Tab>
  prunectl help <Tab>

Nothing of the model is read but its list of tensors.
"""


def data_text() -> str:
    """The topic `data`."""
    return f"""
Data: how examples are named, the same in every command

  train.npz                   arrays x and y, or x_train and y_train
  train.npz[imgs,labels]      arrays by name; several inputs as [a+b,labels]
  x.npy,y.npy                 one array a file
  images/                     pictures; folders in it are classes
  table.csv?target=label      a table; also .parquet
  '*.tfrecord?schema=f.json'  TFRecord files
  package.module:function     a function that gives (x, y) or batches of them
  ./file.py:function          the same, in a file
  random:64                   made up, to try whether something runs

Options follow a question mark, with & between them:

  norm=unit  norm=/16   divide by 255, or by 16; also imagenet and MEAN:STD
  shape=1x28x28         of each input
  limit=1000            only the first
  classes=0,3,5         only these labels; relabel=1 numbers them anew
  onehot=10  flatten    what they say

For all: {", ".join(GENERAL)}.
For pictures: {", ".join(IMAGE_OPTIONS)}. For tables: {", ".join(TABLE_OPTIONS)}.
For TFRecords: {", ".join(RECORD_OPTIONS)}.

Quote a SPEC with ? * [ or & in it. Shapes, types, labels and NaN are checked
before anything is run, and what was decided for you is said.
"""


KEYS = {
    "schema": SCHEMA,
    "tool": "name and version",
    "command": "what ran",
    "ok": "whether the exit code is 0",
    "exit_code": "prunectl help exit-codes",
    "models": "one for each input: path, format, bytes, params, layers ...",
    "gates": "limits: metric, limit, actual, ok",
    "artifacts": "what was written: path, bytes",
    "warnings": "sentences",
    "error": "code, kind, message, hint, did_you_mean; null if all went well",
}


def json_text() -> str:
    """The topic `json`."""
    return f"""
JSON, and what else scripts read

--json prints one object on standard output, also when a command fails:

{aligned(KEYS.items())}

Bytes and counts are whole numbers, ratios lie between 0 and 1, keys are sorted,
and keys are only ever added.

  prunectl inspect model.h5 --json | jq '.models[0].prunable_sparsity'

--format chooses among {", ".join(Layout)}. In a pipe it is
plain: rows with tabs between, without a head, never cropped. Notes, progress
and errors go to standard error. -q leaves notes out; size -q prints the
compressed bytes alone.
"""


MEANINGS: dict[int, str] = {
    0: "done; every gate passed",
    1: "a gate said no, and nothing else: check, size, diff, verify",
    UsageError.exit_code: "usage: a flag, a name or a limit that makes no sense; an output exists",
    InputError.exit_code: "the input is missing, damaged, not a model, or needs --trust",
    MissingExtraError.exit_code: "an optional package is missing; the line that installs it is printed",
    WorkError.exit_code: "the work failed, or its result was rejected: nothing was written",
    BUG: "a bug in prunectl; --debug shows the traceback",
    CANCELLED: "Ctrl-C",
    141: "whoever read the output has closed it",
    143: "SIGTERM",
}


def exit_codes_text() -> str:
    """The topic `exit-codes`."""
    return f"""
Exit codes

{aligned((str(code), line) for code, line in MEANINGS.items())}

Only a gate gives 1, so that a build can tell "too big" from "broken":

  prunectl size model.h5 --max-gzip 5MB
  case $? in 0) ship ;; 1) echo "too big" ;; *) echo "broken" ;; esac

Of several inputs each is tried, and the worst code wins. Whatever the code,
an output is there whole or not at all.
"""


_KINDS = {
    "strategy": "from weights to scores of their shape; the lowest go",
    "schedule": "from (done, initial, final) to a sparsity",
    "policy": "from a tensor to why it is left alone, or nothing",
    "channel strategy": "from rows of weights to a score for each row",
}


def extending_text() -> str:
    """The topic `extending`."""
    return f"""
Extending: strategies, schedules and policies of your own

Wherever a name is taken, so is a function: ./file.py:name, package.module:name,
or the name of an entry point of an installed package.

  # mine.py
  import numpy as np
  def small_squares(weights):
      return np.square(weights)

  prunectl prune model.h5 -o out.h5 -s 80% --strategy ./mine.py:small_squares

Entry points, and what stands behind them:

{aligned((group(kind), line) for kind, line in _KINDS.items())}

A function takes --param K=V (of a schedule, --schedule-param) as keyword
arguments. prunectl plugins lists what is built in, and what is installed by
which package.
"""


def formats_text() -> str:
    """The topic `formats`."""
    read = aligned((row.title, " ".join(filter(None, row.suffixes)) or "(a folder)") for row in FORMATS)
    written = indent(fill(", ".join(target.name for target in TARGETS), WIDTH - 2), "  ")
    return f"""
Formats

Read without a framework:

{read}

A file is judged by its content; its name only breaks ties. A folder of Hugging
Face and the prefix of a TensorFlow checkpoint stand for what is in them.

Written by prunectl export, which runs the result beside its source:

{written}
"""


def patterns_text() -> str:
    """The topic `patterns`."""
    return f"""
Patterns: in what shape weights go

{aligned(PATTERNS.items())}

unstructured is the default. It keeps the most accuracy, and makes files smaller
once they are compressed; it makes nothing faster by itself.

N:M has at least N zeros in every M weights along the inputs; 2:4 is what the
sparse cores of NVIDIA's GPUs run. It decides the sparsity by itself. What does
not divide is padded, as tfmot does.

block:RxC zeroes R x C blocks, ranked by their mean magnitude (:avg) or by their
largest weight (:max).

channel removes whole channels, filters, units and heads for good, with whatever
depends on them: the network is smaller and faster everywhere. Every cut network
is run beside the original before it is kept.

  prunectl prune model.onnx -o fast.onnx --pattern 2:4
  prunectl inspect fast.onnx --pattern 2:4
  prunectl prune model.onnx -o thin.onnx --pattern channel -s 50%
"""


def recipes_text() -> str:
    """The topic `recipes`."""
    return """
Recipes: how a run is recorded, repeated and verified

--manifest FILE keeps a record of a run of prune: every choice, the digests of
input and output, and what went from each tensor.

--recipe FILE takes all choices from such a record. The same input then gives
the same bytes, on any machine; only where to, and from what, is still said.

  prunectl prune model.h5 -o small.h5 -s 80% --manifest run.json
  prunectl prune model.h5 -o again.h5 --recipe run.json
  cmp small.h5 again.h5

verify holds a file against the record and against its source: digests, zeros of
every tensor, no weight changed that was to stay, no zero lost.

  prunectl verify small.h5 --manifest run.json --against model.h5

What a recipe names lies where it lay: data files and functions of your own are
not in it.
"""


def schedules_text() -> str:
    """The topic `schedules`."""
    curves = ((choice.name, choice.summary.replace("``", "")) for choice in builtin_rows("schedules"))
    return f"""
Schedules: how sparsity rises while a model is trained

{aligned(curves)}

  --sparsity 90%          where it ends
  --initial-sparsity 50%  where it begins; else at 0
  --begin 10% --end 75%   when
  --frequency 100         steps from one turn to the next
  --schedule-param K=V    a parameter of the curve, as in power=2

A point in time is 2000 (steps; a step is one batch), 20% of all steps, or 3ep
(epochs).

  prunectl finetune model.h5 -o sparse.h5 --data train.npz -s 90% --end 60%
  prunectl plugins schedules --plot      draws the curves

prune --schedule NAME --end STEP writes tfmot's wrappers into a model of Keras
2, with the schedule inside, for a training script of your own.
"""


def selectors_text() -> str:
    """The topic `selectors`."""
    policies = aligned((choice.name, choice.summary) for choice in builtin_rows("policies"))
    return f"""
Selectors and policies

A selector is a glob over the names of tensors and of layers, or a regular
expression after re: that is sought anywhere in them. Quote it, or the shell
reads the stars. prunectl inspect MODEL lists all names.

  'conv*'           conv1 and everything in it
  fc1.weight        this tensor
  're:block[0-9]+'  by a regular expression

A selector that matches nothing is exit code 2, with the nearest names.

  --layer 'fc*=90%'   a ratio of their own; the last that matches wins
  --only 'conv*'      only these, whatever the policy says
  --exclude head      not these; may be repeated
  --policy NAME       which tensors there are to choose from:

{policies}

What is left alone is said in the report, with the reason.
"""


def sizes_text() -> str:
    """The topic `sizes`."""
    return f"""
Sizes and ratios

  400KB  1.5MB    powers of 1000
  5MiB            powers of 1024
  5242880         bytes
  0.8  80%        a ratio; a bare 80 is refused, for it may mean either

Three sizes of a model are different things:

  raw         bytes of the file, or of all files in the folder
  packed      with the lossless compression of its own container (--pack), which
              every loader undoes by itself
  compressed  what a download or an app package comes to

Zeros alone do not make a raw file smaller: they make it compress better. To get
a smaller file, prune and --pack, or cut channels out (prunectl help patterns).

Codecs of prunectl size: {", ".join(CodecName)}. Gzip is stock zlib at level 6, to
the byte what Python's gzip.compress(data, 6, mtime=0) gives. A folder is
measured as a sorted tar without times.

A sparsity is the share of zeros among the weights that may be pruned: kernels,
and not biases, norms or embeddings.
"""


_BLANK = "\n\n"
_NEEDS = {
    Requires.NOTHING: "By the weights alone",
    Requires.GRADIENTS: "By gradients: prune --data SPEC, or finetune",
    Requires.INPUTS: "By what weights are multiplied with: --data SPEC",
    Requires.PRODUCTS: "By how the inputs of a layer go together: --data SPEC",
    Requires.TRAINING: "By watching training: finetune only",
}


def strategies_text() -> str:
    """The topic `strategies`."""
    parts = [
        f"{title}\n\n{aligned((one.name, one.summary) for one in STRATEGIES if one.needs is needs)}"
        for needs, title in _NEEDS.items()
        if any(one.needs is needs for one in STRATEGIES)
    ]
    return f"""
Strategies: which weights go first

{_BLANK.join(parts)}

Equal scores go in the order of the file, so that the same input gives the same
bytes on any machine. --scope layer ranks within each layer, --scope global over
all. --repair fits what stays anew, from the same data. A function of your own
is ./file.py:name or package.module:name (prunectl help extending). Channels
have measures of their own: prunectl plugins channels.
"""


def trust_text() -> str:
    """The topic `trust`."""
    return """
Trust: when code that comes with a file may run

inspect, size, check, diff, verify, strip and prune by weights read bytes, and
run nothing: pickles are taken apart without being loaded.

What runs the model (finetune, export, --data, --pattern channel, --wrap) loads
it in its framework, once all that the file names is on a list of what is
harmless. What is not on it would run as code:

  whole modules of PyTorch   torch.save(model), a pickle of classes
  Lambda layers of Keras     Python code inside the file
  functions of TensorFlow    in a Keras file, where they do more than compute
  operations of a SavedModel or TorchScript that read or write files
  layers with a file or URL  a vocabulary, weights, another model
  programs of torch.export   pickled inputs, operators of other libraries

These are refused with exit code 3 unless you say --trust. Say it only of files
whose author you would let run a script.

  --model net.py:Net          builds the network; the file then needs to hold
                              weights alone, which is the better way
  --custom-objects mod:DICT   explains custom layers of Keras
  --import MOD                imported first

All three are your own code, and need no --trust.

A recipe or a file of budgets may be a stranger's as well. Code that it names,
such as data = "./data.py:load", runs only with --trust. In CI, check the pull
requests of forks without it.
"""


def builtin_rows(kind: str) -> list[Choice]:
    """What is built in of a kind: these texts are the same wherever prunectl runs."""
    return [choice for choice in choices(kind) if choice.source == "built in"]


def aligned(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and their meanings, in two columns."""
    known = list(pairs)
    width = max(len(name) for name, _ in known) + 4
    return "\n".join(
        fill(line, WIDTH, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width) or f"  {name}"
        for name, line in known
    )
