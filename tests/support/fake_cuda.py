"""A stand-in for torch.cuda as ``ctxfast.nn.graph_capture`` uses it: streams of several devices, and graphs that record
operations on CPU tensors while their stream captures, and run them again on the same memory.

An operation is recorded only where the current stream of the device it runs on (``computes_on``) is the one that
captures, as CUDA does. Pools count the bytes of what was allocated in captures.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    def __init__(self, cuda: FakeCuda, device: Any) -> None:
        self.device, self.cuda = torch.device(device), cuda
        cuda.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.cuda.waits.append((self, other))

    def record_event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.cuda.log.append(("synchronize", self.stream))


class Pool:
    """Segments as the allocator asks the driver for them, each with one block."""

    def __init__(self) -> None:
        self.segments: list[int] = []
        self.free: list[int] = []
        self.graphs = 0

    def allocate(self, tensor: Tensor) -> None:
        fitting = [size for size in self.free if size >= tensor.nbytes]
        if fitting:
            self.free.remove(min(fitting))
        else:
            self.segments.append(tensor.nbytes)
        weakref.finalize(tensor, self.free.append, min(fitting, default=tensor.nbytes))


class Recording(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda, graph: CUDAGraph) -> None:
        super().__init__()
        self.cuda, self.graph = cuda, graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.cuda.current_stream(self.cuda.computes_on) is not self.graph.stream:
            return result
        if self.cuda.fails_after is not None:
            if len(self.graph.nodes) >= self.cuda.fails_after:
                self.graph.is_broken = True
                raise RuntimeError("operation not permitted when stream is capturing")
        given = {each.untyped_storage()._cdata for each in pytree.tree_leaves((args, kwargs)) if _is_tensor(each)}
        made = [each for each in pytree.tree_leaves(result) if _is_tensor(each)]
        made = [each for each in made if each.untyped_storage()._cdata not in given]
        for each in made:
            self.graph.pool_.allocate(each)
        alias = lambda each: each.detach() if _is_tensor(each) else each  # noqa: E731
        args, kwargs = pytree.tree_map(alias, (args, kwargs))
        if "empty" in func.overloadpacket.__name__:  # memory alone is no operation
            return result
        self.graph.nodes.append((func, args, kwargs, [each.detach() for each in made], bool(made)))
        return result


def _is_tensor(each: Any) -> bool:
    return isinstance(each, Tensor)


class CUDAGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.nodes, self.is_broken, self.has_ended = cuda, [], False, False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert self.cuda.capturing is None, "a capture is underway"
        self.stream = self.cuda.current_stream()
        assert self.stream not in self.cuda.defaults.values(), "the default stream cannot be captured"
        self.cuda.capturing, self.pool_id = self, pool
        self.pool_ = self.cuda.pools.setdefault(pool, Pool())
        assert self.pool_.graphs > 0 or not self.pool_.segments, "the pool of graphs that are gone was used again"
        self.pool_.graphs += 1
        self.mode = Recording(self.cuda, self)
        self.mode.__enter__()

    def capture_end(self) -> None:
        assert self.cuda.current_stream() is self.stream
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None
        if self.is_broken:  # as in torch, what was begun has not ended
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.capturing, self.has_ended = None, True
        self.cuda.graphs.append(weakref.ref(self))
        weakref.finalize(self, self.cuda.release, self.pool_id)
        self.cuda.made += 1

    def reset(self) -> None:
        self.nodes.clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self) -> None:
        assert self.has_ended
        self.cuda.replayed += 1
        for func, args, kwargs, outputs, has_made in self.nodes:
            result = func(*args, **kwargs)
            if has_made:
                given = {e.untyped_storage()._cdata for e in pytree.tree_leaves((args, kwargs)) if _is_tensor(e)}
                fresh = [each for each in pytree.tree_leaves(result) if _is_tensor(each)]
                fresh = [each for each in fresh if each.untyped_storage()._cdata not in given]
                for output, each in zip(outputs, fresh, strict=True):
                    output.copy_(each)


class FakeCuda:
    """In the place of ``torch.cuda``.

    Attributes:
        computes_on: the device on whose current stream operations run.
        fails_after: operations after which a capture fails; None for never.
        made, replayed: graphs captured, replays.
        log: what tests note, and events that were waited for.
        renewed: devices whose random numbers were put right.
    """

    def __init__(self, total_memory: int = 1 << 40) -> None:
        self.computes_on = torch.device("cuda", 0)
        self.fails_after: int | None = None
        self.made = self.replayed = 0
        self.streams: list[Stream] = []
        self.waits: list[tuple[Stream, Stream]] = []
        self.graphs: list[weakref.ref] = []
        self.log: list[tuple[str, Any]] = []
        self.pools: dict[tuple[int, int], Pool] = {}
        self.capturing: CUDAGraph | None = None
        self.total_memory = total_memory
        self.defaults = {i: Stream(self, f"cuda:{i}") for i in range(2)}
        self._current = dict(self.defaults)
        self._device = 0
        self.renewed: list[int] = []
        self.default_generators = [_Generator(self, i) for i in range(2)]
        self.streams.clear()

    def _index(self, device: Any) -> int:
        index = None if device is None else torch.device(device).index
        return self._device if device is None else index or 0

    def current_device(self) -> int:
        return self._device

    def Stream(self, device: Any) -> Stream:  # noqa: N802, torch's name
        return Stream(self, f"cuda:{self._index(device)}")

    def current_stream(self, device: Any = None) -> Stream:
        return self._current[self._index(device)]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        before, device = self._current[index], self._device
        self._current[index], self._device = stream, index
        try:
            yield
        finally:
            self._current[index], self._device = before, device

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._device = self._device, self._index(device)
        try:
            yield
        finally:
            self._device = before

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools[0, len(self.pools) + 1] = Pool()
        return 0, len(self.pools)

    def CUDAGraph(self) -> CUDAGraph:  # noqa: N802, torch's name
        return CUDAGraph(self)

    def release(self, pool: tuple[int, int]) -> None:
        self.pools[pool].graphs -= 1

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if self.capturing is None or self.capturing.pool_id != pool:
            raise RuntimeError("not currently recording to the pool")
        self.capturing = None

    def release_pool(self, device: int, pool: tuple[int, int]) -> None:
        self.release(pool)

    def get_device_properties(self, device: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=self.total_memory)

    def memory_snapshot(self) -> list[dict[str, Any]]:
        return [
            {"device": index, "segment_pool_id": key, "total_size": size}
            for key, pool in self.pools.items()
            if pool.graphs
            for size in pool.segments
            for index in (None, 0, 1)  # CPU tensors have no index
        ]


class _Generator:
    def __init__(self, cuda: FakeCuda, index: int) -> None:
        self.cuda, self.index = cuda, index

    def clone_state(self) -> _Generator:
        return self

    def graphsafe_set_state(self, state: _Generator) -> None:
        self.cuda.renewed.append(self.index)


def install(monkeypatch: Any, **options: Any) -> FakeCuda:
    """A ``FakeCuda`` in the place of what ``ctxfast.nn.graph_capture`` uses."""
    from ctxfast.nn import graph_capture

    fake = FakeCuda(**options)
    monkeypatch.setattr(graph_capture, "cuda", fake)
    monkeypatch.setattr(graph_capture, "unowned", Tensor.detach)  # another tensor, so that the first can go
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release_pool, raising=False)
    return fake
