# SPDX-License-Identifier: Apache-2.0
"""What the implementations of ``linear_cross_entropy`` share: labelled rows only, a chunk of their logits at a time.

A chunk's logits are made by one product, turned into their own gradient in place, and used up by the products that
gradients are made of. Chunks come in order and nothing is added atomically: two runs are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..._core import torch_ops

# Logits held at once. One chunk is kept busy by a few thousand rows; more buys no speed.
CHUNK_BYTES = 128 << 20
# Rows of logits begin at multiples of this many elements, as tensor cores want them.
_ALIGNED = 64

# (logits (R, V), labels (R), scale (R) or None, ignore_index) -> losses (R) in float32. Where scale is given, the
# logits are changed in place to the gradient of scale times losses. What lies between rows is the function's to write.
Softmax = Callable[[Tensor, Tensor, "Tensor | None", "int | None"], Tensor]


def labelled(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices of the rows that have a label; None for all rows, as with ``ignore_index`` None.

    Their number is read by the host, which waits for the device here once a call. A stream that is being captured into
    a CUDA graph cannot wait: there all rows are computed, those without a label with a gradient of zero.
    """
    if ignore_index is None:
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = torch.nonzero(labels != ignore_index).squeeze(1)
    return None if rows.shape[0] == labels.shape[0] else rows


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their hidden vectors, their logits) of one chunk after another; the logits' memory is used again."""
    if rows == 0:
        return
    classes = weight.shape[0]
    width = -(-classes // _ALIGNED) * _ALIGNED
    pieces = max(1, -(-rows * width * weight.element_size() // CHUNK_BYTES))
    size = -(-rows // pieces)
    memory = torch_ops.allocate((size, width), weight)
    # torch's bfloat16 product on the CPU (2.13) multiplies what lies between rows by zero: it must not hold a nan.
    memory[:, classes:].zero_()
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        piece = hidden[part]
        logits = memory[: piece.shape[0], :classes]
        if bias is None:
            torch.mm(piece, weight.t(), out=logits)
        else:
            torch.addmm(bias, piece, weight.t(), out=logits)
        yield part, piece, logits


def losses_output(hidden: Tensor, labels: Tensor) -> Tensor:
    return torch_ops.allocate(labels.shape, hidden, torch.float32)


def losses(
    softmax: Softmax, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int | None
) -> Tensor:
    """Loss of every row (T), float32, zero where there is no label."""
    out = losses_output(hidden, labels).zero_()
    index = labelled(labels, ignore_index)
    chosen, chosen_labels = (hidden, labels) if index is None else (hidden[index], labels[index])
    found = torch_ops.allocate(chosen_labels.shape, out)
    for part, _, logits in _logits(chosen, weight, bias, chosen.shape[0]):
        found[part] = softmax(logits, chosen_labels[part], None, ignore_index)
    return found if index is None else out.index_copy_(0, index, found)


def gradients_outputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch_ops.allocate(labels.shape, hidden, torch.float32),
        torch_ops.allocate(hidden.shape, hidden),
        torch_ops.allocate(weight.shape if with_weight else (0,), weight),
        torch_ops.allocate((0,) if bias is None or not with_weight else bias.shape, weight),
    )


def gradients(
    softmax: Softmax, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None,
    ignore_index: int | None, scale: Tensor, with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (T), and the gradients of hidden, weight and bias of the sum of scale (T) times losses.

    The last two are empty where not wanted.
    """
    outputs = gradients_outputs(hidden, weight, labels, bias, with_weight)
    out, grad_hidden, grad_weight, grad_bias = outputs
    index = labelled(labels, ignore_index)
    if index is not None:
        chosen, labels, scale = hidden[index], labels[index], scale[index]
    else:
        chosen = hidden
    found = torch_ops.allocate(labels.shape, out)
    rows = torch_ops.allocate(chosen.shape, chosen)
    bias_sums = torch.zeros(grad_bias.shape, dtype=torch.float32, device=hidden.device)
    for part, piece, logits in _logits(chosen, weight, bias, chosen.shape[0]):
        found[part] = softmax(logits, labels[part], scale[part], ignore_index)
        torch.mm(logits, weight, out=rows[part])
        if with_weight:
            if part.start == 0:
                torch.mm(logits.t(), piece, out=grad_weight)
            else:
                grad_weight.addmm_(logits.t(), piece)
            if bias is not None:
                bias_sums += logits.sum(0, dtype=torch.float32)
    grad_bias.copy_(bias_sums)
    if chosen.shape[0] == 0:
        grad_weight.zero_()
    if index is None:
        out.copy_(found)
        grad_hidden.copy_(rows)
    else:
        out.zero_().index_copy_(0, index, found)
        grad_hidden.zero_().index_copy_(0, index, rows)
    return outputs
