# SPDX-License-Identifier: Apache-2.0
"""Packed copies of weights, kept beside the weights they were made from and never used stale.

A kernel that wants its weights in another layout packs them once and finds the packed form here on the next call.
An entry is used only while every source tensor is the same object, at the same address, with the same autograd
version counter and the same values at some 64 sampled places: the sample catches writes through ``.data``, which
leave the version counter alone. Entries die with their sources.
"""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import capability

_SAMPLES = 64


def _sample(tensor: Tensor) -> Tensor:
    """Some 64 values of a tensor; a view of it if it is contiguous."""
    tensor = tensor.detach()
    step = max(1, tensor.numel() // _SAMPLES)
    if tensor.is_contiguous():
        return tensor.as_strided((-(-tensor.numel() // step),), (step,))
    return tensor.flatten()[::step]


def _facts(sources: Sequence[Tensor]) -> tuple[list[Any], ...]:
    try:
        versions = [tensor._version for tensor in sources]
    except RuntimeError:  # a tensor made in inference mode has none
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in sources]
    return [tensor.data_ptr() for tensor in sources], [tensor.shape for tensor in sources], versions


class _Seen:
    """Sources as they were when something was packed from them."""

    def __init__(
        self, sources: Sequence[Tensor], is_read: Callable[[Tensor], bool], forget: Callable[[Any], None]
    ) -> None:
        self._refs = [weakref.ref(tensor, forget) for tensor in sources]  # held, or nobody is told
        self._facts = _facts(sources)
        self._extension = capability.extension()
        # Samples that are read where the tensors hold them, all in one call, in a tenth of the time that torch takes to
        # compare one; and the others.
        self._table, self._held = array("q"), []
        self._others: list[tuple[int, Tensor]] = []
        for i, tensor in enumerate(sources):
            if is_read(tensor):
                continue
            sample = _sample(tensor)
            value, size = sample.clone(), sample.element_size()
            if self._extension is not None and tensor.is_contiguous():
                self._held.append(value)
                place = (tensor.data_ptr(), sample.stride(0) * size, size, sample.numel(), value.data_ptr())
                self._table.extend(place)
            else:
                self._others.append((i, value))
        self._rows = (self._table.buffer_info()[0], len(self._held))

    def are_still(self, sources: Sequence[Tensor]) -> bool:
        """Whether sources, the same objects as then, hold what they held."""
        if _facts(sources) != self._facts:
            return False
        if self._rows[1] and not self._extension.same_samples(*self._rows):
            return False
        return all([torch.equal(_sample(sources[i]), value) for i, value in self._others])


class WeightCache:
    """Maps the identity and content of some CPU tensors to what was packed from them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[_Seen, Any]] = {}
        self._lock = threading.Lock()

    def get(
        self,
        sources: Sequence[Tensor],
        kind: Any,
        pack: Callable[[], Any],
        is_read: Callable[[Tensor], bool] = lambda tensor: False,
    ) -> Any:
        """The packed form of ``sources`` for this ``kind``, made by ``pack()`` unless it is at hand and current.

        ``is_read`` tells sources of which only the address is kept: their values are read where they are.
        """
        # An object's id is its own while it lives, and whoever dies first takes the entry with it.
        key = (kind, *map(id, sources))
        entry = self._entries.get(key)
        if entry is not None and entry[0].are_still(sources):
            return entry[1]
        # First let go of what was packed before, so that both are never held at once.
        entry = None
        self._entries.pop(key, None)
        # Noted before packing: a write meanwhile must not go unseen.
        seen = _Seen(sources, is_read, lambda _: self._entries.pop(key, None))
        packed = pack()
        with self._lock:
            self._entries[key] = (seen, packed)
        return packed

    def __len__(self) -> int:
        return len(self._entries)
