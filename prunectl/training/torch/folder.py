"""A model folder as a PyTorch module: `transformers` builds the network of its config, and prunectl loads the weights.

Nothing in the folder is unpickled or run without trust: the config names a class of the library, and prunectl's own
readers read the weights. Everything is computed in float32, whatever data type the file holds.
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
from prunectl.training.torch.experts import separate_experts
from prunectl.training.torch.tensors import InnerModule, to_torch

_EXTRA = "transformers"


def names_network(model: ModelFile) -> bool:
    """Whether a model is a folder with a config that names the class of its network."""
    return model.folder is not None and bool(read_config(model, CONFIG).get("architectures"))


class FolderModule(InnerModule):
    """Runs a model of `transformers` on token ids, or other inputs, and returns its first output."""

    def __init__(self, inner: torch.nn.Module, names: Iterable[str]) -> None:
        super().__init__(inner)
        self.names = tuple(names)
        """The names of the arguments that the inner model gets."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The logits, or the first output of a model without a head."""
        return _outputs(self, inputs)[0]

    @contextmanager
    def plain(self) -> Generator[torch.nn.Module]:
        """A copy for `torch.export`, with experts as batched products: their kernels and loops cannot be exported."""
        inner: Any = self.inner
        original = inner.get_experts_implementation() if hasattr(inner, "get_experts_implementation") else None
        try:
            if original is not None:
                inner.set_experts_implementation("batched_mm")
            with super().plain() as plain:
                yield plain
        finally:
            if original is not None:
                inner.set_experts_implementation(original)

    def output_name(self, inputs: Iterable[torch.Tensor]) -> str:
        """The name of the first output in `transformers`, such as `logits`."""
        with torch.no_grad():
            outputs = _outputs(self, inputs)
        return str(next(iter(outputs))) if isinstance(outputs, Mapping) else "output"


def _outputs(module: Any, inputs: Iterable[torch.Tensor]) -> Any:
    """All outputs of the inner model. No method, since the exported copy has no method but `forward`."""
    with quiet_logging():
        return module.inner(**dict(zip(module.names, inputs, strict=True)))


@dataclass(frozen=True, slots=True)
class FolderNetwork:
    """The network of a folder, whose parameters are on the meta device until they are filled."""

    model: ModelFile
    module: FolderModule
    names: Mapping[str, str]
    """From tensors of the file to parameters and buffers."""
    inputs: tuple[TensorSpec, ...]
    text: TextInput

    def shifts_labels(self) -> bool:
        """Whether the library's loss compares each label with the output one position before it, found by trying it.

        The class does not tell: a causal model may compare labels in place, as Bart does, and other models shift them.
        """
        ids = torch.arange(6)[None] % self.text.vocabulary
        module = self.module.inner
        # The class may require other inputs, or return no loss.
        with suppress(Exception), quiet_logging(), torch.no_grad():
            outputs = module(input_ids=ids, labels=ids)
            logits, loss = outputs.logits[0].float(), outputs.loss.float()
            shifted = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
            in_place = torch.nn.functional.cross_entropy(logits, ids[0])
            return bool((loss - shifted).abs() < 1e-4 < (loss - in_place).abs())
        return False

    def fill(self, names: Iterable[str] | None = None) -> None:
        """Load some tensors, or all, from the file."""
        tensors = {tensor.name: tensor for tensor in self.model.tensors if tensor.name in self.names}
        wanted = tensors if names is None else names
        arrays = {self.names[name]: to_torch(self.model.read(tensors[name])) for name in wanted}
        values = {name: value.float() if value.is_floating_point() else value for name, value in arrays.items()}
        self.module.inner.load_state_dict(values, strict=False, assign=True)
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        # Assigning replaced the parameters: an output layer tied to the embedding has to be tied again.
        self.module.inner.tie_weights()  # type: ignore[operator]


def open_network(model: ModelFile, origin: LoadOptions) -> FolderNetwork:
    """Build the network that the config of a folder names, and match its parameters to the folder's tensors."""
    library = require("transformers", extra=_EXTRA)
    config_of_file = read_config(model, CONFIG)
    _check_config(model, config_of_file)
    with quiet_logging(), ignore_warnings(), offline(), _naming_folder(model):
        config = _config(library, model, config_of_file, is_trusted=origin.is_trusted)
        network_class = _network_class(library, model, config, config_of_file, is_trusted=origin.is_trusted)
        if _DECODER in inspect.signature(network_class.forward).parameters and _DECODER not in origin.arrays:
            raise UsageError(
                f"the {CONFIG} of {model.folder} is of an encoder with a decoder, which takes two inputs at once",
                hint="give both by their names, as arrays of --data or with --input: "
                f"{getattr(network_class, 'main_input_name', _TOKENS)} and {_DECODER}",
            )
        # On the meta device first: the sizes in the config may be more than fits in memory.
        with torch.device("meta"):
            shapes = _build(network_class, config)
        _check_buffers(model, shapes)
        with _without_parameters():
            inner = _build(network_class, config)
        names = _match(model, shapes, inner)
        inner.eval()
        causal = {*library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        own = config_of_file.get("auto_map") or {}
        causal.add(str(own.get("AutoModelForCausalLM")).rpartition(".")[2])
        inputs, embedding = _inputs(inner, config, origin.arrays), None
        # A model of images, sounds or several modalities may have no single embedding.
        with suppress(NotImplementedError):
            embedding = inner.get_input_embeddings() if inputs[0].name == _TOKENS else None
    module = FolderModule(inner, (port.name for port in inputs))
    text = TextInput(
        folder=model.folder or model.path.parent,
        vocabulary=embedding.num_embeddings if isinstance(embedding, torch.nn.Embedding) else 0,
        longest=_longest(config),
        is_causal=network_class.__name__ in causal,
        is_trusted=origin.is_trusted,
    )
    return FolderNetwork(model, module, names, inputs, text)


def can_build(model: ModelFile, origin: LoadOptions) -> bool:
    """Whether the network of a folder can be built, whatever its inputs are."""
    with suppress(PrunectlError):
        open_network(model, replace(origin, arrays=(_DECODER,)))
        return True
    return False


_TOKENS, _DECODER, _IMAGES = "input_ids", "decoder_input_ids", "pixel_values"
_NO_INPUT = re.compile(r".*labels?|.*_positions|past_key_values|cache_position|(use|output|return|logits)_.*|kwargs")
"""Arguments of `forward` that are not inputs, but targets, caches or switches."""
_LARGEST_IMAGE = 4096
"""The longest image edge, in pixels, that is taken from a config."""
_TOKEN_LIKE = re.compile(r"(decoder_)?(input_ids|attention_mask)|token_type_ids|position_ids")


def _inputs(inner: torch.nn.Module, config: Any, arrays: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The main input of the model, and those of its other arguments for which the data has an array."""
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
    if _TOKEN_LIKE.fullmatch(name) and is_row:
        return TensorSpec(name, (None,), "int64", example=(None,))
    if name == "bbox":
        return TensorSpec(name, (None, 4), "int64", example=(None, 4))
    if name == "input_values" and hasattr(config, "conv_kernel"):
        return TensorSpec(name, (None,), "float32")
    if name.endswith(("_ids", "_mask")):
        return TensorSpec(name, None, "int64")
    return TensorSpec(name, None, "float32" if name.endswith(("_values", "_features", "_embeds")) else "")


def _match(model: ModelFile, module: Any, inner: torch.nn.Module) -> dict[str, str]:
    """From tensors of the folder to names in the modules; `transformers` renames some when it loads them.

    Experts that it joins are separated in both modules.
    """
    loading = importlib.import_module("transformers.core_model_loading")
    changes = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(module)
    renamings = [change for change in changes if isinstance(change, loading.WeightRenaming)]
    converters = [change for change in changes if isinstance(change, loading.WeightConverter)]
    stored = [tensor.name for tensor in model.tensors]
    separate = separate_experts((module, inner), stored, renamings, converters)
    parameters = module.state_dict()
    file_names: dict[str, str] = {}
    for tensor in model.tensors:
        name, converted = loading.rename_source_key(tensor.name, renamings, converters)
        if tensor.name in separate:
            name, converted = separate[tensor.name], None
        if converted is not None and name in parameters and tensor.name not in parameters:
            raise UsageError(
                f"transformers makes {name} of several tensors of {model.folder}, such as {tensor.name}",
                hint="name a function that builds the network with a weight for each tensor: "
                "--builder ./file.py:function",
            )
        file_names.setdefault(tensor.name if converted is not None or name not in parameters else name, tensor.name)
    new_names = {old: new for new, old in file_names.items()}
    tensors = tuple(replace(tensor, name=new_names.get(tensor.name, tensor.name)) for tensor in model.tensors)
    renamed = replace(model, tensors=tensors)
    matched = match_parameters(renamed, module, str(model.folder), module.base_model_prefix)
    return {file_names[name]: parameter for name, parameter in matched.items()}


def _check_config(model: ModelFile, config: Mapping[str, Any]) -> None:
    """Refuse a config with a network that cannot be built, before the library tries."""
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
    """Yield the keys and numbers of layers, heads, experts and classes in a config and its sub-configs."""
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
def _naming_folder(model: ModelFile) -> Generator[None]:
    """Turn any error of the library into one that names the folder."""
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


def _network_class(library: Any, model: ModelFile, config: Any, fields: Mapping[str, Any], *, is_trusted: bool) -> Any:
    """The class of the network: the library's for this config, or with trust that in the folder's own code."""
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


def _build(network_class: Any, config: Any) -> Any:
    # Never the attention named in the config, which may be a kernel that would have to be downloaded.
    if getattr(network_class, "_supports_sdpa", False):
        # A submodule, such as the backbone of a detector, may not support SDPA.
        with suppress(ValueError):
            return network_class._from_config(config, dtype=torch.float32, attn_implementation="sdpa")  # noqa: SLF001
    return network_class._from_config(config, dtype=torch.float32, attn_implementation="eager")  # noqa: SLF001


def _check_buffers(model: ModelFile, module: torch.nn.Module) -> None:
    """Refuse huge buffers: their size comes from the config alone, since no file holds them."""
    nbytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    if nbytes > budgets.MAX_MODULE_BUFFER_BYTES:
        raise InputError(f"the {CONFIG} of {model.folder} is refused: it asks for tables of {nbytes} bytes")


@contextmanager
def _without_parameters() -> Generator[None]:
    """Create parameters on the meta device; buffers, which no file holds, get their values."""
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
    """The maximum number of tokens of a sequence; 0 if the config does not name it."""
    inner = config.get_text_config()
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    lengths = [getattr(inner, key, None) for key in keys]
    return next((value for value in lengths if type(value) is int and value > 0), 0)
