# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy`` on the CPU: labelled rows only, a chunk of their logits at a time, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import recorded


def _softmax(logits: Tensor, labels: Tensor, scale: Tensor | None, ignore_index: int | None) -> Tensor:
    wide = logits.float()
    normal = torch.logsumexp(wide, dim=1)
    at = labels.long().unsqueeze(1)
    losses = normal - wide.gather(1, at).squeeze(1)
    if scale is not None:
        # ``wide`` is ``logits`` itself in float32, and is not needed again either way.
        wide.sub_(normal.unsqueeze(1)).exp_()
        wide.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
        logits.copy_(wide.mul_(scale.unsqueeze(1)))
    return losses


_operators = recorded.Operators("linear_cross_entropy_cpu", _softmax, "CPU")


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the chunked form cannot run this call."""
    hidden = args["hidden"]
    if hidden.device.type != "cpu":
        return f"it runs on the CPU and hidden is on {hidden.device}."
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16 and hidden is {hidden.dtype}."
    return None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int | None, reduction: str
) -> Tensor:
    """See ``ctxfast.functional.linear_cross_entropy``."""
    return recorded.call(_operators, hidden, weight, labels, bias, ignore_index, reduction)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return recorded.raw_calls(_operators, args)
