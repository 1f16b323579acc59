# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``char_cnn``: ELMo's filter widths, words of every length, filters as wide as the word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    *,
    filters: tuple[tuple[int, int], ...],
    W: int = 0,
    lengths: Sequence[int] | None = None,
    C: int = 50,
    D: int = 4,
    V: int = 262,
    act: str = "relu",
    bias: float = 0.0,
    ids: torch.dtype = torch.int64,
) -> Case:
    """``W`` words of random characters, or one for each of ``lengths``: so many characters, then the padding's."""

    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        char_ids = sample.integers(0, V, W if lengths is None else len(lengths), C)
        if lengths is not None:
            inside = torch.arange(C)[None] < torch.tensor(lengths)[:, None]
            char_ids = torch.where(inside.to(device), char_ids, V - 1)
        return dict(
            char_ids=char_ids.to(ids),
            char_embeddings=sample.normal(V, D),
            conv_weights=[sample.normal(n, D, w, spread=(D * w) ** -0.5) for w, n in filters],
            conv_biases=[sample.normal(n, spread=0.2, mean=bias) for _, n in filters],
            activation=act,
        )

    # Rounding to half precision changes which position is the largest, and with it where the gradient goes.
    return Case(name, make, ("char_embeddings", "conv_weights", "conv_biases"), grad_dtypes=(torch.float32,))


_ELMO = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 64), (6, 32), (7, 33))
_TINY = ((1, 4), (2, 8), (3, 16), (4, 32), (5, 64))

CASES = (
    _case("tiny", W=4, filters=((1, 2), (3, 3)), C=5, D=3, V=9),
    _case("elmo-tiny", W=9, filters=_TINY),
    _case("padded", lengths=(0, 1, 2, 6, 8, 13, 44, 45, 48, 49, 50), filters=_ELMO, D=16),
    _case("elmo-tiny-tanh", W=9, filters=_TINY, act="tanh"),
    _case("elmo-widths", W=5, filters=_ELMO, D=16),
    _case("one-word", W=1, filters=_TINY),
    _case("no-words", W=0, filters=_TINY),
    _case("one-filter", W=3, filters=((3, 1),), D=1, V=5),
    _case("whole-word", W=6, filters=((7, 5), (1, 3)), C=7, D=3),
    _case("padded-tanh", lengths=(3, 12, 50, 0, 25), filters=((2, 33), (7, 40)), act="tanh", ids=torch.int32),
    # Beside a bias far below every sum relu gives zeros only, and tanh -1: the maximum itself is negative.
    _case("negative", lengths=(4, 0, 9), filters=_TINY, bias=-9.0),
    _case("negative-tanh", lengths=(4, 0, 9), filters=_TINY, act="tanh", bias=-2.5),
    _case("odd", W=33, filters=((2, 17), (4, 31)), C=11, D=5),
    _case("large", W=70, filters=((1, 32), (3, 64), (7, 100)), D=16),
)
