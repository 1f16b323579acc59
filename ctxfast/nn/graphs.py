# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for functions of packed tokens, one graph per bucket of sizes, built when a bucket comes a second time.

A forward pass of an encoder is about a hundred small launches; at few tokens the GPU waits for Python between them. A
graph replays them all at once. Sizes are rounded up to buckets; the tokens that fill a bucket up form sequences of
their own at the end, so no real token sees them.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core import capability, choice, torch_ops
from .graph_capture import Place
from .watched import IsHarmless, State

Function = Callable[[Sequence["Tensor | None"], Tensor, int], Sequence[Tensor]]
PROVEN = None  # what graphs have been captured and replayed on: as an implementation's (``_core.registry.Impl``)
_SEQLENS = (16, 32, 64, 128, 256, 512)


def _eighth(count: int) -> int:
    """``count`` rounded up to one of eight sizes to an octave."""
    step = 1 << max((count - 1).bit_length() - 4, 0)
    return -(-count // step) * step


def token_bucket(tokens: int) -> int:
    """The total that ``tokens`` is filled up to: eight sizes to an octave, multiples of 16."""
    return max(16, -(-tokens // 16) * 16) if tokens <= 128 else _eighth(tokens)


def seqlen_bucket(max_seqlen: int) -> int:
    """The longest sequence a bucket is made for."""
    for size in _SEQLENS:
        if max_seqlen <= size:
            return size
    return -(-max_seqlen // 512) * 512


def sequence_bucket(sequences: int) -> int:
    """Eight sizes to an octave, every one up to 16. Of a power of two, one sequence that fills up would make twice as
    many, and kernels launch blocks for each."""
    return _eighth(sequences)


class _Seen:
    """A bucket that has no graph yet: seen once."""


class _Refused:
    """A bucket that gets no graph: its capture failed, or it needs more memory than all graphs may have."""


_SEEN, _REFUSED = _Seen(), _Refused()


class _Bucket:
    """A bucket's graph and what it reads: tokens filled up to the bucket's total, (sequences + 1,) offsets."""

    def __init__(self, place: Any, tokens: Sequence[Tensor | None], cu_seqlens: Tensor, replay: Any) -> None:
        self.place, self.tokens, self.cu_seqlens, self.replay = place, tokens, cu_seqlens, replay
        self.filled = next(each.shape[0] for each in tokens if each is not None)
        self.filled_for: tuple[int, int] | None = None  # tokens and offsets of the last call


class PackedGraphs:
    """Graphs of what one module does with packed tokens. Copies and pickles of it start empty.

    Args:
        max_tokens: calls with more tokens run without a graph: they keep the GPU busy by themselves.
        max_graphs: buckets kept; the one not used for longest goes first.
        max_bytes: most memory of all graphs on a device; None for an eighth of the device's. They share one pool, as
            large as the largest of them needs; where fragments of it add up to more, all graphs go and are built anew
            as they are needed.
        place: what captures on a device; for tests.
        is_harmless: tells forward hooks that need no call in a replay.

    A graph reads parameters where they lie, so weights changed in place (a training step, a merged LoRA) are seen.
    Whatever else has changed (weights that moved, attributes, modules, hooks: ``watched.State``) is looked for while
    the GPU works on the replay; then all graphs are dropped and the call runs again without. The memory of weights that
    moved is held until that next call. A replay waits for the one before it, on whatever stream that was.

    Where a capture fails, calls of the bucket run without from then on; the first time a warning says why.
    """

    def __init__(
        self,
        max_tokens: int = 16384,
        max_graphs: int = 64,
        max_bytes: int | None = None,
        place: Callable[[torch.device], Any] = Place,
        is_harmless: IsHarmless | None = None,
    ) -> None:
        self.max_tokens, self.max_graphs, self.max_bytes = max_tokens, max_graphs, max_bytes
        self._place, self._is_harmless = place, is_harmless
        self._buckets: OrderedDict[tuple, _Bucket | _Seen | _Refused] = OrderedDict()
        self._state: State | None = None  # of the module as the graphs were made; what they read stays allocated
        self._places: dict[torch.device, Any] = {}
        self._has_warned = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return PackedGraphs, (self.max_tokens, self.max_graphs, self.max_bytes, self._place, self._is_harmless)

    def __len__(self) -> int:
        """Graphs built and kept."""
        return sum(isinstance(bucket, _Bucket) for bucket in self._buckets.values())

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._buckets.clear()
        self._state = None
        self._has_warned = False

    def can_run(self, tokens: Tensor) -> bool:
        """Whether a call with these packed tokens may go through a graph."""
        return (
            tokens.is_cuda
            and 0 < tokens.shape[0] <= self.max_tokens
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and torch_ops.why_definition((tokens,)) is None
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(
        self,
        function: Function,
        module: nn.Module,
        tokens: Sequence[Tensor | None],
        cu_seqlens: Tensor,
        max_seqlen: int,
        flags: tuple = (),
        per_sequence: int = 0,
        is_still: Callable[[], bool] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> tuple[Tensor, ...]:
        """``function(tokens, cu_seqlens, max_seqlen)``, through a graph from a bucket's second call on.

        Args:
            function: reads its arguments and ``module``'s parameters only.
            module: what the function runs.
            tokens: tensors (T, ...) or None.
            cu_seqlens: (S + 1,) int32.
            max_seqlen: the longest sequence.
            flags: whatever else changes what the function does.
            per_sequence: how many of the outputs, the last, are (S, ...); all others are (T, ...).
            is_still: whether what the function looks at besides the module is as in the calls before; asked after a
                replay, while the GPU works on it.
            prepare: called before the module is looked at anew; may move its parameters.

        Returns:
            The function's outputs; they are the caller's own.
        """
        lead = next(tensor for tensor in tokens if tensor is not None)
        total, device = lead.shape[0], lead.device
        seqlen, filled = seqlen_bucket(max_seqlen), token_bucket(total)
        # Whole sequences of the bucket's length fill it up, the last of them perhaps in part.
        sequences = sequence_bucket(cu_seqlens.shape[0] - 1 - (total - filled) // seqlen)
        kinds = tuple(None if t is None else (t.dtype, t.shape[1:]) for t in tokens)
        modes = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            capability.allows_tf32(),
            torch.are_deterministic_algorithms_enabled(),
            choice.requested(),
        )
        key = (filled, sequences, seqlen, device, kinds, modes, flags)
        with self._lock:
            bucket = self._buckets.get(key)
            outputs: tuple[Tensor, ...] | None = None
            if isinstance(bucket, _Bucket):
                self._buckets.move_to_end(key)
                outputs = _replay(bucket, tokens, cu_seqlens, total, seqlen, per_sequence)
            state = self._state
            if state is None or not state.is_still(module) or not (is_still is None or is_still()):
                self._drop()
                outputs = bucket = None
                if prepare is not None:
                    prepare()
                self._state = state = State.of(module, self._is_harmless)
            if outputs is not None:
                return outputs
            if state is not None:
                if bucket is _SEEN:
                    bucket = self._build(function, tokens, filled, sequences, seqlen, device)
                self._remember(key, bucket or _SEEN)
                if isinstance(bucket, _Bucket):
                    return _replay(bucket, tokens, cu_seqlens, total, seqlen, per_sequence)
        return tuple(function(tokens, cu_seqlens, max_seqlen))

    def _remember(self, key: tuple, bucket: _Bucket | _Seen | _Refused) -> None:
        self._buckets[key] = bucket
        self._buckets.move_to_end(key)
        if len(self) > self.max_graphs:
            del self._buckets[next(known for known, kept in self._buckets.items() if isinstance(kept, _Bucket))]
        # Sizes without a graph are a few words each; still, not without end.
        while len(self._buckets) > 16 * self.max_graphs:
            self._buckets.popitem(last=False)

    def _build(
        self,
        function: Function,
        tokens: Sequence[Tensor | None],
        filled: int,
        sequences: int,
        seqlen: int,
        device: torch.device,
    ) -> _Bucket | _Seen | _Refused:
        """A bucket's graph, or what stands in its place where there is none (yet)."""
        place = self._places.get(device)
        if place is None:
            place = self._places[device] = self._place(device)
        # Not in the caller's inference mode: what is made in it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            try:
                bucket = _captured(place, function, tokens, filled, sequences, seqlen, device)
            except Exception as error:  # whatever stops it, the call itself can still be answered
                self._warn(filled, error)
                return _REFUSED
        if place.size() <= (place.limit() if self.max_bytes is None else self.max_bytes):
            return bucket
        # Memory of the pool is free again when its last graph goes.
        others = [key for key, kept in self._buckets.items() if isinstance(kept, _Bucket) and kept.place is place]
        for key in others:
            self._buckets[key] = _SEEN
        return _SEEN if others else _REFUSED

    def _warn(self, filled: int, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"ctxfast: a call of up to {filled} tokens cannot go through a CUDA graph, and those like it run "
                f"without from now on: {str(error) or type(error).__name__} Set cuda_graphs = False on the model to "
                f"have it so for all calls.",
                stacklevel=4,
            )


def _captured(
    place: Any,
    function: Function,
    tokens: Sequence[Tensor | None],
    filled: int,
    sequences: int,
    seqlen: int,
    device: torch.device,
) -> _Bucket:
    empty = [None if t is None else t.new_zeros((filled, *t.shape[1:])) for t in tokens]
    cu_seqlens = (torch.arange(sequences + 1, device=device, dtype=torch.int32) * seqlen).clamp_(max=filled)
    # Ids have memory of their own: those of the tokens that fill up, which nobody writes, must stay inside their
    # tables. Other inputs lie where graphs work; whatever stands there, no real token sees it.
    own = [each if each is not None and not each.is_floating_point() else None for each in empty]

    def inputs() -> list[Tensor | None]:
        return [
            t.new_empty((filled, *t.shape[1:])) if mine is None and t is not None else mine
            for t, mine in zip(tokens, own)
        ]

    replay = place.capture(
        lambda: function(empty, cu_seqlens, seqlen), inputs, lambda *given: function(given, cu_seqlens, seqlen)
    )
    return _Bucket(
        place, [mine if mine is not None else given for mine, given in zip(own, replay.inputs)], cu_seqlens, replay
    )


def _replay(
    bucket: _Bucket,
    tokens: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    total: int,
    seqlen: int,
    per_sequence: int,
) -> tuple[Tensor, ...]:
    place, offsets = bucket.place, bucket.cu_seqlens
    stream = torch.cuda.current_stream(cu_seqlens.device) if cu_seqlens.is_cuda else None
    if stream is not None and place.last is not None:
        stream.wait_event(place.last)
    pairs = [(s[:total], g) for s, g in zip(bucket.tokens, tokens) if s is not None and g is not None]
    # Of one dtype, as ids are, they are one launch together. (Optimizers use it; it is in no list of public names.)
    copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    copy([static for static, _ in pairs], [given for _, given in pairs])
    given = cu_seqlens.shape[0]
    offsets[:given].copy_(cu_seqlens)
    # What fills the bucket up: sequences of the bucket's length, then empty ones.
    if bucket.filled_for != (total, given):
        rest = offsets[given:]
        if rest.shape[0]:
            torch.arange(total + seqlen, total + seqlen * rest.shape[0] + 1, seqlen, out=rest)
            rest.clamp_(max=bucket.filled)
        bucket.filled_for = (total, given)
    bucket.replay()
    made = bucket.replay.outputs
    split = len(made) - per_sequence
    outputs = (*(each[:total].clone() for each in made[:split]), *(each[: given - 1].clone() for each in made[split:]))
    if stream is not None:
        place.last = stream.record_event()
    return outputs
