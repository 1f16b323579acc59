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

_SAMPLES = 64


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous()
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        version,
        sample.view(torch.uint8).numpy().tobytes(),
    )


class WeightCache:
    """Maps the identity and content of some CPU tensors to what was packed from them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[tuple[weakref.ref, ...], tuple[Any, ...], Any]] = {}
        self._lock = threading.Lock()

    def get(self, sources: Sequence[Tensor], kind: Any, pack: Callable[[], Any]) -> Any:
        """The packed form of ``sources`` for this ``kind``, made by ``pack()`` unless it is at hand and current."""
        key = (kind, *(id(tensor) for tensor in sources))
        stamp = tuple(_stamp(tensor) for tensor in sources)
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None:
            refs, known, packed = entry
            if known == stamp and all(ref() is tensor for ref, tensor in zip(refs, sources)):
                return packed
        packed = pack()
        # Whoever dies first takes the entry with it.
        refs = tuple(weakref.ref(tensor, lambda _, key=key: self._entries.pop(key, None)) for tensor in sources)
        with self._lock:
            self._entries[key] = (refs, stamp, packed)
        return packed

    def __len__(self) -> int:
        return len(self._entries)
