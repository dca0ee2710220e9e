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

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import torch

import prunectl
from prunectl.formats.scratch import temporary_files
from prunectl.training import host, quiet
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


def test_a_host_program_draws_what_it_would_have_drawn() -> None:
    seed_all(7)
    expected = [draws(), draws()]
    seed_all(7)
    first = draws()
    with host.host_settings():
        seed_all(0)
        draws()
    assert [first, draws()] == expected


def test_no_call_makes_the_draws_after_it_those_after_every_other() -> None:
    x = np.zeros((4, 8, 8, 1), np.float32)
    drawn = []
    for _ in range(2):
        prunectl.inspect(FIXTURES / "digits_cnn.onnx", sensitivity=True, data=x)
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
