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


class _Seen:
    """A source as it was when something was packed from it."""

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None]) -> None:
        self._ref = weakref.ref(tensor, forget)
        self._facts = self._facts_of(tensor)
        sample = _sample(tensor)
        self._values = sample.clone()
        # What reads the values where the tensor holds them, in a tenth of the time that torch takes to compare them.
        self._compare, self._place = None, ()
        if tensor.is_contiguous() and capability.extension() is not None:
            size = sample.element_size()
            stride = sample.stride(0) * size
            self._compare = capability.extension().same_samples
            self._place = (tensor.data_ptr(), stride, size, sample.numel(), self._values.data_ptr())

    @staticmethod
    def _facts_of(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.shape, -1 if tensor.is_inference() else tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        if self._ref() is not tensor or self._facts_of(tensor) != self._facts:
            return False
        if self._compare is not None:
            return self._compare(*self._place)
        return torch.equal(_sample(tensor), self._values)


class WeightCache:
    """Maps the identity and content of some CPU tensors to what was packed from them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[tuple[_Seen, ...], Any]] = {}
        self._lock = threading.Lock()

    def get(self, sources: Sequence[Tensor], kind: Any, pack: Callable[[], Any]) -> Any:
        """The packed form of ``sources`` for this ``kind``, made by ``pack()`` unless it is at hand and current."""
        key = (kind, *(id(tensor) for tensor in sources))
        entry = self._entries.get(key)
        if entry is not None and all([seen.is_still(tensor) for seen, tensor in zip(entry[0], sources)]):
            return entry[1]
        # Whoever dies first takes the entry with it. Noted before packing: a write meanwhile must not go unseen.
        seen = tuple(_Seen(tensor, lambda _, key=key: self._entries.pop(key, None)) for tensor in sources)
        packed = pack()
        with self._lock:
            self._entries[key] = (seen, packed)
        return packed

    def __len__(self) -> int:
        return len(self._entries)
