# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``transformer_layers``: heads and sizes around tiles, ragged lengths, every activation."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    lengths: tuple[int, ...],
    hidden: int,
    heads: int,
    wide: int,
    *,
    activation: str = "gelu",
    bias: bool = True,
    weight_dtype: torch.dtype | None = None,
    slack: int = 0,
    layers: int = 1,
    all_layers: bool = False,
    mixed: torch.dtype | None = None,
    reach: int | None = None,
) -> Case:
    """``mixed``: float32 tensors, and products in this dtype."""

    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)

        def product(out: int, size: int) -> list[torch.Tensor | None]:
            return [sample.normal(out, size, spread=size**-0.5), sample.normal(out, spread=0.3) if bias else None]

        def norm() -> list[torch.Tensor]:
            return [1.0 + sample.normal(hidden, spread=0.2), sample.normal(hidden, spread=0.2)]

        def layer() -> list[torch.Tensor | None]:
            attention = (*product(3 * hidden, hidden), *product(hidden, hidden), *norm())
            return [*attention, *product(wide, hidden), *product(hidden, wide), *norm()]

        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        found: dict[str, Any] = dict(
            x=sample.normal(offsets[-1], hidden),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=0) + slack,
            weights=[tensor for _ in range(layers) for tensor in layer()],
            num_heads=heads,
            activation=activation,
            eps=1e-12,
            weight_dtype=weight_dtype,
            all_layers=all_layers,
        )
        if reach is not None:
            found["relative_bias"] = Sampler(device, torch.float32, seed).normal(heads, 2 * reach - 1)
        return found if mixed is None else found | dict(compute_dtype=mixed)

    grads = ("x", "weights") if reach is None else ("x", "weights", "relative_bias")
    if mixed is not None:
        return Case(name, make, grads, (torch.float32,), (torch.float32,), 4 * torch.finfo(mixed).eps)
    if weight_dtype is not None:  # see linear_act: values near the middle of two steps go either way
        return Case(name, make, dtypes=(torch.float32,), tolerance=3e-2)
    # relu's kink is crossed by half precision's rounding
    grad_dtypes = (torch.float32,) if activation == "relu" else (torch.float32, torch.float16, torch.bfloat16)
    return Case(name, make, grads, grad_dtypes=grad_dtypes)


CASES = (
    _case("ragged", (5, 1, 0, 17, 33), 64, 4, 96),
    _case("tiny", (2, 1), 4, 2, 3),
    _case("one-token", (1,), 32, 1, 48),
    _case("no-tokens", (0, 0), 32, 2, 48),
    _case("no-sequences", (), 32, 2, 48),
    _case("odd", (3, 16, 2), 35, 5, 67, activation="gelu_tanh"),
    _case("no-bias", (9, 8), 48, 3, 100, activation="tanh", bias=False),
    _case("relu", (12, 7), 48, 6, 33, activation="relu", slack=5),
    _case("large-chunks", (130, 63, 64, 1, 129), 64, 2, 128),
    _case("two-layers", (6, 2, 9), 48, 4, 64, layers=2),
    _case("three-layers", (5, 3), 40, 2, 48, layers=3, bias=False),
    _case("all-layers", (4, 0, 7), 32, 2, 48, layers=3, all_layers=True),
    _case("all-of-one", (3, 2), 32, 2, 48, all_layers=True),
    _case("no-tokens-all-layers", (0,), 32, 2, 48, layers=2, all_layers=True),
    _case("mixed-bfloat16", (5, 1, 17), 64, 4, 96, layers=2, mixed=torch.bfloat16),
    _case("mixed-float16", (5, 1, 17), 64, 4, 96, layers=2, mixed=torch.float16),
    _case("mixed-all-layers", (4, 0, 7), 32, 2, 48, layers=2, all_layers=True, mixed=torch.float16, bias=False),
    _case("relative-bias", (6, 0, 20, 1), 32, 2, 48, layers=2, reach=9),
    _case("relative-bias-mixed", (6, 20), 32, 2, 48, layers=2, mixed=torch.float16, reach=30, all_layers=True),
    _case("int8", (11, 4), 64, 4, 96, weight_dtype=torch.int8),
    _case("int8-odd", (1, 6), 33, 3, 35, bias=False, activation="relu", weight_dtype=torch.int8),
)
