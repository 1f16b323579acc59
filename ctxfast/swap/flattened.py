# SPDX-License-Identifier: Apache-2.0
"""Calls of Transformers' encoders that are packed already: texts side by side in one row, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How such a call says where its texts are, to attention functions that know it (flash attention's).
NAMES = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


def offsets(x: Tensor, arguments: dict[str, Any], implementation: Any) -> list[int] | None:
    """Where each text begins in the one row of hidden states x (1, T, N), and T; None if a call does not say so, or if
    what it says cannot be. Waits for a GPU once where it does.

    ``position_ids`` that start anew say so to flash attention alone; with another ``implementation`` they are positions
    and no more.
    """
    if x.shape[0] != 1:
        return None
    given, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if given is not None:
        if not _is_vector(given) or (keys is not None and not (_is_vector(keys) and keys.shape == given.shape)):
            return None
        found, *others = [given.tolist()] if keys is None else torch.stack((given, keys)).tolist()
        holds = found == sorted(found) and found[:1] == [0] and found[-1] == x.shape[1]
        return found if holds and all([other == found for other in others]) else None
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or tuple(positions.shape) != tuple(x.shape[:2]):
        return None
    if not str(implementation).startswith("flash_attention"):
        return None
    row = positions[0].tolist()
    starts = [place for place in range(1, len(row)) if row[place] != row[place - 1] + 1]
    return [0, *starts, len(row)] if starts else None


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not (value.is_floating_point() or value.is_complex())
