"""Operations of a SavedModel that reach outside its process do not run without --trust."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from prunectl.errors import InputError, UntrustedError
from prunectl.formats import budgets, trust
from prunectl.formats.protobuf import fields
from prunectl.formats.pure_names import BY_ATTRIBUTE, OPERATIONS
from prunectl.formats.registry import open_model
from prunectl.formats.tensorflow import graph_code
from prunectl.training.backend import LoadOptions
from prunectl.training.runtimes import load_trainable
from tests.networks import tf_keras
from tests.running import FIXTURES, here
from tests.safety.cost import assert_refused_cheaply, cost
from tests.safety.test_trust_keras import wrapped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
KERAS, SERVED = "digits_cnn_savedmodel", "every_variable_twice"
_META, _GRAPH, _SAVER, _COLLECTIONS, _SIGNATURES, _ASSETS, _OBJECTS = 2, 2, 3, 4, 5, 6, 7


def varint(number: int) -> bytes:
    """A number of protobuf."""
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number >= 0x80 else bytes([number])


def field(number: int, content: bytes | str) -> bytes:
    """A field of protobuf that holds bytes."""
    raw = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def node(operation: str, name: str = "deed", inputs: Iterable[str] = (), **attributes: bytes) -> bytes:
    """A NodeDef, its attributes as AttrValues."""
    said = b"".join(field(5, field(1, key) + field(2, value)) for key, value in attributes.items())
    return field(1, name) + field(2, operation) + b"".join(field(3, one) for one in inputs) + said


def graph(*nodes: bytes, functions: Iterable[bytes] = ()) -> bytes:
    """A GraphDef in its field of a MetaGraphDef."""
    return field(
        _GRAPH, b"".join(field(1, one) for one in nodes) + field(2, b"".join(field(1, one) for one in functions))
    )


def function(name: str, *nodes: bytes, arguments: Iterable[str] = ()) -> bytes:
    """A FunctionDef."""
    signature = field(1, name) + b"".join(field(2, field(1, one)) for one in arguments)
    return field(1, signature) + b"".join(field(3, one) for one in nodes)


def calling(name: str) -> bytes:
    """The attribute of a node that calls a function."""
    return field(10, field(1, name))


def with_more(fixture: str, path: Path, more: bytes) -> Path:
    """A fixture with more in its only MetaGraphDef; what is there twice, protobuf merges."""
    shutil.copytree(FIXTURES / fixture, path)
    program = (path / "saved_model.pb").read_bytes()
    found = b""
    for one in fields(memoryview(program)):
        content = program[one.begin : one.end]
        found += field(_META, content + more) if one.number == _META else varint(one.number << 3) + varint(one.value)
    (path / "saved_model.pb").write_bytes(found)
    return path


def alone(path: Path, more: bytes) -> tuple[str, ...]:
    """Return what is said of a SavedModel that holds a MetaGraphDef alone."""
    path.mkdir(exist_ok=True)
    (path / "saved_model.pb").write_bytes(field(_META, more))
    return graph_code.find_code(path)


@pytest.mark.parametrize("fixture", [KERAS, SERVED])
def test_an_operation_that_writes_a_file_is_refused_before_tensorflow_is_imported(fixture: str, tmp_path: Path) -> None:
    printed = node("PrintV2", output_stream=field(2, f"file://{tmp_path / 'canary'}"))
    path = with_more(fixture, tmp_path / "m", graph(functions=[function("__inference_evil_1", printed)]))
    found = cost("export", path, "-o", tmp_path / "out.onnx", scratch=tmp_path / "scratch")
    assert "holds code: operation PrintV2" in found.outcome.err
    assert_refused_cheaply(found)


def test_descriptions_that_keras_alone_would_read_cost_no_more_than_others(tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(FIXTURES / KERAS, path)
    lists = field(1, field(4, "x") + field(5, b'{"a": [' + b"[]," * 700_000 + b"0]}"))
    with (path / "keras_metadata.pb").open("ab") as file:
        file.write(lists * 20)
    found = cost("export", path, "-o", tmp_path / "o.onnx", scratch=tmp_path / "scratch")
    assert "more objects than prunectl allows" in found.outcome.err
    assert_refused_cheaply(found)


@pytest.mark.parametrize(
    "identifier",
    [field(4, "_tf_keras_layer"), b"", field(4, "x" * 2000), field(4, "_tf_keras_layer") + field(4, "x")],
    ids=["named", "nameless", "long", "twice"],
)
def test_what_keras_would_rebuild_of_a_savedmodel_is_looked_at_too(identifier: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(FIXTURES / KERAS, path)
    metadata = (path / "keras_metadata.pb").read_bytes()
    import json  # noqa: PLC0415 - as Keras keeps it

    evil = {**wrapped("io.write_file"), "name": "deed"}
    one = identifier + field(5, json.dumps(evil))
    (path / "keras_metadata.pb").write_bytes(metadata + field(1, one))
    found = cost("export", path, "-o", tmp_path / "o.onnx", scratch=tmp_path / "scratch")
    assert "operation io.write_file of TFOpLambda deed" in found.outcome.err
    assert_refused_cheaply(found)


@pytest.mark.parametrize("place", ["graph", "function", "uncalled"])
@pytest.mark.parametrize(
    "operation",
    [
        *("WriteFile", "ReadFile", "MatchingFiles", "PyFunc", "EagerPyFunc", "PyFuncStateless", "SummaryWriter"),
        *(
            "WriteSummary",
            "CreateSummaryFileWriter",
            "SaveDataset",
            "SaveDatasetV2",
            "TFRecordDataset",
            "TextLineDataset",
        ),
        *("LMDBDataset", "SqlDataset", "CacheDataset", "DatasetToTFRecord", "DataServiceDataset", "CollectiveReduceV2"),
        *(
            "RemoteCall",
            "_Send",
            "_Recv",
            "RpcCall",
            "DebugIdentity",
            "DebugIdentityV2",
            "DumpTensor",
            "Copy",
            "CopyHost",
        ),
        *("ImmutableConst", "WholeFileReaderV2", "Skipgram", "GenerateVocabRemapping", "LoadAndRemapMatrix", "Abort"),
        *(
            "XlaCallModule",
            "FileSystemSetConfiguration",
            "Save",
            "Restore",
            "CalibrationStatisticsSaver",
            "NobodyKnows",
        ),
        "",
    ],
)
def test_an_operation_that_is_not_allowed_is_named_wherever_it_stands(
    operation: str, place: str, tmp_path: Path
) -> None:
    evil = node(operation)
    more = {
        "graph": graph(node("Const", "c"), evil),
        "function": graph(
            node("PartitionedCall", f=calling("__inference_f_1")), functions=[function("__inference_f_1", evil)]
        ),
        "uncalled": graph(node("NoOp"), functions=[function("__inference_f_1", evil)]),
    }
    assert alone(tmp_path, more[place]) == (f"operation {operation}",)


@pytest.mark.parametrize(
    ("operation", "attributes", "is_allowed"),
    [
        ("PrintV2", {}, True),
        ("PrintV2", {"output_stream": field(2, "stderr")}, True),
        ("PrintV2", {"output_stream": field(2, "log(info)")}, True),
        ("PrintV2", {"output_stream": field(2, "file:///x")}, False),
        ("PrintV2", {"output_stream": field(2, "stderr") + field(2, "file:///x")}, False),
        ("PrintV2", {"output_stream": field(9, "placeholder")}, False),
        ("EncodeProto", {"descriptor_source": field(2, "local://")}, True),
        ("EncodeProto", {"descriptor_source": field(2, "bytes://anything")}, True),
        ("DecodeProtoV2", {"descriptor_source": field(2, "/etc/passwd")}, False),
        ("FixedUnigramCandidateSampler", {"vocab_file": field(2, "")}, True),
        ("FixedUnigramCandidateSampler", {"vocab_file": field(2, "/etc/passwd")}, False),
    ],
)
def test_an_operation_that_may_name_a_file_is_judged_by_what_it_names(
    operation: str,
    attributes: dict[str, bytes],
    is_allowed: bool,
    tmp_path: Path,
) -> None:
    found = alone(tmp_path, graph(node(operation, **attributes)))
    assert found == (() if is_allowed else (f"operation {operation}",))


def test_a_function_that_has_the_name_of_an_operation_is_not_taken_for_one(tmp_path: Path) -> None:
    assert alone(tmp_path, graph(node("my_relu"), functions=[function("my_relu", node("Relu"))])) == ()
    evil = graph(node("WriteFile"), functions=[function("WriteFile", node("Relu"))])
    assert alone(tmp_path, evil) == ("operation WriteFile",)


def test_the_last_operation_that_a_node_names_is_its_own(tmp_path: Path) -> None:
    assert alone(tmp_path, graph(node("Relu") + field(2, "WriteFile"))) == ("operation WriteFile",)
    overlong = node("Relu") + bytes([0x92, 0x00]) + bytes([0x89, 0x00]) + b"WriteFile"
    assert alone(tmp_path, graph(overlong)) == ("operation WriteFile",)


SAVE = function("__inference__traced_save_1", node("SaveV2", "s"), node("MergeV2Checkpoints", "m"))
RESTORE = function("__inference__traced_restore_2", node("RestoreV2", "r"))
SAVED = graph(
    node("Placeholder", "saver_filename"),
    node("StatefulPartitionedCall", "Save", ["saver_filename"], f=calling("__inference__traced_save_1")),
    node("StatefulPartitionedCall", "Load", ["saver_filename"], f=calling("__inference__traced_restore_2")),
    node("Relu", "Answer"),
    functions=[SAVE, RESTORE],
)
SAVER = field(_SAVER, field(1, "saver_filename:0") + field(2, "Save:0") + field(3, "Load"))


def serving(tensor: str) -> bytes:
    """A signature with an output."""
    output = field(1, "y") + field(2, field(1, tensor))
    return field(_SIGNATURES, field(1, "serving_default") + field(2, field(2, output)))


def test_what_saves_the_model_is_allowed(tmp_path: Path) -> None:
    assert alone(tmp_path, SAVED + SAVER + serving("Answer:0")) == ()


@pytest.mark.parametrize(
    ("more", "operation"),
    [
        pytest.param(SAVER + serving("Save:0"), "SaveV2", id="it is a signature"),
        pytest.param(
            SAVER + graph(node("Identity", "After", ["Save:0"])) + serving("After:0"),
            "SaveV2",
            id="a signature takes it",
        ),
        pytest.param(
            SAVER + graph(node("NoOp", "After", ["^Save"])) + serving("After"), "SaveV2", id="a signature waits for it"
        ),
        pytest.param(field(_SAVER, field(1, "f:0") + field(3, "Save")), "SaveV2", id="restoring saves"),
        pytest.param(
            SAVER + field(_COLLECTIONS, field(1, "saved_model_main_op") + field(2, field(1, field(1, "Save")))),
            "SaveV2",
            id="an initializer",
        ),
        pytest.param(
            SAVER
            + graph(
                node("PartitionedCall", "Caller", f=calling("__inference_f_3")),
                functions=[
                    function("__inference_f_3", node("PartitionedCall", f=calling("__inference__traced_save_1")))
                ],
            )
            + serving("Caller:0"),
            "SaveV2",
            id="through a function",
        ),
        pytest.param(
            SAVER + field(_OBJECTS, field(2, field(1, "__inference__traced_save_1"))),
            "SaveV2",
            id="an object of its own",
        ),
        pytest.param(
            SAVER
            + graph(
                node("PartitionedCall", "Caller", f=calling("a" * 97)),
                functions=[function("a" * 97, node("SaveV2", "mine"))],
            )
            + serving("Caller:0"),
            "SaveV2",
            id="a name that begins inside itself",
        ),
        pytest.param(graph(node("SaveV2", "mine")) + serving("mine:0"), "SaveV2", id="in the graph"),
        pytest.param(
            graph(node("RestoreV2", "mine"), node("Identity", "r", ["mine:1"])) + serving("r:0"), "SaveV2", id="a read"
        ),
    ],
)
def test_nobody_else_saves(more: bytes, operation: str, tmp_path: Path) -> None:
    (found,) = alone(tmp_path, SAVED + more)
    assert found.endswith("outside the functions that save the model")
    assert operation in found or "RestoreV2" in found


TABLE = node("InitializeTableFromTextFileV2", "t", ["table", "path"])
ASSET = field(_ASSETS, field(1, field(1, "Const:0")) + field(2, "words.txt"))


def of_objects(*bound: int) -> bytes:
    """Objects, the second of which is an asset, and what an initializer is given of them."""
    objects = field(1, field(9, b"")) + field(1, field(5, b""))
    return field(_OBJECTS, objects + field(2, field(1, "__inference_init_1") + field(2, field(2, bytes(bound)))))


@pytest.mark.parametrize(
    ("more", "is_allowed"),
    [
        pytest.param(ASSET + of_objects(0, 1), True, id="an asset"),
        pytest.param(ASSET + of_objects(1, 0), False, id="a constant"),
        pytest.param(ASSET.replace(b"words.txt", b"wordz.txt") + of_objects(0, 1), False, id="no such file"),
        pytest.param(
            field(_ASSETS, field(1, field(1, "Const:0")) + field(2, "../../words.txt")) + of_objects(0, 1),
            False,
            id="outside",
        ),
        pytest.param(
            field(_ASSETS, field(1, field(1, "Const:0")) + field(2, "/etc/passwd")) + of_objects(0, 1),
            False,
            id="absolute",
        ),
        pytest.param(
            ASSET
            + of_objects(0, 1)
            + graph(functions=[function("__inference_f_2", node("PartitionedCall", f=calling("__inference_init_1")))]),
            False,
            id="a function calls it",
        ),
    ],
)
def test_a_table_is_filled_from_assets_alone(more: bytes, is_allowed: bool, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "words.txt").write_text("a\nb\n")
    filling = graph(functions=[function("__inference_init_1", TABLE, arguments=["table", "path"])])
    assert (alone(tmp_path, filling + more) == ()) is is_allowed


def test_a_table_of_tensorflow_1_is_filled_from_assets_alone(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "words.txt").write_text("a\nb\n")
    init = node("InitializeTableFromTextFileV2", "t", ["table", "Const"])
    assert alone(tmp_path, graph(node("Const", "Const"), init) + ASSET) == ()
    init = node("InitializeTableFromTextFileV2", "t", ["table", "Other"])
    assert alone(tmp_path, graph(node("Const", "Other"), init) + ASSET) != ()


def test_a_graph_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_GRAPH_FIELDS", 1000)
    with pytest.raises(InputError, match="more than 1000 fields"):
        alone(tmp_path, graph(*[node("Relu")] * 500))


def test_every_fixture_needs_no_trust() -> None:
    for fixture in (KERAS, SERVED):
        assert trust.facts_of(open_model(FIXTURES / fixture)) == ()


def test_every_operation_on_the_list_is_one_that_exists() -> None:
    tf_keras()
    from tensorflow.python.framework import op_def_registry  # noqa: PLC0415 - the registry itself

    unknown = {name for name in (*OPERATIONS, *BY_ATTRIBUTE) if op_def_registry.get(name) is None}
    assert unknown == set()


def printing(path: Path, canary: Path) -> Path:
    """A SavedModel that prints into a file when it is called."""
    tf_keras()
    import tensorflow as tf  # noqa: PLC0415 - after Keras has found it

    module: Any = tf.Module()
    module.scale = tf.Variable(tf.ones((6, 4)))

    def answer(x: Any) -> dict[str, Any]:
        tf.print("sings", output_stream=f"file://{canary}")
        return {"out": x @ module.scale}

    signature = tf.function(answer).get_concrete_function(tf.TensorSpec((None, 6), tf.float32, "x"))
    tf.saved_model.save(module, path, signatures=signature)
    return path


def test_the_canary_sings_for_those_who_trust_the_graph(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = printing(tmp_path / "m", canary)
    found = here("export", path, "-o", tmp_path / "o.tflite")
    assert (found.code, "operation PrintV2" in found.err) == (3, True)
    with pytest.raises(UntrustedError, match="PrintV2"):
        load_trainable(open_model(path), LoadOptions())
    assert not canary.exists()
    here("export", path, "-o", tmp_path / "saved", "--to", "saved-model", "--trust")
    assert canary.exists()


def test_a_vocabulary_of_its_own_needs_no_trust(tmp_path: Path) -> None:
    tf_keras()
    import tensorflow as tf  # noqa: PLC0415 - after Keras has found it

    (tmp_path / "words.txt").write_text("a\nb\n")
    line, whole = tf.lookup.TextFileIndex.LINE_NUMBER, tf.lookup.TextFileIndex.WHOLE_LINE
    module: Any = tf.Module()
    lines = tf.lookup.TextFileInitializer(str(tmp_path / "words.txt"), tf.string, whole, tf.int64, line)
    module.table = tf.lookup.StaticHashTable(lines, -1)
    module.scale = tf.Variable(2.0)
    look = tf.function(lambda x: {"out": tf.cast(module.table.lookup(x), tf.float32) * module.scale})
    signature = look.get_concrete_function(tf.TensorSpec((None,), tf.string, "x"))
    tf.saved_model.save(module, tmp_path / "m", signatures=signature)
    assert trust.facts_of(open_model(tmp_path / "m")) == ()
    (tmp_path / "m" / "assets" / "words.txt").unlink()
    (tmp_path / "m" / "assets" / "words.txt").symlink_to(tmp_path / "words.txt")
    assert [one.words for one in trust.facts_of(open_model(tmp_path / "m"))] == [
        "operation InitializeTableFromTextFileV2 on a file that is not an asset of the model"
    ]
