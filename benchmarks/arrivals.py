# SPDX-License-Identifier: Apache-2.0
"""Requests as a service gets them: one at a time, after pauses, beside programs that keep cores busy."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Times are told as percentiles up to the 99th: fewer requests would make that one the slowest of all.
LEAST, MOST, BLOCKS = 120, 1200, 4
_SEED = 20180215
_LOOP = "while True: pass"


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    Attributes:
        pause_ms: from the end of one to the next.
        is_random: pauses are drawn, exponentially with that mean, as those of many users who do not know each other.
        busy: processes that each keep a core busy meanwhile.
    """

    pause_ms: float = 0.0
    is_random: bool = False
    busy: int = 0

    @property
    def words(self) -> str:
        """For a row's name."""
        if self.pause_ms == 0:
            when = "back to back"
        else:
            when = f"after {'about ' if self.is_random else ''}{self.pause_ms:g} ms"
        return f"{when}, {self.busy} cores busy" if self.busy else when

    def pauses(self, count: int) -> list[float]:
        """Seconds before each of so many requests, the same ones for everybody."""
        draw = random.Random(_SEED)
        mean = self.pause_ms / 1e3
        return [draw.expovariate(1 / mean) if self.is_random and mean else mean for _ in range(count)]


# Pauses short and long, chance, neighbours.
USUAL = (
    Arrivals(),
    Arrivals(0.1),
    Arrivals(1),
    Arrivals(10),
    Arrivals(100),
    Arrivals(10, is_random=True),
    Arrivals(busy=1),
    Arrivals(10, busy=1),
    Arrivals(10, busy=2),
)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within, so many processes keep a core busy each, on the cores that this one may use."""
    others = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(count)]
    try:
        if others:
            time.sleep(0.2)  # until they have begun
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def requests(seconds: float, pause: float, taken: float) -> int:
    """How many requests to each provider, in whole blocks: as fit into ``seconds``, within bounds."""
    fitting = int(seconds / max(pause + taken, 1e-6))
    return -(-max(LEAST, min(MOST, fitting)) // BLOCKS) * BLOCKS


def time_requests(
    runs: Sequence[Callable[[], Any]],
    arrivals: Arrivals,
    counts: Sequence[int],
    settle: Callable[[], None],
) -> list[list[float]]:
    """Seconds of every request to each provider.

    Providers are asked in blocks, in turn: within a block nobody else's threads or weights are in the way.

    Args:
        runs: a provider's call each.
        counts: its requests, a multiple of ``BLOCKS``.
        settle: called before a block; waits until no thread of the one before turns in a loop.
    """
    times: list[list[float]] = [[] for _ in runs]
    pauses = [arrivals.pauses(count) for count in counts]
    with busy_processes(arrivals.busy):
        for block in range(BLOCKS):
            for run, found, waits in zip(runs, times, pauses):
                settle()
                run()
                size = len(waits) // BLOCKS
                for wait in waits[block * size : (block + 1) * size]:
                    if wait:
                        time.sleep(wait)
                    start = time.perf_counter()
                    run()
                    found.append(time.perf_counter() - start)
    return times
