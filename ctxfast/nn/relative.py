# SPDX-License-Identifier: Apache-2.0
"""Relative positions in buckets: T5's and MPNet's bias of attention scores."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances of MPNet's and T5's encoders that have the last bucket, and all beyond.
MAX_DISTANCE = 128


def relative_bias(weight: Tensor, max_distance: int = MAX_DISTANCE) -> Tensor:
    """The table of ``functional.attention`` from an embedding of buckets, differentiable.

    Args:
        weight: (buckets, H), a bias for each bucket and head.
        max_distance: from this distance on all keys before a query share one bucket, and all keys behind it another.

    Returns:
        (H, 2R - 1) float32 (float64 for float64) with R = ``max_distance`` + 1: what is further away has the bucket of
        the outermost columns.

    Reference: Raffel et al. 2020 (T5); Song et al. 2020 (MPNet).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    index = _buckets(weight.shape[0], max_distance, weight.device)
    return F.embedding(index, weight).t().to(wide).contiguous()


def _buckets(count: int, max_distance: int, device: torch.device) -> Tensor:
    """(2R - 1,) int64: the bucket of each distance of a key from its query, -(R - 1) to R - 1."""
    if device.type == "cpu":
        return torch.tensor(_known(count, max_distance))
    return _computed(count, max_distance, device)


@lru_cache(maxsize=8)
def _known(count: int, max_distance: int) -> tuple[int, ...]:
    return tuple(_computed(count, max_distance, torch.device("cpu")).tolist())


def _computed(count: int, max_distance: int, device: torch.device) -> Tensor:
    """Half of the buckets are for keys after the query, half for the others; of each half, one for each of the nearest
    distances, then logarithmic steps up to ``max_distance``."""
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    half = count // 2
    near = half // 2
    far = distance.abs()
    # float32 and this order of operations decide what the borders of buckets round to: as models were trained.
    step = torch.log(far.clamp(min=1).float() / near) / math.log(max_distance / near) * (half - near)
    log_bucket = (near + step.long()).clamp(max=half - 1)
    return torch.where(far < near, far, log_bucket) + half * (distance > 0)
