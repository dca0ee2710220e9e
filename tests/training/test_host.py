"""What a program that calls prunectl gets back, and that its threads take turns."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import torch

import prunectl
from fixtures.digits_torch import DigitsCNN
from prunectl.formats.scratch import temporary_files
from prunectl.training import host, quiet
from prunectl.training.runtimes import seed_everything
from tests.running import FIXTURES

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_host_program_gets_its_log_levels_and_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("tensorflow")
    level = logger.level
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    try:
        logger.setLevel(logging.INFO)
        with host.host_settings():
            quiet.raise_log_levels()
            assert logger.level == logging.ERROR
            assert os.environ["GRPC_VERBOSITY"] == "ERROR"
        assert logger.level == logging.INFO
        assert "GRPC_VERBOSITY" not in os.environ
    finally:
        logger.setLevel(level)
    assert all(hasattr(function, "__wrapped__") for function in (prunectl.prune, prunectl.finetune, prunectl.export))


def draws() -> list[float]:
    keras_2 = tf_keras.initializers.GlorotUniform()((2, 2))
    values = (torch.rand(()), tf.random.uniform([]), keras.random.uniform([]), keras_2[0, 0])
    return [random.random(), np.random.rand(), *map(float, values)]  # noqa: NPY002 - the global generator is meant


def seed_all(number: int) -> None:
    torch.manual_seed(number)
    tf_keras.utils.set_random_seed(number)
    keras.utils.set_random_seed(number)


X, Y = np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int64)


@pytest.mark.parametrize("model", ["digits_cnn.keras", "digits_cnn.h5", "digits_cnn.pt"])
def test_a_host_program_draws_what_it_would_have_drawn(model: str) -> None:
    options: Any = {"builder": DigitsCNN} if model.endswith(".pt") else {}
    x = X.transpose(0, 3, 1, 2) if options else X
    seed_all(7)
    expected = [draws(), draws()]
    seed_all(7)
    first, within = draws(), []

    def data() -> tuple[object, object]:
        within.append(random.random())
        return x, Y

    prunectl.evaluate(FIXTURES / model, data, **options)
    assert [first, draws()] == expected
    assert within[0] != expected[1][0]  # the call had seeded


def test_what_functions_of_the_user_draw_and_seed_stays_where_no_call_seeds() -> None:
    random.seed(7)
    expected = [random.random() for _ in range(4)]
    random.seed(7)
    drawn = []

    def data() -> tuple[object, object]:
        drawn.append(random.random())
        np.random.seed(3)  # noqa: NPY002 - as above
        return X, Y

    for _ in range(3):
        prunectl.evaluate(FIXTURES / "digits_cnn.onnx", data)
    assert [*drawn, random.random()] == expected
    assert np.random.rand() == np.random.RandomState(3).rand()  # noqa: NPY002


@pytest.mark.parametrize("model", ["digits_cnn.keras", "digits_cnn.h5"])
def test_an_evaluation_lets_operations_with_a_seed_of_their_own_go_on(model: str) -> None:
    def draw() -> float:
        return float(tf.random.uniform([], seed=1))

    tf.random.set_seed(7)
    expected = [draw(), draw()]
    tf.random.set_seed(7)
    first = draw()
    prunectl.evaluate(FIXTURES / model, (X, Y))
    assert [first, draw()] == expected


def test_what_was_drawn_before_a_call_seeds_is_not_drawn_again() -> None:
    random.seed(7)
    expected = [random.random(), random.random()]
    random.seed(7)
    with host.host_settings():
        first = random.random()
        for number in range(2):
            seed_everything(number)
            random.random()
    assert [first, random.random()] == expected


def test_a_call_within_a_call_gives_the_outer_one_its_seeded_generators_back() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    with host.host_settings():
        seed_everything(0)
        with host.host_settings():
            seed_everything(1)
        assert random.random() == random.Random(0).random()
    assert random.random() == expected


def test_what_cannot_be_restored_keeps_nothing_else_and_no_error_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the device is lost")

    logger = logging.getLogger("tensorflow")
    level = logger.level
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    random.seed(7)
    expected = [random.random(), random.random()]
    random.seed(7)
    own: list[object] = [ValueError("the cause"), None]
    for error, draw in zip(own, expected, strict=True):
        with (  # noqa: PT012 - what is raised is compared below
            monkeypatch.context() as lost,
            pytest.raises(Exception) as caught,  # noqa: PT011
            host.host_settings(),
        ):
            host.before_seeding("torch")
            seed_everything(0)
            quiet.raise_log_levels()
            lost.setattr(torch, "set_rng_state", fail)
            if isinstance(error, Exception):
                raise error
        assert "the device is lost" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
        assert error is None or caught.value is error
        assert random.random() == draw
        assert logger.level == level
        assert "GRPC_VERBOSITY" not in os.environ


def test_no_call_makes_the_draws_after_it_those_after_every_other() -> None:
    drawn = []
    for _ in range(2):
        prunectl.inspect(FIXTURES / "digits_cnn.onnx", sensitivity=True, data=X)
        drawn.append((random.random(), np.random.rand()))  # noqa: NPY002 - as above
    assert len({one for one, _ in drawn}) == len({other for _, other in drawn}) == 2


def test_threads_run_frameworks_one_after_another() -> None:
    order = []

    def enter() -> None:
        with host.host_settings():
            order.append("second")

    second = threading.Thread(target=enter)
    with host.host_settings():
        second.start()
        # Time enough to come in, if the door is open.
        second.join(timeout=0.2)
        order.append("first")
    second.join()
    assert order == ["first", "second"]


FORK = """
import os, signal, threading
from prunectl.training import host
held, is_over = threading.Event(), threading.Event()
def hold():
    with host.host_settings():
        held.set()
        is_over.wait()
threading.Thread(target=hold).start()
held.wait()
if (child := os.fork()) == 0:
    signal.alarm(20)
    with host.host_settings():
        os._exit(0)
is_over.set()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_process_does_not_wait_for_threads_that_it_has_not() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], check=False, timeout=60).returncode == 0


def test_files_of_other_threads_are_not_put_where_a_run_is_tidied_up() -> None:
    before = tempfile.gettempdir()
    with host.host_settings(), temporary_files():
        assert tempfile.gettempdir() == before
    with temporary_files() as scratch:
        assert Path(tempfile.gettempdir()) == scratch
