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
    reach: int | None = None,
    window: int | None = None,
    rotated: int | None = None,
    kv_heads: int | None = None,
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        heads = (3, H) if kv_heads is None else (H + 2 * kv_heads,)
        longest = max(lengths, default=0) + slack
        offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        return dict(
            qkv=sample.normal(sum(lengths), *heads, D, spread=spread),
            cu_seqlens=sample.integers_given(offsets, torch.int32),
            max_seqlen=longest,
            bias=sample.normal(*heads, D, spread=0.3) if bias else None,
            softmax_scale=scale,
            relative_bias=None if reach is None else Sampler(device, torch.float32, seed).normal(H, 2 * reach - 1),
            window=window,
            rotary=None if rotated is None else _angles(longest + 3, rotated).to(device),
            num_kv_heads=kv_heads,
        )

    grads = ["qkv"] + ["bias"] * bias + ["relative_bias"] * (reach is not None)
    return Case(name, make, tuple(grads), dtypes)


def _angles(positions: int, rotated: int) -> torch.Tensor:
    """(positions, 2, rotated/2): cosines and sines of angles in geometric steps."""
    steps = 100.0 ** -(torch.arange(rotated // 2) / max(rotated // 2, 1))
    angles = torch.arange(positions)[:, None] * steps
    return torch.stack((angles.cos(), angles.sin()), dim=1)


CASES = (
    _case("tiny", (3, 0, 2), H=2, D=4, bias=True),
    _case("tiny-all-at-once", (3, 0, 2), H=2, D=4, bias=True, reach=2, window=1, rotated=2, kv_heads=1),
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
    _case("relative-bias", (5, 0, 1, 12), H=2, D=8, bias=True, reach=16),
    _case("relative-bias-clamped", (70, 3, 33), H=3, D=32, reach=9, scale=-0.3),
    _case("relative-bias-of-three", (6, 40), H=2, D=16, bias=True, reach=2),
    _case("relative-bias-long", (300, 18), H=1, D=64, reach=300),
    _case("window", (5, 2), H=2, D=4, bias=True, window=1),
    _case("window-of-zero", (9, 130), H=1, D=16, window=0),
    _case("window-across-tiles", (200, 65, 1, 0, 97), H=2, D=32, bias=True, window=30),
    _case("window-beyond-all", (20, 7), H=2, D=32, window=64),
    _case("window-long", (512, 3), H=1, D=64, window=64),
    _case("rotary", (7, 0, 1, 20), H=2, D=32, bias=True, rotated=32),
    _case("rotary-partial", (33, 5), H=2, D=20, rotated=6),
    _case("rotary-half-of-40", (65, 48), H=1, D=80, bias=True, rotated=40),
    _case("grouped-queries", (3, 9), H=4, D=4, bias=True, kv_heads=2),
    _case("one-key-for-all", (40, 1, 0, 129), H=3, D=32, kv_heads=1),
    _case("all-at-once", (100, 0, 33, 70), H=4, D=32, bias=True, reach=20, window=40, rotated=24, kv_heads=2, slack=4),
    _case("many-short", tuple((i * 7) % 11 + 1 for i in range(60)), H=2, D=32),
)
