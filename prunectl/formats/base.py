"""The interface of a format: ModelFile, its tensors, the facts about them, and selectors of tensors by name."""

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
    """The dtypes of a format by its own names; `ml_dtypes`, for those that NumPy lacks, is imported on first use."""

    def __init__(self, known: Mapping[str, Any], lacking: Mapping[str, str]) -> None:
        super().__init__({name: np.dtype(kind) for name, kind in known.items()})
        self._lacking = lacking

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._lacking

    @property
    def codes(self) -> dict[str, str]:
        """The format's name of each dtype, by NumPy's (or ml_dtypes') name."""
        return {kind.name: name for name, kind in self.items()} | {kind: name for name, kind in self._lacking.items()}

    def __missing__(self, name: str) -> np.dtype[Any]:
        """Import a dtype of ml_dtypes, and remember it."""
        self[name] = np.dtype(getattr(importlib.import_module("ml_dtypes"), self._lacking[name]))
        return self[name]


@lru_cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a dtype; cached, because NumPy builds the string anew at each access."""
    return dtype.name


def format_shape(shape: Sequence[int]) -> str:
    """A shape, shortened for a message."""
    return abbreviated(str(list(shape[:MAX_NAME_CHARACTERS])))


class Role(StrEnum):
    """The purpose of a tensor in its model."""

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
"""Roles of tensors that inference needs; the others are of no use once the model is trained."""

PRUNABLE = frozenset({Role.KERNEL, Role.RECURRENT})
"""Roles that policies prune by default."""

QUANTISED = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16"})
"""Integer dtypes of quantised kernels, which are not prunable: a model is pruned before it is quantised."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes behind one or more tensors: tied tensors and views of the same bytes have equal keys."""

    key: str
    nbytes: int
    """Bytes once decoded."""
    extent: Extent | None
    """Where these bytes lie in one uncompressed run; None when the container compresses or splits them."""
    stored_bytes: int
    """Bytes as stored in the container, after its compression."""
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
    """Class of the layer, or type of the operation, that uses the tensor; empty where the file does not give it."""
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
        """Bytes in memory."""
        return self.size * self.dtype.itemsize

    @property
    def view_key(self) -> tuple[object, ...]:
        """Identity of the view: tensors with equal keys have the same elements, which need to be read only once."""
        return self.storage.key, self.start, self.shape, self.strides, self.dtype

    @property
    def is_float(self) -> bool:
        """Whether the elements are real floating-point numbers, including bfloat16 and float8."""
        return self.dtype.kind == "f" or dtype_name(self.dtype).startswith(("bfloat", "float"))

    @property
    def is_prunable(self) -> bool:
        """Whether policies prune the tensor by default: floats, two or more axes, and a prunable role."""
        return self.role in PRUNABLE and self.is_float and len(self.shape) >= 2

    @property
    def reduction_axis(self) -> int | None:
        """Axis that the matrix product sums over: `in_axis` if known, else the neighbour of the output axis."""
        if self.in_axis is not None or self.out_axis is None or len(self.shape) < 2:
            return self.in_axis
        return 1 if self.out_axis == 0 else self.out_axis - 1


PARAMETRIZATION = "parametrization"
"""The kind of a wrapper that computes a weight for a purpose other than pruning, such as weight_norm."""


@dataclass(frozen=True, slots=True)
class PruningWrapper:
    """A training-time wrapper that a framework left around a layer."""

    kind: str
    """The library that added it (`tfmot`, `torch.nn.utils.prune`, `torch.ao.pruning`, `nni`), or PARAMETRIZATION."""
    layer: str
    schedule: str = ""
    """The sparsity schedule stored in the file, such as `PolynomialDecay(0.5 -> 0.8, steps 0-1000)`."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a model beside its tensors."""

    producer: str = ""
    """The library that wrote the file, with its version: `keras 2.4.0`, `pytorch 1.13`."""
    wrappers: tuple[PruningWrapper, ...] = ()
    optimizer: str = ""
    training: tuple[str, ...] = ()
    """Training configuration, which inference does not need: `loss mse`, `epoch 12`."""
    code: tuple[str, ...] = ()
    """Code that a framework would run when it loads the file: `class models.Net`, `Lambda layer crop`."""
    code_bytes: int = 0
    example_bytes: int = 0
    """Bytes of the example inputs that are stored in an exported program."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, each a full sentence."""
    is_compressed: bool = False
    keras: Mapping[str, Any] | None = field(default=None, repr=False)
    """The Keras configuration (class_name, config), where the file holds one."""
    programs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The graphs of an exported program, by zip entry; None for a graph that is too big to be read."""

    @property
    def pruning_wrappers(self) -> tuple[PruningWrapper, ...]:
        """The wrappers that prune, which excludes parametrizations such as weight_norm."""
        return tuple(wrapper for wrapper in self.wrappers if wrapper.kind != PARAMETRIZATION)


@dataclass(frozen=True, slots=True)
class Operation:
    """One multiply-accumulate operation of the graph."""

    layer: str
    kind: str
    macs: int | None
    """Multiply-accumulates for one example; None where the shapes are not known."""
    weight: str = ""
    """Name of the weight tensor of the product."""


class Capability(Flag):
    """The operations that a format supports beyond reading."""

    NOTHING = 0
    PACK = auto()
    FLOPS = auto()
    STRIP = auto()
    WRITE = auto()


class Family(Enum):
    """Groups of formats that a framework opens in the same way."""

    KERAS = auto()
    SAVED_MODEL = auto()
    TORCH = auto()
    """Files of `torch.load`: zips, and the older bare pickles and tars."""
    TORCH_PROGRAM = auto()
    SAFETENSORS = auto()
    ONNX = auto()
    LITE = auto()
    """TensorFlow Lite models, which can be run but not trained."""
    OTHER = auto()
    """Formats that prunectl cannot train, run or cut."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table of formats."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    matches: Callable[[FileProbe], bool]
    opener: str | Callable[[Path], ModelFile]
    """`module:function` in this package that opens a path as a ModelFile; a plug-in gives the function itself."""
    family: Family = Family.OTHER
    packer: str = ""
    """`module:function` that rewrites a model with the container's own compression."""
    graph: str = ""
    """`module:function` that lists the operations of a model."""
    writer: str = "patch:patch_files"
    """`module:function` that writes a copy with changed tensor values."""
    stripper: str = ""
    """`module:function` that writes a copy without the parts that only training needs."""
    can_reencode: bool = False
    """Whether the writer can change tensors without a flat extent, such as compressed ones."""
    is_of_ranks: bool = False
    """Whether it is a distributed checkpoint, of which each rank wrote a part; outputs have another format."""

    @property
    def can(self) -> Capability:
        """The operations that the columns of this row provide."""
        offers = (
            (self.packer, Capability.PACK),
            (self.graph, Capability.FLOPS),
            (self.stripper, Capability.STRIP),
            (self.writer, Capability.WRITE),
        )
        return reduce(or_, (can for module, can in offers if module), Capability.NOTHING)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """An open model: its metadata is in memory, and its tensors are read on demand."""

    path: Path
    format: str
    tensors: tuple[Tensor, ...]
    about: ModelInfo
    files: tuple[Path, ...]
    """Every file that the model consists of."""
    decode: Callable[[Tensor], Array] | None = None
    """Reads a tensor that has no flat extent."""
    stream: Callable[[Tensor], Iterator[Array]] | None = None
    """Yields such a tensor in C order, in pieces (it may exceed memory); None where its parts do not lie flat."""
    duplicates: Mapping[str, str] = field(default_factory=dict)
    """Stored copies of other tensors: the name of each copy, with its original's. Both change together."""
    family: Family = Family.OTHER
    """The family of its format in the table of formats."""
    folder: Path | None = None
    """The folder that the user named, where the weights are one of its files, as in Hugging Face model folders."""
    has_neighbours: bool = False
    """Whether the model is a folder that also holds files that do not belong to it."""
    states: Mapping[Path, FileState] = field(default_factory=dict)
    """Size and version of each file, taken before any of its bytes were read; `open_model` adds those missing.

    Outputs must be made from unchanged files: see `extents.unchanged`.
    """

    @property
    def nbytes(self) -> int:
        """Total size of its files."""
        return sum(extents.file_bytes(path) for path in self.files)

    def read(self, tensor: Tensor) -> Array:
        """The tensor as a read-only array; memory-mapped where its bytes lie flat in a local file."""
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
        """The wanted name, with a number appended if it is taken."""
        name = wanted
        while name in self._seen:
            self._seen[wanted] += 1
            name = f"{wanted}#{self._seen[wanted]}"
        self._seen[name] = 1
        return name


Length = int | None
Shape = tuple[Length, ...]


def numel(lengths: Iterable[Length]) -> int | None:
    """Product of the lengths; None if a length is unknown or the product exceeds MAX_COUNT."""
    known = tuple(lengths)
    if any(length is None for length in known):
        return None
    count = math.prod(length for length in known if length is not None)
    return count if count <= budgets.MAX_COUNT else None


class StripPart(StrEnum):
    """A part of a file that a trained model does not need."""

    MASKS = "masks"
    """Pruning masks, which are multiplied into the weights before they are removed."""
    WRAPPERS = "wrappers"
    """The rest of the pruning wrappers around layers: thresholds, steps, names, classes."""
    OPTIMIZER = "optimizer"
    TRAINING = "training"
    """Losses, metrics, epochs, schedulers, callbacks, averaged copies of the weights."""
    GRADIENTS = "gradients"
    EXAMPLES = "examples"
    """Example inputs that `torch.export` stores in a program."""


WRAPPING = frozenset({StripPart.MASKS, StripPart.WRAPPERS})
"""The two parts of a pruning wrapper: neither is of use without the other, so both are stripped together."""


@dataclass(frozen=True, slots=True)
class CopyChoice:
    """The choice between two copies of the weights in a file; the kept values get the names that loaders read."""

    home: str
    """Name prefix of the copy that loaders read."""
    other: str
    """Name prefix of the other copy, which is removed from the output."""
    names: Mapping[str, str]
    """Tensors of the copy at `home`, with their names in the output."""
    sources: Mapping[str, str]
    """Tensors at `home` whose values are taken from the other copy, with their counterparts there."""
    lacking: tuple[str, ...] = ()
    """Tensors at `home` that the other copy lacks, such as batch norm statistics: they keep their values."""
    more: tuple[str, ...] = ()
    """Name prefixes of further copies, which are removed as well."""

    def is_removed(self, name: str) -> bool:
        """Whether a tensor or an entry belongs to a copy that is removed."""
        return any(name == other or name.startswith(f"{other}.") for other in (self.other, *self.more))

    def kept(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The kept tensors, by their names in the output."""
        by_name = {tensor.name: tensor for tensor in tensors}
        kept_names = (name for name in by_name if not self.is_removed(name))
        return {self.names.get(name, name): by_name[self.sources.get(name, name)] for name in kept_names}


@dataclass(frozen=True, slots=True)
class StripOptions:
    """Which parts to strip, and whether to store floats in 16 bits."""

    parts: frozenset[StripPart] = frozenset(StripPart)
    to_half: bool = False
    """Whether to convert 32-bit and wider floats to 16 bits."""
    copies: CopyChoice | None = None
    """Which of two copies of the weights to keep; None keeps the trained weights."""


@dataclass(frozen=True, slots=True)
class RemovedItem:
    """A stripped item and its size."""

    name: str
    part: StripPart
    bytes: int


_MAX_SUGGESTIONS = 3


def select_names(model: ModelFile, selector: str) -> tuple[Tensor, ...]:
    """The tensors whose name or layer matches a selector; it is an error if none does."""
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
    return tuple(get_close_matches(bare, dict.fromkeys(known), n=_MAX_SUGGESTIONS, cutoff=0.5))


def _matcher(selector: str) -> Callable[[str], bool]:
    if not selector.startswith("re:"):
        return lambda name: fnmatchcase(name, selector)
    try:
        pattern = re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise UsageError(f"{selector!r} is not a regular expression: {error}") from error
    return lambda name: pattern.search(name) is not None
