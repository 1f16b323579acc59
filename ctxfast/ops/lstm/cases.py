# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``lstm``: every path of a kernel's tiling, lengths, states and clips."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import HALF_AND_FLOAT, Case
from ..shared.samples import Sampler


def _case(
    name: str,
    *,
    B: int,
    T: int,
    I: int,  # noqa: E741  (the letter of the legend)
    H: int,
    P: int | None = None,
    R: int = 1,
    lengths: tuple[int, ...] | None = None,
    state: bool = False,
    bias: bool = True,
    own_inputs: bool = False,
    clip: float | None = None,
    scale: float = 1.0,
    weight_dtype: torch.dtype | None = None,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        size = H if P is None else P

        def per_direction(*shape: int, spread: float) -> list[torch.Tensor]:
            return [sample.normal(*shape, spread=scale * spread) for _ in range(R)]

        return dict(
            input=[sample.normal(B, T, I) for _ in range(R)] if own_inputs else sample.normal(B, T, I),
            weight_ih=per_direction(4 * H, I, spread=I**-0.5),
            weight_hh=per_direction(4 * H, size, spread=size**-0.5),
            bias=per_direction(4 * H, spread=0.5) if bias else None,
            weight_proj=None if P is None else per_direction(P, H, spread=H**-0.5),
            lengths=None if lengths is None else sample.integers_given(lengths),
            initial_state=(sample.normal(R, B, size, spread=0.5), sample.normal(R, B, H, spread=0.5))
            if state
            else None,
            cell_clip=clip,
            proj_clip=clip,
            weight_dtype=weight_dtype,
        )

    grads = ["input", "weight_ih", "weight_hh"]
    grads += ["bias"] * bias + ["weight_proj"] * (P is not None) + ["initial_state"] * state
    # Rounding to half precision moves values across a bound that clips many of them, and flips gates that are steep.
    grad_dtypes = (torch.float32,) if (clip is not None and clip < 1) or scale > 1 else HALF_AND_FLOAT
    if weight_dtype is None:
        return Case(name, make, tuple(grads), grad_dtypes=grad_dtypes)
    return Case(name, make, tuple(grads), (torch.float32,), (torch.float32,), _TOLERANCE[weight_dtype])


_BF16, _INT8 = torch.bfloat16, torch.int8
# One step of rounding in h, seen in a sum over few terms.
_TOLERANCE = {_BF16: 2e-3, _INT8: 1e-2}

# Layers of real models, for GPUs: a CPU would work on them for seconds.
ON_A_GPU = (
    _case("real-elmo", B=9, T=3, I=64, H=4096, P=512, R=2, lengths=(3, 0, 1, 2, 3, 3, 1, 3, 2), state=True, clip=3.0),
    _case("real-elmo-few-rows", B=3, T=4, I=64, H=4096, P=512, R=2, state=True, clip=3.0),
    _case("real-elmo-many-rows", B=33, T=2, I=64, H=4096, P=512, R=2, clip=3.0),
    _case("real-plain", B=17, T=3, I=64, H=1024, R=2, lengths=(3, 1, 2, 3, 0, *(3,) * 12), state=True),
)

CASES = (
    _case("one", B=1, T=1, I=1, H=1),
    _case("one-step-projected", B=1, T=1, I=3, H=5, P=2, R=2),
    _case("plain", B=2, T=5, I=4, H=16),
    _case("plain-two-directions", B=3, T=7, I=8, H=17, R=2, state=True),
    _case("plain-ragged", B=4, T=6, I=5, H=33, R=2, lengths=(6, 0, 1, 3), state=True),
    _case("elmo-like", B=3, T=9, I=16, H=64, P=16, R=2, clip=3.0),
    _case("elmo-like-ragged-state", B=5, T=9, I=16, H=64, P=16, R=2, lengths=(9, 2, 7, 1, 5), state=True, clip=3.0),
    _case("own-inputs", B=2, T=4, I=6, H=12, P=7, R=2, own_inputs=True, lengths=(4, 3), clip=1.0),
    _case("clips-hit", B=3, T=8, I=8, H=40, P=12, R=2, state=True, clip=0.25, scale=3.0),
    _case("saturated-gates", B=2, T=6, I=8, H=20, R=2, scale=12.0),
    _case("no-bias", B=2, T=3, I=4, H=9, P=3, bias=False),
    _case("empty-batch", B=0, T=4, I=3, H=8, P=4, R=2),
    _case("no-steps", B=2, T=0, I=3, H=8, P=4, R=2, state=True),
    _case("all-empty-rows", B=3, T=4, I=3, H=8, R=2, lengths=(0, 0, 0), state=True),
    _case("odd-sizes", B=7, T=3, I=129, H=65, P=63, R=2, lengths=(3, 3, 1, 2, 0, 3, 2)),
    _case("wide-batch", B=33, T=3, I=8, H=31, P=17),
    _case("large", B=6, T=12, I=64, H=512, P=128, R=2, lengths=(12, 12, 11, 9, 4, 1), clip=3.0),
    _case("large-plain", B=9, T=10, I=64, H=257, R=2),
    # Sizes that the persistent kernels take: one, two and three tiles of rows.
    _case("on-chip-plain", B=9, T=4, I=8, H=128, R=2, lengths=(4, 0, 1, 4, 3, 2, 4, 4, 1), state=True),
    _case("on-chip-projected", B=17, T=3, I=8, H=512, P=64, R=2, state=True, clip=0.5, scale=2.0),
    _case("on-chip-wide-batch", B=33, T=3, I=8, H=128, R=2),
    _case("bf16-weights", B=3, T=6, I=16, H=64, P=24, R=2, state=True, clip=3.0, weight_dtype=_BF16),
    _case("int8-weights", B=3, T=6, I=16, H=64, P=24, R=2, state=True, clip=3.0, weight_dtype=_INT8),
    _case("int8-weights-plain-odd", B=2, T=5, I=7, H=35, R=2, lengths=(5, 2), weight_dtype=_INT8),
    _case("int8-weights-wide-batch", B=37, T=2, I=70, H=31, P=300, weight_dtype=_INT8),
    _case("bf16-weights-wide-batch", B=37, T=2, I=70, H=31, P=300, weight_dtype=_BF16),
    _case("bf16-weights-plain-odd", B=2, T=5, I=7, H=35, R=2, lengths=(5, 2), weight_dtype=_BF16),
)
