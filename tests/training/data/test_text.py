"""Text as data: how it is read, tokenised and cut, by a tokenizer that gives each character its number."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunectl.errors import InputError, PrunectlError, UsageError
from prunectl.formats import budgets
from prunectl.training.backend import ModelSignature, TextInput
from prunectl.training.data import text as texts
from prunectl.training.data import tokenizer as tokenizers
from prunectl.training.data.registry import open_source
from prunectl.training.data.source import Batch, EpochOrder
from tests.running import here


def tokenizer(piece: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
    """Give each character its number, after a token 1 where marks are wanted."""
    return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in piece]}


@pytest.fixture(autouse=True)
def characters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Characters:
        eos_token_id = 2
        cls_token_id, sep_token_id = 3, 4
        __call__ = staticmethod(tokenizer)

    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *_, **__: Characters())


def signature(*, is_causal: bool = True, longest: int = 0) -> ModelSignature:
    return ModelSignature((), (), is_channels_first=True, text=TextInput(Path(), 256, longest, is_causal))


def batch(path: Path | str, signature: ModelSignature, examples: int = 100) -> Batch:
    return next(open_source(str(path), signature=signature, seed=0).batches(EpochOrder(examples)))


def test_a_text_is_cut_into_sequences_each_token_with_the_one_that_follows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij", encoding="utf-8-sig")
    found = batch(f"{tmp_path}/a.txt?length=3", signature())
    ids = [1, *b"abcdefghij"]
    assert np.array_equal(found.x, [ids[0:3], ids[3:6], ids[6:9]])
    assert np.array_equal(found.y, [ids[1:4], ids[4:7], ids[7:10]])
    # Not longer than the model takes, nor than the text is.
    assert np.shape(batch(tmp_path / "a.txt", signature(longest=5)).x) == (2, 5)
    assert np.shape(batch(tmp_path / "a.txt", signature()).x) == (1, 10)


def test_an_encoder_gets_its_marks_around_each_sequence_and_no_targets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    found = batch(f"{tmp_path}/a.txt?length=5", signature(is_causal=False))
    assert np.array_equal(found.x, [[3, *b"abc", 4], [3, *b"def", 4]])
    assert found.y is None


def test_between_the_lines_of_a_jsonl_stands_the_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": "cd", "x": 1}\n{"text": ""}\n{"text": "\\ud800"}\n')
    found = batch(tmp_path / "a.jsonl", signature())
    assert np.array_equal(found.x, [[1, *b"ab", 2, *b"cd", 2, 2]])
    (tmp_path / "b.jsonl").write_text('{"body": "xyz"}')
    assert np.array_equal(batch(f"{tmp_path}/b.jsonl?field=body", signature()).y, [[*b"xyz"]])


def test_a_long_text_is_tokenised_in_pieces_that_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE", 7)
    lines = "one\ntwo\nthree\na line without an end that is longer\n\nfour"
    (tmp_path / "a.txt").write_text(lines)
    found = batch(tmp_path / "a.txt", signature())
    assert np.array_equal(found.y, [[*lines.encode()]])


def test_token_ids_are_cut_in_a_row_and_kept_in_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    assert np.array_equal(batch(f"{tmp_path}/ids.npy?length=4", signature()).y, [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.save(tmp_path / "rows.npy", np.arange(12).reshape(3, 4))
    found = batch(tmp_path / "rows.npy", signature())
    assert np.array_equal(found.x, [[0, 1, 2], [4, 5, 6], [8, 9, 10]])
    assert np.array_equal(batch(tmp_path / "rows.npy", signature(is_causal=False)).x, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "too few"),
        ("a.txt", b"caf\xe9", "not text in UTF-8: byte 3"),
        ("a.jsonl", b'{"text": "ab"}\n{"body": "ab"}\n', "line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": 3}', "no text under 'text'"),
        ("a.jsonl", b"\n\n", "too few"),
        ("a.txt", "Ā" * 9, "knows 0 to 255"),
        ("a.npy", np.zeros(5, np.float32), "not token ids"),
        ("a.npy", np.zeros((2, 3, 4), np.int64), "not token ids"),
        ("a.npy", np.array([1, -1, 5]), "has the token -1"),
        ("a.npy", np.zeros((3, 1), np.int64), "none is followed"),
    ],
)
def test_data_that_is_no_text_is_refused_in_a_sentence(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        batch(tmp_path / name, signature())


def test_more_text_than_is_tokenised_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(budgets.MAX_TEXT_BYTES + 1)
    with pytest.raises(InputError, match="at most"):
        batch(tmp_path / "a.txt", signature())
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(InputError, match="not a file"):
        batch(tmp_path / "b.txt", signature())


def test_sequences_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    np.save(tmp_path / "rows.npy", np.zeros((3, 9), np.int64))
    for spec in (f"{tmp_path}/a.txt?field=b", f"{tmp_path}/rows.npy?length=4"):
        with pytest.raises(UsageError, match="has no effect on"):
            batch(spec, signature())
    for spec in (f"{tmp_path}/a.txt?length=9", f"{tmp_path}/rows.npy"):
        with pytest.raises(UsageError, match="the model takes"):
            batch(spec, signature(longest=5))
    with pytest.raises(PrunectlError, match="leaves no room"):
        batch(f"{tmp_path}/a.txt?length=2", signature(is_causal=False))


def test_text_needs_a_model_with_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UsageError, match="folder with a tokenizer"):
        open_source(str(tmp_path / "a.txt"), signature=ModelSignature((), (), is_channels_first=True), seed=0)


def test_fewer_sequences_run_at_once_where_each_token_has_many_logits(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((64, 129), np.int64))
    source = open_source(str(tmp_path / "rows.npy"), signature=signature(), seed=0)
    wide = ModelSignature((), (), is_channels_first=True, text=TextInput(Path(), 1 << 17, is_causal=True))
    assert texts.batch_size(source, wide, 32) == 4
    assert texts.batch_size(source, signature(), 32) == 32
    assert texts.batch_size(source, ModelSignature((), (), is_channels_first=True), 32) == 32


def test_what_a_tokenizer_raises_is_told_and_an_interrupt_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def fail(error: BaseException) -> Any:
        raise error

    for error, expected in ((panic("index"), InputError), (KeyError("x"), InputError), (KeyboardInterrupt(), None)):
        with pytest.raises(expected or KeyboardInterrupt):
            tokenizers._encode(lambda *_, error=error, **__: fail(error), "a", has_marks=False)


@pytest.mark.parametrize("answer", [b"[[1e999],[]]", b"[" * 100_000, b"[[99999999999999999999],[]]", b""])
def test_marks_that_are_no_two_numbers_are_refused(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_marks", lambda _: answer)
    text = signature().text
    assert text is not None
    with pytest.raises(InputError, match="answers no token ids"), tokenizers.open_tokenizer(text):
        pass


def test_marks_that_the_model_does_not_know_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "ids.npy", np.arange(50))
    for mark in (256, -2):
        monkeypatch.setattr(tokenizers, "_marks", lambda _, mark=mark: np.array([0, mark]).tobytes())
        with pytest.raises(InputError, match=f"has the token {mark}, but the model knows 0 to 255"):
            batch(tmp_path / "ids.npy", signature(is_causal=False))


def test_ids_in_a_row_for_an_encoder_whose_tokenizer_fails_may_be_saved_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise InputError("broken")

    monkeypatch.setattr(tokenizers, "load_tokenizer", fail)
    np.save(tmp_path / "ids.npy", np.arange(50))
    with pytest.raises(InputError) as caught:
        batch(tmp_path / "ids.npy", signature(is_causal=False))
    assert "in rows, with their marks" in str(caught.value.hint)


def test_an_empty_document_is_given_to_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Prepends:
        eos_token_id = 2

        def __call__(self, piece: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7, *piece.encode()]}

    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *_, **__: Prepends())
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    assert np.array_equal(batch(tmp_path / "a.jsonl", signature()).y, [[*b"ab", 2, 2, 7, *b"c"]])


def test_without_transformers_a_folder_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from safetensors.numpy import save_file  # noqa: PLC0415

    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "a.txt").write_text("abc")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for words in (("eval", folder), ("prune", folder, "-o", tmp_path / "out", "-s", "50%", "--strategy", "obs")):
        done = here(*words, "--data", tmp_path / "a.txt")
        assert done.code == 4
        assert "transformers is not installed" in done.err
    assert not (tmp_path / "out").exists()
