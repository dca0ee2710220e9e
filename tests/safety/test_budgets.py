"""What hostile files may cost: each is refused at once, in little memory, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prunectl.formats import budgets
from tests.running import FIXTURES
from tests.safety import makers
from tests.safety.cost import assert_refused_cheaply, cost
from tests.safety.makers import MEGABYTE, Maker, commas, field, filled, numbered

INSPECT, FLOPS, SIZE = ("inspect",), ("inspect", "--flops"), ("size",)
STRIP, PRUNE = ("strip", "-o"), ("prune", "--sparsity", "0.5", "-o")


@dataclass(frozen=True)
class Hostile:
    """A file, and the commands that it is tried with."""

    make: Callable[[], Maker]
    commands: tuple[tuple[str, ...], ...] = (INSPECT,)


def listed(megabytes: int, piece: bytes = b"[]", key: bytes = b"a") -> bytes:
    return filled(megabytes * MEGABYTE, piece, b'{"%s":' % key, b"}")


DENSE = json.dumps(makers.DENSE).encode()
FILES: dict[str, Hostile] = {
    "keras config of empty lists": Hostile(lambda: makers.keras(listed(63)), (INSPECT, STRIP)),
    "keras config of empty objects": Hostile(lambda: makers.keras(listed(63, b"{}"))),
    "keras metadata of empty lists": Hostile(lambda: makers.keras(DENSE, listed(63))),
    "keras config of 2^16 layers": Hostile(lambda: makers.keras(makers.doubled(16)), (INSPECT, STRIP, FLOPS)),
    "keras functional config of 2^16 layers": Hostile(
        lambda: makers.keras(makers.doubled(16, is_functional=True)), (INSPECT, STRIP)
    ),
    "keras config of 60,000 layers in a row": Hostile(
        lambda: makers.keras(
            b'{"class_name":"Sequential","config":{"layers":' + filled(60_000 * 19, b'{"class_name":"D"}') + b"}}"
        )
    ),
    "h5 config of empty lists": Hostile(lambda: makers.h5(listed(8)), (INSPECT, STRIP)),
    "h5 config of 2^16 layers": Hostile(lambda: makers.h5(makers.doubled(16)), (INSPECT, STRIP, FLOPS)),
    "h5 with ten million names": Hostile(lambda: makers.h5_names(10**7)),
    "h5 with a text of 40 MB": Hostile(lambda: makers.h5('{"a":"' + "a" * 40_000_000 + '"}')),
    "zip of a million entries": Hostile(lambda: makers.entries(10**6)),
    "saved model with metadata of empty lists": Hostile(lambda: makers.saved_model(listed(7))),
    "saved model with much metadata": Hostile(lambda: makers.saved_model(listed(1), 60)),
    "safetensors metadata of 99 MB": Hostile(
        lambda: makers.safetensors(filled(98_999_000, b"[]", b'{"__metadata__":', b"}"))
    ),
    "safetensors metadata of 63 MB": Hostile(lambda: makers.safetensors(listed(63, key=b"__metadata__"))),
    "safetensors shape of 10^7 ones": Hostile(lambda: makers.one_tensor(commas(b"1", 10**7), 4)),
    "safetensors shape of 10^6 twos": Hostile(lambda: makers.one_tensor(commas(b"2", 10**6))),
    "safetensors shape of 4*10^7 twos": Hostile(lambda: makers.one_tensor(commas(b"2", 4 * 10**7))),
    "safetensors shape of long numbers": Hostile(lambda: makers.one_tensor(commas(b"9" * 4000, 10**4))),
    "a million empty tensors": Hostile(lambda: makers.empty_tensors(10**6), (INSPECT, STRIP)),
    "an empty tensor of an impossible shape": Hostile(
        lambda: makers.one_tensor(b"0,9223372036854775807,9223372036854775807"), (INSPECT, STRIP, PRUNE)
    ),
    "shard index of 2 GB": Hostile(lambda: makers.index(b'{"weight_map":{}}', 2 << 30)),
    "shard index of empty lists": Hostile(lambda: makers.index(listed(60, key=b"weight_map"))),
    "shard index of two million names": Hostile(
        lambda: makers.index(b'{"weight_map":{' + numbered(b'"t%b":"a"', 2 * 10**6) + b"}}")
    ),
    "onnx sparse tensors that unfold": Hostile(
        lambda: makers.onnx(makers.onnx_sparse(2000, 1 << 25)), (INSPECT, PRUNE)
    ),
    "onnx tensors that share a hole": Hostile(
        lambda: makers.onnx_shared(1000, 1 << 30, is_varied=True), (INSPECT, SIZE)
    ),
    "tflite tensors over one buffer": Hostile(lambda: makers.tflite(90_000, 8), (INSPECT, PRUNE)),
    "tflite tensors over one big buffer": Hostile(lambda: makers.tflite(90_000, MEGABYTE)),
    "checkpoint with an object graph of 60 MB": Hostile(lambda: makers.checkpoint(b"\x0a\x00" * 30_000_000)),
    "checkpoint with many objects": Hostile(lambda: makers.checkpoint(b"\x0a\x00" * 7_000_000), (INSPECT, STRIP)),
    "checkpoint with many children": Hostile(lambda: makers.checkpoint(field(1, field(1, b"") * 7_000_000))),
    "checkpoint with a name that is no text": Hostile(
        lambda: makers.checkpoint(field(1, field(2, field(3, b"\xff" * 15_000_000))))
    ),
}
CASES = [(name, command) for name, file in FILES.items() for command in file.commands]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each file, made when it is first asked for."""
    known: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in known:
            known[name] = FILES[name].make()(tmp_path_factory.mktemp("file"))
        return known[name]

    return path


@pytest.mark.parametrize(("name", "command"), CASES, ids=[f"{name}, {' '.join(words)}" for name, words in CASES])
def test_it_is_refused_at_once(
    name: str, command: tuple[str, ...], made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(name)
    output = tmp_path / f"output{path.suffix}"
    verb, *options = command
    found = cost(verb, path, *options, *([output] if options[-1:] == ["-o"] else []), scratch=tmp_path)
    assert_refused_cheaply(found)
    assert not output.exists()


def test_a_thousand_tensors_over_one_hole_are_counted_once(tmp_path: Path) -> None:
    path = makers.onnx_shared(1000, 1 << 26)(tmp_path)
    found = cost("inspect", path, "--json", scratch=tmp_path)
    assert found.outcome.code == 0
    layers = found.outcome.json["models"][0]["layers"]
    assert len(layers) == 1000
    assert {row["zeros"] for row in layers} == {1 << 24}
    # Each by itself would take 64 GB of reading, half a minute at best.
    assert found.seconds < 5
    assert found.nbytes < 300_000_000


@pytest.mark.parametrize("name", ["digits_cnn.safetensors", "digits_cnn.keras", "digits_cnn.h5", "two_shards"])
def test_real_texts_are_far_below_the_limits(name: str, tmp_path: Path) -> None:
    found = cost("inspect", FIXTURES / name, scratch=tmp_path)
    assert found.outcome.code == 0


def test_a_header_of_a_hundred_thousand_tensors_is_within_the_limits() -> None:
    rows = ",".join(
        f'"model.layers.{at}.self_attn.q_proj.weight":{{"dtype":"BF16","shape":[4096,4096],"data_offsets":[{at},{at}]}}'
        for at in range(100_000)
    )
    assert _spent(f'{{"__metadata__":{{"format":"pt"}},{rows}}}') < budgets.MAX_JSON_OBJECT_BYTES


def test_an_index_of_half_a_million_tensors_is_within_the_limits() -> None:
    rows = ",".join(
        f'"model.layers.{at}.mlp.experts.gate_proj.weight":"model-00001-of-00163.safetensors"' for at in range(500_000)
    )
    text = f'{{"weight_map":{{{rows}}}}}'
    assert len(text) < budgets.MAX_JSON_BYTES
    assert _spent(text) < budgets.MAX_JSON_OBJECT_BYTES


def _spent(text: str) -> int:
    from prunectl.formats.safe_json import _parsed_bytes  # noqa: PLC0415 - what only this asks for

    return _parsed_bytes(text.encode())
