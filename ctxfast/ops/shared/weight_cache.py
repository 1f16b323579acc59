# SPDX-License-Identifier: Apache-2.0
"""Packed copies of weights, kept beside the weights they were made from.

A kernel that wants its weights in another layout packs them once and finds the packed form here on the next call.
What a packed copy may be used for is a contract:

- A change that PyTorch counts (any operation on the tensor outside ``.data``, as every optimiser's) is seen at the
  next call, and so is another memory, shape, layout or dtype under the same tensor.
- A write by any other road (``.data``, a NumPy or DLPack view, the storage, another process) is seen at the next call
  if every entry of a row, of a column or of more of a matrix has other bits after it: a weight's first dimension are
  its rows, all others its columns. So it is in a weight of at most ``WHOLE`` bytes, whatever it changes, and in a
  vector.
- Such a write to a row or a column some of whose entries have the new value already is missed only if all those have it
  that are looked at: some neighbours in each row, ``NEIGHBOURS`` bytes of them or more.
- Such a write to single entries of a larger weight may go unseen. ``forget_packed`` makes all packed copies new.

For this an entry keeps the facts of its sources and a sample of their bits: of every row some neighbours, which move on
from row to row, so that no column is left out either. Facts are compared first: only memory that a source still holds
is read. Entries die with their sources.

Weights on a GPU keep the same contract: there the samples lie beside the packed weights, a kernel compares them before
each use and packs again what has changed (csrc/lstm/step_pack.cu), and the host, which keeps the facts alone, waits for
nothing. What is captured into a CUDA graph packs at each replay.
"""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..._core import capability

# Weights up to this size are compared whole.
WHOLE = 160 << 10
# Bytes that are looked at in each row, at the least: they lie in one cache line, and an entry alone proves little where
# a weight holds a value many times. Of 16 bytes BERT's weights take a tenth longer than of one float32 (2026-11).
NEIGHBOURS = 16
# Entries of one kind that may stand at one address: tensors that share their memory have one each.
_MOST_AT_ONE_PLACE = 4

_caches: weakref.WeakSet[WeightCache] = weakref.WeakSet()
# Tensors that a cache holds, by id: nobody else writes to them, so they need no samples where they are packed again.
_own: dict[int, weakref.ref] = {}
_changes_at_once = threading.RLock()  # a collection may call forget_packed while this thread changes an entry


def forget_packed(*of: nn.Module | Tensor) -> None:
    """Forgets the packed copies of weights; the next call packs them again.

    Needed only after writing to a part of a large weight behind PyTorch's back, as through ``.data`` or a NumPy view.
    Every other change is noticed: whatever PyTorch counts, and by any road a change of every entry of a row, of a
    column or of all of a weight, or of anything in a weight of at most 160 KiB. A row that is written where some
    entries have the new value already is noticed unless 16 bytes of it that lie side by side all have it; a column,
    unless it has it in all the rows where it is among those. Safe to call from any thread.

    Args:
        of: modules, whose parameters are meant, and weights. Nothing: all weights there are.

    Raises:
        TypeError: if an argument is neither a module nor a tensor.
    """
    tensors: list[Tensor] = []
    for each in of:
        if isinstance(each, nn.Module):
            tensors += chain(each.parameters(), each.buffers())
        elif isinstance(each, Tensor):
            tensors.append(each)
        else:
            kind = type(each).__name__
            raise TypeError(
                f"ctxfast.forget_packed: of is a {kind}; expected modules and tensors. Pass none to mean all weights."
            )
    for cache in list(_caches):
        cache.forget(tensors if of else None)


def _note_own(tensor: Tensor) -> None:
    key = id(tensor)
    _own[key] = weakref.ref(tensor, lambda _: _own.pop(key, None))


def _matrix(tensor: Tensor) -> Tensor | None:
    """A view (rows, columns) of a tensor with elements, neighbours in a row side by side in memory where they are so in
    a column; None if its strides allow none."""
    tensor = tensor.detach()
    if tensor.dim() == 2:
        return tensor.t() if tensor.stride(0) == 1 < tensor.stride(1) else tensor
    try:
        return tensor.view(1, -1) if tensor.dim() < 2 else tensor.view(tensor.shape[0], -1)
    except RuntimeError:
        return None


def sample_columns(rows: int, columns: int, size: int) -> Tensor:
    """(rows, width): the columns of a matrix that are looked at in each row (csrc/base/samples.h)."""
    width = min(columns, max(-(-columns // rows), NEIGHBOURS // size))
    if rows * columns * size <= WHOLE:
        width = columns
    starts = torch.arange(-(-columns // width)).mul_(width).clamp_(max=columns - width)
    return starts[torch.arange(rows) % len(starts), None] + torch.arange(width)


def _sample(matrix: Tensor) -> Tensor:
    return matrix.gather(1, sample_columns(*matrix.shape, matrix.element_size()))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


_kind, _counted_kind = attrgetter("shape", "dtype"), attrgetter("shape", "dtype", "_version")


def _facts(sources: Sequence[Tensor]) -> tuple[list[Any], ...]:
    try:
        kinds = list(map(_counted_kind, sources))
    except RuntimeError:  # a tensor made in inference mode counts nothing
        kinds = [_kind(tensor) if tensor.is_inference() else _counted_kind(tensor) for tensor in sources]
    return list(map(Tensor.data_ptr, sources)), list(map(Tensor.stride, sources)), kinds


class Seen:
    """Sources as they were when something was packed from them."""

    def __init__(
        self, sources: Sequence[Tensor], is_read: Callable[[Tensor], bool], forget: Callable[[Any], None]
    ) -> None:
        # ``forget`` is told when a source's memory ends. To a parameter itself no reference may be held:
        # torch.utils.swap_tensors refuses those, and with them ``nn.Module.to``. Of other tensors, as of ``.data``,
        # many may come and go over one memory, each with a count of its own: there the object has to be the same, too.
        self._storages = [weakref.ref(tensor.untyped_storage(), forget) for tensor in sources]
        self._tensors = [weakref.ref(tensor, forget) for tensor in sources if not isinstance(tensor, nn.Parameter)]
        self._facts = _facts(sources)
        self._extension = capability.extension()
        # Samples that compiled code compares, where the tensors hold them and without a copy; and the others.
        self._table, self._held = array("q"), []
        self._others: list[tuple[int, Tensor]] = []
        for i, tensor in enumerate(sources):
            if is_read(tensor) or tensor.numel() == 0 or id(tensor) in _own:
                continue
            matrix = _matrix(tensor)
            if matrix is None:
                self._others.append((i, _copy(tensor)))
                continue
            kept = _sample(matrix)
            if self._extension is None:
                self._others.append((i, kept))
                continue
            self._held.append(kept)
            size, (row_stride, column_stride) = matrix.element_size(), matrix.stride()
            shape = (matrix.shape[0], row_stride * size, matrix.shape[1], column_stride * size, size, kept.shape[1])
            self._table.extend((matrix.data_ptr(), *shape, kept.data_ptr()))

    @property
    def addresses(self) -> list[int]:
        return self._facts[0]

    def are_still(self, sources: Sequence[Tensor]) -> bool:
        """Whether sources, the same objects as then, are and hold what they were and held."""
        # Held, so that no other thread frees what is compared. Facts first: else it may not be the sources' memory.
        _storages = [storage() for storage in self._storages]
        return _facts(sources) == self._facts and self._have_samples_of(sources)

    def _have_samples_of(self, sources: Sequence[Tensor]) -> bool:
        address, count = self._table.buffer_info()[0], len(self._held)
        if count and not self._extension.same_samples(address, count, torch.get_num_threads()):
            return False
        for i, kept in self._others:
            matrix = _matrix(sources[i])
            now = _copy(sources[i]) if matrix is None else _sample(matrix)
            if not _equal_bits(now, kept):
                return False
        return True


class WeightCache:
    """Maps the identity and content of some tensors to what was packed from them."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[Seen, Any]] = {}
        self._times_forgotten = 0
        _caches.add(self)

    def get(
        self,
        sources: Sequence[Tensor],
        kind: Any,
        pack: Callable[[], Any],
        is_read: Callable[[Tensor], bool] = lambda tensor: False,
    ) -> Any:
        """The packed form of ``sources`` for this ``kind``, made by ``pack()`` unless it is at hand and current.

        ``is_read`` tells sources of which only the facts are kept: their values are read where they are, or compared
        elsewhere, as all values on a GPU. ``pack`` must not keep its sources or views of them: entries would not die.
        """
        key = (kind, *map(id, sources))
        entry = self._entries.get(key)
        if entry is not None and entry[0].are_still(sources):
            return entry[1]
        # First let go of what was packed before, so that both are never held at once.
        entry = None
        self._entries.pop(key, None)
        times_forgotten = self._times_forgotten
        # Noted before packing: a write meanwhile must not go unseen.
        seen = Seen(sources, is_read, lambda _: self._entries.pop(key, None))
        packed = pack()
        for made in packed if isinstance(packed, tuple) else (packed,):
            if isinstance(made, Tensor):
                _note_own(made)
        with _changes_at_once:
            if times_forgotten == self._times_forgotten:  # else what was just read is to be forgotten, too
                self._entries[key] = (seen, packed)
                self._keep_few_at(seen.addresses, kind)
        return packed

    def _keep_few_at(self, addresses: list[int], kind: Any) -> None:
        """Nobody tells the end of a parameter whose memory lives on in other tensors."""
        there = [key for key, (seen, _) in self._snapshot() if key[0] == kind and seen.addresses == addresses]
        for key in there[:-_MOST_AT_ONE_PLACE]:
            self._entries.pop(key, None)

    def _snapshot(self) -> list[tuple[tuple[Any, ...], tuple[Seen, Any]]]:
        """The entries as they are now."""
        while True:
            try:
                return list(self._entries.items())
            except RuntimeError:  # garbage was collected in the midst of it, and an entry went with its source
                continue

    def forget(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Drops what was packed from any of these tensors; None: everything."""
        with _changes_at_once:
            self._times_forgotten += 1
            if tensors is None:
                self._entries.clear()
                return
            ids = set(map(id, tensors))
            for key, _ in self._snapshot():
                if not ids.isdisjoint(key[1:]):
                    self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)
