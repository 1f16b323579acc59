# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy`` on a GPU: labelled rows only, products by cuBLAS, softmax by Triton.

Each chunk of logits is read once for its losses and once to become its own gradient, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import torch_ops
from ..shared import triton_launch, triton_rows
from . import recorded, triton_kernels


def tile(classes: int) -> dict[str, int]:
    """Sixteen elements a thread."""
    block = min(4096, triton_rows.block(classes))
    return dict(BLOCK_V=block, num_warps=max(1, block // 512))


def _softmax(logits: Tensor, labels: Tensor, scale: Tensor | None, ignore_index: int | None) -> Tensor:
    losses = torch_ops.allocate((logits.shape[0],), logits, torch.float32)
    if losses.numel() == 0:
        return losses
    with triton_rows.on_device(logits):
        triton_launch.launch(
            triton_kernels.softmax, (logits.shape[0],), logits, labels.contiguous(),
            None if scale is None else scale.contiguous(), losses, logits.stride(0),
            -1 if ignore_index is None else ignore_index, logits.shape[1],
            GRADIENT=scale is not None, **tile(logits.shape[1]),
        )  # fmt: skip
    return losses


_operators = recorded.Operators("linear_cross_entropy_triton", _softmax, triton_rows.DISPATCH)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernel cannot run this call."""
    return triton_rows.why_not("hidden", args["hidden"])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int | None, reduction: str
) -> Tensor:
    """See ``ctxfast.functional.linear_cross_entropy``."""
    return recorded.call(_operators, hidden, weight, labels, bias, ignore_index, reduction)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return recorded.raw_calls(_operators, args)


ARGUMENT_TYPES = {"scale": "*fp32"}


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: BERT's vocabulary."""
    for gradient in (True, False):
        name = "gradient" if gradient else "loss"
        yield name, triton_kernels.softmax, dict(GRADIENT=gradient), tile(30522)
