# SPDX-License-Identifier: Apache-2.0
"""What a matrix product reads when its factors are held in fewer bits than the tensors they come from."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_rows(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as its rows (last dimension) are held in ``dtype``, in the dtype of ``x``; None leaves it alone.

    bfloat16: nearest, ties to even. int8: whole steps, ties to even, of 1/127 of the row's largest magnitude.
    """
    if dtype is None:
        return x
    if dtype is not torch.int8:
        return x.to(dtype).to(x.dtype)
    if x.shape[-1] == 0:
        return x
    most = x.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(most > 1e-30, 127.0 / most, torch.zeros_like(most))
    return torch.round(x * steps) * (most / 127.0)
