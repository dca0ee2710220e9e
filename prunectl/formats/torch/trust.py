"""Allow-lists for exported programs and TorchScript: only programs that keep to them are loaded without `--trust`.

Loading an exported program (.pt2) can run code. PyTorch evaluates the symbolic shapes, resolves operators with
getattr from `torch` on, imports the classes that a tree specification names, writes the names of nodes and weights into
Python source that it executes, and unpickles example inputs, constants and tensor subclasses. PyTorch therefore gets
nothing that is not on a list here: the JSON of the archive is parsed, checked against the lists and written anew, and
the rest are the bytes of plain weights. The schema is torch/_export/serde/schema.py; every line that evaluates
a string is in serialize.py beside it.

TorchScript is a language of its own, without imports and without Python. But some of its operators write files by
name (aten::save, aten::from_file), some of its classes open connections, and `__setstate__` runs on loading.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

from prunectl.errors import InputError, UntrustedError, abbreviated
from prunectl.formats import zip_read
from prunectl.formats.budgets import (
    MAX_CONFIG_DEPTH,
    MAX_EXPRESSION_CHARACTERS,
    MAX_JSON_BYTES,
    MAX_MARK_BYTES,
    MAX_SAMPLE_INPUTS_BYTES,
    MAX_SCRIPT_CODE_BYTES,
)
from prunectl.formats.safe_json import parse_object
from prunectl.formats.torch.pickle.vm import interpret
from prunectl.formats.zip_read import Archive

NAMESPACES = frozenset({"aten", "prims", "quantized_decomposed"})
"""Namespaces of operators that only compute."""
WRITING = frozenset({"from_file", "save"})
"""Operators of aten that open or write a file by name."""
HIGHER_ORDER = frozenset(
    {
        *("cond", "while_loop", "map_impl", "scan", "associative_scan", "out_dtype", "flex_attention"),
        *(
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
            "wrap_activation_checkpoint",
            "tag_activation_checkpoint",
        ),
        *("strict_mode", "invoke_subgraph", "hints_wrapper"),
    }
)
"""Higher-order operators, which run graphs of the program."""
SCALARS = frozenset(
    {
        *(f"torch.{name}" for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum")),
        *(f"torch._sym_{name}" for name in ("sqrt", "abs", "log2")),
        *(f"math.{name}" for name in ("ceil", "floor", "sqrt", "trunc")),
        *(f"_operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos")),
        *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "lshift", "rshift")),
        "_operator.getitem",
    }
)
"""Functions of numbers that PyTorch lists for computing with sizes."""
FUNCTIONS = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "Piecewise"),
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
        *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
        *("IsNonOverlappingAndDenseIndicator", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "ceiling", "floor"),
        *("Eq", "Ne", "Gt", "Ge", "Lt", "Le", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan"),
        *("StrictLessThan", "And", "Or", "Not", "true", "false", "True", "False", "oo", "int_oo"),
        *("positive", "integer", "nonnegative", "negative", "real", "precision", "evaluate"),
    }
)
"""Names that may occur in a symbolic size."""
CONTAINERS = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.namedtuple"}
)
"""Classes that inputs and outputs may be nested in."""

_MARKS = ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
_MODEL = "model"
"""The name of the program that torch.export.load returns."""
_MAX_POWERS = 2
_POWERS = re.compile(r"\*\*|\b(?:Pow|PowByNatural|FloatPow|LShift)\b|<<")
_BIG = re.compile(r"\d{4}")
_IS_SYMBOL = re.compile(r"[a-z]{1,5}\d{1,9}", re.ASCII)
_TOKEN = re.compile(
    r"\s+|'(?:[a-z]{1,5}\d{1,9}|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)'"
    r"|(?P<word>[A-Za-z_]\w*)|\d+(?:\.\d*)?(?:e[+-]?\d+)?(?!\w)|[+\-*/%<>=!(),&|~]",
    re.ASCII,
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,500}|", re.ASCII)
_ATTRIBUTE = re.compile(r"[\w.:/@+<>\- ]{0,1000}")
_VERSION = re.compile(r"[\w.+<=\-]{0,100}", re.ASCII)
_STACK = re.compile(r"(?:[\w.@]*,[\w.@]*,[\w.]*)(?:;[\w.@]*,[\w.@]*,[\w.]*)*", re.ASCII)
"""The modules around an operation, each with a key, a path and a class."""
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.((?!__)\w+|__[a-z]+__)(?:\.((?!_)\w+))?", re.ASCII)
_DUNDERS = frozenset({f"__{of}{name}__" for of in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift")})
_ENTRY = re.compile(r"(?:weight|tensor)_\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class SafeProgram:
    """The parts of an archive that PyTorch may be given."""

    archive: Archive
    folder: str
    texts: Mapping[str, bytes]
    """The contents of small entries, such as the version, and of the rewritten JSON, by the name of the entry."""
    weights: tuple[str, ...]
    """The names of the entries that hold raw weights."""
    inputs: bytes
    """Example inputs, a checkpoint of plain tensors; empty if there are none."""

    def write(self, file: IO[bytes], inputs: bytes) -> None:
        """Write an archive of these parts only, with ``inputs`` as its example inputs."""
        with ZipFile(file, "w") as out:
            written = {**self.texts, f"data/sample_inputs/{_MODEL}.pt": inputs}
            for name, content in written.items():
                out.writestr(f"{_MODEL}/{name}", content)
            for name in self.weights:
                entry = self.archive.entries[self.folder + name]
                with out.open(f"{_MODEL}/{name}", "w", force_zip64=True) as into:
                    into.writelines(self.archive.pieces(entry))


def check_program(path: Path) -> SafeProgram:
    """Check an exported program against the lists; UntrustedError if it holds anything that is not on them."""
    archive = zip_read.open_archive(path)
    folder = _folder(archive)
    texts = {name: archive.read(folder + name, MAX_MARK_BYTES) for name in _MARKS if folder + name in archive.entries}
    program = _json(archive, f"{folder}models/{_MODEL}.json")
    # The guards on inputs are Python source that PyTorch executes; the shapes imply the same checks.
    if "guards_code" in program:
        program["guards_code"] = []
    _AllowLists(path).check(_without_metadata(program))
    texts[f"models/{_MODEL}.json"] = json.dumps(program).encode()
    weights: dict[str, None] = {}
    for part, kind in (("data/weights/", "weights"), ("data/constants/", "constants")):
        config = _json(archive, f"{folder}{part}{_MODEL}_{kind}_config.json")
        for name, facts in _payloads(path, config):
            weights[part + _entry(archive, folder + part, name, facts)] = None
        _AllowLists(path).check(config)
        texts[f"{part}{_MODEL}_{kind}_config.json"] = json.dumps(config).encode()
    return SafeProgram(
        archive, folder, texts, tuple(weights), _inputs(archive, f"{folder}data/sample_inputs/{_MODEL}.pt")
    )


def _folder(archive: Archive) -> str:
    folders = {name.partition("/")[0] for name in archive.entries}
    if len(folders) != 1:
        raise InputError(f"{archive.path} is damaged: its entries are not in one folder")
    return f"{folders.pop()}/"


def _json(archive: Archive, name: str) -> dict[str, Any]:
    if name not in archive.entries:
        raise InputError(
            f"{archive.path} is not laid out as torch.export.save does: it has no entry {abbreviated(name)}"
        )
    return parse_object(archive.read(name, MAX_JSON_BYTES), archive.path, f"its entry {abbreviated(name)}")


def _without_metadata(program: dict[str, Any]) -> dict[str, Any]:
    """Remove metadata in place, except the module stacks: PyTorch looks up the functions that it names."""
    todo: list[Any] = [program]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            metadata = value.get("metadata")
            if isinstance(metadata, dict) and ("target" in value or "module_call_graph" in value):
                stack = metadata.get("nn_module_stack")
                value["metadata"] = {"nn_module_stack": stack} if isinstance(stack, str) and _is_stack(stack) else {}
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return program


def _payloads(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    listed = config.get("config")
    if not isinstance(listed, dict) or not all(isinstance(facts, dict) for facts in listed.values()):
        raise InputError(f"{path} is damaged: it does not list its tensors")
    yield from listed.items()


def _entry(archive: Archive, folder: str, name: str, facts: Mapping[str, Any]) -> str:
    """The entry of a tensor that is stored as raw bytes; UntrustedError if it is pickled."""
    entry = facts.get("path_name")
    if facts.get("use_pickle") is not False or not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
        raise _untrusted(archive.path, f"PyTorch would unpickle {abbreviated(name)}")
    if folder + entry not in archive.entries:
        raise InputError(f"{archive.path} is damaged: it has no entry {abbreviated(folder + entry)}")
    return entry


def _inputs(archive: Archive, name: str) -> bytes:
    """The example inputs, checked by the pickle VM; empty if there are none or they are too big."""
    if name not in archive.entries or not archive.entries[name].nbytes:
        return b""
    if archive.entries[name].nbytes > MAX_SAMPLE_INPUTS_BYTES:
        return b""
    content = archive.read(name, MAX_SAMPLE_INPUTS_BYTES)
    context, rewritten = "its entry of example inputs", io.BytesIO()
    try:
        with ZipFile(io.BytesIO(content)) as inner:
            infos = inner.infolist()
            pickles = [info for info in infos if info.filename.casefold().endswith(".pkl")]
            total = sum(info.file_size for info in infos)
            if len(pickles) != 1 or total > MAX_SAMPLE_INPUTS_BYTES or not all(info.filename for info in infos):
                raise _untrusted(archive.path, f"{context} is not a pickle of tensors only")
            foreign_calls = interpret(inner.read(pickles[0]), archive.path, context).foreign_calls
            # Written anew, so that PyTorch loads the pickle that was checked, however it looks entries up.
            with ZipFile(rewritten, "w") as out:
                for info in infos:
                    out.writestr(info.filename, inner.read(info))
    except (BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError, RuntimeError) as error:
        raise _untrusted(archive.path, f"{context} is not a checkpoint that prunectl can verify") from error
    if foreign_calls:
        raise _untrusted(archive.path, f"{context} {foreign_calls[0]}")
    return rewritten.getvalue()


def _untrusted(path: Path, why: str) -> UntrustedError:
    return UntrustedError(
        f"{path} holds more than a program and its weights: {why}", hint="if you trust its author, add --trust"
    )


class _AllowLists:
    """Checks every string of a program against the list for its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[tuple[str, str]] = set()

    def check(self, program: Mapping[str, Any]) -> None:
        self._value("", program, 0)

    def _value(self, key: str, value: Any, depth: int) -> None:
        if depth > MAX_CONFIG_DEPTH:
            raise InputError(f"{self.path} is refused: its program is nested more than {MAX_CONFIG_DEPTH} deep")
        if isinstance(value, str):
            self._text(key, value)
        elif isinstance(value, list):
            for item in value:
                self._value(key, item, depth + 1)
        elif isinstance(value, dict):
            is_name = _KEYS.get(key, _is_identifier)
            for name, item in value.items():
                if not is_name(name):
                    self._refuse(key or "key", name)
                self._value("" if key in _TABLES else name, item, depth + 1)

    def _text(self, key: str, text: str) -> None:
        if (key, text) not in self.known:
            is_listed = _TEXTS.get(key)
            if is_listed is None or not is_listed(text):
                self._refuse(key, text)
            self.known.add((key, text))

    def _refuse(self, key: str, text: str) -> None:
        raise _untrusted(self.path, f"its {abbreviated(key)} {abbreviated(text)} is not on the allow-list")


def is_operator(target: str) -> bool:
    """Whether an operation of a graph only computes."""
    if target in SCALARS:
        return True
    match = _OPERATOR.fullmatch(target)
    if not match:
        return False
    library, name, _ = match.groups()
    if library == "higher_order":
        return name in HIGHER_ORDER
    return library in NAMESPACES and name not in WRITING and (not name.startswith("__") or name in _DUNDERS)


def is_expression(text: str) -> bool:
    """Whether a symbolic size, which sympify evaluates, consists of symbols, numbers and listed functions only."""
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        return False
    powers = len(_POWERS.findall(text))
    if powers > _MAX_POWERS or (powers and _BIG.search(text)):
        return False
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return False
        name = token["word"]
        if name is not None and name not in FUNCTIONS and not _IS_SYMBOL.fullmatch(name):
            return False
        position = token.end()
    return True


def is_tree(text: str) -> bool:
    """Whether a tree specification names plain containers only: PyTorch imports any other class."""
    return _nodes(text) is not None


def is_tree_of_inputs(text: str) -> bool:
    """As `is_tree`, with identifiers as the names of keyword arguments: PyTorch uses them as parameter names."""
    nodes = _nodes(text)
    return nodes is not None and all(_is_identifier(str(key)) for depth, keys in nodes if depth == 1 for key in keys)


def _nodes(text: str) -> list[tuple[int, list[Any]]] | None:
    """The depth and the keys of each container; None where one is not on the list."""
    containers = []
    try:
        version, root = json.loads(text)
        todo = [(0, root)]
        while todo:
            depth, node = todo.pop()
            context = None if node["context"] is None else json.loads(node["context"])
            keys = context if isinstance(context, list) else [] if context is None else [context]
            if version != 1 or (node["type"] is not None and node["type"] not in CONTAINERS):
                return None
            if not all(type(key) is int or (isinstance(key, str) and _is_attribute(key)) for key in keys):
                return None
            containers.append((depth, keys))
            todo += [(depth + 1, child) for child in node["children_spec"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return containers


def _is_identifier(text: str) -> bool:
    return bool(_IDENTIFIER.fullmatch(text))


def _is_attribute(text: str) -> bool:
    return bool(_ATTRIBUTE.fullmatch(text))


def _is_stack(text: str) -> bool:
    return bool(_STACK.fullmatch(text))


_TABLES = frozenset(
    {
        *("config", "range_constraints", "tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values"),
        *("custom_obj_values", "opset_version", "treespec_namedtuple_fields", "as_string_to_argument"),
    }
)
"""Keys of objects whose own keys are names in the program, not fields of the schema."""
_KEYS: Mapping[str, Callable[[str], bool]] = {
    "config": _is_attribute,
    "range_constraints": lambda text: bool(_IS_SYMBOL.fullmatch(text)),
    "treespec_namedtuple_fields": _is_attribute,
}
_TEXTS: Mapping[str, Callable[[str], bool]] = {
    "target": is_operator,
    "as_operator": is_operator,
    "expr_str": is_expression,
    "in_spec": is_tree_of_inputs,
    "out_spec": is_tree,
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "field_names", "verifiers", "type"), _is_identifier),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"), _is_attribute),
    **dict.fromkeys(("fqn", "path_name"), _is_attribute),
    "torch_version": lambda text: bool(_VERSION.fullmatch(text)),
    # String arguments of operators, such as a mode; PyTorch quotes them.
    **dict.fromkeys(("as_string", "as_strings"), lambda _text: True),
    "nn_module_stack": _is_stack,
}
"""By key, the check of a string; a string under any other key is refused."""


SCRIPT_LIBRARIES = frozenset(
    {"aten", "prim", "quantized", "_quantized", "prepacked", "mkldnn_prepacked", "torchvision"}
)
"""Namespaces of operators that only compute, except for those in WRITING."""
SCRIPT_CLASSES = frozenset({"quantized", "xnnpack"})
"""Libraries of classes that hold packed weights."""

_SCRIPT_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|#[^\n]*|(?P<word>[A-Za-z_]\w*)|\S""", re.DOTALL
)


def check_script(path: Path) -> None:
    """Refuse TorchScript that names an operator or a class that is not on a list."""
    archive = zip_read.open_archive(path)
    if len({name.casefold() for name in archive.entries}) < len(archive.entries):
        # PyTorch looks up entries without regard to case.
        raise InputError(f"{path} is refused: different readers would find different entries in it")
    left = MAX_SCRIPT_CODE_BYTES
    for name, entry in archive.entries.items():
        if "/code/" not in f"/{name.casefold()}" or name.casefold().endswith(".debug_pkl"):
            continue
        left -= entry.nbytes
        if left < 0:
            raise InputError(f"{path} is refused: it has more than {MAX_SCRIPT_CODE_BYTES} bytes of code")
        foreign = find_foreign(archive.read(name, MAX_SCRIPT_CODE_BYTES).decode("utf-8", "replace"))
        if foreign:
            raise UntrustedError(
                f"{path} holds TorchScript that does more than compute: {abbreviated(foreign)}",
                hint="if you trust its author, add --trust",
            )


def find_foreign(code: str) -> str:
    """The first operator or class in some code that is not on a list, as it is written; empty if there is none."""
    if '"""' in code or "'''" in code:
        return "a multi-line string"
    tokens = [match[0] for match in _SCRIPT_TOKEN.finditer(code) if not match[0].startswith("#")]
    if not {'"', "'", "\\"}.isdisjoint(tokens):
        # After an unbalanced quote, code would be taken for a string.
        return "a string that does not end"
    tokens += [""] * 3
    for index in range(len(tokens) - 3):
        first, second, name = tokens[index], tokens[index + 1], tokens[index + 2]
        if first == "ops" and (index == 0 or tokens[index - 1] != "."):
            if second != "." or name not in SCRIPT_LIBRARIES:
                return f"ops.{name}"
        elif first == "classes" and tokens[index - 1] == ".":
            if second != "." or name not in SCRIPT_CLASSES:
                return f"torch.classes.{name}"
        elif first == "." and (second in WRITING or second.startswith("rpc_")):
            return f"{tokens[index - 1]}.{second}"
        elif first == "getattr" and not _is_plain_getattr(tokens[index + 1 : index + 64]):
            return "getattr"
    return ""


def _is_plain_getattr(tokens: list[str]) -> bool:
    """Whether an attribute is looked up by a plain name: `getattr(self.layers, "0")`."""
    if ")" not in tokens:
        return False
    *owner, comma, name, _ = tokens[: tokens.index(")") + 1] if tokens.index(")") > 2 else ["", "", "", ""]
    is_text = name[:1] in {'"', "'"} and "\\" not in name and name[1:-1] not in WRITING
    return comma == "," and is_text and not {"ops", "torch"} & set(owner)
