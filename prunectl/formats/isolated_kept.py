"""A child that is kept for the work of many small files: to fork takes longer than to read one of them."""

from __future__ import annotations

import io
import os
import pickle
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from prunectl.formats import isolated_child

_LENGTH = struct.Struct("<Q")
_PIECE_BYTES = 1 << 16


class Kept:
    """Does one work after the other in the same child, and in a new one after one that has died."""

    def __init__(self) -> None:
        self._child = 0
        self._requests = self._answers = -1
        self._lock = threading.Lock()

    def ask(
        self, work: Callable[[], bytes], seconds: float, extra_bytes: int, patience: float
    ) -> tuple[bytes | None, int] | None:
        """Return the answer, or nothing where time is up, and how the child ended; None for work that cannot be sent.

        Only what the parent says is unpickled, by the child. What the child says is bytes.
        """
        request = _pickled((work, seconds, extra_bytes))
        if request is None:
            return None
        with self._lock:
            if not self._child:
                self._start()
            try:
                isolated_child.send(self._requests, _LENGTH.pack(len(request)) + request)
                answer = self._listen(time.monotonic() + patience)
            except BrokenPipeError:
                answer = b""
            except BaseException:
                self._end()
                raise
            # One that has answered in full goes on to live; of any other the work is over.
            return (answer, 0) if answer else (answer, self._end())

    def close(self) -> None:
        """Let the child go."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        theirs, self._requests = os.pipe()
        self._answers, writer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(theirs, writer)
        os.close(theirs)
        os.close(writer)

    def _end(self) -> int:
        if not self._child:
            return 0
        os.close(self._requests)
        os.close(self._answers)
        os.kill(self._child, signal.SIGKILL)
        status = os.waitpid(self._child, 0)[1]
        self._child = 0
        return status

    def _listen(self, deadline: float) -> bytes | None:
        """Return one answer; nothing if it does not come in time, empty bytes if the child has died."""
        answer = bytearray()
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._answers], [], [], left)[0]:
                return None
            piece = os.read(self._answers, _PIECE_BYTES)
            if not piece:
                return b""
            answer += piece
            if len(answer) >= _LENGTH.size and len(answer) >= _LENGTH.size + _LENGTH.unpack_from(answer)[0]:
                return bytes(answer[_LENGTH.size :])
        return None


class _Pickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        # Arrays are shared with a child that is forked, which fills them: a copy would be filled for nobody.
        if isinstance(thing, np.ndarray):
            raise pickle.PicklingError("an array is not sent")
        return NotImplemented


def _pickled(request: tuple[Any, ...]) -> bytes | None:
    sink = io.BytesIO()
    try:
        _Pickler(sink).dump(request)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return sink.getvalue()


def _serve(requests: int, answers: int) -> None:
    # Nothing may leave this function, as in a child that is not kept.
    try:
        isolated_child.hush()
        with open(requests, "rb", buffering=0) as file:
            while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
                (nbytes,) = _LENGTH.unpack(head)
                request = b""
                while len(request) < nbytes and (piece := file.read(nbytes - len(request))):
                    request += piece
                work, seconds, extra_bytes = pickle.loads(request)  # noqa: S301 - of the parent
                isolated_child.fence(seconds, extra_bytes, is_last=False)
                answer = isolated_child.answer_of(work)
                signal.setitimer(signal.ITIMER_PROF, 0)
                isolated_child.send(answers, _LENGTH.pack(len(answer)) + answer)
    finally:
        os._exit(0)
