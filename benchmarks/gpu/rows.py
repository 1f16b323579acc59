# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.rows``: every op but ``lstm`` on the GPU's implementations, at the benchmarks' sizes.

Results and gradients against the reference in float64, in memory that holds nan, twice with the same bits;
``attention`` also on lengths around its tiles. A dry run takes tiny sizes and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch

from ctxfast import functional as functional  # enters all ops in the table
from ctxfast._core import capability, registry

from .. import cases, peers
from ..cases import Case, Row
from ..gate import results, runner
from . import device as _device
from .device import Device, Lines, relative_error

# Of the norm. A gradient is a sum of products that were each rounded.
_LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
_GRADIENT_FACTOR = 3.0
# Around the tiles of attention: none, one, and a token to each side of 16, 32, 64 and 128.
_EDGES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257)
_UP_TO = ((16, 3, 9), (32, 7), (64, 33, 1), (128, 65, 2), (300, 5))


def selected(device: Device) -> Iterator[tuple[Case, registry.Impl]]:
    """What is checked: every row that is timed on a GPU, in the dtypes it is timed in, with its gradients."""
    for op, spec in registry.OPS.items():
        impls = [impl for impl in spec.impls if op != "lstm" and _is_here(impl, device)]
        rows = (*cases.module(op).ROWS, *_more_rows(op))
        if device.is_stand_in:
            rows = (Row("tiny", cases.module(op).TINY, cuda=("float16",)), *_more_rows(op)[-1:])
        seen = set()
        for row in rows:
            passes = ("f", "fb") if hasattr(cases.module(op), "GRADS") else ("f",)
            for dtype in row.cuda:
                for name in passes if device.is_stand_in else row.passes:
                    case = Case(op, row.workload, _without_dropout(row), dtype, name == "fb", device.kind, row.size)
                    if case.id not in seen:
                        seen.add(case.id)
                        yield from ((case, impl) for impl in impls)


def _is_here(impl: registry.Impl, device: Device) -> bool:
    if impl.name == "triton" and device.is_stand_in:
        return capability.is_triton_interpreted()
    return impl.device == "cuda" and not device.is_stand_in


def _more_rows(op: str) -> tuple[Row, ...]:
    if op != "attention":
        return ()
    heads = [dict(H=12, D=64), dict(H=4, D=32), dict(H=3, D=48), dict(H=2, D=128)]
    shapes = {"edges": _EDGES, **{f"up to {lengths[0]}": lengths for lengths in _UP_TO}}
    rows = [
        Row(f"{name} D{sizes['D']}", dict(lengths=lengths, **sizes), cpu=(), passes=("f", "fb"))
        for name, lengths in shapes.items()
        for sizes in heads
    ]
    return (*rows, Row("edges, small", dict(lengths=(0, 3, 17), H=2, D=16), cpu=(), cuda=("float16",)))


def _without_dropout(row: Row) -> dict:
    return {name: value for name, value in row.sizes.items() if name != "dropout"}


def check(case: Case, impl: registry.Impl, lines: Lines) -> None:
    """One case on one implementation: a line with the errors of outputs and of each gradient."""
    what = f"{case.id}: {impl.name}"
    args = case.make()
    with torch.set_grad_enabled(case.backward):
        objection = registry.OPS[case.op].supports(impl, registry.OPS[case.op].arguments(**args))
    if objection is not None:
        lines.row(what, lambda: f"not taken: {objection}")
        return
    right, right_grads, starts = peers.oracle(case, args)
    call = next(p for p in peers.providers(case) if p.name == f"ctxfast {impl.name}").build(case, args)
    run = runner(call, starts, backward=case.backward)
    found: list = []

    def twice() -> None:
        found.extend(results(call, run(), backward=case.backward) for _ in range(2))
        if not all(torch.equal(one, two) for one, two in zip(_all(found[0]), _all(found[1]))):
            raise AssertionError("two runs gave other bits")

    lines.row(what, twice)
    if not found:
        return
    outputs, grads = found[0]
    limit, errors = _LIMITS[case.dtype], {}
    errors["outputs"] = max(relative_error(one, two) for one, two in zip(outputs, right)), limit
    for name, values in grads.items():
        error = max(relative_error(one, two) for one, two in zip(values, right_grads[name]))
        errors[name] = error, _GRADIENT_FACTOR * limit
    lines.check(what, errors)


def _all(found: tuple) -> list[torch.Tensor]:
    outputs, grads = found
    return [*outputs, *(tensor for values in grads.values() for tensor in values)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.rows")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    options, device = _device.start(parser, argv)
    lines = Lines(width=90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch lists its own operations that repeat no bits
        # torch.empty then gives nan.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for case, impl in selected(device):
                if not options.op or case.op in options.op:
                    lines.row(f"{case.id}: inputs", check, case, impl, lines)
        finally:
            torch.use_deterministic_algorithms(False)
    return lines.end()


if __name__ == "__main__":
    sys.exit(main())
