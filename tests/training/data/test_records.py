from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, UsageError
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import as_tuple, peek
from tests.networks import keras
from tests.training.data.sources import opened, whole

SHAPE = (4, 3, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, *SHAPE), np.uint8)
LABELS = np.array([-1, 0, 1, 2, 1 << 40, 300, -(1 << 62)])
FLOATS = np.random.default_rng(1).standard_normal((7, 2)).astype(np.float32)
SCHEMA = {"x": {"feature": "image", "dtype": "uint8", "shape": list(SHAPE)}, "y": {"feature": "label"}}


@pytest.fixture(scope="module")
def tf() -> Any:
    keras()
    return importlib.import_module("tensorflow")


def example(tf: Any, number: int) -> bytes:
    train = tf.train
    feature = {
        "image": train.Feature(bytes_list=train.BytesList(value=[IMAGES[number].tobytes()])),
        "label": train.Feature(int64_list=train.Int64List(value=[LABELS[number]])),
        "floats": train.Feature(float_list=train.FloatList(value=FLOATS[number])),
    }
    found: bytes = train.Example(features=train.Features(feature=feature)).SerializeToString()
    return found


@pytest.fixture
def folder(tmp_path: Path, tf: Any) -> Path:
    for name, numbers in (("a.tfrecord", range(4)), ("b.tfrecord", range(4, 7))):
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            for number in numbers:
                writer.write(example(tf, number))
    (tmp_path / "f.json").write_text(json.dumps(SCHEMA))
    return tmp_path


def test_what_tensorflow_writes_is_read_back_over_all_files(folder: Path) -> None:
    x, y = whole(opened(f"{folder}/*.tfrecord?schema={folder}/f.json"))
    assert np.array_equal(x, IMAGES)
    assert x.dtype == np.uint8
    assert np.array_equal(y, LABELS)
    assert y.dtype == np.int64


def test_several_features_are_several_inputs(folder: Path) -> None:
    schema = {"x": [{"feature": "floats", "shape": [2]}, {"feature": "label", "dtype": "float32"}]}
    (folder / "g.json").write_text(json.dumps(schema))
    source = opened(f"{folder}/a.tfrecord?schema={folder}/g.json")
    batch = peek(source)
    assert batch is not None
    assert batch.y is None
    assert not source.has_targets
    assert np.array_equal(as_tuple(batch.x)[0], FLOATS[:4])
    assert np.array_equal(as_tuple(batch.x)[1], LABELS[:4].astype(np.float32))
    ports = TensorSpec("label", (), ""), TensorSpec("floats", (2,), "")
    batch = peek(opened(f"{folder}/a.tfrecord?schema={folder}/g.json", ModelSignature(ports, (), False)))
    assert batch is not None
    assert np.array_equal(as_tuple(batch.x)[1], FLOATS[:4])


def test_gzip_is_seen_by_content(folder: Path, tf: Any) -> None:
    plain = (folder / "a.tfrecord").read_bytes()
    (folder / "z.tfrecord").write_bytes(gzip.compress(plain))
    assert np.array_equal(whole(opened(f"{folder}/z.tfrecord?schema={folder}/f.json"))[0], IMAGES[:4])
    (folder / "cut.tfrecord").write_bytes(gzip.compress(plain)[:-20])
    with pytest.raises(InputError, match="cannot be decompressed"):
        whole(opened(f"{folder}/cut.tfrecord?schema={folder}/f.json"))


def test_every_flipped_byte_is_found_by_a_checksum(folder: Path) -> None:
    good = (folder / "a.tfrecord").read_bytes()
    for place in range(0, len(good), 11):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / "bad.tfrecord").write_bytes(bad)
        with pytest.raises(InputError, match=r"checksum"):
            whole(opened(f"{folder}/bad.tfrecord?schema={folder}/f.json"))


def test_a_truncated_file_is_refused_where_it_ends(folder: Path) -> None:
    (folder / "cut.tfrecord").write_bytes((folder / "a.tfrecord").read_bytes()[:-5])
    with pytest.raises(InputError, match="ends within record 3"):
        whole(opened(f"{folder}/cut.tfrecord?schema={folder}/f.json"))


def test_without_a_schema_the_features_are_listed(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        opened(f"{folder}/*.tfrecord")
    assert "image (12 bytes)" in caught.value.hint
    assert "label (1 x int64)" in caught.value.hint
    assert "floats (2 x float32)" in caught.value.hint


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ({"feature": "imgae", "dtype": "uint8", "shape": [12]}, "no feature 'imgae'"),
        ({"feature": "image", "dtype": "uint8", "shape": [28, 28]}, r"holds 12 numbers \(12 bytes\)"),
        ({"feature": "image", "dtype": "text", "shape": [12]}, "is not a type of numbers"),
        ({"feature": "image", "dtpye": "uint8"}, "has no 'dtpye'"),
        ({"feature": "image", "shape": "12"}, "is not a list of lengths"),
        ({"feature": "image", "encoding": "jpeg"}, "encoding 'jpeg' is not known"),
        ([], "a list of features is empty"),
        ("image", "must each name a feature"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(folder: Path, x: Any, said: str) -> None:
    (folder / "g.json").write_text(json.dumps({"x": x}))
    with pytest.raises(InputError, match=said):
        peek(opened(f"{folder}/a.tfrecord?schema={folder}/g.json"))


def test_bytes_without_a_dtype_ask_for_one(folder: Path) -> None:
    (folder / "g.json").write_text(json.dumps({"x": {"feature": "image", "shape": [12]}}))
    with pytest.raises(UsageError, match="add its dtype to the schema"):
        peek(opened(f"{folder}/a.tfrecord?schema={folder}/g.json"))


def test_encoded_pictures_are_decoded(folder: Path, tf: Any) -> None:
    pytest.importorskip("PIL")
    png = tf.io.encode_png(IMAGES[0]).numpy()
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[png]))
    with tf.io.TFRecordWriter(str(folder / "p.tfrecord")) as writer:
        writer.write(tf.train.Example(features=tf.train.Features(feature={"png": feature})).SerializeToString())
    (folder / "g.json").write_text(json.dumps({"x": {"feature": "png", "encoding": "image", "shape": list(SHAPE)}}))
    batch = peek(opened(f"{folder}/p.tfrecord?schema={folder}/g.json"))
    assert batch is not None
    assert np.array_equal(as_tuple(batch.x)[0][0], IMAGES[0])
