# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while training: the step is finished and saved before the process gives way."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_ASKS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Within it, the first Ctrl-C or SIGTERM is only remembered; a second one acts at once.

    Args:
        is_on: False leaves signals alone, and so does a thread other than the main one.

    Attributes:
        asked: the signal that came, or None.
    """

    def __init__(self, is_on: bool = True) -> None:
        self.asked: int | None = None
        self._is_on = is_on and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if self._is_on:
            # A handler that somebody set is his to keep; so is the nohup of a shell.
            usual = (signal.default_int_handler, signal.SIG_DFL)
            self._before = {number: signal.getsignal(number) for number in _ASKS}
            self._before = {number: own for number, own in self._before.items() if own in usual}
            for number in self._before:
                signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *_: object) -> None:
        self._restore()

    def give_way(self) -> None:
        """End as the signal would have ended the process."""
        self._restore()
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            os.kill(os.getpid(), self.asked)
