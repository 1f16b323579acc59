# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.attention``: ``attention`` by shape, in a graph, beside torch's, and cut in other ways.

Where all sequences have one length torch's SDPA could be called instead (``FULL_BY_SDPA``); whether its backends are
faster there, and which tiles are, ``ctxfast/ops/attention/triton_plan.py`` can say once these have been measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctxfast import functional

from ..inputs import RAGGED_256
from . import device as _device
from .device import Device, Lines, Run, relative_error
from .switches import full_by_sdpa

_SHAPES = {"1 x 128": (128,), "256 ragged": RAGGED_256, "64 x 128": (128,) * 64, "32 x 512": (512,) * 32}
_SMALL = {"ragged": (5, 17, 1, 40), "2 x 8": (8, 8)}
_LIMIT = 2e-2  # of the norm, between two ways that both round to 16 bits
# queries, keys, warps, stages, registers a thread at most (None: as the compiler likes) of a tile. Which of them spill,
# the compiler says: csrc/triton_resources.py.
_Cut = tuple[int, int, int, int, "int | None"]
_FORWARD: tuple[_Cut, ...] = (
    (64, 64, 4, 1, None), (64, 64, 4, 2, None), (64, 64, 4, 2, 128), (64, 128, 4, 1, None), (128, 64, 4, 2, None),
    (128, 64, 8, 2, None), (128, 64, 8, 2, 128), (128, 128, 8, 1, None), (128, 128, 8, 2, None),
)  # fmt: skip
_BACKWARD: tuple[_Cut, ...] = (
    (64, 64, 4, 1, None), (64, 64, 4, 2, None), (64, 32, 4, 2, None), (32, 64, 4, 2, None), (64, 64, 8, 2, None),
    (64, 128, 8, 1, None), (128, 64, 8, 1, None),
)  # fmt: skip


class _Inputs:
    """Packed inputs of one shape, and what torch's own functions take for them."""

    def __init__(self, device: Device, lengths: Sequence[int]) -> None:
        self.heads, self.head_dim = (2, 32) if device.is_stand_in else (12, 64)
        sample, dtype = torch.Generator().manual_seed(0), device.halves[0]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=sample).to(device.kind, dtype)

        self.lengths, self.longest = tuple(lengths), max(lengths)
        self.qkv = normal(sum(lengths), 3, self.heads, self.head_dim)
        self.bias, self.grad = normal(3, self.heads, self.head_dim), normal(sum(lengths), self.heads, self.head_dim)
        starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.cu_seqlens = starts.to(device.kind)
        self.impl = "triton"

    @property
    def is_full(self) -> bool:
        return len(set(self.lengths)) == 1

    def call(self, with_bias: bool = True, **how: Any) -> Tensor:
        bias = self.bias if with_bias else None
        return functional.attention(self.qkv, self.cu_seqlens, self.longest, bias, impl=self.impl, **how)

    def padded(self) -> tuple[Tensor, ...]:
        """query, key, value (S, H, L, D) of sequences of one length."""
        shape = (len(self.lengths), self.longest, 3, self.heads, self.head_dim)
        return self.qkv.detach().view(shape).permute(2, 0, 3, 1, 4).unbind()

    def flops(self) -> float:
        return 4.0 * sum(n * n for n in self.lengths) * self.heads * self.head_dim


def _backward_of(output: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Callable[[Tensor], Tensor]) -> Run:
    def run() -> Any:
        found = output()
        return torch.autograd.grad(found, leaves, grad(found))

    return run


def _told(device: Device, run: Run, flops: float = 0.0) -> str:
    took = device.milliseconds(device.graph(run))
    return f"{took:.4f} ms" + (f", {flops / took / 1e9:.0f} TFLOP/s" if flops else "")


def _forward(device: Device, given: _Inputs, with_bias: bool) -> str:
    with torch.no_grad():
        return _told(device, lambda: given.call(with_bias), given.flops())


def _full(device: Device, given: _Inputs) -> str:
    """As a call would be with ``FULL_BY_SDPA``."""
    with torch.no_grad():
        right = given.call(False)
        with full_by_sdpa():
            error = relative_error(given.call(False), right)
            if not error < _LIMIT:
                raise AssertionError(f"off by {error:.1e} from the kernel's result")
            return _told(device, lambda: given.call(False), given.flops())


def _both(device: Device, given: _Inputs, with_bias: bool, dropout: float) -> str:
    leaves = [given.qkv.requires_grad_(), *([given.bias.requires_grad_()] if with_bias else [])]
    return _told(device, _backward_of(lambda: given.call(with_bias, dropout_p=dropout), leaves, lambda out: given.grad))


def shapes(device: Device, lines: Lines) -> None:
    """As shipped, with the bias on load and without; torch's own backends."""
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for name, lengths in (_SMALL if device.is_stand_in else _SHAPES).items():
        given = _Inputs(device, lengths)
        for what, with_bias in (("bias on load", True), ("no bias", False)):
            lines.row(f"{name}, forward, {what}", _forward, device, given, with_bias)
        if given.is_full and not device.is_stand_in:
            lines.row(f"{name}, forward, no bias, full by SDPA", _full, device, given)
        for backend in backends if given.is_full else ():
            lines.row(f"{name}, forward, {backend.name}", _sdpa, device, given, backend)
        if not given.is_full and not device.is_stand_in:
            lines.row(f"{name}, forward, varlen_attn", _varlen, device, given)
        for p in (0.0, 0.1):
            both = f"{name}, forward+backward, dropout {p}"
            for what, with_bias in (("bias on load", True), ("no bias", False)):
                lines.row(f"{both}, {what}", _both, device, given, with_bias, p)
            for backend in backends if given.is_full else ():
                lines.row(f"{both}, {backend.name}", _sdpa, device, given, backend, p)


def _sdpa(device: Device, given: _Inputs, backend: SDPBackend, dropout: float | None = None) -> str:
    """torch's backend; forward and backward with a dropout, forward alone without."""
    backend = SDPBackend.MATH if device.is_stand_in else backend
    parts = given.padded()

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*parts, dropout_p=dropout or 0.0)

    try:
        if dropout is None:
            with torch.no_grad():
                return _told(device, forward, given.flops())
        parts = tuple(part.contiguous().requires_grad_() for part in parts)
        grad = torch.randn_like(parts[0])
        return _told(device, _backward_of(forward, parts, lambda out: grad))
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            return "does not take it"
        raise


def _varlen(device: Device, given: _Inputs) -> str:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.contiguous() for part in given.qkv.detach().unbind(1))
    starts, longest = given.cu_seqlens, given.longest
    with torch.no_grad():
        return _told(device, lambda: varlen_attn(query, key, value, starts, starts, longest, longest), given.flops())


@contextmanager
def cut(**tiles: _Cut | None) -> Iterator[None]:
    """Inside, plans have these tiles: forward, whole, query, key; None for no such kernel."""
    from ctxfast.ops.attention import triton_plan

    chosen = {
        name: None if tile is None else triton_plan.Tile(*tile[:4], registers=tile[4]) for name, tile in tiles.items()
    }
    plain = triton_plan.choose
    with mock.patch.object(triton_plan, "choose", lambda *args, **kwargs: replace(plain(*args, **kwargs), **chosen)):
        yield


def tiles(device: Device, lines: Lines) -> None:
    """Every way to cut, held to the shipped one's results; a way that does not compile keeps its row."""
    ways = {"forward": _FORWARD, "query": _BACKWARD, "key": _BACKWARD}
    shapes = {name: lengths for name, lengths in _SHAPES.items() if name != "1 x 128"}
    if device.is_stand_in:
        ways, shapes = {name: found[:1] for name, found in ways.items()}, {"ragged": _SMALL["ragged"]}
    for name, lengths in shapes.items():
        given = _Inputs(device, lengths)
        lines.row(f"{name}, forward as shipped", _forward, device, given, False)
        lines.row(f"{name}, forward+backward, dropout 0.1, as shipped", _both, device, given, False, 0.1)
        for kernel, candidates in ways.items():
            for tile in candidates:
                words = "{} x {}, {} warps, {} stages, registers {}".format(*tile)
                lines.row(f"{name}, {kernel} {words}", _timed_cut, device, given, kernel, tile)


def _timed_cut(device: Device, given: _Inputs, kernel: str, tile: _Cut) -> str:
    if kernel == "forward":
        given.qkv.requires_grad_(False)
        with torch.no_grad():
            right = given.call(False)
            with cut(forward=tile):
                error = relative_error(given.call(False), right)
                took = device.milliseconds(device.graph(lambda: given.call(False)), 0.08)
    else:
        given.qkv.requires_grad_()
        run = _backward_of(lambda: given.call(False, dropout_p=0.1), [given.qkv], lambda out: given.grad)
        other = "key" if kernel == "query" else "query"
        with cut(whole=None, **{kernel: tile, other: (64, 64, 4, 2, None)}):
            plain = _backward_of(lambda: given.call(False), [given.qkv], lambda out: given.grad)
            (gradient,) = plain()
            took = device.milliseconds(device.graph(run), 0.08)
        error = relative_error(gradient, plain()[0])
    if not error < _LIMIT:
        raise AssertionError(f"off by {error:.1e} from the shipped tiles' result")
    return f"{took:.4f} ms, {error:.0e} from the shipped"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.attention")
    _, device = _device.start(parser, argv)
    lines = Lines(width=62)
    shapes(device, lines)
    tiles(device, lines)
    return lines.end()


if __name__ == "__main__":
    sys.exit(main())
