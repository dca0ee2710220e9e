"""Code planted in files of PyTorch does not run in any command without --trust."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunectl.errors import UntrustedError
from prunectl.formats.torch import trust
from tests.running import here
from tests.safety.cost import assert_refused_cheaply, cost

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
MODEL, WEIGHTS, INPUTS = "models/model.json", "data/weights/model_weights_config.json", "data/sample_inputs/model.pt"


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


class Net(torch.nn.Module):
    """A convolution and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Linear(8 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.dense(torch.relu(self.conv(x)).flatten(1))
        return found


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "net.pt2"
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(Net().eval(), (torch.ones(2, 1, 4, 4),), dynamic_shapes=(batch,)), path)
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def changed(plain: Path, target: Path, changes: dict[str, Callable[[bytes], bytes]]) -> Path:
    """An archive with other bytes in some entries."""
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(info.filename, changes.get(name, lambda found: found)(old.read(info)))
    return target


def edited(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    """What changes a JSON in place."""

    def edit(raw: bytes) -> bytes:
        found = json.loads(raw)
        change(found)
        return json.dumps(found).encode()

    return edit


def saved(value: Any) -> bytes:
    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def first_size(program: Any) -> Any:
    """The first symbolic size."""
    values = graph(program)["tensor_values"].values()
    return next(size["as_expr"] for facts in values for size in facts["sizes"] if "as_expr" in size)


def call(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def tree(kind: str, context: Any) -> str:
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])


def source(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


PROGRAMS: dict[str, Callable[[Any, Path], object]] = {
    "an-operator-of-os": lambda program, _: graph(program)["nodes"][0].update(target="torch.os.system"),
    "an-operator-of-hub": lambda program, _: graph(program)["nodes"][0].update(target="torch.hub.load"),
    "an-operator-that-writes": lambda program, _: graph(program)["nodes"][0].update(
        target="torch.ops.aten.save.default"
    ),
    "an-operator-that-maps": lambda program, _: graph(program)["nodes"][0].update(
        target="torch.ops.aten.from_file.default"
    ),
    "an-operator-that-calls": lambda program, _: graph(program)["nodes"][0].update(target="_operator.methodcaller"),
    "an-operator-of-a-stranger": lambda program, _: graph(program)["nodes"][0].update(
        target="torch.ops.own.op.default"
    ),
    "a-size": lambda program, canary: first_size(program).update(expr_str=source(canary)),
    "the-name-of-an-input": lambda program, canary: graph(program)["inputs"][-1]["as_tensor"].update(
        name=f"x={source(canary)}"
    ),
    "the-name-of-a-parameter": lambda program, canary: program["graph_module"]["signature"]["input_specs"][0][
        "parameter"
    ].update(parameter_name=f'w"), {source(canary)}, ("'),
    "the-name-of-an-argument": lambda program, canary: call(program).update(forward_arg_names=[f"x={source(canary)}"]),
    "a-module-to-import": lambda program, _: call(program).update(
        out_spec=tree(
            "collections.defaultdict",
            {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []},
        )
    ),
    "an-enumeration-to-import": lambda program, _: call(program).update(
        out_spec=tree("builtins.dict", [{"__enum__": True, "fqn": "antigravity:A", "name": "B"}])
    ),
    "a-range": lambda program, canary: program["range_constraints"].update({source(canary): {"min_val": 0}}),
    "an-object": lambda program, _: graph(program).update(
        custom_obj_values={"o": {"name": "o", "class_fqn": "__torch__.torch.classes.own.Own"}}
    ),
}


@pytest.mark.parametrize("plant", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_text_that_pytorch_would_evaluate_is_refused(
    plant: Callable[[Any, Path], object], plain: Path, canary: Path, tmp_path: Path
) -> None:
    path = changed(plain, tmp_path / "m.pt2", {MODEL: edited(lambda program: plant(program, canary))})
    done = here("inspect", path, "--groups")
    assert (done.code, canary.exists()) == (3, False), done.err
    assert "--trust" in done.err


def planted_inputs(plain: Path, target: Path, canary: Path) -> Path:
    inputs = saved(((torch.ones(2, 1, 4, 4), Planted(canary)), {}))
    return changed(plain, target, {INPUTS: lambda _: inputs})


def planted_weight(plain: Path, target: Path, canary: Path) -> Path:
    weight = saved(Planted(canary))
    pickled = edited(lambda found: next(iter(found["config"].values())).update(use_pickle=True))
    return changed(plain, target, {WEIGHTS: pickled, "data/weights/weight_0": lambda _: weight})


def planted_script(target: Path, canary: Path) -> Path:
    class Saving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(16, 4)
            self.place = str(canary)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, self.place)
            found: torch.Tensor = self.dense(x.flatten(1))
            return found

    torch.jit.script(Saving()).save(str(target))
    return target


def planted_module(target: Path, canary: Path) -> Path:
    torch.save({"net": Planted(canary), "fc.weight": torch.ones(4, 4), "fc.bias": torch.ones(4)}, target)
    return target


@pytest.mark.parametrize("kind", ["inputs", "script"])
def test_it_is_refused_before_pytorch_is_imported(kind: str, plain: Path, canary: Path, tmp_path: Path) -> None:
    if kind == "inputs":
        path = planted_inputs(plain, tmp_path / "m.pt2", canary)
    else:
        path = planted_script(tmp_path / "m.pt", canary)
    assert_refused_cheaply(cost("inspect", path, "--groups", scratch=tmp_path))
    assert not canary.exists()


def test_checks_of_inputs_are_left_out_rather_than_executed(plain: Path, canary: Path, tmp_path: Path) -> None:
    guarded = edited(lambda program: program.update(guards_code=[source(canary)]))
    done = here("inspect", changed(plain, tmp_path / "m.pt2", {MODEL: guarded}), "--groups")
    assert (done.code, canary.exists()) == (0, False), done.err


def test_plain_programs_go_on_working(plain: Path, tmp_path: Path) -> None:
    done = here("prune", plain, "-o", tmp_path / "a.pt2", "--pattern", "channel", "-s", "50%")
    assert done.code == 0, done.err
    assert torch.export.load(tmp_path / "a.pt2").state_dict["conv.weight"].shape[0] == 4


IMAGE = torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    "examples",
    [((IMAGE, IMAGE), {}), ((), {}), ((torch.ones(2, 3),), {}), ((IMAGE,), {"k": IMAGE}), ((None,), {})],
    ids=["two", "none", "another-shape", "another-name", "no-tensor"],
)
def test_example_inputs_that_do_not_go_in_are_passed_over(examples: Any, plain: Path, tmp_path: Path) -> None:
    path = changed(plain, tmp_path / "m.pt2", {INPUTS: lambda _: saved(examples)})
    done = here("inspect", path, "--groups")
    assert done.code == 0, done.err


def test_a_program_that_does_not_run_on_what_it_says_goes_in_is_refused(plain: Path, tmp_path: Path) -> None:
    def widen(program: Any) -> None:
        graph(program)["tensor_values"]["x"]["sizes"][1]["as_int"] = 3

    done = here("inspect", changed(plain, tmp_path / "m.pt2", {MODEL: edited(widen)}), "--groups")
    assert (done.code, "PyTorch cannot run" in done.err) == (3, True), done.err


def test_programs_of_many_kinds_are_on_the_lists(tmp_path: Path) -> None:
    class Many(torch.nn.Module):
        def forward(self, *xs: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
            picked = torch.cond(xs[0].sum() > 0, lambda x: x * 2, lambda x: x + 1, (xs[0],))
            return {"a.b": (picked[:, ::2] * scale, [xs[1].t()]), "ones": torch.ones(len(xs))}

    free = torch.export.Dim.AUTO
    shapes = {"xs": ({1: free}, None), "scale": None}
    given, path = (torch.ones(3, 7), torch.ones(2, 2)), tmp_path / "m.pt2"
    program = torch.export.export(Many(), given, {"scale": torch.ones(1)}, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"note.txt": "mine"})
    safe, again = trust.check_program(path), tmp_path / "again.pt2"
    with again.open("wb") as file:
        safe.write(file, safe.inputs)
    found = torch.export.load(again).module()(*given, scale=torch.ones(1))
    assert torch.equal(found["a.b"][0], torch.full((3, 4), 2.0))


@pytest.mark.parametrize(
    "text", ["s0**2", "Max(1, s77) + 3*s0 // 2", "FloorDiv(Symbol('s27', positive=True), Integer(2))"]
)
def test_sizes_of_real_programs_are_on_the_list(text: str) -> None:
    assert trust.is_expression(text)


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "Pow(9, 99999)", "s0.x", "exit()", "1if s0 else s1", "'__class__'", "[s0]"]
)
def test_sizes_that_do_more_are_not(text: str) -> None:
    assert not trust.is_expression(text)


@pytest.mark.parametrize(
    "code",
    [
        "torch.save(x, '/a')",
        "t = torch\nt . save(x, y)",
        "torch. # here\n  from_file(y)",
        'x = "#"; torch.save(x, y)',
        "ops.image.write_file(y, x)",
        "o = ops",
        'getattr(torch, "sa\\x76e")(x, y)',
        "x : __torch__.torch.classes.c10d.FileStore",
        'q = ("a\\\nb", torch.save(x, "/a"))',
        'q = ("a\\\r\nb", torch.save(x, "/a"))',
        'q = "a\nb"',
        "q = \\",
    ],
)
def test_operators_of_scripts_that_do_more_than_compute_are_found(code: str) -> None:
    assert trust.find_foreign(code)


def prefixed(target: io.BytesIO, script: Path) -> tuple[int, int, bytes]:
    """Write the entries of a script behind what is there; where its directory lies, of how many, and the directory."""
    with zipfile.ZipFile(script) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr("net/" + info.filename.partition("/")[2], old.read(info))
    whole = target.getvalue()
    count, length, offset = struct.unpack("<10xHII2x", whole[-22:])
    target.seek(offset)
    target.truncate()
    return offset, count, whole[offset : offset + length]


@pytest.mark.parametrize("where", ["beside", "in-a-comment"])
def test_a_second_directory_that_pytorch_alone_finds_is_refused(where: str, canary: Path, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(16, 4))).save(str(tmp_path / "plain.pt"))
    out = io.BytesIO()
    _, count, shown = prefixed(out, tmp_path / "plain.pt")
    offset, hidden_count, hidden = prefixed(out, planted_script(tmp_path / "planted.pt", canary))

    def end_64(count: int, length: int, offset: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)

    content = out.getvalue() + hidden
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(content), 1)
    content += end_64(hidden_count, len(hidden), offset)
    begin = len(content)
    if where == "beside":
        content += shown + end_64(count, len(shown), begin) + locator
    else:
        comment = bytes(40) + locator
        last = shown.rindex(b"PK\x01\x02") + 32
        shown = shown[:last] + struct.pack("<H", len(comment)) + shown[last + 2 :] + comment
        content += shown
    content += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(shown), begin, 0)
    path = tmp_path / "m.pt"
    path.write_bytes(content)

    assert "torch.save" in torch.jit.load(path).code, "PyTorch reads the other directory"
    done = here("export", path, "-o", tmp_path / "m.onnx", "--input", "2,16")
    assert (done.code, canary.exists()) == (3, False), done.err
    assert "different readers" in done.err


def test_ordinary_scripts_pass(tmp_path: Path) -> None:
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()))
    net.save(str(tmp_path / "m.pt"))
    trust.check_script(tmp_path / "m.pt")
    with pytest.raises(UntrustedError):
        trust.check_script(planted_script(tmp_path / "n.pt", tmp_path / "canary"))
