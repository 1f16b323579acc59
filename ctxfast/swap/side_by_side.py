# SPDX-License-Identifier: Apache-2.0
"""Parameters of one memory: query, key and value of a layer, so that their product is one without a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one after another in one memory, as one along their first dimension; None if they do not."""
    first, size = parts[0], parts[0].numel()
    if not all([each.is_contiguous() and each.shape == first.shape for each in parts]):
        return None
    start, memory = first.storage_offset(), first.untyped_storage()._cdata
    for number, each in enumerate(parts):
        if each.untyped_storage()._cdata != memory or each.storage_offset() != start + number * size:
            return None
    return first.detach().as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride(), start)


def lay(parts: Sequence[Tensor]) -> list[Tensor]:
    """Gives parameters one memory, in which they lie one after another; they stay what they are, with their values.

    Not where somebody else sees the memory of one (a state_dict that is kept, a tied weight, a flat buffer): writes
    would not reach one from the other any more. Returns tensors of the memory they had, [] if they stay where they are.
    """
    users = getattr(torch._C, "_storage_Use_Count", None)
    if users is None or len(set(map(id, parts))) < len(parts) or joined(parts) is not None:
        return []
    usual = _users_of_one(users)
    for each in parts:
        memory = each.untyped_storage()
        if each.is_inference() or not each.is_contiguous() or memory.nbytes() != each.nbytes:
            return []
        if each.shape != parts[0].shape or users(memory._cdata) != usual:
            return []
    with torch.inference_mode(False), torch.no_grad():
        before = [each.detach() for each in parts]
        for each, part in zip(parts, torch.cat(before).chunk(len(parts))):
            each.data = part
    return before


def _users_of_one(users: Callable[[int], int]) -> int:
    """How many users a memory has that one tensor alone holds, as asked for here."""
    memory = torch.empty(1, device="cpu").untyped_storage()
    return users(memory._cdata) + 1  # the tensor is gone
