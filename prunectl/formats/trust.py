"""Decide whether a framework may open an untrusted file: only if all code that the file names does nothing but compute.

Keras rebuilds a model from the names of classes, functions and TensorFlow operations. TensorFlow runs all operations
in a graph. Hence both are parsed here first, without a framework, and every name is checked against an allow-list
(`pure_names`); any other name needs `--trust`. A class or function of the user's own may also be provided with
`--custom-objects`.

PyTorch files are checked where they are read: their pickles run in a pickle VM with an allow-list of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from prunectl.errors import UntrustedError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.base import Family, ModelFile
from prunectl.formats.keras.config import string_in
from prunectl.formats.protobuf import BYTES, WireError, fields
from prunectl.formats.pure_names import (
    CLASSES,
    FUNCTIONS,
    FUNCTIONS_OF_TENSORFLOW,
    MEMBERS,
    MODULES,
    OPERATIONS,
    RAGGED_CLASS_METHODS,
    TYPES,
)
from prunectl.formats.safe_json import parse_object, refuse_too_much
from prunectl.formats.tensorflow import graph_code
from prunectl.formats.tensorflow.graph_def import KerasObject, read_graph, read_keras_metadata

_VALUES = frozenset(
    {
        "CompositeTensor",
        "TensorShape",
        "__bytes__",
        "__complex__",
        "__ellipsis__",
        "__keras_tensor__",
        "__numpy__",
        "__slice__",
        "__tensor__",
        "__tuple__",
    }
)
"""Values of class_name for plain values, which are not classes."""
_CODE = frozenset({"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"})
"""Layers whose purpose is to contain or load code."""
_FILES = (
    "ckpt_to_load_from",
    "file_path",
    "filename",
    "filepath",
    "saved_model_path",
    "vocabulary",
    "vocabulary_file",
    "weights",
)
"""Settings that, if they are strings, are the path or URL of a file."""
_KERAS = frozenset({"keras", "tf_keras"})
_INNER_MODULES = frozenset({"_tf_keras", "api", "keras", "python", "src"})
_INITIALIZERS = "tensorflow.python.ops.init_ops_v2"
"""The module of TensorFlow's own initializers, which EfficientNetV2 of Keras 2 uses."""
_TFMOT, _REGISTERED_BY_KERAS = "tensorflow_model_optimization", "Custom"
_PACKAGES_OF_TFMOT = frozenset({"TFOptimizationToolkit"})


_MAX_SHOWN = 3
OR_BUILD = ", or build the model with --builder mod:fn"
"""The end of hints, which commands without `--builder` leave out."""


class Fact(NamedTuple):
    """Code that a framework would run, or a file that it would read, in words such as `Lambda layer crop`."""

    words: str
    custom: str = ""
    """The name of a custom class or function, which `--custom-objects` may provide; empty for anything else."""


def check(model: ModelFile, known: Callable[[], Collection[str]]) -> None:
    """Refuse a file that contains code, or names custom objects other than the `known` ones."""
    facts = facts_of(model)
    if facts and all(fact.custom for fact in facts):
        facts = unknown(facts, known())
    if not facts:
        return
    is_explicable = all(fact.custom for fact in facts)
    hint = "provide them with --custom-objects mod:DICT" if is_explicable else "if you trust its author, add --trust"
    raise UntrustedError(f"{model.path} holds code: {worded(facts)}", hint=hint + OR_BUILD)


def facts_of(model: ModelFile) -> tuple[Fact, ...]:
    """The code that would run if the framework of a file opened it."""
    if model.family is Family.SAVED_MODEL:
        graph = tuple(Fact(words) for words in graph_code.find_code(model.path))
        return (*_facts(_metadata(model), is_saved_model=True), *graph)
    # The compile config is not rebuilt with the model, and is checked when it is used.
    config = {key: value for key, value in (model.about.keras or {}).items() if key != "compile_config"}
    return facts_in(config)


def facts_in(config: Any) -> tuple[Fact, ...]:
    """The code that would run if Keras rebuilt an object from a configuration, at any depth in it."""
    return _facts(config, is_saved_model=False)


def unknown(facts: Collection[Fact], known: Collection[str]) -> tuple[Fact, ...]:
    """The facts that no custom object covers."""
    names = {name.rpartition(">")[2] for name in known}
    return tuple(fact for fact in facts if not fact.custom or fact.custom not in names)


def worded(facts: Collection[Fact]) -> str:
    """The first few facts in words."""
    return f"{', '.join(fact.words for fact in tuple(facts)[:_MAX_SHOWN])}{' …' if len(facts) > _MAX_SHOWN else ''}"


def _metadata(model: ModelFile) -> list[Any]:
    """The Keras metadata of a SavedModel, without its training configuration."""
    graph, metadata = model.path / "saved_model.pb", model.path / "keras_metadata.pb"
    objects: tuple[KerasObject, ...]
    if metadata.is_file():
        path, objects = metadata, read_keras_metadata(metadata)
    else:
        path = graph
        objects = tuple(node for node in read_graph(graph).objects if node.identifier.startswith("_tf_keras"))
    texts = [node.metadata for node in objects if node.metadata]
    refuse_too_much(texts, path, "its Keras metadata", budgets.MAX_KERAS_OBJECT_BYTES)
    configs = (parse_object(metadata_text, path, "its Keras metadata") for metadata_text in texts)
    return [{key: value for key, value in config.items() if key != "training_config"} for config in configs]


def _facts(config: Any, *, is_saved_model: bool) -> tuple[Fact, ...]:
    facts: dict[Fact, None] = {}
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            facts |= dict.fromkeys(_facts_of_object(value, is_saved_model=is_saved_model))
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
    return tuple(facts)


def _facts_of_object(keras_object: Mapping[str, Any], *, is_saved_model: bool) -> Iterator[Fact]:
    """Yield the code that Keras would run to create one object from its class and configuration."""
    if "class_name" not in keras_object:
        return
    kind, config = string_in(keras_object, "class_name"), keras_object.get("config")
    owner = _of(kind, string_in(config, "name") or string_in(keras_object, "name"))
    yield from (Fact(f"file {abbreviated(string_in(config, key))}{owner}") for key in _FILES if string_in(config, key))
    if kind == "__lambda__":
        yield Fact("a function")
    elif kind in _CODE:
        yield Fact(f"{kind} layer {abbreviated(string_in(config, 'name'))}")
    elif kind in _DISPATCHING:
        operation = _DISPATCHING[kind](config)
        if operation is not None:
            yield Fact(f"operation {abbreviated(operation)}{owner}")
    elif kind == "function":
        name = config if isinstance(config, str) else ""
        # If the function has another registered name, Keras uses the function of that name.
        is_itself = string_in(keras_object, "registered_name") in {"", name, "function"}
        if name not in FUNCTIONS or not is_itself or not _is_of_keras(keras_object, is_function=True):
            yield _custom("function", name)
    elif not (_is_value(keras_object, kind) or _is_builtin(keras_object, kind, is_saved_model=is_saved_model)):
        yield _custom("class", kind)


def _is_value(keras_object: Mapping[str, Any], kind: str) -> bool:
    """Whether an object is a plain value, such as a shape, or the type spec of a tensor."""
    if kind == "__typespec__":
        # Keras takes the class from the named module, which must be TensorFlow, and not from its registered classes.
        module, registered = keras_object.get("module"), keras_object.get("registered_name")
        is_of_tensorflow = module is None or (isinstance(module, str) and module.partition(".")[0] == "tensorflow")
        return string_in(keras_object, "spec_name") in TYPES and is_of_tensorflow and not registered
    if kind == "TypeSpec":
        return string_in(keras_object, "type_spec").rpartition(".")[2] in TYPES
    return kind in _VALUES


def _custom(what: str, name: str) -> Fact:
    plain = name.rpartition(">")[2]
    return Fact(f"custom {what} {abbreviated(plain)}", plain)


def _of(kind: str, layer: str) -> str:
    return f" of {abbreviated(kind)} {abbreviated(layer)}" if layer else f" of {abbreviated(kind)}"


def _is_builtin(keras_object: Mapping[str, Any], kind: str, *, is_saved_model: bool) -> bool:
    """Whether a class is one of Keras or tfmot."""
    package, registered, name = kind.rpartition(">")
    if string_in(keras_object, "registered_name").rpartition(">")[2] not in {"", name}:
        # Keras would look for the registered name instead.
        return False
    if registered:
        # Keras looks for such a class among the registered ones only.
        return package in _PACKAGES_OF_TFMOT or (package == _REGISTERED_BY_KERAS and name in CLASSES)
    if keras_object.get("module") is None:
        # Custom classes of a SavedModel are revived by the functions in its graph, whatever their names are.
        is_revived = is_saved_model and kind[:1].isupper()
        return (kind in CLASSES or is_revived) and not _is_registered_by_others(keras_object)
    return kind in CLASSES and _is_of_keras(keras_object)


def _is_registered_by_others(keras_object: Mapping[str, Any]) -> bool:
    package, registered, _ = string_in(keras_object, "registered_name").rpartition(">")
    return bool(registered) and package not in {_REGISTERED_BY_KERAS, *_PACKAGES_OF_TFMOT}


def _is_of_keras(keras_object: Mapping[str, Any], *, is_function: bool = False) -> bool:
    """Whether an object's module is one of Keras, TensorFlow or tfmot from which models are built."""
    module = keras_object.get("module")
    if not isinstance(module, str):
        return module is None
    first, *rest = module.split(".")
    if module == "builtins":
        # The module that Keras writes for its own functions.
        return is_function
    if first == _TFMOT or module == _INITIALIZERS:
        return not is_function
    modules = [name for name in rest if name not in _INNER_MODULES]
    return first in _KERAS and (not modules or modules[0] in MODULES)


def _of_lambda(config: Any) -> str | None:
    """The function of TensorFlow that a layer wraps, if it is not on the allow-list."""
    name = string_in(config, "function")
    function = name.removeprefix("compat.v1.")
    is_pure = function in FUNCTIONS_OF_TENSORFLOW or (
        function.startswith("raw_ops.") and function.removeprefix("raw_ops.") in OPERATIONS
    )
    return None if is_pure else name


def _of_node(config: Any) -> str | None:
    """The operation of the graph node in a layer, if it is not on the allow-list."""
    node = config.get("node_def") if isinstance(config, Mapping) else None
    operation = string_in(node, "op")
    if isinstance(node, str):
        data = memoryview(node.encode("utf-8", "surrogatepass"))
        try:
            named = [field for field in fields(data) if field.number == 2 and field.wire == BYTES]
        except WireError:
            return "of a damaged node"
        operation = str(data[named[-1].begin : named[-1].end], "utf-8", "backslashreplace") if named else ""
    return None if operation in OPERATIONS else operation


def _of_class_method(config: Any) -> str | None:
    names = string_in(config, "cls_symbol"), string_in(config, "method_name")
    is_pure = names[0] in {"RaggedTensor", "compat.v1.RaggedTensor"} and names[1] in RAGGED_CLASS_METHODS
    return None if is_pure else ".".join(names)


def _of_member(config: Any) -> str | None:
    name = string_in(config, "attr_name")
    return None if name in MEMBERS else name


_DISPATCHING: Mapping[str, Callable[[Any], str | None]] = {
    "ClassMethod": _of_class_method,
    "InstanceMethod": _of_member,
    "InstanceProperty": _of_member,
    "SlicingOpLambda": _of_lambda,
    "TFOpLambda": _of_lambda,
    "TensorFlowOpLayer": _of_node,
}
"""Layers that call a function named in the file, with the check that returns its name if it is not allowed."""
