"""What TorchScript may do for PyTorch to load it without `--trust`: an allow-list of operators and classes.

TorchScript is a language of its own, without imports and without Python; it computes. But some of its operators write
files by name (aten::save, aten::from_file), some of its classes open connections, and `__setstate__` runs on loading.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunectl.errors import InputError, UntrustedError, abbreviated
from prunectl.formats import zip_read
from prunectl.formats.budgets import MAX_SCRIPT_CODE_BYTES
from prunectl.formats.torch.exported_trust import WRITING

LIBRARIES = frozenset({"aten", "prim", "quantized", "_quantized", "prepacked", "mkldnn_prepacked", "torchvision"})
"""Libraries of operators that compute and do nothing else, but for those in WRITING."""
CLASSES = frozenset({"quantized", "xnnpack"})
"""Libraries of classes that hold packed weights."""

_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|#[^\n]*|(?P<word>[A-Za-z_]\w*)|\S""", re.DOTALL
)


def check(path: Path) -> None:
    """Refuse TorchScript that names an operator or a class that is on no list."""
    archive = zip_read.open_archive(path)
    if len({name.casefold() for name in archive.entries}) < len(archive.entries):
        # PyTorch looks entries up whatever their case.
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
    """The first operator or class in some code that is on no list, as it is written; nothing if there is none."""
    if '"""' in code or "'''" in code:
        return "a text of several lines"
    tokens = [match[0] for match in _TOKEN.finditer(code) if not match[0].startswith("#")]
    if not {'"', "'", "\\"}.isdisjoint(tokens):
        # Whoever loses step here takes code for a text.
        return "a text that does not end"
    tokens += [""] * 3
    for index in range(len(tokens) - 3):
        first, second, name = tokens[index], tokens[index + 1], tokens[index + 2]
        if first == "ops" and (index == 0 or tokens[index - 1] != "."):
            if second != "." or name not in LIBRARIES:
                return f"ops.{name}"
        elif first == "classes" and tokens[index - 1] == ".":
            if second != "." or name not in CLASSES:
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
