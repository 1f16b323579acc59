# SPDX-License-Identifier: Apache-2.0
"""What is off until a GPU has measured it: contexts inside which it is on, so that both sides can be timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest import mock

# Compute capabilities' major numbers that there are kernels for.
_MAJORS = (8, 9, 10, 12)


def gelu_in_product() -> AbstractContextManager[object]:
    """GELU in the epilogue of Triton's product, for every size."""
    from ctxfast.ops.shared import triton_product

    return mock.patch.dict(triton_product.FASTER, {major: lambda M, N, K: True for major in _MAJORS})


def full_by_sdpa() -> AbstractContextManager[object]:
    """Full batches of one length through SDPA's cuDNN backend."""
    from ctxfast.ops.attention import triton_plan

    return mock.patch.dict(triton_plan.FULL_BY_SDPA, {major: lambda *sizes: True for major in _MAJORS})


def rows_in_tiles() -> AbstractContextManager[object]:
    """Any number of rows by ``lstm``'s persistent kernels, 32 at a time."""
    from ctxfast.ops.lstm import cuda

    return mock.patch.dict(cuda._MAX_BATCH, dict.fromkeys(cuda._MAX_BATCH, 1 << 20))


@contextmanager
def all_on() -> Iterator[None]:
    """What concerns an encoder: GELU and full batches."""
    with ExitStack() as stack:
        stack.enter_context(gelu_in_product())
        stack.enter_context(full_by_sdpa())
        yield
