"""Pickle programs, harmless and not: followed, never run."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest

from prunectl.errors import InputError
from prunectl.formats.torch import tree
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, Persistent, PickleDict, RawBytes
from prunectl.formats.torch.pickle.vm import interpret

WHERE = Path("m.pt")


def plain(value: Any) -> Any:
    """Turn what the interpreter makes of plain data back into that data."""
    if isinstance(value, PickleDict):
        return {plain(key): plain(item) for key, item in value.items}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value.head if isinstance(value, RawBytes) else value


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_back_in_every_protocol(protocol: int) -> None:
    shared = ["x"]
    data = {
        "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**70, -(2**70), 1.5, True, False, None],
        "texts": ("", "abc", "é", "x" * 300),
        "nested": [[], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, shared, shared],
        "ordered": collections.OrderedDict(a=1, b=2),
    }
    assert plain(interpret(pickle.dumps(data, protocol), WHERE, "it").value) == data


def test_bytes_and_sets_come_back() -> None:
    value = interpret(pickle.dumps([b"abc", {1, 2}, frozenset({3}), bytearray(b"x")], 5), WHERE, "it").value
    assert [plain(item) if isinstance(item, RawBytes) else sorted(item) for item in value] == [
        b"abc",
        [1, 2],
        [3],
        b"x",
    ]


def test_strings_of_python_2_are_text() -> None:
    assert interpret(b"(U\x03abcT\x03\x00\x00\x00defS'ghi'\nt.", WHERE, "it").value == ("abc", "def", "ghi")
    # As Python reads them, so that a key cannot be one thing to us and another to PyTorch.
    assert interpret(b"S'of\\x66set'\n.", WHERE, "it").value == "offset"


def test_an_instance_is_told_and_not_made() -> None:
    program = interpret(b"(imodels\nNet\n}S'a'\nI1\nsb.", WHERE, "it")
    assert isinstance(program.value, OpaqueCall)
    assert program.value.path == "models.Net"
    assert program.foreign_calls == ("class models.Net",)


@pytest.mark.parametrize(
    ("program", "fact"),
    [
        (b"cos\nsystem\n(S'ls'\ntR.", "calls os.system"),
        (b"\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", "calls posix.system"),
        (b"(cbuiltins\neval\nS'1'\no.", "class builtins.eval"),
        (b"(S'1'\nibuiltins\nexec\n.", "class builtins.exec"),
        (b"cbuiltins\neval\n)\x81.", "class builtins.eval"),
        (b"cbuiltins\neval\n)}\x92.", "class builtins.eval"),
        (b"cbuiltins\neval\n.", "imports builtins.eval"),
        (b"\x82\x07.", "imports copyreg.extension 7"),
        (
            b"\x8c\x0ctorch._utils\x8c\x20_rebuild_tensor.__builtins__.get\x93\x8c\x04eval\x85R\x8c\x031+1\x85R.",
            "calls torch._utils._rebuild_tensor.__builtins__.get",
        ),
        (b"ctorch.jit._pickle\n__builtins__\n.", "imports torch.jit._pickle.__builtins__"),
    ],
)
def test_whatever_would_run_is_named(program: bytes, fact: str) -> None:
    assert interpret(program, WHERE, "it").foreign_calls == (fact,)


def test_what_the_container_provides_is_listed() -> None:
    program = interpret(b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ.", WHERE, "it")
    assert isinstance(program.value, Persistent)
    assert program.storages == (("storage", Global("torch", "FloatStorage"), "0", "cpu", 4),)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"(",
        b".",
        b"R.",
        b"K",
        b"X\xff\xff\xff\xffabc.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"\x8b\xff\xff\xff\xff.",
        b"\x8b\xff\xff\x00\x00" + b"9" * 70_000 + b".",
        b"I" + b"9" * 10_000 + b"\n.",
        b"F1e\n.",
        b"h\x07.",
        b"g-1\n.",
        b"]]s.",
        b"}(K\x01u.",
        b"K\x01K\x02a.",
        b"\x97.",
        b"\xff.",
        b"\x85.",
        b"cos\n",
        b"K\x01K\x02\x93.",
        b"t.",
    ],
)
def test_a_broken_program_is_refused_in_a_sentence(program: bytes) -> None:
    with pytest.raises(InputError, match=r"m\.pt is truncated or damaged: its pickle is not"):
        interpret(program, WHERE, "its pickle")


MANY = 200_000


NESTED = "m.pt is refused: its values are nested more than 400 deep"
UNFOLLOWED = "m.pt is truncated or damaged: it is not a pickle that can be interpreted"


@pytest.mark.parametrize(
    ("program", "refusal"),
    [
        pytest.param(b"]" * (MANY // 2) + b"a" * (MANY // 2 - 1) + b".", NESTED, id="deep lists"),
        pytest.param(b")" + b"\x85" * MANY + b".", NESTED, id="deep tuples"),
        pytest.param(b")" + b"2\x86" * (MANY // 2) + b".", NESTED, id="doubling"),
        pytest.param(b"}" * 3 * MANY + b".", UNFOLLOWED, id="dictionaries"),
        pytest.param(b"(" * MANY + b".", UNFOLLOWED, id="marks"),
        pytest.param(b"]" * 3_800_000 + b".", "m.pt is refused: it is a pickle of more than 2000000 steps", id="long"),
    ],
)
def test_a_bomb_is_refused(program: bytes, refusal: str) -> None:
    with pytest.raises(InputError) as caught:
        tree.list_tensors(WHERE, interpret(program, WHERE, "it").value, {})
    assert str(caught.value).startswith(refusal)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"cos\nsystem\nq\x00" + b"h\x00)R" * (MANY // 3) + b".", id="calls"),
        pytest.param(b"\x8c\x03abc" * MANY + b".", id="texts"),
    ],
)
def test_a_long_program_is_followed_without_tensors(program: bytes) -> None:
    assert not tree.list_tensors(WHERE, interpret(program, WHERE, "it").value, {})


def test_a_billion_laughs_of_dictionaries_is_refused() -> None:
    program = b"}q\x00" + b"0}(S'a'\nh\x00S'b'\nh\x00uq\x00" * 60 + b"."
    with pytest.raises(InputError, match="refer to each other without end"):
        tree.list_tensors(WHERE, interpret(program, WHERE, "it").value, {})


def test_a_value_inside_itself_is_walked_once() -> None:
    assert tree.list_tensors(WHERE, interpret(b"}q\x00S'me'\nh\x00s.", WHERE, "it").value, {}) == []
