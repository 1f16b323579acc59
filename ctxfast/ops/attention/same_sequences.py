# SPDX-License-Identifier: Apache-2.0
"""What kernels derive from ``cu_seqlens``, kept beside it while several calls look at the same sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..._core import capability, torch_ops

# What was derived, by the offsets of each pass that is under way.
_passes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def for_one_pass(cu_seqlens: Tensor) -> Tensor:
    """The same offsets, as a tensor for which calls of ``attention`` leave what they derive from it for the next.

    Made anew in every pass over an encoder's layers: what is derived in a captured graph is then made by the graph, and
    nothing outlives the pass, whatever becomes of ``cu_seqlens``.
    """
    if torch_ops.must_dispatch() or not (cu_seqlens.is_cuda or capability.is_triton_interpreted()):
        return cu_seqlens
    if cu_seqlens in _passes:  # the layers of a pass may have passes of their own
        return cu_seqlens
    alias = cu_seqlens.detach()
    _passes[alias] = {}
    return alias


def derived(cu_seqlens: Tensor, what: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it gave an earlier call of the same pass. ``what``: all it depends on besides the offsets."""
    known = _passes.get(cu_seqlens)
    if known is None:
        return make()
    key = (*what, None if cu_seqlens.is_inference() else cu_seqlens._version)
    if key not in known:
        known[key] = make()
    return known[key]
