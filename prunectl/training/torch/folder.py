"""A model folder as a module of PyTorch: `transformers` builds the network of its config, and prunectl fills it in.

Nothing in the folder is unpickled or run: the config names a class of the library, and the weights are read as they are
for every other command. Everything is computed in 32 bits, whatever the file holds.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunectl.errors import InputError, PrunectlError, UntrustedError, UsageError, abbreviated, first_line
from prunectl.formats import budgets
from prunectl.formats.base import ModelFile
from prunectl.formats.families import CONFIG, COUNTS, read_config
from prunectl.formats.safe_json import require
from prunectl.training.backend import LoadOptions, TensorSpec, TextInput
from prunectl.training.quiet import ignore_warnings, offline, quiet_logging
from prunectl.training.torch.build import match_parameters
from prunectl.training.torch.tensors import InnerModule, to_torch

_EXTRA = "transformers"


def names_network(model: ModelFile) -> bool:
    """Whether a folder has a config that names the class of its network."""
    return model.folder is not None and bool(read_config(model, CONFIG).get("architectures"))


class FolderModule(InnerModule):
    """Runs token ids, or whatever else a model of `transformers` takes, to its first output."""

    def __init__(self, inner: torch.nn.Module, names: Iterable[str]) -> None:
        super().__init__(inner)
        self.names = tuple(names)
        """Of the arguments that are given to the inner model."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The logits, or what a model without a head ends in."""
        return _answer(self, inputs)[0]

    @contextmanager
    def plain(self) -> Generator[torch.nn.Module]:
        """For `torch.export`, with experts as products of stacks: kernels and loops over those in use have no graph."""
        inner: Any = self.inner
        usual = inner.get_experts_implementation() if hasattr(inner, "get_experts_implementation") else None
        try:
            if usual is not None:
                inner.set_experts_implementation("batched_mm")
            with super().plain() as plain:
                yield plain
        finally:
            if usual is not None:
                inner.set_experts_implementation(usual)

    def output_name(self, inputs: Iterable[torch.Tensor]) -> str:
        """What `transformers` calls the output: `logits`, or that of a model without a head."""
        with torch.no_grad():
            outputs = _answer(self, inputs)
        return str(next(iter(outputs))) if isinstance(outputs, Mapping) else "output"


def _answer(module: Any, inputs: Iterable[torch.Tensor]) -> Any:
    """All that the inner model makes of its arguments: no method, as what is exported has none but `forward`."""
    with quiet_logging():
        return module.inner(**dict(zip(module.names, inputs, strict=True)))


@dataclass(frozen=True, slots=True)
class FolderNetwork:
    """The network of a folder, whose parameters have shapes and no numbers yet."""

    model: ModelFile
    module: FolderModule
    names: Mapping[str, str]
    """From tensors of the file to parameters and buffers."""
    inputs: tuple[TensorSpec, ...]
    text: TextInput

    def shifts_labels(self) -> bool:
        """Whether the loss of the library compares labels with the output one place before: nothing else tells.

        A class for causal models may compare them in place, as Bart's does, and others shift them.
        """
        ids = torch.arange(6)[None] % self.text.vocabulary
        module = self.module.inner
        # What the class takes besides may be needed, or its answer may have no loss.
        with suppress(Exception), quiet_logging(), torch.no_grad():
            outputs = module(input_ids=ids, labels=ids)
            logits, loss = outputs.logits[0].float(), outputs.loss.float()
            moved = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
            in_place = torch.nn.functional.cross_entropy(logits, ids[0])
            return bool((loss - moved).abs() < 1e-4 < (loss - in_place).abs())
        return False

    def fill(self, names: Iterable[str] | None = None) -> None:
        """Read the numbers of some tensors, or of all, from the file."""
        tensors = {tensor.name: tensor for tensor in self.model.tensors if tensor.name in self.names}
        wanted = tensors if names is None else names
        numbers = {self.names[name]: to_torch(self.model.read(tensors[name])) for name in wanted}
        values = {name: value.float() if value.is_floating_point() else value for name, value in numbers.items()}
        self.module.inner.load_state_dict(values, strict=False, assign=True)
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        # An output layer that is the embedding is that of the file from now on.
        self.module.inner.tie_weights()  # type: ignore[operator]


def open_network(model: ModelFile, origin: LoadOptions) -> FolderNetwork:
    """The network that the config of a folder names, held against the tensors of the folder."""
    library = require("transformers", extra=_EXTRA)
    config_of_file = read_config(model, CONFIG)
    _check_config(model, config_of_file)
    with quiet_logging(), ignore_warnings(), offline(), _told(model):
        config = _config(library, model, config_of_file, is_trusted=origin.is_trusted)
        kind = _kind(library, model, config, config_of_file, is_trusted=origin.is_trusted)
        if _DECODED in inspect.signature(kind.forward).parameters and _DECODED not in origin.arrays:
            raise UsageError(
                f"the {CONFIG} of {model.folder} is of an encoder with a decoder, which takes two inputs at once",
                hint="give both by their names, as arrays of --data or with --input: "
                f"{getattr(kind, 'main_input_name', _TOKENS)} and {_DECODED}",
            )
        # First without any memory: what the config asks for may be more than there is.
        with torch.device("meta"):
            shapes = _built(kind, config)
        _check_buffers(model, shapes)
        names = _match(model, shapes)
        with _without_parameters():
            inner = _built(kind, config)
        inner.eval()
        causal = {*library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        own = config_of_file.get("auto_map") or {}
        causal.add(str(own.get("AutoModelForCausalLM")).rpartition(".")[2])
        inputs, embedding = _inputs(inner, config, origin.arrays), None
        # A model of images or sounds, or of several kinds, may have none to give.
        with suppress(NotImplementedError):
            embedding = inner.get_input_embeddings() if inputs[0].name == _TOKENS else None
    module = FolderModule(inner, (port.name for port in inputs))
    text = TextInput(
        folder=model.folder or model.path.parent,
        vocabulary=embedding.num_embeddings if isinstance(embedding, torch.nn.Embedding) else 0,
        longest=_longest(config),
        is_causal=kind.__name__ in causal,
        is_trusted=origin.is_trusted,
    )
    return FolderNetwork(model, module, names, inputs, text)


def can_build(model: ModelFile, origin: LoadOptions) -> bool:
    """Whether the network of a folder can be built, whatever it takes."""
    with suppress(PrunectlError):
        open_network(model, replace(origin, arrays=(_DECODED,)))
        return True
    return False


_TOKENS, _DECODED, _IMAGES = "input_ids", "decoder_input_ids", "pixel_values"
_NO_INPUT = re.compile(r".*labels?|.*_positions|past_key_values|cache_position|(use|output|return|logits)_.*|kwargs")
"""An argument of a model that is a target, a cache or a switch."""
_LARGEST_IMAGE = 4096
"""Along an edge, of those that a config may have made up."""
_OF_TOKENS = re.compile(r"(decoder_)?(input_ids|attention_mask)|token_type_ids|position_ids")


def _inputs(inner: torch.nn.Module, config: Any, arrays: Sequence[str]) -> tuple[TensorSpec, ...]:
    """What the model mainly takes, and what else it takes of the arrays that will go in."""
    main = str(getattr(inner, "main_input_name", _TOKENS))
    known = [name for name in inspect.signature(inner.forward).parameters if not _NO_INPUT.fullmatch(name)]
    names = dict.fromkeys((main, *(name for name in known if main in arrays and name in arrays)))
    is_row = not type(inner).__name__.endswith("MultipleChoice")
    return tuple(_input(name, config, is_row=is_row) for name in names)


def _input(name: str, config: Any, *, is_row: bool) -> TensorSpec:
    if name == _IMAGES:
        images = getattr(config, "vision_config", config)
        channels, size = getattr(images, "num_channels", 3), getattr(images, "image_size", None)
        lengths = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        is_known = all(type(length) is int and 0 < length <= _LARGEST_IMAGE for length in lengths)
        return TensorSpec(name, (channels, None, None), "float32", example=(channels, *lengths) if is_known else None)
    if _OF_TOKENS.fullmatch(name) and is_row:
        return TensorSpec(name, (None,), "int64", example=(None,))
    if name == "bbox":
        return TensorSpec(name, (None, 4), "int64", example=(None, 4))
    if name == "input_values" and hasattr(config, "conv_kernel"):
        return TensorSpec(name, (None,), "float32")
    if name.endswith(("_ids", "_mask")):
        return TensorSpec(name, None, "int64")
    return TensorSpec(name, None, "float32" if name.endswith(("_values", "_features", "_embeds")) else "")


def _match(model: ModelFile, module: Any) -> dict[str, str]:
    """The name in the module of each tensor of the folder, which the library may call otherwise when it loads it."""
    loading = importlib.import_module("transformers.core_model_loading")
    changes = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(module)
    renamings = [change for change in changes if isinstance(change, loading.WeightRenaming)]
    converters = [change for change in changes if isinstance(change, loading.WeightConverter)]
    parameters = module.state_dict()
    files_names: dict[str, str] = {}
    for tensor in model.tensors:
        name, converted = loading.rename_source_key(tensor.name, renamings, converters)
        if converted is not None and name in parameters and tensor.name not in parameters:
            raise UsageError(
                f"transformers makes {name} of several tensors of {model.folder}, such as {tensor.name}",
                hint="name a function that builds the network with a weight for each tensor: "
                "--builder ./file.py:function",
            )
        files_names.setdefault(tensor.name if converted is not None or name not in parameters else name, tensor.name)
    new_names = {old: new for new, old in files_names.items()}
    tensors = tuple(replace(tensor, name=new_names.get(tensor.name, tensor.name)) for tensor in model.tensors)
    called_so = replace(model, tensors=tensors)
    matched = match_parameters(called_so, module, str(model.folder), module.base_model_prefix)
    return {files_names[name]: parameter for name, parameter in matched.items()}


def _check_config(model: ModelFile, config: Mapping[str, Any]) -> None:
    """Refuse a config that asks for what could not be built, before the library tries."""
    where = f"the {CONFIG} of {model.folder}"
    if config.get("quantization_config"):
        raise UsageError(
            f"{where} says that the weights are quantized, which cannot be run here",
            hint="use the folder that it was made from",
        )
    for key, number in _counts(config):
        most = len(model.tensors) if key in COUNTS else budgets.MAX_CONFIG_COUNT
        if number > most:
            raise InputError(f"{where} is refused: {abbreviated(key)} is {number}, which does not fit its weights")


_STAGES = frozenset({"depths", "num_block_repeats"})


def _counts(value: Any) -> Iterator[tuple[str, int]]:
    """Yield what counts layers, heads, experts and classes in a config and its parts."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = str(key)
            # How often the blocks of each stage are repeated, as in vision models.
            if isinstance(inner, list) and inner and all(type(number) is int for number in inner):
                if name in _STAGES or name.startswith(("num_", "n_")) or name.endswith(("layers", "depths", "repeats")):
                    yield from ((name, number) for number in inner)
            elif type(inner) is int and (name in COUNTS or name.startswith(("num_", "n_")) or name.endswith("layers")):
                yield name, inner
            else:
                yield from _counts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner)


@contextmanager
def _told(model: ModelFile) -> Generator[None]:
    """Say of which folder it is what the library raises, which may be anything."""
    try:
        yield
    except (PrunectlError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"transformers cannot build the model of {model.folder}: {first_line(error)}") from error


def _config(library: Any, model: ModelFile, fields: Mapping[str, Any], *, is_trusted: bool) -> Any:
    kind = fields.get("model_type")
    if not is_trusted and kind not in library.CONFIG_MAPPING:
        if fields.get("auto_map"):
            raise UntrustedError(
                f"opening {model.folder} would run its own Python code, for the model_type {abbreviated(str(kind))!r}",
                hint="read that code, and if you trust it, add --trust",
            )
        raise InputError(f"transformers {library.__version__} has no model_type {abbreviated(str(kind))!r}")
    config = library.AutoConfig.from_pretrained(
        str(model.folder), local_files_only=True, trust_remote_code=is_trusted and bool(fields.get("auto_map"))
    )
    config.use_cache = False
    return config


def _kind(library: Any, model: ModelFile, config: Any, fields: Mapping[str, Any], *, is_trusted: bool) -> Any:
    """The class of the network: one of the library, made for such a config, or where that is trusted, the folder's."""
    name = str((fields.get("architectures") or [""])[0])
    kind = getattr(library, name, None) if name.isidentifier() else None
    base = library.PreTrainedModel
    if isinstance(kind, type) and issubclass(kind, base) and isinstance(config, getattr(kind, "config_class", ())):
        return kind
    references = fields.get("auto_map")
    own = [value for value in references.values() if str(value).endswith(f".{name}")] if references else []
    if is_trusted and own:
        return library.dynamic_module_utils.get_class_from_dynamic_module(
            str(own[0]), str(model.folder), local_files_only=True
        )
    raise InputError(
        f"the {CONFIG} of {model.folder} names the architecture {abbreviated(name)!r}, "
        f"which transformers {library.__version__} does not have for it"
    )


def _built(kind: Any, config: Any) -> Any:
    # Never what a config asks for: it may name a kernel that would have to be fetched.
    if getattr(kind, "_supports_sdpa", False):
        # A part of it, such as the backbone of a detector, may have none of it.
        with suppress(ValueError):
            return kind._from_config(config, dtype=torch.float32, attn_implementation="sdpa")  # noqa: SLF001
    return kind._from_config(config, dtype=torch.float32, attn_implementation="eager")  # noqa: SLF001


def _check_buffers(model: ModelFile, module: torch.nn.Module) -> None:
    """Refuse tables of a size that only the config names."""
    nbytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    if nbytes > budgets.MAX_MODULE_BUFFER_BYTES:
        raise InputError(f"the {CONFIG} of {model.folder} is refused: it asks for tables of {nbytes} bytes")


@contextmanager
def _without_parameters() -> Generator[None]:
    """Give parameters no memory when they are made, and buffers, which no file holds, their numbers."""
    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _longest(config: Any) -> int:
    """How many tokens a sequence may have; 0 where the config does not say it."""
    inner = config.get_text_config()
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    lengths = [getattr(inner, key, None) for key in keys]
    return next((value for value in lengths if type(value) is int and value > 0), 0)
