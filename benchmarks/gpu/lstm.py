# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.lstm right|stress|choose|one``: ``lstm``'s CUDA implementations at real sizes.

- right: ELMo's layer and plain biLSTMs, forward and gradients, batches on both sides of every tile, against the
  reference in float32.
- stress: the same bits in hundreds of calls, on two streams at once, beside products that fill the device, in a graph.
- choose: the implementations beside each other and beside nn.LSTM, by batch: what ``_MAX_BATCH`` in
  ``ctxfast/ops/lstm/cuda.py`` rests on.
- one: a few calls of one size, for a profiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctxfast import functional
from ctxfast._core import registry

from ..ops.lstm import module_lstm
from . import device as _device
from .device import Device, Lines, relative_error
from .switches import rows_in_tiles

ELMO = dict(I=512, H=4096, P=512, clip=3.0)
_SIZES = {"ELMo": ELMO, "H256": dict(I=512, H=256), "H512": dict(I=512, H=512), "H1024": dict(I=512, H=1024)}
# The emulator runs these sizes in seconds, and the persistent kernels take them.
_SMALL = {"projected": dict(I=8, H=512, P=64, clip=0.5), "plain": dict(I=8, H=128)}
# Of the norm, outputs and states; h and the gates are rounded at every step. Gradients: three times that.
_LIMITS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}
_GRADIENTS = ("input", "weight_ih", "weight_hh", "bias", "weight_proj")


def inputs(
    device: Device, B: int, T: int, I: int, H: int,  # noqa: E741
    P: int | None = None, clip: float | None = None, R: int = 2, dtype: torch.dtype = torch.float16,
    ragged: bool = False, state: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``lstm``; states and gates lively, some inside the clips and some at them."""
    sample = torch.Generator().manual_seed(B + 31 * T + H)
    size = H if P is None else P

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=sample) * std).to(device.kind, dtype)

    lengths = torch.randint(0, T + 1, (B,), generator=sample).to(device.kind) if ragged else None
    return dict(
        input=normal(B, T, I),
        weight_ih=[normal(4 * H, I, std=I**-0.5) for _ in range(R)],
        weight_hh=[normal(4 * H, size, std=1.5 * size**-0.5) for _ in range(R)],
        bias=[normal(4 * H, std=0.1) for _ in range(R)],
        weight_proj=None if P is None else [normal(P, H, std=2 * H**-0.5) for _ in range(R)],
        lengths=lengths,
        initial_state=(normal(R, B, size, std=0.5), normal(R, B, H, std=0.5)) if state else None,
        cell_clip=clip,
        proj_clip=clip,
    )


def implementations(device: Device) -> list[str]:
    """Those of a GPU; in a dry run whatever runs on a CPU."""
    return [impl.name for impl in registry.OPS["lstm"].impls if impl.device == device.kind]


def _converted(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    return type(value)(_converted(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def _results(kwargs: dict[str, Any], impl: str, gradients: bool) -> list[Tensor]:
    """output, h_n, c_n; and the gradients of a fixed weighting of them."""
    if not gradients:
        with torch.no_grad():
            output, (h_n, c_n) = functional.lstm(**kwargs, impl=impl)
        return [output, h_n, c_n]
    kwargs = {name: _converted(value, lambda t: t.detach().clone().requires_grad_()) for name, value in kwargs.items()}
    output, (h_n, c_n) = functional.lstm(**kwargs, impl=impl)
    leaves = [t for name in _GRADIENTS if kwargs[name] is not None for t in _flat(kwargs[name])]
    sample = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=sample).to(t) for t in (output, h_n, c_n)]
    return [output, h_n, c_n, *torch.autograd.grad((output, h_n, c_n), leaves, given)]


def _flat(value: Any) -> Iterator[Tensor]:
    yield from (value,) if isinstance(value, Tensor) else value


def right(device: Device, impls: Sequence[str]) -> int:
    lines = Lines(width=70)
    sizes, dtypes = (_SMALL, [torch.float32]) if device.is_stand_in else (_SIZES, device.halves)
    if device.is_stand_in and "cpu" not in impls:
        dtypes = [torch.float16]  # the persistent kernels, emulated
    batches = (1, 9, 33) if device.is_stand_in else (1, 3, 8, 9, 16, 17, 32, 33, 128)
    for dtype in dtypes:
        for name, size in sizes.items():
            for B in batches:
                lengths = [(3, {}), (3, dict(ragged=True, state=True))] if device.is_stand_in else [
                    (1, {}), (7, dict(ragged=True, state=True)), (64, {})
                ]  # fmt: skip
                for T, extra in lengths:
                    if T == 64 and B not in (8, 32):
                        continue
                    gradients = bool(extra)
                    # Half precision crosses the clips' kinks, which gradients then do not share.
                    free = {**size, "clip": None} if gradients else size
                    kwargs = inputs(device, B, T, dtype=dtype, **free, **extra)
                    wide = {key: _converted(value, Tensor.float) for key, value in kwargs.items()}
                    want = _results(wide, "reference", gradients)
                    for impl in impls:
                        what = f"{impl} {name} {str(dtype)[6:]} B{B} T{T}{' ragged' * bool(extra)}"
                        _one_right(lines, what, kwargs, impl, gradients, want, _LIMITS[dtype])
    return lines.end()


def _one_right(
    lines: Lines, what: str, kwargs: dict[str, Any], impl: str, gradients: bool, want: list[Tensor], limit: float
) -> None:
    objection = registry.OPS["lstm"].supports(registry.OPS["lstm"].impl(impl), registry.OPS["lstm"].arguments(**kwargs))
    if objection is not None:
        lines.row(what, lambda: f"not taken: {objection}")
        return
    found: list[Tensor] = []
    lines.row(what, lambda: found.extend(_results(kwargs, impl, gradients)))
    if found:
        errors = [relative_error(one, two) for one, two in zip(found, want)]
        told = {"outputs": (_worst(errors[:3]), limit)}
        if gradients:
            told["gradients"] = _worst(errors[3:]), 3 * limit
        lines.check(what, told)


def _worst(errors: Sequence[float]) -> float:
    """The largest; nan if one is."""
    return float(torch.tensor(errors, dtype=torch.float64).max()) if errors else 0.0


@torch.no_grad()
def stress(device: Device, impls: Sequence[str]) -> int:
    lines = Lines(width=70)
    size, T = (_SMALL["projected"], 3) if device.is_stand_in else (ELMO, 64)
    dtype = torch.float32 if "cpu" in impls else torch.float16
    calls, rounds = (3, 2) if device.is_stand_in else (300, 30)
    for impl in impls:
        for B in (9,) if device.is_stand_in else (8, 16, 32):
            kwargs = inputs(device, B, T, dtype=dtype, **size)
            lines.row(f"{impl} B{B}: same bits", _stressed, device, kwargs, impl, calls, rounds)
    return lines.end()


def _stressed(device: Device, kwargs: dict[str, Any], impl: str, calls: int, rounds: int) -> str:
    def run() -> Tensor:
        return functional.lstm(**kwargs, impl=impl)[0]

    first = run()
    device.synchronize()
    passed = [_agree("again", first, [run() for _ in range(calls)], device)]
    one, two = device.streams(2)
    both: list[Tensor] = []
    for _ in range(rounds):
        for stream in (one, two):
            with stream:
                both.append(run())
    passed.append(_agree("two at once", first, both, device))
    width = 64 if device.is_stand_in else 8192
    busy = torch.randn(width, width, device=device.kind, dtype=kwargs["input"].dtype)
    beside: list[Tensor] = []
    for _ in range(rounds):
        with one:  # holds multiprocessors while blocks that wait for one another arrive
            for _ in range(3):
                busy @ busy
        with two:
            beside.append(run())
    passed.append(_agree("beside products", first, beside, device))
    replay = device.graph(run)
    kwargs["input"].copy_(torch.randn_like(kwargs["input"]))
    captured = replay()
    passed.append(_agree("in a graph", run(), [captured], device))
    return ", ".join(passed)


def _agree(what: str, first: Tensor, others: Sequence[Tensor], device: Device) -> str:
    device.synchronize()
    wrong = sum(not torch.equal(first, other) for other in others)
    if wrong:
        raise AssertionError(f"{what}: {wrong} of {len(others)} calls gave other bits")
    return f"{len(others)} {what}"


def choose(device: Device, impls: Sequence[str]) -> int:
    lines = Lines(width=28)
    sizes = _SMALL if device.is_stand_in else _SIZES
    T = 4 if device.is_stand_in else 128
    columns = [*impls, "nn.LSTM", "products before"]
    for passes in ("forward", "forward and backward"):
        print(f"us a step of both directions, {T} steps, {passes}, the input's products within")
        print(f"{'':28} {' '.join(f'{name:>16}' for name in columns)}")
        for name, size in sizes.items():
            for B in (2, 33) if device.is_stand_in else (1, 8, 16, 32, 48, 64, 96, 128):
                if passes != "forward" and B in (1, 48, 96):
                    continue
                lines.row(f"{name} B{B}", _beside, device, impls, B, T, size, passes != "forward")
    return lines.end()


def _beside(device: Device, impls: Sequence[str], B: int, T: int, size: dict[str, Any], backward: bool) -> str:
    dtype = torch.float32 if "cpu" in impls else torch.float16
    kwargs = inputs(device, B, T, dtype=dtype, **size)
    leaves = [t for name in _GRADIENTS if kwargs[name] is not None for t in _flat(kwargs[name])]
    if backward:
        for leaf in leaves:
            leaf.requires_grad_()
    x = kwargs["input"]
    found: list[str] = []

    def timed(run: Any) -> None:
        found.append(f"{1e3 * device.milliseconds(run, 0.15) / T:16.2f}")

    def step(impl: str) -> None:
        output = functional.lstm(**kwargs, impl=impl)[0]
        if backward:
            torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    with torch.set_grad_enabled(backward):
        for impl in impls:
            args = registry.OPS["lstm"].arguments(**kwargs)
            if registry.OPS["lstm"].supports(registry.OPS["lstm"].impl(impl), args) is None:
                timed(partial(step, impl))
            else:
                found.append(f"{'-':>16}")
    module, _ = module_lstm({**kwargs, "lengths": None}, (0, 1), trained=backward)
    own = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def peer() -> None:
        output = module(x)[0]
        if backward:
            torch.autograd.grad(output, own, torch.ones_like(output))

    with torch.set_grad_enabled(backward):
        timed(peer)
    with torch.no_grad():
        timed(lambda: [torch.nn.functional.linear(x, w, b) for w, b in zip(kwargs["weight_ih"], kwargs["bias"])])
    return " ".join(found)


@torch.no_grad()
def one(device: Device, impls: Sequence[str], batch: int, hidden: int | None) -> int:
    size = ELMO if hidden is None else dict(I=512, H=hidden)
    if device.is_stand_in:
        size = _SMALL["projected"]
    dtype = torch.float32 if "cpu" in impls else torch.float16
    kwargs = inputs(device, batch, 3 if device.is_stand_in else 64, dtype=dtype, **size)
    for _ in range(3):
        functional.lstm(**kwargs, impl=impls[0])
    device.synchronize()
    return 0


def main(argv: Sequence[str] | None = None, impls: Sequence[str] | None = None) -> int:
    """``impls``: other implementations than the device's, for tests that put them onto the emulator."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.lstm")
    parser.add_argument("what", choices=("right", "stress", "choose", "one"))
    parser.add_argument("batch", nargs="?", type=int, default=8, help="rows of 'one'")
    parser.add_argument("--hidden", type=int, help="cells of a plain layer for 'one', instead of ELMo's")
    options, device = _device.start(parser, argv)
    impls = implementations(device) if impls is None else impls
    if options.what == "one":
        return one(device, impls, options.batch, options.hidden)
    with rows_in_tiles():  # more rows than it takes by itself are right too, or no choice
        return {"right": right, "stress": stress, "choose": choose}[options.what](device, impls)


if __name__ == "__main__":
    sys.exit(main())
