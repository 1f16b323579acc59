# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.products``: BERT-Base's products by shape, with what follows them inside or after.

Columns: the product alone; with its bias, by cuBLASLt's epilogue (attention's bias may go there only if it is free);
with GELU's tanh form in the epilogue; and every implementation of ``linear_act`` with GELU (erf), Triton's after
cuBLAS's product and in a product of its own (``FASTER`` in ``ctxfast/ops/shared/triton_product.py``). Then
``add_layer_norm`` beside the time that its bytes take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast import functional
from ctxfast._core import capability, registry

from . import device as _device
from .device import Device, Lines, Run, relative_error
from .switches import gelu_in_product

# Two roundings to 16 bits instead of one.
_LIMIT = 1e-2
_TOKENS, _WIDTH, _WIDE = (128, 1024, 8192, 12288, 16384), 768, 3072


def _implementations(op: str, device: Device) -> list[str]:
    """Those of a GPU, in a dry run those that the interpreter runs; the reference last."""
    impls = [impl.name for impl in registry.OPS[op].impls if impl.device == "cuda"]
    if device.is_stand_in:
        impls = [name for name in impls if name == "triton" and capability.is_triton_interpreted()]
    return [*impls, "reference"]


class _Rows:
    """The rows of this program, on inputs of a fixed seed."""

    def __init__(self, device: Device) -> None:
        self._device, self._sample = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._sample) * std
        return drawn.to(self._device.kind, self._device.halves[0])

    def _milliseconds(self, run: Run) -> float:
        return self._device.milliseconds(self._device.graph(run), 0.08)

    def product(self, T: int, K: int, N: int, with_gelu: bool) -> str:
        x, weight, bias = self.normal(T, K), self.normal(N, K, std=K**-0.5), self.normal(N)
        alone = self._milliseconds(lambda: F.linear(x, weight))
        found = [f"alone {alone:.4f} ms, {2 * T * K * N / alone / 1e9:4.0f} TFLOP/s"]
        found.append(f"with bias {self._milliseconds(lambda: F.linear(x, weight, bias)):.4f}")
        if with_gelu:
            tanh = self._milliseconds(lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True))
            found.append(f"tanh in it {tanh:.4f}")
            for impl in _implementations("linear_act", self._device):
                erf = partial(functional.linear_act, x, weight, bias, activation="gelu", impl=impl)
                found.append(f"erf by {impl} {self._milliseconds(erf):.4f}")
                if impl == "triton":
                    right = erf()
                    with gelu_in_product():
                        error = relative_error(erf(), right)
                        found.append(f"in its product {self._milliseconds(erf):.4f}")
                    if not error < _LIMIT:
                        raise AssertionError(f"GELU in the product is off by {error:.1e} from GELU after it")
        return ", ".join(found)

    def layer_norm(self, T: int, N: int, impl: str) -> str:
        x, residual, weight = self.normal(T, N), self.normal(T, N), self.normal(N)
        run = partial(functional.add_layer_norm, x, residual, weight, weight, weight, impl=impl)
        return f"{self._milliseconds(run):.4f} ms; its bytes {3 * x.nbytes / 4.3e9:.4f} at 4.3 TB/s"


@torch.no_grad()
def run(device: Device) -> int:
    lines, rows = Lines(width=30), _Rows(device)
    tokens, width, wide = ((5,), 32, 64) if device.is_stand_in else (_TOKENS, _WIDTH, _WIDE)
    for T in tokens:
        for K, N in ((width, 3 * width), (width, width), (width, wide), (wide, width)):
            lines.row(f"{T} x {K} -> {N}", rows.product, T, K, N, N == wide)
    for impl in _implementations("add_layer_norm", device):
        lines.row(f"add_layer_norm {impl}", rows.layer_norm, tokens[-1], width, impl)
    return lines.end()


def main(argv: Sequence[str] | None = None) -> int:
    _, device = _device.start(argparse.ArgumentParser("python -m benchmarks.gpu.products"), argv)
    return run(device)


if __name__ == "__main__":
    sys.exit(main())
