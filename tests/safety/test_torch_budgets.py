"""What hostile files of PyTorch cost: refused at once, or read in no more than they are worth."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from prunectl.analysis.stats import measure_stats
from prunectl.analysis.tensor_io import count_zeros
from prunectl.formats.registry import open_model
from tests.running import FIXTURES, here
from tests.safety.cost import assert_refused_cheaply, cost

PROTOCOL, KEPT, POPPED = b"\x80\x02", 40, b"0"


def checkpoint(path: Path, program: bytes, *, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def text(raw: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def deep(opening: bytes, closing: bytes, times: int) -> bytes:
    return PROTOCOL + opening * times + closing * (times - 1) + b"Q."


def laughs(opening: bytes, filling: bytes, times: int = KEPT) -> bytes:
    """Containers that hold the one before twice."""
    program = PROTOCOL + opening + b"q\x00"
    for at in range(times):
        program += opening + b"q" + bytes([at + 1]) + b"(" + filling.replace(b"?", b"h" + bytes([at]))
    return program + b"Q."


def calls(function: bytes, argument: bytes, times: int) -> bytes:
    """One big argument, and a function called with it again and again."""
    return PROTOCOL + argument + b"\x85q\x02" + POPPED + b"](" + (b"c" + function + b"\nh\x02R") * times + b"e."


def big_list(elements: int) -> bytes:
    return b"](" + b"N" * elements + b"e"


HOSTILE = {
    "lists-300-deep": deep(b"]", b"a", 300),
    "lists-100000-deep": deep(b"]", b"a", 100_000),
    "dictionaries-3000-deep": PROTOCOL + b"}" + b"K\x00}" * 3000 + b"s" * 3000 + b"Q.",
    "a-billion-lists": laughs(b"]", b"??e"),
    "a-billion-dictionaries": laughs(b"}", b"K\x00?K\x01?u"),
    "a-tuple-of-a-billion-lists": laughs(b"]", b"??e")[:-2] + b"\x85Q.",
    "list-of-500000": calls(b"builtins\nlist", big_list(500_000), 1000),
    "set-of-500000": calls(b"builtins\nset", big_list(500_000), 1000),
    "deque-of-200000": calls(b"collections\ndeque", big_list(200_000), 400),
    "dictionary-of-200000": calls(b"collections\nOrderedDict", b"](" + b"NN\x86" * 200_000 + b"e", 400),
    "broken-utf-8": PROTOCOL + b"](" + text(b"\xff" * 60_000) * 300 + b"e.",
    "short-broken-utf-8": PROTOCOL + b"](" + text(b"\xff" * 60) * 300_000 + b"e.",
    "wide-letters": PROTOCOL + b"](" + text(b"a" * 60_000 + "😀".encode()) * 600 + b"e.",
    "a-name-of-120000-letters": PROTOCOL + text(b"m" * 60_000) + text(b"n" * 60_000) + b"\x93q\x02)R.",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_that_is_made_to_keep_its_reader_busy_is_refused_at_once(program: bytes, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.pt", program)
    assert_refused_cheaply(cost("inspect", path, scratch=tmp_path))


def test_a_persistent_id_that_is_no_name_is_refused_in_a_tar_and_a_legacy_file(tmp_path: Path) -> None:
    whole = PROTOCOL + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + PROTOCOL + b"M\xe9\x03." + PROTOCOL + b"}."
    path = tmp_path / "m.bin"
    path.write_bytes(whole + deep(b"]", b"a", 3000) + PROTOCOL + b"].")
    assert_refused_cheaply(cost("inspect", path, scratch=tmp_path))


def views(ways: list[tuple[int, int, int]], elements: int, *, keys: bytes = b"0") -> bytes:
    """Tensors over one storage, or over several in turn: of each the start, the rows and the columns."""
    program = PROTOCOL + b"ctorch._utils\n_rebuild_tensor_v2\nq\x000" + b"ccollections\nOrderedDict\n)Rq\x010"
    pieces = [program]
    for at, key in enumerate(keys, 2):
        storage = text(b"storage") + b"ctorch\nFloatStorage\n" + text(bytes([key])) + text(b"cpu") + number(elements)
        pieces += b"(", storage, b"tQq", bytes([at]), b"0"
    pieces.append(b"}(")
    for at, (start, rows, columns) in enumerate(ways):
        shape, strides = number(rows) + number(columns), number(columns) + number(1)
        memo = bytes([2 + at % len(keys)])
        pieces += text(b"%06d" % at), b"h\x00(h", memo, number(start), b"(", shape, b"t(", strides, b"t\x89h\x01tR"
    return b"".join([*pieces, b"u."])


def test_two_thousand_views_of_a_deflated_storage_are_refused(tmp_path: Path) -> None:
    count = 60_000_000
    ways = [(at, 999, count // 1000) for at in range(2000)]
    path = checkpoint(tmp_path / "m.pt", views(ways, count), storages={"0": bytes(4 * count)})
    assert_refused_cheaply(cost("inspect", path, scratch=tmp_path))


def test_a_deflated_storage_is_inflated_once_for_all_that_see_it(tmp_path: Path) -> None:
    ways = [(4 * at, 2, 2) for at in range(2000)]
    path = checkpoint(tmp_path / "m.pt", views(ways, 2_000_000), storages={"0": bytes(8_000_000)})
    found = cost("inspect", path, scratch=tmp_path)
    assert found.outcome.code == 0
    # Inflating it for each of them would take a minute.
    assert found.seconds < 10, found.seconds


def test_deflated_storages_that_are_seen_in_turn_are_refused(tmp_path: Path) -> None:
    program = views([(4 * at, 2, 2) for at in range(2000)], 2_000_000, keys=b"01")
    path = checkpoint(tmp_path / "m.pt", program, storages={key: bytes(8_000_000) for key in "01"})
    assert_refused_cheaply(cost("inspect", path, scratch=tmp_path))


def test_a_hundred_thousand_tensors_over_one_storage_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.pt", views([(0, 8, 8)] * 60_000, 64), storages={"0": bytes(256)})
    assert_refused_cheaply(cost("prune", path, "-o", tmp_path / "p.pt", "-s", "50%", scratch=tmp_path))
    assert not (tmp_path / "p.pt").exists()


def test_tied_tensors_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1_000_000
    storage = struct.pack("<4f", 0, 1, 2, 3) * (count // 4)
    path = checkpoint(tmp_path / "m.pt", views([(0, 1000, 1000)] * 400, count), storages={"0": storage})
    model, reads = open_model(path), []
    monkeypatch.setattr("prunectl.analysis.stats.count_zeros", lambda *of: reads.append(of) or count_zeros(*of))
    assert {row.zeros for row in measure_stats(model, model.tensors).layers} == {count // 4}
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("digits_cnn.pt", "/version"),
        ("digits_cnn_torchscript.pt", "/version"),
        ("digits_cnn.pt2", "/version"),
        ("lambda_layer.keras", "metadata.json"),
    ],
)
def test_an_entry_without_a_name_is_refused_by_every_command(name: str, entry: str, tmp_path: Path) -> None:
    path, out = tmp_path / name, tmp_path / f"out{Path(name).suffix}"
    with zipfile.ZipFile(FIXTURES / name) as archive:
        (whole,) = (inside.encode() for inside in archive.namelist() if inside.endswith(entry))
    path.write_bytes((FIXTURES / name).read_bytes().replace(whole, b"\0" + whole[1:]))
    for words in (
        ("inspect", path),
        ("size", path),
        ("diff", FIXTURES / name, path),
        ("strip", path, "-o", out),
        ("prune", path, "-o", out, "-s", "50%", "--pack"),
        ("prune", path, "-o", out, "-s", "50%", "--wrap"),
        ("export", path, "-o", tmp_path / "out.npz"),
        ("finetune", path, "-o", out, "--data", FIXTURES / "digits.npz"),
    ):
        done = here(*words)
        assert (done.code, "one of its entries has no name" in done.err) == (3, True), (words, done.err)
    assert os.listdir(tmp_path) == [name]


def test_a_program_whose_json_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    config = {"config": {"w": {"path_name": "weight_0", "tensor_meta": None}}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", '{"graph_module": ' + "[" * 100_000 + "]" * 100_000 + "}")
        archive.writestr("m/data/weights/model_weights_config.json", json.dumps(config))
        archive.writestr("m/data/constants/model_constants_config.json", '{"config": {}}')
    assert_refused_cheaply(cost("inspect", path, scratch=tmp_path))


def test_a_checkpoint_of_twenty_thousand_tensors_over_one_buffer_is_read(tmp_path: Path) -> None:
    """Frameworks lay all parameters into one buffer."""
    ways = [(4 * at, 2, 2) for at in range(20_000)]
    path = checkpoint(tmp_path / "m.pt", views(ways, 80_000), storages={"0": bytes(320_000)})
    assert len(open_model(path).tensors) == len(ways)
