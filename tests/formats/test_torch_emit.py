"""A pickle program that is recorded and written again makes what it made before."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import enum
import fractions
import io
import pathlib
import pickle
import pickletools
import uuid
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunectl.errors import InputError
from prunectl.formats.torch.pickle.edit import (
    dict_of,
    entries,
    items,
    number_node,
    replace_entries,
    string_of,
    text_node,
    value_of,
)
from prunectl.formats.torch.pickle.ir import PickleIR, emit_pickle, parse_ir
from prunectl.formats.torch.pickle.opcodes import OpaqueCall, Persistent, PickleDict, RawBytes
from prunectl.formats.torch.pickle.vm import interpret

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WHERE = Path("m.pt")
PROTOCOLS = range(6)


class Colour(enum.Enum):
    RED = 1


class Slotted:
    """Has no dictionary of its own."""

    __slots__ = ("left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def __getstate__(self) -> tuple[Any, Any]:
        return self.left, self.right

    def __setstate__(self, state: tuple[Any, Any]) -> None:
        self.left, self.right = state


class Keyworded:
    """Is made with a keyword, which protocol 2 spells in a way of its own."""

    def __new__(cls, *, size: int = 0) -> Self:
        made = super().__new__(cls)
        made.size = size
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"size": self.size}


class Growing(list[Any]):
    """A list with attributes."""


def again(program: bytes) -> bytes:
    return b"".join(emit_pickle(parse_ir(program, WHERE)))


def shape_of(thing: Any, seen: dict[int, int] | None = None) -> Any:
    """Tell what the restricted machine made in plain words; what was met before by its number."""
    seen = {} if seen is None else seen
    if isinstance(thing, list | PickleDict | OpaqueCall | Persistent):
        if id(thing) in seen:
            return f"same as {seen[id(thing)]}"
        seen[id(thing)] = len(seen)
    if isinstance(thing, RawBytes):
        return "raw", thing.nbytes, thing.head
    if isinstance(thing, PickleDict):
        return "pairs", [(shape_of(key, seen), shape_of(item, seen)) for key, item in thing.items]
    if isinstance(thing, OpaqueCall):
        insides = (thing.function, thing.args, thing.state, thing.pairs, thing.items)
        return "made", [shape_of(inside, seen) for inside in insides]
    if isinstance(thing, Persistent):
        return "stored", shape_of(thing.id, seen)
    if isinstance(thing, list | tuple):
        return type(thing).__name__, [shape_of(item, seen) for item in thing]
    return repr(thing)


def same_program(first: bytes, second: bytes) -> None:
    assert shape_of(interpret(second, WHERE, "it").value) == shape_of(interpret(first, WHERE, "it").value)
    assert again(second) == second
    pickletools.dis(second, out=io.StringIO())


THINGS = {
    "plain": {"n": [0, -1, 255, 65536, 2**70, 1.5, True, None], "t": ("", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))},
    "texts": ["é", "x" * 300, "line\nbreak", "x" * 70_000],
    "bytes": [b"abc", b"x" * 5000],
    "sets": [{1, 2}, frozenset({3}), set(), bytearray(b"y")],
    "ordered": collections.OrderedDict(a=1, b=[2]),
    "defaults": collections.defaultdict(list, {1: [2]}),
    "counted": collections.Counter("abba"),
    "queued": collections.deque([1, 2]),
    "namespace": argparse.Namespace(depth=3, layers=[1, 2]),
    "enum": [Colour.RED, Colour.RED],
    "slots": Slotted([1], "right"),
    "keywords": Keyworded(size=3),
    "growing": Growing([1, 2]),
    "times": [dt.datetime(2024, 1, 2, tzinfo=dt.UTC), dt.timedelta(3)],
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1 + 2j, uuid.UUID(int=5)],
    "paths": pathlib.PurePosixPath("a/b"),
    "numpy": [np.float32(3), np.arange(6.0).reshape(2, 3), np.dtype("<f4"), np.arange(3, dtype=">i2")],
    "classes": [dict, collections.OrderedDict, len],
    "errors": ValueError("no"),
}


def words(thing: Any) -> Any:
    """Tell things that have no equality of their own apart."""
    if isinstance(thing, Slotted | Keyworded | Growing | ValueError):
        state = thing.__getstate__() if isinstance(thing, Slotted) else vars(thing)
        return type(thing), state, list(thing) if isinstance(thing, list) else None, str(thing.__reduce_ex__(2)[1])
    if isinstance(thing, list) and any(isinstance(item, np.ndarray | np.generic) for item in thing):
        return [(type(item), str(getattr(item, "dtype", "")), repr(item)) for item in thing]
    return type(thing), thing


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", list(THINGS))
def test_things_come_back_from_every_protocol(name: str, protocol: int) -> None:
    thing = THINGS[name]
    if name == "texts" and protocol == 0:
        thing = thing[:-1]  # no line is that long
    first = pickle.dumps(thing, protocol)
    second = again(first)
    same_program(first, second)
    assert words(pickle.loads(second)) == words(pickle.loads(first))
    assert len(second) <= len(first) + 16


nested = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=20,
)


@given(nested, st.sampled_from(PROTOCOLS))
@settings(max_examples=150, deadline=None)
def test_any_plain_data_comes_back(data: Any, protocol: int) -> None:
    first = pickle.dumps([data, data], protocol)
    second = again(first)
    same_program(first, second)
    found = pickle.loads(second)
    assert found == [data, data]
    if isinstance(data, list | dict | set):
        assert found[0] is found[1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_things_inside_themselves_come_back(protocol: int) -> None:
    loop: list[Any] = []
    loop.append(loop)
    pair: tuple[Any, ...] = ([],)
    pair[0].append(pair)
    long: tuple[Any, ...] = ([], 1, 2, 3)
    long[0].append(long)
    own: dict[str, Any] = {}
    own["me"] = own
    space = argparse.Namespace()
    space.me, space.list = space, [space]
    second = again(pickle.dumps([loop, pair, long, own, space], protocol))
    loop, pair, long, own, space = pickle.loads(second)
    assert loop[0] is loop
    assert pair[0][0] is pair
    assert long[0][0] is long
    assert own["me"] is own
    assert space.me is space.list[0] is space


def test_strings_of_python_2_and_old_instances_stay_as_they_stand() -> None:
    for program in (
        b"(U\x03abcT\x03\x00\x00\x00defS'ghi'\nt.",
        b"(imodels\nNet\n}S'a'\nI1\nsb.",
        b"(cmodels\nNet\nI01\no.",
    ):
        same_program(program, again(program))


def test_what_a_container_provides_is_asked_for_again() -> None:
    for program in (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ.", b"P7\n."):
        same_program(program, again(program))


def test_nothing_is_called_on_the_way() -> None:
    program = b"cos\nsystem\n(S'exit 1'\ntR."
    assert again(program).startswith(b"cos\nsystem\n")


def test_deep_values_take_no_recursion() -> None:
    deep = b"]" * 20_000 + b"a" * 19_999 + b"."
    assert len(again(deep)) > len(deep)


@pytest.mark.parametrize(
    "program", [b"", b"(", b".", b"R.", b"K", b"X\xff\xff\xff\xffabc.", b"h\x07.", b"\xff.", b"]q\x00"]
)
def test_a_broken_program_is_refused_in_a_sentence(program: bytes) -> None:
    with pytest.raises(InputError, match=r"m\.pt is truncated or damaged"):
        parse_ir(program, WHERE)


class TestChangedEntries:
    @pytest.mark.parametrize(
        "make", [dict, collections.OrderedDict, lambda pairs: collections.defaultdict(list, pairs)]
    )
    def test_a_dictionary_with_other_entries_keeps_its_kind(self, make: Any) -> None:
        made = make([("a", [1]), ("b", 2), ("c", 3)])
        for protocol in PROTOCOLS:
            recipe = parse_ir(pickle.dumps(made, protocol), WHERE)
            inside = entries(recipe.root)
            assert inside is not None
            replace_entries(recipe.root, [inside[0], (text_node("é"), number_node(2**40)), inside[2]])
            found = pickle.loads(b"".join(emit_pickle(recipe)))
            assert found == {"a": [1], "é": 2**40, "c": 3}
            assert type(found) is type(made)

    def test_an_ordered_dictionary_of_python_2_has_entries_too(self) -> None:
        program = b"ccollections\nOrderedDict\n(](](S'a'\nI1\ne](S'b'\nI2\neetR."
        root = parse_ir(program, WHERE).root
        assert {name: value_of(item) for name, item in dict_of(root).items()} == {"a": 1, "b": 2}
        replace_entries(root, [entry for entry in entries(root) or () if string_of(entry[0]) == "b"])
        assert pickle.loads(b"".join(emit_pickle(PickleIR(root, b"", 0)))) == {"b": 2}

    def test_items_are_those_of_lists_and_tuples(self) -> None:
        root = parse_ir(pickle.dumps([["a", "b"], ("c",)], 2), WHERE).root
        assert [[string_of(item) for item in items(inner)] for inner in items(root)] == [["a", "b"], ["c"]]


def checkpoint() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias = nn.Parameter(model[0].weight[0])
    optimizer = torch.optim.Adam(model.parameters())
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": dt.date(2024, 1, 1)}


@pytest.mark.parametrize(
    "make",
    [
        checkpoint,
        lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True).eval(),
        lambda: nn.LSTM(3, 4),
        lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], momentum=0.9),
        lambda: [torch.rand(3).to_sparse(), torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)],
        lambda: [nn.Parameter(torch.ones(2)), torch.ones(3, dtype=torch.float8_e4m3fn), torch.Size([1]), torch.float32],
    ],
    ids=["checkpoint", "module", "recurrent", "optimizer", "sparse and quantized", "parameters"],
)
def test_pickles_of_torch_load_to_the_same(make: Any) -> None:
    first, second, third = io.BytesIO(), io.BytesIO(), io.BytesIO()
    thing = make()
    torch.save(thing, first)
    reader = torch._C.PyTorchFileReader(io.BytesIO(first.getvalue()))
    program = reader.get_record("data.pkl")
    same_program(program, again(program))
    writer = torch._C.PyTorchFileWriter(second)
    for name in reader.get_all_records():
        record_ = again(program) if name == "data.pkl" else reader.get_record(name)
        if name not in {"version", ".data/serialization_id"}:
            writer.write_record(name, record_, len(record_))
    writer.write_end_of_file()
    second.seek(0)
    torch.save(torch.load(second, weights_only=False), third)
    third.seek(0)
    # Loaded and saved by PyTorch, both give the same program: types, order, ties and views included.
    first.seek(0)
    fourth = io.BytesIO()
    torch.save(torch.load(first, weights_only=False), fourth)
    programs = [torch._C.PyTorchFileReader(io.BytesIO(f.getvalue())) for f in (third, fourth)]
    assert programs[0].get_record("data.pkl") == programs[1].get_record("data.pkl")
    for name in programs[0].get_all_records():
        if name.startswith("data/"):
            assert programs[0].get_record(name) == programs[1].get_record(name)
