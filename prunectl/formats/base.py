"""The interface of a format: ModelFile, its tensors and how selectors name them, and the facts around them."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum, Flag, StrEnum, auto
from fnmatch import fnmatchcase
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import MAX_NAME_CHARACTERS, UsageError, abbreviated
from prunectl.formats import budgets, extents
from prunectl.formats.extents import Extent, FileState

if TYPE_CHECKING:
    from prunectl.formats.detect import FileProbe


Array = NDArray[Any]


class DtypeTable(dict[str, np.dtype[Any]]):
    """The types of numbers of a format, by its names; those that NumPy lacks are imported when one is met."""

    def __init__(self, known: Mapping[str, Any], lacking: Mapping[str, str]) -> None:
        super().__init__({name: np.dtype(kind) for name, kind in known.items()})
        self._lacking = lacking

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._lacking

    @property
    def codes(self) -> dict[str, str]:
        """Its names, by those of NumPy."""
        return {kind.name: name for name, kind in self.items()} | {kind: name for name, kind in self._lacking.items()}

    def __missing__(self, name: str) -> np.dtype[Any]:
        """A type of ml_dtypes."""
        self[name] = np.dtype(getattr(importlib.import_module("ml_dtypes"), self._lacking[name]))
        return self[name]


@lru_cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a type of numbers, which NumPy puts together from its parts each time."""
    return dtype.name


def format_shape(shape: Sequence[int]) -> str:
    """A shape, shortened for a message."""
    return abbreviated(str(list(shape[:MAX_NAME_CHARACTERS])))


class Role(StrEnum):
    """What a tensor is for."""

    KERNEL = "kernel"
    RECURRENT = "recurrent"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM = "norm"
    ROUTER = "router"
    STATE = "state"
    MASK = "mask"
    SCHEDULE = "schedule"
    OPTIMIZER = "optimizer"
    OTHER = "other"


WEIGHTS = frozenset(Role) - {Role.MASK, Role.SCHEDULE, Role.OPTIMIZER}
"""Roles of what a model needs to predict; the rest is dead weight once it is trained."""

PRUNABLE = frozenset({Role.KERNEL, Role.RECURRENT})
"""Roles that a policy prunes unless it is told otherwise."""

QUANTISED = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16"})
"""Types of numbers that kernels are quantised to: what is no float is pruned before."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes behind one tensor or several: tied tensors and views name the same key."""

    key: str
    nbytes: int
    """Bytes once decoded."""
    extent: Extent | None
    """Where these bytes lie flat; nowhere when the container compresses or splits them."""
    stored_bytes: int
    """Bytes that they take in the container."""
    big_endian: bool = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """Metadata of a tensor, known before any of its bytes are read."""

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    role: Role
    storage: Storage
    kind: str = ""
    """Class of the layer or type of the operation that uses it, where the file says so."""
    out_axis: int | None = None
    in_axis: int | None = None
    """Axis that runs over the inputs of one output, along which N:M patterns lie."""
    start: int = 0
    """First element of the view, counted from the start of its storage."""
    strides: tuple[int, ...] | None = None
    """Steps of the view, counted in elements; None when it is dense and in C order."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes once loaded."""
        return self.size * self.dtype.itemsize

    @property
    def view_key(self) -> tuple[object, ...]:
        """Identity of the view: tensors with equal keys show the same elements, and need be read once."""
        return self.storage.key, self.start, self.shape, self.strides, self.dtype

    @property
    def is_float(self) -> bool:
        """Whether its elements are real floating-point numbers, bfloat16 and float8 included."""
        return self.dtype.kind == "f" or dtype_name(self.dtype).startswith(("bfloat", "float"))

    @property
    def is_prunable(self) -> bool:
        """Whether it is what policies prune unless they are told otherwise."""
        return self.role in PRUNABLE and self.is_float and len(self.shape) >= 2

    @property
    def reduction_axis(self) -> int | None:
        """Axis that a product sums over: as the handler says, else the neighbour of the output axis."""
        if self.in_axis is not None or self.out_axis is None or len(self.shape) < 2:
            return self.in_axis
        return 1 if self.out_axis == 0 else self.out_axis - 1


PARAMETRIZATION = "parametrization"
"""The kind of a wrapper that computes a weight for other ends than pruning, such as weight_norm."""


@dataclass(frozen=True, slots=True)
class PruningWrapper:
    """A training-time wrapper that a framework left around a layer."""

    kind: str
    """Who put it there: `tfmot`, `torch.nn.utils.prune`, `torch.ao.pruning`, `nni`, or PARAMETRIZATION."""
    layer: str
    schedule: str = ""
    """The schedule as the file words it, such as `PolynomialDecay(0.5 -> 0.8, steps 0-1000)`."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts around the tensors."""

    producer: str = ""
    """Who wrote the file, with the version: `keras 2.4.0`, `pytorch 1.13`."""
    wrappers: tuple[PruningWrapper, ...] = ()
    optimizer: str = ""
    training: tuple[str, ...] = ()
    """Training configuration that predictions do not need: `loss mse`, `epoch 12`."""
    code: tuple[str, ...] = ()
    """Code that a framework would run on loading: `class models.Net`, `Lambda layer crop`."""
    code_bytes: int = 0
    example_bytes: int = 0
    """Bytes of the inputs that a program was exported with."""
    notes: tuple[str, ...] = ()
    """What a user should know, each a full sentence."""
    is_compressed: bool = False
    keras: Mapping[str, Any] | None = field(default=None, repr=False)
    """The Keras configuration (class_name, config), where the file holds one."""
    programs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The graphs of an exported program by their entries; None for one too big to be read."""

    @property
    def pruning_wrappers(self) -> tuple[PruningWrapper, ...]:
        """The wrappers that hold masks, which parametrizations do not."""
        return tuple(wrapper for wrapper in self.wrappers if wrapper.kind != PARAMETRIZATION)


@dataclass(frozen=True, slots=True)
class Operation:
    """One multiply-accumulate operation of the graph."""

    layer: str
    kind: str
    macs: int | None
    """For one input; None where the file does not say the shapes."""
    weight: str = ""
    """Name of the tensor it multiplies by."""


class Capability(Flag):
    """What a format supports beyond reading."""

    NOTHING = 0
    PACK = auto()
    FLOPS = auto()
    STRIP = auto()
    WRITE = auto()


class Family(Enum):
    """Formats that a framework opens in the same way."""

    KERAS = auto()
    SAVED_MODEL = auto()
    TORCH = auto()
    """What `torch.load` opens: zips, and the pickles and tars before them."""
    TORCH_PROGRAM = auto()
    SAFETENSORS = auto()
    ONNX = auto()
    LITE = auto()
    """What TensorFlow Lite runs, and nothing trains."""
    OTHER = auto()
    """What no framework trains, runs or cuts here."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table of formats."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    matches: Callable[[FileProbe], bool]
    opener: str | Callable[[Path], ModelFile]
    """`module:function` in this package that opens a path as a ModelFile; a function, where a plug-in brings it."""
    family: Family = Family.OTHER
    packer: str = ""
    """`module:function` that writes a model again with the container's own compression."""
    graph: str = ""
    """`module:function` that lists the operations of a model."""
    writer: str = "patch:patch_files"
    """`module:function` that writes a copy with other numbers in it."""
    stripper: str = ""
    """`module:function` that writes a copy without what a trained model does not need."""
    can_reencode: bool = False
    """Whether the writer can change what does not lie flat."""
    is_of_ranks: bool = False
    """Whether many processes wrote it, each its part: it is only read, and becomes another model."""

    @property
    def can(self) -> Capability:
        """What is there to do with such a file."""
        offers = (
            (self.packer, Capability.PACK),
            (self.graph, Capability.FLOPS),
            (self.stripper, Capability.STRIP),
            (self.writer, Capability.WRITE),
        )
        return reduce(or_, (can for module, can in offers if module), Capability.NOTHING)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """An open model: facts at hand, bytes on demand."""

    path: Path
    format: str
    tensors: tuple[Tensor, ...]
    about: ModelInfo
    files: tuple[Path, ...]
    """Every file that the model consists of."""
    decode: Callable[[Tensor], Array] | None = None
    """Reads a tensor that has no flat extent."""
    stream: Callable[[Tensor], Iterator[Array]] | None = None
    """Yields such a tensor in C order piece by piece, where its parts lie flat: it may be bigger than memory."""
    duplicates: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the file holds once more, with the names of what they are copies of: they change together."""
    family: Family = Family.OTHER
    """That of its format, as the table of formats says."""
    folder: Path | None = None
    """The folder by which it was named, if its weights are a part of it, as in those of Hugging Face."""
    has_neighbours: bool = False
    """Whether it is a folder that also holds what is no part of it."""
    states: Mapping[Path, FileState] = field(default_factory=dict)
    """By what its files are known again, taken before any of their bytes were read; `open_model` adds what is missing.

    What is made of it has to be made of these files: see `extents.unchanged`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(extents.file_bytes(path) for path in self.files)

    def read(self, tensor: Tensor) -> Array:
        """The tensor as a read-only array, paged in as it is touched where the bytes lie flat."""
        if tensor.storage.extent is not None:
            return extents.view(
                tensor.storage.extent,
                dtype=tensor.dtype,
                shape=tensor.shape,
                start=tensor.start,
                strides=tensor.strides,
                big_endian=tensor.storage.big_endian,
            )
        if self.decode is None:
            raise ValueError(f"{self.format} gives {tensor.name} neither an extent nor a decoder")
        return self.decode(tensor)


class NameAllocator:
    """Makes names unique: `a`, `a#2`, `a#3`."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def unique(self, wanted: str) -> str:
        """The wanted name, with a number if another tensor has it."""
        name = wanted
        while name in self._seen:
            self._seen[wanted] += 1
            name = f"{wanted}#{self._seen[wanted]}"
        self._seen[name] = 1
        return name


Length = int | None
Shape = tuple[Length, ...]


def numel(lengths: Iterable[Length]) -> int | None:
    """Product of the lengths; None if one is unknown or no model can have so many elements."""
    known = tuple(lengths)
    if any(length is None for length in known):
        return None
    count = math.prod(length for length in known if length is not None)
    return count if count <= budgets.MAX_COUNT else None


class StripPart(StrEnum):
    """A kind of dead weight."""

    MASKS = "masks"
    """Masks of pruning; the weights come out as weight times mask."""
    WRAPPERS = "wrappers"
    """What pruning has put around layers: thresholds, steps, names, classes."""
    OPTIMIZER = "optimizer"
    TRAINING = "training"
    """Losses, metrics, epochs, schedulers, callbacks, averaged copies of the weights."""
    GRADIENTS = "gradients"
    EXAMPLES = "examples"
    """Inputs that a program was exported with, which it keeps to be tried."""


WRAPPING = frozenset({StripPart.MASKS, StripPart.WRAPPERS})
"""Neither means anything without the other: they go together."""


@dataclass(frozen=True, slots=True)
class CopyChoice:
    """Of weights that a file holds twice, the copy that stays: where the other would be looked for, under its names."""

    home: str
    """Where the names begin of the copy that loaders take."""
    other: str
    """The same of the copy beside it, of which nothing is left."""
    names: Mapping[str, str]
    """The tensors of the first, and what they are called in the output."""
    sources: Mapping[str, str]
    """For those of them that take their values from the other copy, its tensors."""
    lacking: tuple[str, ...] = ()
    """Those that it does not have, such as statistics of batch norm, which stay as they are."""
    more: tuple[str, ...] = ()
    """Where further copies begin, of which nothing is left either."""

    def is_removed(self, name: str) -> bool:
        """Whether a tensor or an entry is another copy, or a part of one."""
        return any(name == other or name.startswith(f"{other}.") for other in (self.other, *self.more))

    def kept(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The tensors that stay, by their names in the output."""
        by_name = {tensor.name: tensor for tensor in tensors}
        left = (name for name in by_name if not self.is_removed(name))
        return {self.names.get(name, name): by_name[self.sources.get(name, name)] for name in left}


@dataclass(frozen=True, slots=True)
class StripOptions:
    """Which parts to strip, and whether to halve the floats."""

    parts: frozenset[StripPart] = frozenset(StripPart)
    to_half: bool = False
    """Whether 32-bit and wider floats become 16-bit ones."""
    copies: CopyChoice | None = None
    """Which of two copies of the weights stays; without it the one that was trained does."""


@dataclass(frozen=True, slots=True)
class RemovedItem:
    """A stripped item and its size."""

    name: str
    part: StripPart
    bytes: int


_NEAREST = 3


def select_names(model: ModelFile, selector: str) -> tuple[Tensor, ...]:
    """The tensors whose name or layer a selector matches; matching none is a slip."""
    matches = _matcher(selector)
    tensors = tuple(tensor for tensor in model.tensors if matches(tensor.name) or matches(tensor.layer))
    if not tensors:
        raise UsageError(
            f"no layer of {model.path} matches {selector!r}",
            did_you_mean=close_matches(selector, [tensor.layer or tensor.name for tensor in model.tensors]),
            hint=f"list the layers: prunectl inspect {model.path}",
        )
    return tensors


def close_matches(word: str, known: Sequence[str]) -> tuple[str, ...]:
    """The known words that look most like a misspelt one."""
    bare = word.removeprefix("re:").strip("*?.$^")
    return tuple(get_close_matches(bare, dict.fromkeys(known), n=_NEAREST, cutoff=0.5))


def _matcher(selector: str) -> Callable[[str], bool]:
    if not selector.startswith("re:"):
        return lambda name: fnmatchcase(name, selector)
    try:
        pattern = re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise UsageError(f"{selector!r} is not a regular expression: {error}") from error
    return lambda name: pattern.search(name) is not None
