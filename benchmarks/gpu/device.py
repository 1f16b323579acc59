# SPDX-License-Identifier: Apache-2.0
"""The device that the programs run on, as they ask for it.

``Gpu`` is a CUDA device; ``StandIn``, for a dry run, answers the same calls on the CPU: streams do nothing, a graph
computes again, times are the host's and say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..measure import capture
from ..provider import flat

Run = Callable[[], Any]
_WARM_CALLS, _MOST_CALLS = 3, 200


class Gpu:
    """The current CUDA device. ``halves``: its 16-bit dtypes, the first for programs that take one."""

    kind = "cuda"
    is_stand_in = False
    halves = (torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("error: torch sees no GPU. --dry-run runs the same in small, on the CPU.")
        self.name = torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What is called inside is queued on a stream of its own, after all that was queued before."""
        side, outside = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(outside)
        with torch.cuda.stream(side):
            yield
        outside.wait_stream(side)

    def streams(self, count: int) -> list[Any]:
        """Contexts, to be entered as often as wanted, whose work runs at once."""
        return [torch.cuda.stream(torch.cuda.Stream()) for _ in range(count)]

    def graph(self, run: Run) -> Run:
        """``run`` as a CUDA graph: a function that replays it and returns its outputs, the same tensors each time."""
        return capture(run)

    def milliseconds(self, run: Run, seconds: float = 0.2) -> float:
        """Median time of a call between two events of its stream."""
        for _ in range(_WARM_CALLS):
            run()
        torch.cuda.synchronize()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 5 or (time.perf_counter() < end and len(times) < _MOST_CALLS):
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(5)]
            for before, after in pairs:
                before.record()
                run()
                after.record()
            torch.cuda.synchronize()
            times += [before.elapsed_time(after) for before, after in pairs]
        return statistics.median(times)

    def peak_mib(self, run: Run) -> float:
        """Memory that a call adds at its peak, by torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class StandIn:
    """The CPU in the place of a GPU. bfloat16 is left out: Triton's interpreter multiplies it wrongly."""

    kind = "cpu"
    is_stand_in = True
    halves = (torch.float16,)
    name = "no GPU: a dry run"

    def synchronize(self) -> None:
        pass

    def stream(self) -> Any:
        return nullcontext()

    def streams(self, count: int) -> list[Any]:
        return [nullcontext() for _ in range(count)]

    def graph(self, run: Run) -> Run:
        kept = run()

        def replay() -> Any:
            for old, new in zip(_tensors(kept), _tensors(run())):
                old.copy_(new)
            return kept

        return replay

    def milliseconds(self, run: Run, seconds: float = 0.2) -> float:
        run()
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def peak_mib(self, run: Run) -> float:
        run()
        return float("nan")


Device = Gpu | StandIn


def _tensors(value: Any) -> Sequence[Tensor]:
    return flat(value)


def host_microseconds(device: Device, run: Run, calls: int = 100) -> float:
    """Time that the host spends in a call while the device is left behind: what a queue of calls costs at least."""
    calls = 2 if device.is_stand_in else calls
    for _ in range(_WARM_CALLS):
        run()
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    took = (time.perf_counter() - start) / calls
    device.synchronize()
    return 1e6 * took


def wall_milliseconds(device: Device, run: Run, calls: int = 30) -> float:
    """Median time of a call that is waited for."""
    times = []
    for _ in range(2 if device.is_stand_in else calls):
        device.synchronize()
        start = time.perf_counter()
        run()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


class Lines:
    """Prints one line a row. A row that breaks says so; the rows after it still run, and ``end`` names it again."""

    def __init__(self, width: int = 60) -> None:
        self.width = width
        self.failed: list[str] = []

    def row(self, name: str, run: Callable[..., str | None], *args: Any) -> None:
        """``run(*args)`` returns the line's text; None for no line."""
        try:
            text = run(*args)
        except Exception as error:
            words = (str(error).strip().splitlines() or [""])[0]
            text = f"FAILED: {type(error).__name__}: {words[:200]}"
            traceback.print_exc()
            self.failed.append(f"{name}: {words[:100]}")
        if text is not None:
            print(f"{name:<{self.width}} {text}", flush=True)
            if "CUDA error" in text:  # every row after this one would say the same
                self.end()
                raise SystemExit("stopped: the device answers no more.")

    def check(self, name: str, errors: Mapping[str, tuple[float, float]]) -> None:
        """A row of what -> (error, limit), which fails where one error is above its limit or nan."""
        wrong = [what for what, (error, limit) in errors.items() if not error <= limit]
        words = ", ".join(f"{what} {error:.1e}" for what, (error, limit) in errors.items())
        if wrong:
            limits = ", ".join(f"{what} {errors[what][1]:.0e}" for what in wrong)
            words += f"  WRONG: allowed are {limits}"
            self.failed.append(f"{name}: {', '.join(wrong)}")
        print(f"{name:<{self.width}} {words}", flush=True)

    def end(self) -> int:
        """Say what failed; the exit code."""
        print("\n".join([f"{len(self.failed)} failed", *self.failed]), flush=True)
        return int(bool(self.failed))


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Device]:
    """The options of a program, ``--dry-run`` among them, and the device it is to run on."""
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU; its times say nothing")
    options = parser.parse_args(argv)
    device = StandIn() if options.dry_run else Gpu()
    print(f"{device.name}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    return options, device


def relative_error(got: Tensor, right: Tensor) -> float:
    """|got - right| / |right| in float64, both Frobenius norms; nan where ``got`` holds one."""
    got, right = got.detach().double(), right.detach().double()
    return float((got - right).norm() / right.norm().clamp(min=1e-30))
