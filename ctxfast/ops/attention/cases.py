# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``attention``: head sizes, sequence lengths around tiles, empty sequences."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import HALF_AND_FLOAT, Case
from ..shared.samples import Sampler


def _case(
    name: str,
    lengths: tuple[int, ...],
    *,
    H: int,
    D: int,
    bias: bool = False,
    slack: int = 0,
    scale: float | None = None,
    spread: float = 1.0,
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        return dict(
            qkv=sample.normal(sum(lengths), 3, H, D, spread=spread),
            cu_seqlens=sample.integers_given(offsets, torch.int32),
            max_seqlen=max(lengths, default=0) + slack,
            bias=sample.normal(3, H, D, spread=0.3) if bias else None,
            softmax_scale=scale,
        )

    return Case(name, make, ("qkv", "bias") if bias else ("qkv",), dtypes)


CASES = (
    _case("tiny", (3, 0, 2), H=2, D=4, bias=True),
    _case("one-token", (1,), H=1, D=32),
    _case("single-tokens", (1, 1, 1), H=2, D=64),
    _case("bert-like", (16, 9, 12), H=4, D=64, bias=True),
    _case("minilm-like", (7, 31, 2, 18), H=12, D=32, bias=True),
    _case("equal-lengths", (17, 17, 17), H=3, D=64),
    _case("empty-sequences", (0, 5, 0, 0, 3, 0), H=2, D=32, bias=True),
    _case("all-empty", (0, 0), H=2, D=32, bias=True),
    _case("no-sequences", (), H=2, D=64),
    _case("tile-edges", (63, 64, 65), H=2, D=32),
    _case("tile-edges-long", (127, 128, 129), H=2, D=64),
    _case("long", (511, 1), H=1, D=64, bias=True),
    _case("wide-head", (33, 20), H=2, D=128),
    _case("odd-head", (13, 6), H=3, D=17, bias=True),
    _case("max-seqlen-with-slack", (5, 8), H=2, D=32, slack=11),
    _case("own-scale", (6, 10), H=2, D=32, scale=0.5),
    _case("peaked", (24, 12), H=2, D=64, spread=6.0),
    _case("none-one-two", (0, 1, 2), H=12, D=64, bias=True),
    _case("model-limit", (512, 2), H=1, D=32, dtypes=(torch.float16, torch.bfloat16)),
    _case("head-of-48", (37, 21), H=2, D=48, bias=True),
    _case("negative-scale", (6, 40), H=2, D=32, bias=True, scale=-0.2),
    _case("blocks-of-queries", (47, 48, 49, 97), H=2, D=32, bias=True),
    _case("blocks-of-keys", (300, 257), H=1, D=32),
    _case("head-of-one", (5, 2, 18), H=3, D=1, bias=True),
    _case("head-of-80", (50, 3), H=2, D=80, bias=True),
    _case("head-of-256", (9, 20), H=1, D=256, bias=True),
    _case("many-short", tuple((i * 7) % 11 + 1 for i in range(60)), H=2, D=32),
)
