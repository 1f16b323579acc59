# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm`` in Triton: gather, sum, LayerNorm and dropout in one pass. Not yet run on a GPU.

The forward keeps ids, and mean and 1 / standard deviation of each row; the backward gathers again. Gradients of the
tables are sums over rows of one id, by torch's own sorted reduction: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ..._core import capability, torch_ops, triton_rows
from . import triton_kernels


def _forward(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ids and tables: of words, positions, types and, where there are four, tasks."""
    out, mean, rstd = _forward_fake(ids, tables, weight, bias, eps, dropout_p, seeds, save)
    if out.numel() == 0:
        return out, mean, rstd
    pointers = _pointers(ids, tables)
    tile = triton_rows.tile(out.shape[1])
    with triton_rows.on_device(out):
        triton_kernels.forward[(triton.cdiv(out.shape[0], tile["BLOCK_ROWS"]),)](
            *pointers, weight.contiguous(), bias.contiguous(), seeds, out, mean, rstd, *out.shape, eps,
            *triton_rows.dropout_numbers(dropout_p), HAS_TASKS=len(ids) == 4, DROPOUT=seeds is not None, SAVE=save,
            **tile,
        )  # fmt: skip
    return out, mean, rstd


def _pointers(ids: list[Tensor], tables: list[Tensor]) -> list[Tensor | None]:
    missing = [None] * (4 - len(ids))
    return [*(t.contiguous() for t in tables), *missing, *(i.contiguous() for i in ids), *missing]


def _forward_fake(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = ids[0].shape[0]
    statistics = (tokens if save else 0,)
    return (
        torch_ops.allocate((tokens, tables[0].shape[1]), tables[0]),
        torch_ops.allocate(statistics, tables[0], torch.float32),
        torch_ops.allocate(statistics, tables[0], torch.float32),
    )


def _backward(
    grad: Tensor, ids: list[Tensor], tables: list[Tensor], weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_sum, sums = _backward_fake(grad, ids, tables, weight, mean, rstd, dropout_p, seeds)
    if grad.numel() == 0:
        return grad_sum, sums.zero_()
    tile = triton_rows.tile(grad.shape[1])
    programs = min(triton.cdiv(grad.shape[0], tile["BLOCK_ROWS"]), triton_rows.PARTIAL_SUMS)
    partial = torch_ops.allocate((programs, *sums.shape), sums)
    with triton_rows.on_device(grad):
        triton_kernels.backward[(programs,)](
            grad.contiguous(), *_pointers(ids, tables), weight.contiguous(), seeds, mean, rstd, grad_sum, partial,
            *grad.shape, *triton_rows.dropout_numbers(dropout_p), HAS_TASKS=len(ids) == 4, DROPOUT=seeds is not None,
            **tile,
        )  # fmt: skip
    torch.sum(partial, 0, out=sums)
    return grad_sum, sums


def _backward_fake(
    grad: Tensor, ids: list[Tensor], tables: list[Tensor], weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the sum of embeddings (T, N), and sums (2, N) for weight and bias."""
    return torch_ops.allocate(grad.shape, tables[0]), torch_ops.allocate((2, grad.shape[1]), grad, torch.float32)


_DEVICE = "CPU" if capability.is_triton_interpreted() else "CUDA"
_fwd = torch_ops.define(
    "embed_layer_norm_triton_fwd",
    "(Tensor[] ids, Tensor[] tables, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor? seeds, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _DEVICE,
)  # fmt: skip
_bwd = torch_ops.define(
    "embed_layer_norm_triton_bwd",
    "(Tensor grad, Tensor[] ids, Tensor[] tables, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, "
    "Tensor? seeds) -> (Tensor, Tensor)",
    _backward, _backward_fake, _DEVICE,
)  # fmt: skip


class _EmbedLayerNorm(torch.autograd.Function):
    """Tensors come flat: n ids, n tables, weight, bias."""

    @staticmethod
    def forward(
        ctx: Any, count: int, eps: float, dropout_p: float, seeds: Tensor | None, paddings: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ids, tables, (weight, bias) = list(tensors[:count]), list(tensors[count : 2 * count]), tensors[2 * count :]
        out, mean, rstd = _fwd(ids, tables, weight, bias, eps, dropout_p, seeds, True)
        ctx.save_for_backward(mean, rstd, seeds, weight, *ids, *tables)
        ctx.facts = (count, dropout_p, paddings)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, rstd, seeds, weight, *tensors = ctx.saved_tensors
        count, dropout_p, paddings = ctx.facts
        ids, tables = tensors[:count], tensors[count:]
        grad_sum, sums = _bwd(grad, ids, tables, weight, mean, rstd, dropout_p, seeds)
        of_tables: list[Tensor | None] = []
        for i, (index, table, padding) in enumerate(zip(ids, tables, paddings)):
            wanted = ctx.needs_input_grad[5 + count + i]
            of_tables.append(
                torch.ops.aten.embedding_dense_backward(grad_sum, index, table.shape[0], padding, False)
                if wanted
                else None
            )
        of_weight, of_bias = sums.to(weight.dtype)
        return (None,) * (5 + count) + (*of_tables, of_weight, of_bias)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    table = args["word_embeddings"]
    return triton_rows.objection("word_embeddings", table, table.shape[1])


def _lists(args: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """ids, tables, and of each table the row whose gradient is zero (-1: none)."""
    ids = [args["input_ids"], args["position_ids"], args["token_type_ids"]]
    tables = [args["word_embeddings"], args["position_embeddings"], args["token_type_embeddings"]]
    paddings = [args["padding_idx"], args["position_padding_idx"], None]
    if args["task_type_ids"] is not None:
        ids.append(args["task_type_ids"])
        tables.append(args["task_type_embeddings"])
        paddings.append(None)
    rows = [-1 if at is None else at % table.shape[0] for at, table in zip(paddings, tables)]
    return ids, tables, tuple(rows)


def embed_layer_norm(**args: Any) -> Tensor:
    """See ``ctxfast.functional.embed_layer_norm``."""
    ids, tables, paddings = _lists(args)
    weight, bias, eps, dropout_p = args["weight"], args["bias"], args["eps"], args["dropout_p"]
    seeds = triton_rows.draw_seeds(tables[0], dropout_p)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tables, weight, bias)):
        return _EmbedLayerNorm.apply(len(ids), eps, dropout_p, seeds, paddings, *ids, *tables, weight, bias)
    return _fwd(ids, tables, weight, bias, eps, dropout_p, seeds, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    ids, tables, _ = _lists(args)
    seeds = triton_rows.draw_seeds(tables[0], args["dropout_p"])
    forward = (ids, tables, args["weight"], args["bias"], args["eps"], args["dropout_p"], seeds, True)
    out, mean, rstd = _fwd(*forward)
    backward = (torch.randn_like(out), ids, tables, args["weight"], mean, rstd, args["dropout_p"], seeds)
    return [(_fwd, forward), (_bwd, backward)]
