# SPDX-License-Identifier: Apache-2.0
"""How far long work has come: what does it tells, whoever wants to know watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Called with what is done, how much of it, and how much there is in all.
Watch = Callable[[str, int, int], None]

_watch: ContextVar[Watch | None] = ContextVar("ctxfast progress", default=None)


@contextmanager
def watching(watch: Watch | None) -> Iterator[None]:
    """``watch`` is told of long work in the block; None tells nobody."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


def watched() -> Watch | None:
    """Whom to tell."""
    return _watch.get()
