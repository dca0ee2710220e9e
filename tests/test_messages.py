"""Every message starts with what happened, is a sentence, names what it is about, and has no retired word.

Messages are read from the source: what errors are raised with, their hints, and sentences of notes, help and topics.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from prunectl import errors
from prunectl.commands._help_page import plain_text
from prunectl.commands.app import COMMANDS, TOPICS
from prunectl.commands.help import topic_lines
from tests.running import ROOT

VALUE = "{}"
"""What stands for a value in a message."""
KINDS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.PrunectlError)
}
VERBS = re.compile(
    r"\b(is|are|was|were|has|have|had|do|does|did|can|cannot|could|may|must|need|needs|will|would|"
    r"answered|answers|applies|asks|became|began|belongs|chose|claims|combines|compresses|computes|consists|contains|"
    r"costs|differ|differs|ended|ends|exceeds|exist|exists|expects|failed|finds|fits|fixes|follows|gives|goes|grew|"
    r"held|holds|imports|keeps|knows|leads|leaves|lets|lies|lists|lost|made|makes|match|matches|means|names|offers|outputs|"
    r"overlap|points|produced|prunes|raised|ran|ranks|reaches|reads|refers|repeats|reported|requires|returned|returns|runs|"
    r"says|scores|selects|serves|sets|shares|shrank|starts|states|stopped|stores|takes|trains|unpacks|uses|wants|"
    r"works|wraps|writes)|and \S+ name the same\b"
)
RETIRED = {
    "prune": r"\bgoes first\b|\bdropped\b",
    "keep": r"\bstays?\b|\bso many\b",
    "pruning step": r"\b(?:each|every|whole|of|the) turns?\b",
    "schedule": r"\bramps?\b",
    "calibration data": r"what data does",
    "layer inputs": r"\bsights?\b|what weights meet",
    "reconstruct": r"\brefits?\b|fitted anew|\banew\b",
    "distillation": r"\btaught\b|\bguided\b",
    "random state": r"\bby chance\b",
    "checkpoint": r"\bstale\b|\bsaver\b|\bdiary\b",
    "dependency group": r"goes together",
    "not pruned": r"[Ll]eft alone",
    "atomic": r"\bput in place\b",
    "sandbox": r"\bisolated\b",
    "one-shot": r"all at a time",
    "resume": r"gone on with|\bgoes on\b",
    "options": r"\bsaid\b|\bastray\b|\bwords\b",
    "budget": r"\bgate\b",
}
"""Words that words.md retired, by what is said instead."""
NOT_THE_EVENT = re.compile(
    r"(error|failed|failure|sorry|please|unable|could not|cannot|invalid|oops|warning)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Message:
    """A message of the source, with its hint."""

    place: str
    text: str
    hint: str


def texts_of(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        case ast.IfExp():
            yield from texts_of(node.body)
            yield from texts_of(node.orelse)


@cache
def modules() -> tuple[tuple[str, tuple[ast.AST, ...]], ...]:
    """The modules of the package, and all that each consists of."""
    paths = sorted((ROOT / "prunectl").rglob("*.py"))
    return tuple((path.relative_to(ROOT).as_posix(), tuple(ast.walk(ast.parse(path.read_bytes())))) for path in paths)


@cache
def raised() -> tuple[Message, ...]:
    """What errors are raised with, except where all of it is the message of something else."""
    found = []
    for name, nodes in modules():
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                hints = [
                    text for word in node.keywords if word.arg == "hint" for text in (*texts_of(word.value), VALUE)
                ]
                for text in texts_of(node.args[0]):
                    if re.search(r"[a-z]{3}", text.replace("the plug-in", "")):
                        found.append(Message(f"{name}:{node.lineno}", text, "\n".join(hints)))
    return tuple(found)


@cache
def sentences() -> tuple[tuple[str, str], ...]:
    """Notes, help and topics: text that ends in a full stop, and is no docstring."""
    found = []
    for name, nodes in modules():
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in docstrings | inner:
                found += [(f"{name}:{node.lineno}", text) for text in texts_of(node) if text.rstrip().endswith(".")]
    for command, (module, line) in COMMANDS.items():
        found.append((command, line))
        found.append((command, plain_text(importlib.import_module(module).command.help)))
    found += [(topic, "\n".join(topic_lines(topic))) for topic in TOPICS]
    return tuple(found)


def test_there_are_many_messages() -> None:
    assert len({message.text for message in raised()}) > 600
    assert len(sentences()) > 300


def test_a_message_starts_with_what_happened_and_ends_without_a_full_stop() -> None:
    assert [message for message in raised() if NOT_THE_EVENT.match(message.text)] == []
    assert [message for message in raised() if message.text.endswith((".", "!"))] == []
    names = re.compile(r"[A-Z]\w*[A-Z\d]|[A-Z][A-Z]+|(Keras|Python|PyTorch|Tensor|Ray)\b|NaN")
    capitals = [message for message in raised() if message.text[0].isupper() and not names.match(message.text)]
    assert capitals == []


def test_a_message_is_a_sentence() -> None:
    assert [message for message in raised() if not VERBS.search(message.text)] == []


def test_a_message_names_what_it_is_about_or_what_to_do() -> None:
    def is_named(message: Message) -> bool:
        subject = re.search(r"\{\}|--?[a-z]|[A-Z]\w+|\bgit\b|\btfmot\b|\bprunectl\b", message.text)
        return bool(subject or message.hint)

    assert [message for message in raised() if not is_named(message)] == []


@pytest.mark.parametrize("instead", RETIRED)
def test_no_message_has_a_retired_word(instead: str) -> None:
    retired = re.compile(RETIRED[instead])
    assert [message for message in raised() if retired.search(f"{message.text}\n{message.hint}")] == []
    assert [(place, text) for place, text in sentences() if retired.search(text)] == []


def test_the_list_of_retired_words_finds_them() -> None:
    for sentence in (
        "Left alone: a bias (3).",
        "so many stay",
        "what goes first",
        "the turns of a ramp",
        "gone on with",
    ):
        assert any(re.search(retired, sentence) for retired in RETIRED.values()), sentence


def test_messages_are_read_from_the_source(tmp_path: Path) -> None:
    nodes = dict(modules())["prunectl/errors.py"]
    (call,) = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node).count("ran out of")]
    assert [*texts_of(call.args[0])] == ["prunectl ran out of memory"]
