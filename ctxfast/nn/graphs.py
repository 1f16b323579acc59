# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for functions of packed tokens, one graph per bucket of sizes, built when a bucket comes a second time.

A forward pass of an encoder is about a hundred small launches; at few tokens the GPU waits for Python between them. A
graph replays them all at once. Sizes are rounded up to buckets; the tokens that fill a bucket up form sequences of
their own at the end, so no real token sees them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._core import capability, registry, torch_ops
from .watched import IsHarmless, is_watched

Function = Callable[[Sequence["Tensor | None"], Tensor, int], Sequence[Tensor]]
PROVEN = None  # what graphs have been captured and replayed on: as an implementation's (``_core.registry.Impl``)
_SEQLENS = (16, 32, 64, 128, 256, 512)


def token_bucket(tokens: int) -> int:
    """The total that ``tokens`` is filled up to: eight sizes to an octave, multiples of 16."""
    if tokens <= 128:
        return max(16, -(-tokens // 16) * 16)
    step = 1 << (tokens - 1).bit_length() - 4
    return -(-tokens // step) * step


def seqlen_bucket(max_seqlen: int) -> int:
    """The longest sequence a bucket is made for."""
    for size in _SEQLENS:
        if max_seqlen <= size:
            return size
    return -(-max_seqlen // 512) * 512


def sequence_bucket(sequences: int) -> int:
    """A power of two."""
    return 1 << max(sequences - 1, 0).bit_length()


def signature(module: nn.Module, is_harmless: IsHarmless | None = None) -> tuple | None:
    """What a graph of ``module`` was made from: where each parameter and buffer lies, and ``impl`` attributes.

    None where a graph would not do what the module does: parts in training mode, and parts that are watched (hooks that
    ``is_harmless`` tells do not count).
    """
    found: list[Any] = []

    def walk(part: nn.Module) -> bool:
        if part.training or is_watched(part, is_harmless):
            return False
        found.append(part.__dict__.get("impl"))
        for own in (part._parameters, part._buffers):
            for tensor in own.values():
                if tensor is not None:
                    found.append(tensor.data_ptr())
        return all([walk(child) for child in part._modules.values() if child is not None])

    return tuple(found) if walk(module) else None


class Replay:
    """A captured run: ``outputs`` are overwritten by every call."""

    def __init__(self, run: Callable[[], Sequence[Tensor]], pool: Any) -> None:
        device = torch.cuda.current_device()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # Kernels are compiled and libraries make their workspaces on first runs: neither can be captured.
            for _ in range(2):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = tuple(run())

    def __call__(self) -> None:
        self._graph.replay()


@dataclass
class _Bucket:
    tokens: tuple[Tensor | None, ...]  # filled up to the bucket's total
    cu_seqlens: Tensor  # (sequences + 1,)
    replay: Any


class PackedGraphs:
    """Graphs of what one module does with packed tokens. Copies and pickles of it start empty.

    Args:
        max_tokens: calls with more tokens run without a graph: they keep the GPU busy by themselves.
        max_graphs: buckets kept; the one not used for longest goes first. All share one pool of memory, as large as
            the largest of them needs.
        capture: makes a replay of a run in a pool; for tests.
        is_harmless: tells forward hooks that need no call in a replay.

    A graph reads parameters where they lie, so weights changed in place (a training step, a merged LoRA) are seen.
    Weights that moved, modules put in or taken out, hooks and ``impl`` attributes are looked for while the GPU works
    on the replay; then all graphs are dropped and the call runs again without. The memory of weights that moved is
    held until that next call. A replay waits for the one before it, on whatever stream that was.
    """

    def __init__(
        self,
        max_tokens: int = 16384,
        max_graphs: int = 64,
        capture: Callable[[Callable[[], Sequence[Tensor]], Any], Any] = Replay,
        is_harmless: IsHarmless | None = None,
    ) -> None:
        self.max_tokens, self.max_graphs = max_tokens, max_graphs
        self._capture, self._is_harmless = capture, is_harmless
        self._buckets: OrderedDict[tuple, _Bucket | None] = OrderedDict()  # None: seen once
        self._signature: tuple | None = None
        self._held: list[Tensor] = []  # what the graphs read stays allocated
        self._pool: Any = None
        self._last: Any = None  # event after the last replay's outputs were copied
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return PackedGraphs, (self.max_tokens, self.max_graphs, self._capture, self._is_harmless)

    def __len__(self) -> int:
        """Graphs built and kept."""
        return sum(bucket is not None for bucket in self._buckets.values())

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._buckets.clear()
        self._held.clear()
        self._signature = self._pool = self._last = None

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
    ) -> tuple[Tensor, ...]:
        """``function(tokens, cu_seqlens, max_seqlen)``, through a graph from a bucket's second call on.

        Args:
            function: reads its arguments and ``module``'s parameters only; outputs (T, ...) each.
            module: what the function runs.
            tokens: tensors (T, ...) or None.
            cu_seqlens: (S + 1,) int32.
            max_seqlen: the longest sequence.
            flags: whatever else changes what the function does.

        Returns:
            The function's outputs; they are the caller's own.
        """
        lead = next(tensor for tensor in tokens if tensor is not None)
        total, device = lead.shape[0], lead.device
        seqlen, filled = seqlen_bucket(max_seqlen), token_bucket(total)
        sequences = sequence_bucket(cu_seqlens.shape[0] - 1 - (total - filled) // seqlen)
        kinds = tuple(None if t is None else (t.dtype, t.shape[1:]) for t in tokens)
        modes = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            capability.allows_tf32(),
            torch.are_deterministic_algorithms_enabled(),
            registry.requested(),
        )
        key = (filled, sequences, seqlen, device, kinds, modes, flags)
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is not None:
                self._buckets.move_to_end(key)
                outputs = self._replay(bucket, tokens, cu_seqlens, total, filled, seqlen)
            now = signature(module, self._is_harmless)
            if now is not None and now == self._signature:
                if bucket is not None:
                    return outputs
            else:
                self._drop()
                self._signature = now
                self._held = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
            if now is not None and key in self._buckets:
                bucket = self._build(function, tokens, filled, sequences, seqlen, device)
                self._remember(key, bucket)
                return self._replay(bucket, tokens, cu_seqlens, total, filled, seqlen)
            self._remember(key, None)
        return tuple(function(tokens, cu_seqlens, max_seqlen))

    def _remember(self, key: tuple, bucket: _Bucket | None) -> None:
        self._buckets[key] = bucket
        self._buckets.move_to_end(key)
        if len(self) > self.max_graphs:
            del self._buckets[next(known for known, kept in self._buckets.items() if kept is not None)]
        # Sizes seen once are a few words each; still, not without end.
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
    ) -> _Bucket:
        # Not in the caller's inference mode: what is made in it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            inputs = tuple(None if t is None else t.new_zeros((filled, *t.shape[1:])) for t in tokens)
            offsets = torch.arange(sequences + 1, device=device, dtype=torch.int32)
            cu_seqlens = (offsets * seqlen).clamp_(max=filled)
            if device.type == "cuda" and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
                replay = self._capture(lambda: function(inputs, cu_seqlens, seqlen), self._pool)
        return _Bucket(inputs, cu_seqlens, replay)

    def _replay(
        self,
        bucket: _Bucket,
        tokens: Sequence[Tensor | None],
        cu_seqlens: Tensor,
        total: int,
        filled: int,
        seqlen: int,
    ) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(cu_seqlens.device) if cu_seqlens.is_cuda else None
        if stream is not None and self._last is not None:
            stream.wait_event(self._last)
        for static, given in zip(bucket.tokens, tokens):
            if static is not None and given is not None:
                static[:total].copy_(given)
        given = cu_seqlens.shape[0]
        bucket.cu_seqlens[:given].copy_(cu_seqlens)
        # What fills the bucket up: sequences of the bucket's length, then empty ones.
        rest = bucket.cu_seqlens[given:]
        if rest.shape[0]:
            torch.arange(total + seqlen, total + seqlen * rest.shape[0] + 1, seqlen, out=rest)
            rest.clamp_(max=filled)
        bucket.replay()
        outputs = tuple(output[:total].clone() for output in bucket.replay.outputs)
        if stream is not None:
            self._last = stream.record_event()
        return outputs
