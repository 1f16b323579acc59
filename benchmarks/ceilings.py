# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most, measured in the run that uses it: reading memory, multiplying matrices."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from ctxfast import functional

from .cases import Work

_REPEATS = 5
_READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_MATRIX = {"cpu": 1024, "cuda": 8192}


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median time of a call after a first one."""
    run()
    times = []
    for _ in range(_REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@functools.cache
def bytes_per_second(device: str) -> float:
    """Reading memory that no cache holds."""
    x = torch.ones(_READ_BYTES[device] // 4, device=device)
    return x.nbytes / _seconds(x.sum, device)


@functools.cache
def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """A large square matrix product by torch or, where that is faster, by ctxfast; a multiply-add is two."""
    size = _MATRIX[device]
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    products = [lambda: torch.mm(a, b)]
    if device == "cpu":  # torch's own of float32 is a library's that is slow on some processors
        products.append(lambda: functional.linear_act(a, b))
    with torch.inference_mode():
        return 2.0 * size**3 / min(_seconds(product, device) for product in products)


def floor_seconds(work: Work, device: str, dtype: torch.dtype | None) -> float | None:
    """The longest of what a case takes at least: reading the weights of every step, moving its bytes, its arithmetic.

    ``dtype``: of the products; None leaves the arithmetic out (torch multiplies no int8 to compare with). None is
    returned where nothing is known.
    """
    moved = [work.bytes, None if work.steps is None or work.step_bytes is None else work.steps * work.step_bytes]
    found = [amount / bytes_per_second(device) for amount in moved if amount is not None]
    if work.flops is not None and dtype is not None:
        found.append(work.flops / flops_per_second(device, dtype))
    return max(found, default=None)
