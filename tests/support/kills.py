# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at any of a program's operations on files, without a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

_OPERATIONS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "pwrite", "open")


class Killed(BaseException):
    """Nothing of the code under test may catch it."""


def run_until(step: int, call: Callable[[], object]) -> list[str] | None:
    """Call, and kill it before its ``step``-th operation on files: nothing is done to files afterwards, whatever
    handlers try.

    Returns:
        The operations before the kill; None if the call ended before.
    """
    seen: list[str] = []

    def killed(name: str, original: Callable) -> Callable:
        def operation(*args, **kwargs):
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return original(*args, **kwargs)
            if len(seen) >= step:
                raise Killed(name)
            seen.append(
                f"{name} {os.path.basename(os.fspath(args[0])) if isinstance(args[0], (str, os.PathLike)) else ''}"
            )
            return original(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, killed(name, getattr(os, name)))
        try:
            call()
        except Killed:
            return seen
    return None
