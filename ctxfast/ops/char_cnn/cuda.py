# SPDX-License-Identifier: Apache-2.0
"""``char_cnn`` on CUDA: gather, convolutions, maximum and activation in one kernel.

In 16 bits on tensor cores, in float32 (and for filters too wide for them) by plain multiply-adds; sums are float32.
The forward pass notes where each largest window was, and the backward pass reads those alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from . import recorded

_MOST_WIDTHS = 16  # the kernel takes their addresses by value
_SHARED_BYTES = 96 * 1024
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _words(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids and table as the kernels read them, and their arguments of them."""
    ids, table = ids.contiguous(), table.contiguous()
    sizes = dict(words=ids.shape[0], characters=ids.shape[1], size=table.shape[1], vocabulary=table.shape[0])
    kinds = dict(dtype=capability.DTYPE_NAMES[table.dtype], is_int64=ids.dtype is torch.int64)
    return ids, table, sizes | kinds | dict(ids=ids.data_ptr(), table=table.data_ptr())


def _run(
    ids: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], is_tanh: bool,
    y: Tensor, at: Tensor | None,
) -> None:  # fmt: skip
    ids, table, words = _words(ids, table)
    weights, biases = [weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]
    filters = [
        (weight.shape[2], weight.shape[0], weight.data_ptr(), bias.data_ptr(), 0, 0)
        for weight, bias in zip(weights, biases)
    ]
    with torch_ops.launching(y) as stream:
        capability.extension().char_cnn_cuda_forward(
            **words, widths=len(weights), columns=y.shape[1], filters=filters, at=torch_ops.address(at),
            is_tanh=is_tanh, y=y.data_ptr(), stream=stream,
        )  # fmt: skip


def _outputs(ids: Tensor, table: Tensor, weights: Sequence[Tensor], has_at: bool) -> list[Tensor]:
    """The output and, if wanted, where the window begins that each number of it comes from."""
    shape = (ids.shape[0], sum(weight.shape[0] for weight in weights))
    y = torch_ops.allocate(shape, table)
    return [y, torch_ops.allocate(shape, table, torch.int32)] if has_at else [y]


def _forward(
    ids: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], is_tanh: bool, has_at: bool
) -> list[Tensor]:
    outputs = _outputs(ids, table, weights, has_at)
    _run(ids, table, weights, biases, is_tanh, outputs[0], outputs[1] if has_at else None)
    return outputs


def _backward(grad: Tensor, at: Tensor, ids: Tensor, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """From the gradient before the activation: those of the table, of every weight, then of every bias."""
    ids, table, words = _words(ids, table)
    grad, at, weights = grad.float().contiguous(), at.contiguous(), [weight.contiguous() for weight in weights]
    grad_words = torch_ops.allocate((*ids.shape, table.shape[1]), grad)
    grad_weights = [torch_ops.allocate(weight.shape, grad) for weight in weights]
    grad_biases = [torch_ops.allocate(weight.shape[:1], grad) for weight in weights]
    filters = [
        (weight.shape[2], weight.shape[0], weight.data_ptr(), 0, grad_weight.data_ptr(), grad_bias.data_ptr())
        for weight, grad_weight, grad_bias in zip(weights, grad_weights, grad_biases)
    ]
    with torch_ops.launching(grad) as stream:
        capability.extension().char_cnn_cuda_backward(
            **words, widths=len(weights), columns=at.shape[1], filters=filters, at=at.data_ptr(),
            grad=grad.data_ptr(), grad_words=grad_words.data_ptr(), stream=stream,
        )  # fmt: skip
    grad_table = torch.ops.aten.embedding_dense_backward(grad_words, ids, table.shape[0], -1, False)
    return [each.to(table.dtype) for each in (grad_table, *grad_weights, *grad_biases)]


_fwd = torch_ops.define("char_cnn_cuda_fwd", _forward, _outputs, "CUDA")
_bwd = torch_ops.define("char_cnn_cuda_bwd", _backward, recorded.gradient_outputs, "CUDA")


def _shared_bytes(characters: int, size: int, width: int) -> int:
    """Of a block at least, as char_cnn_cuda_shared_bytes in csrc: 64 filters and a word."""
    stride = (size + 3) // 4 * 4
    return 4 * (64 * width + characters + 7) * stride


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the CUDA kernels cannot run this call."""
    ids, table, weights = args["char_ids"], args["char_embeddings"], args["conv_weights"]
    if table.device.type != "cuda":
        return f"it runs on a CUDA GPU and char_embeddings is on {table.device}."
    if table.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16 and char_embeddings is {table.dtype}."
    if len(weights) > _MOST_WIDTHS:
        return f"it takes filters of at most {_MOST_WIDTHS} widths and there are {len(weights)}."
    if table.shape[1] == 0:
        return "there is nothing to multiply in characters without numbers."
    needed = _shared_bytes(ids.shape[1], table.shape[1], max([weight.shape[2] for weight in weights]))
    if needed > _SHARED_BYTES:
        return f"it keeps 64 filters and a word in shared memory: here {needed} bytes, and it has {_SHARED_BYTES}."
    return capability.why_no_cuda()


def char_cnn(
    char_ids: Tensor,
    char_embeddings: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """See ``ctxfast.functional.char_cnn``."""
    weights, biases, is_tanh = list(conv_weights), list(conv_biases), activation == "tanh"
    if registry.needs_grad(char_embeddings, weights, biases):
        return recorded.CharCnn.apply(_fwd, _bwd, True, char_ids, is_tanh, char_embeddings, *weights, *biases)
    return _fwd(char_ids, char_embeddings, weights, biases, is_tanh, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    words = (args["char_ids"], args["char_embeddings"], list(args["conv_weights"]))
    given = (*words, list(args["conv_biases"]), args["activation"] == "tanh")
    y, at = _fwd(*given, True)
    return [(_fwd, (*given, False)), (_fwd, (*given, True)), (_bwd, (torch.randn_like(y), at, *words))]
