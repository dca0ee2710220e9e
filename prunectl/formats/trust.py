"""May a framework open a stranger's file? Only if all that the file names is known to do nothing but compute.

Keras rebuilds a model from names: of classes, of functions, of operations of TensorFlow. TensorFlow runs whatever
operations a graph holds. So both are read here first, without a framework, and every name is held against a list of
what is allowed (`pure_names`); whatever is not on it needs `--trust`. A class or
function of the user's own may also be explained by `--custom-objects`.

PyTorch's files are looked at where they are read: their pickles run in a machine that knows few functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from prunectl.errors import UntrustedError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.base import Family, ModelFile
from prunectl.formats.keras.config import text
from prunectl.formats.protobuf import BYTES, WireError, fields
from prunectl.formats.pure_names import (
    CLASSES,
    FUNCTIONS,
    FUNCTIONS_OF_TENSORFLOW,
    MEMBERS,
    OPERATIONS,
    RAGGED_CLASS_METHODS,
    ROOMS,
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
"""What Keras words as a class, and makes a plain value of."""
_CODE = frozenset({"FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"})
"""Layers that are made to hold code, or to load it."""
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
"""Settings that are the path of a file, or its URL, where they are text."""
_KERAS = frozenset({"keras", "tf_keras"})
_BETWEEN = frozenset({"_tf_keras", "api", "keras", "python", "src"})
_INITIALIZERS = "tensorflow.python.ops.init_ops_v2"
"""Where the initializers of TensorFlow itself are, which EfficientNetV2 of Keras 2 has."""
_TFMOT, _REGISTERED_BY_KERAS = "tensorflow_model_optimization", "Custom"
_PACKAGES_OF_TFMOT = frozenset({"TFOptimizationToolkit"})


_MANY = 3
OR_BUILD = ", or build the model with --builder mod:fn"
"""The end of hints, which commands without builders leave out."""


class Fact(NamedTuple):
    """Something that a framework would run."""

    words: str
    custom: str = ""
    """The name that custom objects may explain, where it is one."""


def check(model: ModelFile, known: Callable[[], Collection[str]]) -> None:
    """Refuse a file that brings code, or names code that nobody vouched for by `known` names."""
    facts = facts_of(model)
    if facts and all(fact.custom for fact in facts):
        facts = unknown(facts, known())
    if not facts:
        return
    is_explicable = all(fact.custom for fact in facts)
    hint = "provide them with --custom-objects mod:DICT" if is_explicable else "if you trust its author, add --trust"
    raise UntrustedError(f"{model.path} holds code: {worded(facts)}", hint=hint + OR_BUILD)


def facts_of(model: ModelFile) -> tuple[Fact, ...]:
    """What would run if the framework of a file opened it."""
    if model.family is Family.SAVED_MODEL:
        graph = tuple(Fact(words) for words in graph_code.find_code(model.path))
        return (*_facts(_metadata(model), is_saved_model=True), *graph)
    # How it was trained is not rebuilt with the model: what that names is looked at when it is used.
    config = {key: value for key, value in (model.about.keras or {}).items() if key != "compile_config"}
    return facts_in(config)


def facts_in(config: Any) -> tuple[Fact, ...]:
    """What would run if Keras rebuilt something from a configuration, wherever in it that hides."""
    return _facts(config, is_saved_model=False)


def unknown(facts: Collection[Fact], known: Collection[str]) -> tuple[Fact, ...]:
    """The facts that no custom object explains."""
    names = {name.rpartition(">")[2] for name in known}
    return tuple(fact for fact in facts if not fact.custom or fact.custom not in names)


def worded(facts: Collection[Fact]) -> str:
    """What would run in a few words."""
    return f"{', '.join(fact.words for fact in tuple(facts)[:_MANY])}{' …' if len(facts) > _MANY else ''}"


def _metadata(model: ModelFile) -> list[Any]:
    """All that Keras wrote about the layers of a SavedModel, how they were trained left aside."""
    graph, metadata = model.path / "saved_model.pb", model.path / "keras_metadata.pb"
    objects: tuple[KerasObject, ...]
    if metadata.is_file():
        path, objects = metadata, read_keras_metadata(metadata)
    else:
        path = graph
        objects = tuple(one for one in read_graph(graph).objects if one.identifier.startswith("_tf_keras"))
    texts = [one.metadata for one in objects if one.metadata]
    refuse_too_much(texts, path, "its Keras metadata", budgets.MAX_KERAS_OBJECT_BYTES)
    configs = (parse_object(one, path, "its Keras metadata") for one in texts)
    return [{key: value for key, value in one.items() if key != "training_config"} for one in configs]


def _facts(config: Any, *, is_saved_model: bool) -> tuple[Fact, ...]:
    facts: dict[Fact, None] = {}
    pending = [config]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            facts |= dict.fromkeys(_facts_of_one(one, is_saved_model=is_saved_model))
            pending.extend(one.values())
        elif isinstance(one, list | tuple):
            pending.extend(one)
    return tuple(facts)


def _facts_of_one(one: Mapping[str, Any], *, is_saved_model: bool) -> Iterator[Fact]:
    """Yield what Keras would run to make one object of its class and configuration."""
    if "class_name" not in one:
        return
    kind, config = text(one, "class_name"), one.get("config")
    whose = _of(kind, text(config, "name") or text(one, "name"))
    yield from (Fact(f"file {abbreviated(text(config, key))}{whose}") for key in _FILES if text(config, key))
    if kind == "__lambda__":
        yield Fact("a function")
    elif kind in _CODE:
        yield Fact(f"{kind} layer {abbreviated(text(config, 'name'))}")
    elif kind in _DISPATCHING:
        operation = _DISPATCHING[kind](config)
        if operation is not None:
            yield Fact(f"operation {abbreviated(operation)}{whose}")
    elif kind == "function":
        name = config if isinstance(config, str) else ""
        # Where it is registered under another name, Keras takes what has that name.
        is_itself = text(one, "registered_name") in {"", name, "function"}
        if name not in FUNCTIONS or not is_itself or not _is_of_keras(one, is_function=True):
            yield _custom("function", name)
    elif not (_is_value(one, kind) or _is_builtin(one, kind, is_saved_model=is_saved_model)):
        yield _custom("class", kind)


def _is_value(one: Mapping[str, Any], kind: str) -> bool:
    """Whether it is a plain value, such as a shape, or the type of a tensor."""
    if kind == "__typespec__":
        # Keras takes the class of that name from the module that is named, and nothing else may stand in for it.
        module, registered = one.get("module"), one.get("registered_name")
        is_of_tensorflow = module is None or (isinstance(module, str) and module.partition(".")[0] == "tensorflow")
        return text(one, "spec_name") in TYPES and is_of_tensorflow and not registered
    if kind == "TypeSpec":
        return text(one, "type_spec").rpartition(".")[2] in TYPES
    return kind in _VALUES


def _custom(what: str, name: str) -> Fact:
    plain = name.rpartition(">")[2]
    return Fact(f"custom {what} {abbreviated(plain)}", plain)


def _of(kind: str, layer: str) -> str:
    return f" of {abbreviated(kind)} {abbreviated(layer)}" if layer else f" of {abbreviated(kind)}"


def _is_builtin(one: Mapping[str, Any], kind: str, *, is_saved_model: bool) -> bool:
    """Whether a class is one of Keras or tfmot."""
    package, registered, name = kind.rpartition(">")
    if text(one, "registered_name").rpartition(">")[2] not in {"", name}:
        # Keras would look for what has that name instead.
        return False
    if registered:
        # Looked for among registered classes alone.
        return package in _PACKAGES_OF_TFMOT or (package == _REGISTERED_BY_KERAS and name in CLASSES)
    if one.get("module") is None:
        # Custom classes of a SavedModel are revived by the functions in its graph, whatever their names are.
        is_revived = is_saved_model and kind[:1].isupper()
        return (kind in CLASSES or is_revived) and not _is_registered_by_others(one)
    return kind in CLASSES and _is_of_keras(one)


def _is_registered_by_others(one: Mapping[str, Any]) -> bool:
    package, registered, _ = text(one, "registered_name").rpartition(">")
    return bool(registered) and package not in {_REGISTERED_BY_KERAS, *_PACKAGES_OF_TFMOT}


def _is_of_keras(one: Mapping[str, Any], *, is_function: bool = False) -> bool:
    """Whether the module that is named is one that holds what a model is built of."""
    module = one.get("module")
    if not isinstance(module, str):
        return module is None
    first, *rest = module.split(".")
    if module == "builtins":
        # So Keras words its own functions.
        return is_function
    if first == _TFMOT or module == _INITIALIZERS:
        return not is_function
    rooms = [room for room in rest if room not in _BETWEEN]
    return first in _KERAS and (not rooms or rooms[0] in ROOMS)


def _of_lambda(config: Any) -> str | None:
    """The function of TensorFlow that a layer wraps, if it is not on the list."""
    name = text(config, "function")
    function = name.removeprefix("compat.v1.")
    is_pure = function in FUNCTIONS_OF_TENSORFLOW or (
        function.startswith("raw_ops.") and function.removeprefix("raw_ops.") in OPERATIONS
    )
    return None if is_pure else name


def _of_node(config: Any) -> str | None:
    """The operation of the node that a layer holds, if it is not on the list."""
    node = config.get("node_def") if isinstance(config, Mapping) else None
    operation = text(node, "op")
    if isinstance(node, str):
        data = memoryview(node.encode("utf-8", "surrogatepass"))
        try:
            named = [field for field in fields(data) if field.number == 2 and field.wire == BYTES]
        except WireError:
            return "of a damaged node"
        operation = str(data[named[-1].begin : named[-1].end], "utf-8", "backslashreplace") if named else ""
    return None if operation in OPERATIONS else operation


def _of_class_method(config: Any) -> str | None:
    names = text(config, "cls_symbol"), text(config, "method_name")
    is_pure = names[0] in {"RaggedTensor", "compat.v1.RaggedTensor"} and names[1] in RAGGED_CLASS_METHODS
    return None if is_pure else ".".join(names)


def _of_member(config: Any) -> str | None:
    name = text(config, "attr_name")
    return None if name in MEMBERS else name


_DISPATCHING: Mapping[str, Callable[[Any], str | None]] = {
    "ClassMethod": _of_class_method,
    "InstanceMethod": _of_member,
    "InstanceProperty": _of_member,
    "SlicingOpLambda": _of_lambda,
    "TFOpLambda": _of_lambda,
    "TensorFlowOpLayer": _of_node,
}
"""Layers that call what the file names, each with what is wrong about it."""
