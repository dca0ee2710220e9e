"""What a message calls an option is what one types."""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import Field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import typer

from prunectl.commands._build import Stamp, first_difference
from prunectl.commands._command import RENAMED, option_name
from prunectl.commands._requests import CHANNEL_LIMITS, OPTION_RULES, request_options
from prunectl.commands.app import COMMANDS
from prunectl.exporting.request import ExportRequest
from prunectl.exporting.routes import TARGETS
from prunectl.pruning.masks import NonFinitePolicy
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import PruneRequest
from prunectl.reporting import slips
from prunectl.training.request import FinetuneRequest, KeepWeights, MaskMode
from tests.running import FIXTURES, ROOT, here

FOREIGN = {
    "cli.py": {"--version"},
    "commands/app.py": {"--version", "--show-completion", "--install-completion"},
    "commands/completion.py": {"--show-completion"},
    "commands/doctor.py": {"--force-reinstall"},
    "commands/_topics.py": {"--install-completion", "--show-completion"},
    "checks/baseline.py": {"--verify", "--quiet", "--end-of-options", "--depth"},
    "commands/_command.py": {old for names in RENAMED.values() for old in names},
    "formats/packages.py": {"--python"},
    "reporting/slips.py": set(slips._OPTIONS),
    "sweeping/ray_workers.py": {"--head"},
    "training/torch/distributed.py": {"--nproc-per-node"},
}
"""What is no option of a command: of prunectl itself, of git, pip, Ray, torchrun, of a style sheet and of slips."""
BY_NAME = {
    "api/keywords.py",
    "commands/completion.py",
    "exporting/export.py",
    "exporting/folder.py",
    "exporting/routes.py",
    "training/checkpoint.py",
    "training/mask_schedule.py",
}
"""Modules that put two dashes before a name that is held against the options elsewhere, or not shown."""
PT, SPEC = FIXTURES / "digits_cnn.pt", ("-s", "50%", "--dry-run")


def context(command: str) -> typer.Context:
    return typer.Context(importlib.import_module(COMMANDS[command][0]).command)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_is_spelled_as_the_help_shows_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    shown = re.split(r"[\s,]+", here(command, "--help").out)
    ctx = context(command)
    options = [param for param in ctx.command.params if param.param_type_name == "option" and param.opts != ["-h"]]
    assert options
    for param in options:
        assert param.name is not None
        assert option_name(ctx, param.name).startswith("--")
        assert option_name(ctx, param.name) in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--builder", "net.py:Net"), "--builder has no effect here"),
        (("--custom-objects", "net.py:X"), "--custom-objects has no effect here"),
        (("--schedule-param", "a=1"), "--schedule-param needs a schedule"),
        (("--input", "1,8,8"), "--input needs --pattern channel"),
        (("--min-channels", "2"), "--min-channels needs --pattern channel"),
        (("--max-drop", "1pp", "--data", "x.npz"), "--sparsity and --max-drop both set the sparsity"),
    ],
)
def test_what_does_not_go_together_is_named_as_it_was_typed(words: tuple[str, ...], says: str) -> None:
    done = here("prune", PT, *SPEC, *words)
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize("words", [("--builder", "net.py:Net"), ("--input", "1,8,8"), ("--custom-objects", "a:B")])
def test_what_a_recipe_says_itself_is_named_as_it_was_typed(words: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({}))
    done = here("prune", PT, "-o", tmp_path / "out.pt", "--recipe", tmp_path / "run.json", *words)
    assert done.code == 2
    assert f"leave out {words[0]}" in done.err


def test_what_inspect_has_no_data_for_is_named_as_it_was_typed() -> None:
    done = here("inspect", PT, "--builder", "net.py:Net")
    assert "--builder needs --data" in done.err


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [
        ("export", "input_", "--input"),
        ("export", "builder", "--builder"),
        ("finetune", "compile_", "--compile"),
        ("finetune", "imports", "--import"),
        ("prune", "inputs", "--input"),
        ("prune", "sparsity", "--sparsity"),
    ],
)
def test_an_option_that_has_changed_is_named_as_it_is_typed(command: str, name: str, option: str) -> None:
    old, new = (Stamp("1", command, {name: value}, {}, {}, {}) for value in ("a", "b"))
    assert first_difference(old, new, partial(option_name, context(command))) == f"{option} has changed"


def test_an_option_that_nobody_has_is_not_made_up() -> None:
    old, new = (Stamp("1", "prune", asked, {}, {}, {}) for asked in ({"no_such_thing": 1}, {}))
    assert first_difference(old, new, partial(option_name, context("prune"))) == "no_such_thing has changed"


VALUES = {"--layers": "conv*", "--target-params": "-50%", "--target-flops": "-50%", "--against": "old.h5"}
NEEDED = {"finetune": ["--data", "d.npz"], "sweep": ["--data", "d.npz", "-o", "trials"]}


@pytest.mark.parametrize(("command", "old"), [(command, old) for command, names in RENAMED.items() for old in names])
def test_an_option_is_known_by_its_old_name_and_shown_by_its_new_one(command: str, old: str) -> None:
    new, parser = RENAMED[command][old], importlib.import_module(COMMANDS[command][0]).command

    def given(*words: str) -> dict[str, Any]:
        return dict(parser.make_context(command, ["m.h5", *NEEDED.get(command, ()), *words]).params)

    value = VALUES.get(new, "net.py:f")
    assert given(old, value) == given(new, value) == given(f"{old}={value}") != given()
    shown = re.split(r"[\s,]+", here(command, "--help").out)
    assert new in shown
    assert old not in shown


def test_an_old_name_is_answered_with_the_new_one() -> None:
    done = here("prune", PT, *SPEC, "--only", "conv*")
    assert "note: --only is now called --layers" in done.err
    assert done.out == here("prune", PT, *SPEC, "--layers", "conv*").out
    assert "now called" not in here("prune", PT, *SPEC, "--only=conv*", "-q").err
    assert "now called" not in here("strip", PT, "--dry-run", "--only", "optimizer").err


def test_an_old_name_is_never_proposed() -> None:
    assert here("prune", PT, *SPEC, "--onl", "conv*").err.count("--only") == 0


REQUESTS = {"prune": PruneRequest(), "finetune": FinetuneRequest("train.npz"), "export": ExportRequest()}
TEXTS = {
    **dict.fromkeys(("sparsity", "initial_sparsity", "val_split"), "25%"),
    **dict.fromkeys(("target_gzip", "target_packed", "shard_size"), "3kB"),
    "layer": ["a=0.5"],
    "repair": "outputs",
    "metadata": ["a=b"],
    "input_": ["1,8"],
    "scope": Scope.GLOBAL,
    "keep": KeepWeights.LAST,
    "mask": MaskMode.REGROW,
    "nan": NonFinitePolicy.KEEP,
    "card": Path("card.md"),
    "logdir": Path("logs"),
    "checkpoint_dir": Path("epochs"),
    "data": "other.npz",
}
"""What an option may be, where not any flag, number, text or list of texts."""


def request_of(command: str, **given: object) -> Any:
    ctx, module = context(command), importlib.import_module(COMMANDS[command][0])
    needed = {"data": "train.npz"} if command == "finetune" else {}
    options = ctx.command.callback.__wrapped__(model="m", **{**needed, **given})
    return module.parse_request(request_options(ctx, options, module.OPTIONS))


def other_value(field: Field[object]) -> object:
    if field.name in TEXTS:
        return TEXTS[field.name]
    kinds = {"bool": True, "int": 7, "float": 7.5, "str": "other", "list[str]": ["other"]}
    return next(value for kind, value in kinds.items() if f"Annotated[{kind}" in str(field.type).replace("\n", ""))


@pytest.mark.parametrize("command", REQUESTS)
def test_every_option_reaches_a_field_of_its_request_or_the_code_of_its_command(command: str) -> None:
    """Of the other commands a function takes the options, and the linter looks for arguments that it does not use."""
    ctx, module = context(command), importlib.import_module(COMMANDS[command][0])
    read = {
        node.attr
        for name in ("_requests", "_build", "max_drop", "wrap_options", command)
        for node in ast.walk(ast.parse((ROOT / f"prunectl/commands/{name}.py").read_bytes()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in {"self", "options"}
    }
    assert request_of(command) == REQUESTS[command]
    known = set()
    for field in fields(ctx.command.callback.__wrapped__):
        name = option_name(ctx, field.name).removeprefix("--").replace("-", "_")
        if field.name == "model" or (name not in module.OPTIONS and name not in CHANNEL_LIMITS):
            assert field.name in read, field.name
        elif name in module.OPTIONS:
            known.add(name)
            assert request_of(command, **{field.name: other_value(field)}) != REQUESTS[command], name
    assert known == set(module.OPTIONS)


def test_a_name_that_is_empty_is_not_as_if_there_were_none() -> None:
    assert request_of("finetune", lr_schedule="").rate == ""
    done = here("prune", PT, *SPEC, "--strategy", "")
    assert (done.code, "not a known strategy" in done.err) == (2, True)


@pytest.mark.parametrize("command", OPTION_RULES)
def test_rules_are_about_options_that_there_are(command: str) -> None:
    names = {field.name for field in fields(context(command).command.callback.__wrapped__)}
    assert {name for rule in OPTION_RULES[command] for name in rule.options} <= names


@cache
def modules() -> dict[str, ast.AST]:
    """Every module by its path."""
    home = ROOT / "prunectl"
    files = {path.relative_to(home).as_posix(): path for path in home.rglob("*.py")}
    return {name: ast.parse(path.read_bytes()) for name, path in files.items()}


def test_no_message_names_an_option_that_no_command_has() -> None:
    params = [param for command in COMMANDS for param in context(command).command.params]
    known = {"--help"}.union(*((*param.opts, *param.secondary_opts) for param in params))
    for name, tree in modules().items():
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        found = {word for text in texts for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
        assert found - known <= FOREIGN.get(name, set()), name


def test_no_option_is_made_of_a_name() -> None:
    made = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values[:-1]
        if isinstance(part, ast.Constant) and str(part.value).endswith("--")
    }
    assert made == BY_NAME


def test_targets_of_an_export_name_its_options() -> None:
    ctx = context("export")
    known = {option_name(ctx, str(param.name)) for param in ctx.command.params}
    assert {f"--{name}" for target in TARGETS for name in target.options} <= known
