"""Pictures of masks: what is in them is what NumPy counts, and they stay small."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from prunectl import api
from prunectl.analysis.patterns import FIELDS, sparsity_map, sparsity_maps
from prunectl.commands import app
from prunectl.formats import extents
from prunectl.formats.base import ModelFile
from prunectl.formats.registry import open_model
from prunectl.reporting.html.charts import COLORS, draw_sparsity_maps, quantise
from tests.reporting.test_html import Page
from tests.running import FIXTURES

Matrix = NDArray[np.float64]


def decoded(uri: str) -> NDArray[np.uint8]:
    """Return the colours of a picture, pixel by pixel, read by hand."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(name + body)
        chunks[name] = body
        at += 12 + length
    wide, tall, bits, kind, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (bits, kind, rest) == (4, 3, [0, 0, 0])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(tall, -1)
    assert not lines[:, 0].any()
    pixels = np.stack([lines[:, 1:] >> 4, lines[:, 1:] & 15], axis=-1).reshape(tall, -1)[:, :wide]
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[pixels]


def fields_by_hand(matrix: NDArray[np.bool_]) -> Matrix:
    """Return the share of zeros in each field, element by element."""
    high, wide = (min(side, FIELDS) for side in matrix.shape)
    zeros, sizes = np.zeros((high, wide)), np.zeros((high, wide))
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            place = row * high // matrix.shape[0], column * wide // matrix.shape[1]
            zeros[place] += matrix[row, column]
            sizes[place] += 1
    return zeros / sizes


def sparse(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    weights = random.normal(size=shape).astype(np.float32)
    weights[random.uniform(size=shape) < np.linspace(0, 1, shape[-1])] = 0
    return weights


def of_numbers(path: Path, **arrays: NDArray[np.float32]) -> ModelFile:
    save_file(arrays, path)
    return open_model(path)


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (65, 130), (100, 7), (7, 300), (10, 3, 5, 5)])
def test_a_picture_shows_the_share_of_zeros_of_each_field(shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = sparse(*shape)
    model = of_numbers(tmp_path / "m.safetensors", **{"fc.weight": weights})
    found = sparsity_map(model, model.tensors[0])
    matrix = weights.reshape(shape[0], -1) == 0
    by_hand = fields_by_hand(matrix)
    assert np.allclose(found.zeros / found.sizes, by_hand)
    assert found.share == matrix.mean()
    (image,) = Page.of(draw_sparsity_maps([found])).all("img")
    assert image.attributes["src"] is not None
    colors = decoded(image.attributes["src"])
    shown = np.rint(by_hand * 15)
    # Nearly none is not none, and nearly all not all.
    shown = np.where((by_hand > 0) & (shown == 0), 1, np.where((by_hand < 1) & (shown == 15), 14, shown))
    assert np.array_equal(colors, np.array(COLORS, np.uint8)[shown.astype(int)])


def test_it_is_the_same_whichever_way_the_file_stores_it_and_however_small_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = {}
    for block in (extents.BLOCK_BYTES, 256):
        monkeypatch.setattr(extents, "BLOCK_BYTES", block)
        for name in ("digits_cnn.h5", "digits_cnn.pt"):
            model = open_model(FIXTURES / name)
            tensor = next(one for one in model.tensors if "fc1" in one.name and len(one.shape) == 2)
            found = sparsity_map(model, tensor)
            assert (found.rows, found.columns) == (32, 256)
            assert np.array_equal(found.zeros, whole.setdefault(name, found.zeros))


def test_outputs_are_rows_in_keras_and_in_pytorch(tmp_path: Path) -> None:
    for name in ("digits_cnn.h5", "digits_cnn.onnx"):
        out = tmp_path / name
        api.prune(FIXTURES / name, out, sparsity=0.7)
    one, other = (
        next(shown for shown in sparsity_maps(model, api.inspect(model.path)) if "fc1" in shown.name)
        for model in (open_model(tmp_path / "digits_cnn.h5"), open_model(tmp_path / "digits_cnn.onnx"))
    )
    assert np.array_equal(quantise(one), quantise(other))


def test_rows_without_any_weight_are_counted_and_told(tmp_path: Path) -> None:
    weights = np.ones((40, 10), np.float32)
    weights[3:15] = 0
    weights[20, 0] = -0.0
    model = of_numbers(tmp_path / "m.safetensors", **{"fc.weight": weights})
    (found,) = sparsity_maps(model, api.inspect(model.path))
    assert found.empty_rows == 12
    (image,) = Page.of(draw_sparsity_maps([found])).all("img")
    assert image.attributes["alt"] == "fc.weight, 40 x 10: 30.2 % zero; 12 empty rows"


def test_what_is_dense_has_no_picture(tmp_path: Path) -> None:
    model = of_numbers(tmp_path / "m.safetensors", **{"fc.weight": np.ones((8, 8), np.float32)})
    assert sparsity_maps(model, api.inspect(model.path)) == ()
    assert draw_sparsity_maps([]) == ""


def test_inspect_and_diff_show_them_and_nothing_else_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, place = tmp_path / "out.onnx", tmp_path / "page.html"
    api.prune(FIXTURES / "digits_cnn.onnx", out, sparsity=0.5)
    assert app.run(["inspect", str(out), "--html", str(place)]) == 0
    found = Page.of(place.read_text())
    assert [image.attributes["alt"].split(",")[0] for image in found.all("img")] == [  # type: ignore[union-attr]
        *("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")
    ]
    assert "maps of zeros" in [head.text for head in found.all("h3")]
    assert all((image.attributes["src"] or "").startswith("data:image/png;base64,") for image in found.all("img"))
    assert app.run(["diff", str(out), str(FIXTURES / "digits_cnn.onnx"), "--html", str(place)]) == 0
    assert len(Page.of(place.read_text()).all("img")) == 4
    assert app.run(["inspect", str(out), "--no-zeros", "--html", str(place)]) == 0
    assert not Page.of(place.read_text()).all("img")
    capsys.readouterr()
    assert app.run(["inspect", str(out), "--json"]) == 0
    assert "masks" not in capsys.readouterr().out


def test_five_hundred_pruned_layers_stay_under_a_megabyte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.encoder.layers.{at}.self_attention.projection.weight" for at in range(500)]
    path, place = tmp_path / "many.safetensors", tmp_path / "page.html"
    random = np.random.default_rng(0)
    noise = random.normal(size=(128, 128)).astype(np.float32) * (random.uniform(size=(128, 128)) < 0.5)
    save_file(dict.fromkeys(names, noise), path)
    assert app.run(["inspect", str(path), "--html", str(place)]) == 0
    page = place.read_bytes()
    assert len(page) < 1_000_000
    assert 0 < page.count(b"<img") < 100
