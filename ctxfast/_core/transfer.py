# SPDX-License-Identifier: Apache-2.0
"""Copies between host and GPU that neither side waits for.

A copy from ordinary memory makes the host wait until the GPU has done all it was given before; one from pinned memory
does not. Results are copied to the host on a stream of their own, beside the next computation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, cuda


def is_gpus(device: torch.device) -> bool:
    """Whether copies to and from a device are worth all this."""
    return device.type == "cuda"


def to_device(value: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A host's values on a device, without waiting for it: through pinned memory."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not is_gpus(device) or not tensor.is_cpu:
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """The same in pinned memory, which the allocator keeps until copies from it are done."""
    return tensor if tensor.is_pinned() else tensor.pin_memory()


class ToHost:
    """Copies of results to the host, one after another on a stream beside the one that computes."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ToHost, ()

    def start(self, values: Tensor) -> Copy:
        """Begin to copy, as soon as the values are computed; a CPU's values are there already."""
        device = values.device
        if not is_gpus(device):
            return Copy(values.cpu(), None)
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = cuda.Stream(device)
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        stream.wait_stream(cuda.current_stream(device))
        with cuda.stream(stream):
            host.copy_(values, non_blocking=True)
            values.record_stream(stream)  # its memory is not given away before it is copied
            return Copy(host, stream.record_event())


class Copy:
    """A copy that is under way."""

    def __init__(self, host: Tensor, event: Any) -> None:
        self._host, self._event = host, event

    def finish(self) -> np.ndarray:
        """The values; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
