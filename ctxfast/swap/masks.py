# SPDX-License-Identifier: Apache-2.0
"""What a mask of Transformers keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_keys(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that a mask keeps, and whether it is a padding mask: one that keeps the same keys for all heads and
    queries of a text, and adds nothing to the scores of those. Reads no value on the host.

    Args:
        mask: (B or 1, H or 1, Q or 1, L), bool (True keeps a key) or added to scores (0 keeps it).

    Returns:
        (B or 1, L) bool, by the first query of the first head; and () bool.
    """
    kept = mask if mask.dtype == torch.bool else mask == 0
    first = kept[:, :1, :1]
    facts: list[Tensor] = []
    if any(size > 1 and stride != 0 for size, stride in zip(mask.shape[1:3], mask.stride()[1:3])):
        facts.append((kept == first).all())
    if mask.dtype != torch.bool:
        # Added to a score, -10000 (of older models) and less leave a weight of 0.
        facts.append((kept | (mask <= -1e4)).all())
    is_padding = facts[0] if facts else torch.ones((), dtype=torch.bool, device=mask.device)
    return first[:, 0, 0], is_padding & facts[1] if len(facts) > 1 else is_padding
