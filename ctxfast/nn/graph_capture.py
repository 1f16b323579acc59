# SPDX-License-Identifier: Apache-2.0
"""Capturing runs as CUDA graphs on one device: the stream it is done on, the memory graphs share, what cannot be
captured, and what is put right after a capture that failed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, cuda
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Sequence[Tensor]]
# Graphs whose capture failed. The allocator may ask them for ever whether a stream is theirs.
_failed: list[Any] = []


class CannotCapture(Exception):
    """Why a run cannot be a CUDA graph, as a sentence."""


class Refusing(TorchDispatchMode):
    """Within, an operation raises ``CannotCapture`` where it waits for the GPU or reads values that a replay would not
    read again: in a capture CUDA would refuse the first, and nobody would notice the second."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_read(func, args, kwargs) and any(map(_is_on_gpu, pytree.tree_leaves((args, kwargs)))):
            raise CannotCapture(f"something in it calls {func}, whose result the host waits for.")
        result = func(*args, **kwargs)
        if _crosses(pytree.tree_leaves((args, kwargs, result))):
            raise CannotCapture(f"something in it calls {func} between the CPU and the GPU.")
        return result


def _is_on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def _is_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for an operation's result: for a value, or for how many there are."""
    aten = torch.ops.aten
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # by a mask they count what it holds
        indices = args[1]
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _crosses(leaves: Iterable[Any]) -> bool:
    return len({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}) > 1


class _Memory:
    """An address that torch.as_tensor takes for a GPU's memory."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size,), "typestr": "|u1", "strides": None, "version": 3,
        }  # fmt: skip


def unowned(tensor: Tensor) -> Tensor:
    """The same values at the same address, which the tensor's memory is not kept for.

    Graphs that share a pool run one after another, and what a replay leaves is copied before the next: so a graph's
    outputs may lie where another works. They stay mapped as long as a graph of the pool is there, in torch's own
    allocator; with another (cudaMallocAsync) the tensor is kept.
    """
    if not tensor.is_cuda or tensor.numel() == 0 or cuda.get_allocator_backend() != "native":
        return tensor
    flat = torch.as_tensor(_Memory(tensor.data_ptr(), tensor.nbytes), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)


class Captured:
    """A captured run. Its static inputs and ``outputs`` are overwritten by this and by other graphs of the place."""

    def __init__(self, graph: Any, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        self._graph = graph
        self.inputs = tuple(None if each is None else unowned(each) for each in inputs)
        self.outputs = tuple(map(unowned, outputs))

    def __call__(self) -> None:
        self._graph.replay()


class Place:
    """Where the graphs of one device are captured: one stream (libraries keep a workspace for each), one pool of memory
    that all graphs share, as large as the largest of them needs but for fragments.

    Attributes:
        last: event after the outputs of the last replay were copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last: Any = None
        self._stream = cuda.Stream(device)
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Captured] = weakref.WeakSet()

    def limit(self) -> int:
        """Bytes that graphs may take where nobody says: an eighth of the device's."""
        return cuda.get_device_properties(self.device).total_memory // 8

    def size(self) -> int:
        """Bytes that the graphs' pool holds; 0 with an allocator that does not say."""
        if self._pool is None:
            return 0
        index, pool = self.device.index, tuple(self._pool)
        try:
            segments = cuda.memory_snapshot()
        except RuntimeError:  # cudaMallocAsync's
            return 0
        return sum(
            segment["total_size"]
            for segment in segments
            if segment["device"] == index and tuple(segment["segment_pool_id"]) == pool
        )

    def capture(self, warm_up: Run, inputs: Callable[[], Sequence[Tensor | None]], run: Callable[..., Any]) -> Captured:
        """A graph of ``run(*inputs())``.

        Args:
            warm_up: the same run with inputs of its own. Kernels are compiled and libraries make their workspaces on
                first runs: neither can be captured.
            inputs: makes static inputs, uninitialised.
            run: returns the outputs.

        Raises:
            CannotCapture: the run waits for the GPU.
            Exception: whatever else stops a capture; streams, allocator and random numbers are then as they were.
        """
        with cuda.device(self.device):
            caller = cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            try:
                with cuda.stream(self._stream):
                    with Refusing():
                        warm_up()
                    warm_up()
            finally:
                caller.wait_stream(self._stream)
            if not self._graphs:  # a pool that no graph was left in is gone
                self._pool = cuda.graph_pool_handle()
            with cuda.stream(self._stream):
                graph = cuda.CUDAGraph()
                # Other threads may use the GPU meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    static = inputs()
                    outputs = [output.contiguous() for output in run(*static)]
                    graph.capture_end()
                except BaseException:
                    abandon(graph, self._pool)
                    raise
            captured = Captured(graph, static, outputs)
            self._graphs.add(captured)
        return captured


def abandon(graph: Any, pool: Any) -> None:
    """Ends a capture that failed.

    Where CUDA has broken it off, ``capture_end`` raises before it has ended what ``capture_begin`` began in torch: the
    allocator goes on as if a capture were underway (it puts off what it should free), and so do random numbers, which
    then raise.
    """
    try:
        graph.capture_end()
    except Exception:
        _failed.append(graph)
        index = cuda.current_device()
        with suppress(Exception):
            graph.reset()
        with suppress(Exception):  # it raises where the routing has ended, and the pool was released with the graph
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        generator = cuda.default_generators[index]
        with suppress(Exception):
            generator.graphsafe_set_state(generator.clone_state())
