"""The allow-list of the pickle VM: functions and classes that only make plain data."""

from __future__ import annotations

from typing import Any

from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, PickleDict

_BUILTINS = ("builtins", "__builtin__")
_DICTIONARIES = frozenset(
    {"collections.OrderedDict", "collections.Counter", *(f"{module}.dict" for module in _BUILTINS)}
)
_DEFAULT_DICTIONARY = "collections.defaultdict"
_SEQUENCES = frozenset(
    {"torch.Size", "collections.deque"}
    | {f"{module}.{name}" for module in _BUILTINS for name in ("list", "tuple", "set", "frozenset")}
)
_HARMLESS = frozenset(
    {
        *(f"{module}.{name}" for module in _BUILTINS for name in ("bytearray", "bytes", "complex", "object")),
        *(f"{module}.{name}" for module in _BUILTINS for name in ("float", "int", "bool", "str", "range", "slice")),
        "_codecs.encode",
        "argparse.Namespace",
        "collections.defaultdict",
        "copy_reg._reconstructor",
        "copyreg._reconstructor",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "decimal.Decimal",
        "fractions.Fraction",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Buffer",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion",
        "torch.version.TorchVersion",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
    | _DICTIONARIES
    | _SEQUENCES
)
_NUMPY = frozenset({"_frombuffer", "_reconstruct", "bool_", "dtype", "ndarray", "scalar"})
_COPYING = _DICTIONARIES | _SEQUENCES
_RECONSTRUCTORS = frozenset({"copyreg._reconstructor", "copy_reg._reconstructor"})


def is_allowed(name: Global) -> bool:
    """Whether importing and calling a function or class only makes plain data."""
    if name.path in _HARMLESS:
        return True
    if "." in name.name:
        # Attributes of allowed functions are not allowed: `__builtins__` of any function leads to all of Python.
        return False
    if name.module in {"torch._utils", "torch._tensor"}:
        return name.name.startswith("_rebuild_")
    if name.module == "torch.jit._pickle":
        return name.name.startswith("build_") or name.name == "restore_type_tag"
    if name.module == "numpy" or name.module.startswith("numpy."):
        return name.name in _NUMPY
    is_storage = name.name.endswith("Storage") and name.module in {"torch", "torch.cuda", "torch.storage"}
    # torch.float32, torch.strided, torch.per_tensor_affine: values, not functions.
    return is_storage or (name.module == "torch" and name.name in _TORCH_VALUES)


_TORCH_VALUES = frozenset(
    {
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("half", "float", "double", "float16", "float32", "float64", "bfloat16"),
        *("complex32", "complex64", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("float4_e2m1fn_x2", "strided", "contiguous_format", "preserve_format", "channels_last"),
        *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric"),
        *("per_channel_affine_float_qparams", "FloatTensor", "DoubleTensor", "HalfTensor", "LongTensor"),
        *("IntTensor", "ShortTensor", "CharTensor", "ByteTensor", "BoolTensor", "BFloat16Tensor"),
    }
)


def copied(function: Any, args: Any) -> int:
    """How many elements a call would copy into a new container."""
    first = args[0] if isinstance(args, tuple) and args else None
    if not isinstance(function, Global) or function.path not in _COPYING:
        return 0
    items = first.items if isinstance(first, PickleDict) else first
    return len(items) if isinstance(items, list | tuple) else 0


def result_of_call(function: Any, args: Any) -> Any:
    """The result of a call: a plain container for known container classes, an `OpaqueCall` for anything else."""
    if isinstance(function, Global) and isinstance(args, tuple):
        first = args[0] if args else None
        if function.path in _DICTIONARIES:
            return PickleDict(_pairs(first))
        if function.path == _DEFAULT_DICTIONARY:
            return PickleDict()
        if function.path == "collections.deque":
            # Later opcodes may append its items, for which the VM needs a list.
            return list(first) if isinstance(first, list | tuple) else []
        if function.path in _SEQUENCES:
            return first if isinstance(first, tuple) else list(first) if isinstance(first, list) else []
        if function.path in _RECONSTRUCTORS and isinstance(first, Global):
            return OpaqueCall(first, args[1:])
    return OpaqueCall(function, args)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, PickleDict):
        return list(value.items)
    if not isinstance(value, list):
        return []
    return [(pair[0], pair[1]) for pair in value if isinstance(pair, list | tuple) and len(pair) == 2]
