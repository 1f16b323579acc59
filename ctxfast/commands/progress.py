# SPDX-License-Identifier: Apache-2.0
"""What commands say while they work: sentences, and how far they are. A bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

# Seconds between lines where no bar shows that something moves.
LONGEST_SILENCE = 30.0
_DELAY = 0.5  # what is read in less shows no bar
_MOST_SHOWN = 6  # figures on a line


def say(who: str, text: str) -> None:
    """A line on standard error, above a bar if there is one: ``ctxfast WHO: TEXT``."""
    line = f"ctxfast {who}: {text}"
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A length of time to two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reading:
    """Shows how far data is prepared, told by ``_core.progress``."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._what, self._start, self._before = "", 0.0, 0
        self._said = time.monotonic()
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done < self._before:
            self.close()
            self._what, self._start = what, now
        self._before = done
        if sys.stderr.isatty():
            self._show(done, total)
        elif now - self._said >= LONGEST_SILENCE and done < total:
            self._said = now
            left = (now - self._start) * (total - done) / max(done, 1)
            say(self._who, f"{what}: {100 * done / total:.0f} %, about {duration(left)} left")

    def _show(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            name = f"ctxfast {self._who}: {self._what}"
            self._bar = tqdm(
                total=total, desc=name, unit="", unit_scale=True, leave=False, delay=_DELAY, file=sys.stderr
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Training:
    """Shows how far training is: loss, tokens or words a second, and the time that is left.

    On a terminal a bar moves with every step, and evaluations stand above it. Elsewhere there is a line for every
    report and evaluation, and one now and then between reports that are far apart.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._bar: Any = None
        self._loss: float | None = None
        self._first: tuple[int, float] | None = None  # what this process started from, and when
        self._size = 0  # read since then
        self._said = time.monotonic()

    def tick(self, tick: Any) -> None:
        """After every step, by ``train(tick=...)``."""
        now = time.monotonic()
        if self._first is None:  # the first step is slower than others, and counts nowhere
            self._first = (tick.step, now)
        else:
            self._size += tick.size
        self._loss = self._loss if tick.loss is None else tick.loss
        shown = [] if self._loss is None else [f"loss {self._loss:.4g}"]
        if self._size:
            shown.append(f"{self._size / max(now - self._first[1], 1e-9):,.0f} {tick.unit}/s")
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                name = f"ctxfast {self._who}"
                self._bar = tqdm(total=tick.steps, initial=tick.step, unit="step", desc=name, file=sys.stderr)
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update(tick.step - self._bar.n)
        elif now - self._said >= LONGEST_SILENCE:
            self._line(tick.step, tick.steps, shown)

    def report(self, step: int, steps: int, figures: dict[str, float]) -> None:
        """At every report and evaluation, by ``train(show=...)``."""
        is_training = "learning_rate" in figures
        if is_training:
            self._loss = figures["loss"]
            if self._bar is not None:
                return
        rates = {name: value for name, value in figures.items() if name.endswith("_per_second")}
        plain = {name: value for name, value in figures.items() if name not in rates and name != "learning_rate"}
        shown = [f"{name} {value:.4g}" for name, value in list(plain.items())[:_MOST_SHOWN]]
        shown += [f"{value:,.3g} {name.replace('_per_second', '/s')}" for name, value in rates.items() if value < 100]
        shown += [f"{value:,.0f} {name.replace('_per_second', '/s')}" for name, value in rates.items() if value >= 100]
        self._line(step, steps, shown)

    def _line(self, step: int, steps: int, shown: list[str]) -> None:
        self._said = time.monotonic()
        if self._first is not None and self._first[0] < step < steps:
            before, since = self._first
            shown = [*shown, f"about {duration((self._said - since) * (steps - step) / (step - before))} left"]
        say(self._who, f"step {step:,} of {steps:,}: {', '.join(shown)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
