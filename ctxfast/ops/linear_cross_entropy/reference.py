# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy``: the definition, in plain PyTorch (masked LM output of Devlin et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,  # (T, N)
    weight: Tensor,  # (V, N)
    labels: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    ignore_index: int | None,
    reduction: str,
) -> Tensor:
    """See ``ctxfast.functional.linear_cross_entropy``."""
    logits = F.linear(hidden, weight, bias)
    # The softmax over tens of thousands of words is taken in fp32 at least.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long()
    if ignore_index is None:
        losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        return losses if reduction == "none" else losses.sum() / (max(1, len(labels)) if reduction == "mean" else 1)
    if reduction == "none":
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if reduction == "sum":
        return total
    return total / (labels != ignore_index).sum().clamp(min=1)
