# SPDX-License-Identifier: Apache-2.0
"""What all implementations of ``lstm`` do around their kernels: rows' lengths, and the state before each step."""

from __future__ import annotations

import torch
from torch import Tensor


def as_int64(lengths: Tensor | None) -> Tensor | None:
    """Lengths as kernels read them."""
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def previous(states: Tensor, initial: Tensor | None, lengths: Tensor | None, is_reverse: bool) -> Tensor:
    """(B, T, ...) -> the state before each step in the direction's own order; ``initial`` (B, ...), or zeros, is first.

    States are zero past a row's length.
    """
    if states.shape[1] == 0:
        return states
    first = torch.zeros_like(states[:, :1]) if initial is None else initial[:, None]
    if not is_reverse:
        return torch.cat((first, states[:, :-1]), dim=1)
    shifted = torch.cat((states[:, 1:], first), dim=1)
    if lengths is None or initial is None:
        return shifted
    last = torch.arange(states.shape[1], device=states.device) == lengths[:, None] - 1
    return torch.where(last[:, :, None], first, shifted)
