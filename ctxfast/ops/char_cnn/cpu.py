# SPDX-License-Identifier: Apache-2.0
"""``char_cnn`` on the CPU: compiled, forward and backward, in float32 inside.

No value before the maximum is stored, and windows wholly in a word's padding are computed once. A word's bits depend on
nothing but the word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..shared.weight_cache import WeightCache
from . import recorded

_PANEL = 32  # filters side by side
_MOST = 16384  # numbers of a word: the kernel keeps it on its stack

_packed = WeightCache()


def _in_panels(weight: Tensor) -> Tensor:
    """(n, D, w) -> [panel][w * D][32], float32, zeros where there is no filter: see csrc/char_cnn/char_cnn.h."""
    rows = weight.detach().float().permute(2, 1, 0).flatten(0, 1)
    return F.pad(rows, (0, -weight.shape[0] % _PANEL)).unflatten(1, (-1, _PANEL)).transpose(0, 1).contiguous()


def _all_in_panels(weights: Sequence[Tensor], is_kept: bool) -> list[Tensor]:
    if is_kept:
        return _packed.get(weights, "panels", lambda: [_in_panels(weight) for weight in weights])
    return [_in_panels(weight) for weight in weights]


def _words(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Ids and table as the kernel reads them, and its arguments of them: keep both while it runs."""
    ids = ids.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    sizes = (*ids.shape, table.shape[1], table.shape[0], capability.DTYPE_NAMES[table.dtype], ids.dtype is torch.int64)
    return ids, table, (*sizes, ids.data_ptr(), table.data_ptr(), table.stride(0))


def _run(
    ids: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], is_tanh: bool, is_kept: bool,
    y: Tensor, at: Tensor | None,
) -> None:  # fmt: skip
    ids, table, words = _words(ids, table)
    packed, biases = _all_in_panels(weights, is_kept), [bias.contiguous() for bias in biases]
    filters = [
        (weight.shape[2], weight.shape[0], panels.data_ptr(), bias.data_ptr())
        for weight, panels, bias in zip(weights, packed, biases)
    ]
    capability.extension().char_cnn_forward(
        *words, torch_ops.address(at), filters, is_tanh, y.data_ptr(), torch.get_num_threads()
    )


def _output(ids: Tensor, table: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch_ops.allocate((ids.shape[0], sum(weight.shape[0] for weight in weights)), table)


def _outputs(ids: Tensor, table: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output and, for each number of it, where the window begins that it comes from."""
    y = _output(ids, table, weights)
    return y, torch_ops.allocate(y.shape, y, torch.int32)


def _forward(
    ids: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], is_tanh: bool, is_kept: bool
) -> Tensor:
    y = _output(ids, table, weights)
    _run(ids, table, weights, biases, is_tanh, is_kept, y, None)
    return y


def _forward_at(
    ids: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], is_tanh: bool, is_kept: bool
) -> tuple[Tensor, Tensor]:
    y, at = _outputs(ids, table, weights)
    _run(ids, table, weights, biases, is_tanh, is_kept, y, at)
    return y, at


def _backward(grad: Tensor, at: Tensor, ids: Tensor, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """From the gradient before the activation: those of the table, of every weight, then of every bias."""
    ids, table, words = _words(ids, table)
    grad, at = grad.float().contiguous(), at.contiguous()
    rows = [weight.float().transpose(1, 2).contiguous() for weight in weights]  # (n, w, D)
    grad_rows = [torch_ops.allocate(row.shape, row) for row in rows]
    grad_biases = [torch_ops.allocate(row.shape[:1], row) for row in rows]
    grad_words = torch_ops.allocate((*ids.shape, table.shape[1]), grad)
    filters = [
        (row.shape[1], row.shape[0], row.data_ptr(), grad_row.data_ptr(), grad_bias.data_ptr())
        for row, grad_row, grad_bias in zip(rows, grad_rows, grad_biases)
    ]
    capability.extension().char_cnn_backward(
        *words, at.data_ptr(), filters, grad.data_ptr(), grad_words.data_ptr(), torch.get_num_threads()
    )
    grad_table = torch.ops.aten.embedding_dense_backward(grad_words, ids, table.shape[0], -1, False)
    grad_weights = [grad_row.transpose(1, 2).contiguous() for grad_row in grad_rows]
    return [each.to(table.dtype) for each in (grad_table, *grad_weights, *grad_biases)]


_fwd = torch_ops.define("char_cnn_cpu_fwd", _forward, _output, "CPU")
_fwd_at = torch_ops.define("char_cnn_cpu_fwd_at", _forward_at, _outputs, "CPU")
_bwd = torch_ops.define("char_cnn_cpu_bwd", _backward, recorded.gradient_outputs, "CPU")


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled kernel cannot run this call."""
    ids, table = args["char_ids"], args["char_embeddings"]
    if table.device.type != "cpu":
        return f"it runs on the CPU and char_embeddings is on {table.device}."
    if table.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and char_embeddings is {table.dtype}."
    if not 0 < ids.shape[1] * table.shape[1] <= _MOST:
        return (
            f"it takes words of 1 to {_MOST} numbers, characters times embedding size, and these have "
            f"{ids.shape[1] * table.shape[1]}."
        )
    return None if capability.extension() is not None else capability.why_no_extension()


def char_cnn(
    char_ids: Tensor,
    char_embeddings: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """See ``ctxfast.functional.char_cnn``."""
    weights, biases, is_tanh = list(conv_weights), list(conv_biases), activation == "tanh"
    # A packed form pays from the second call on: not for weights in training, nor for autocast's passing copies.
    in_training = registry.needs_grad(weights)
    is_kept = not (in_training or torch.is_autocast_enabled("cpu"))
    if registry.needs_grad(char_embeddings, weights, biases):
        return recorded.CharCnn.apply(_fwd_at, _bwd, is_kept, char_ids, is_tanh, char_embeddings, *weights, *biases)
    forward = _forward if torch_ops.is_direct(char_ids, char_embeddings, *weights, *biases) else _fwd
    return forward(char_ids, char_embeddings, weights, biases, is_tanh, is_kept)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    words = (args["char_ids"], args["char_embeddings"], list(args["conv_weights"]))
    given = (*words, list(args["conv_biases"]), args["activation"] == "tanh", True)
    y, at = _fwd_at(*given)
    return [(_fwd, given), (_fwd_at, given), (_bwd, (torch.randn_like(y), at, *words))]
