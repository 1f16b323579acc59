# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm`` in Triton: gather, sum, LayerNorm and dropout in one pass.

The backward gathers the rows again, makes the gradient of their sum once for all tables, and scatters it by torch's
own embedding gradient: it sorts the ids and adds up equal ones in order, so it is repeatable to the last bit. Small
tables take a product instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import philox, triton_launch, triton_rows
from . import triton_kernels


def _outputs(ids: list[Tensor], weight: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / deviation of every row, or empty."""
    rows = ids[0].shape[0]
    mean, rstd = (torch_ops.allocate((rows if save else 0,), weight, torch.float32) for _ in range(2))
    return torch_ops.allocate((rows, weight.shape[0]), weight), mean, rstd


def _forward(
    ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, eps: float, dropout_p: float,
    seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ids: of words, positions, types and, if there are any, tasks (T each); tables in the same order."""
    out, mean, rstd = _outputs(ids, weight, save)
    if out.numel() == 0:
        return out, mean, rstd
    size = out.shape[1]
    tile = triton_rows.forward_tile(size)
    with triton_rows.on_device(out):
        triton_launch.launch(
            triton_kernels.forward, (-(-out.shape[0] // tile["ROWS"]),), *_four(ids), *_four(tables),
            weight.contiguous(), bias.contiguous(), out, mean, rstd, seeds,
            out.shape[0], eps, *philox.numbers(dropout_p),
            N=size, HAS_TASK=len(ids) == 4, DROPOUT=seeds is not None, SAVE=save, **tile,
        )  # fmt: skip
    return out, mean, rstd


def _four(given: list[Tensor]) -> list[Tensor | None]:
    return [*(tensor.contiguous() for tensor in given), *[None] * (4 - len(given))]


def _gradients(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sum of the tables' rows (T, N), of weight and of bias."""
    of_sum, of_weight, of_bias = (torch_ops.allocate(each.shape, each) for each in (grad, weight, weight))
    return of_sum, of_weight, of_bias


def _backward(
    grad: Tensor, ids: list[Tensor], tables: list[Tensor], weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float, seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_sum, grad_weight, grad_bias = _gradients(grad, weight)
    if grad.numel() == 0:
        return grad_sum, grad_weight.zero_(), grad_bias.zero_()
    grad, size = triton_rows.rows(grad), grad.shape[1]
    tile = triton_rows.backward_tile(size)
    count = triton_rows.programs(grad, -(-grad.shape[0] // tile["ROWS"]), triton_rows.resident(tile))
    partial = triton_rows.allocate_partial(2, count, size, grad)
    with triton_rows.on_device(grad):
        triton_launch.launch(
            triton_kernels.backward, (count,), grad, *_four(ids), *_four(tables), weight.contiguous(), mean, rstd,
            seeds, grad_sum, partial, grad.shape[0], grad.stride(0), *philox.numbers(dropout_p),
            N=size, HAS_TASK=len(ids) == 4, DROPOUT=seeds is not None, **tile,
        )  # fmt: skip
        triton_rows.column_sums(partial, [grad_weight, grad_bias])
    return grad_sum, grad_weight, grad_bias


_fwd = torch_ops.define("embed_layer_norm_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("embed_layer_norm_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


def _table_gradient(grad: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    """(rows, N): the sums of those rows of grad (T, N) that have the same id."""
    if rows > _FEW_ROWS or padding >= 0:
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)
    is_row = (ids == torch.arange(rows, device=ids.device)[:, None]).to(grad.dtype)
    with torch_ops.without_autocast(grad.device.type):
        return is_row @ grad


# A table of so few rows (of token types, say) has its gradient from a product: torch's embedding gradient adds up equal
# ids one after another, and here they are most of a batch.
_FEW_ROWS = 64


class _EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, paddings: tuple[int, int], dropout_p: float, seeds: Tensor | None, weight: Tensor,
        bias: Tensor, count: int, *ids_and_tables: Tensor,
    ) -> Tensor:  # fmt: skip
        ids, tables = list(ids_and_tables[:count]), list(ids_and_tables[count:])
        out, mean, rstd = _fwd(ids, tables, weight, bias, eps, dropout_p, seeds, True)
        ctx.save_for_backward(seeds, weight, bias, mean, rstd, *ids, *tables)
        ctx.rest = (count, paddings, eps, dropout_p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seeds, weight, bias, mean, rstd, *ids_and_tables = ctx.saved_tensors
        count, paddings, eps, dropout_p = ctx.rest
        ids, tables = ids_and_tables[:count], ids_and_tables[count:]
        if torch_ops.needs_definition(grad):
            given = [None if row < 0 else row for row in paddings]
            mask = None if seeds is None else philox.row_bits(*grad.shape, seeds)
            mask = None if mask is None else philox.multiplier(mask, dropout_p, grad.dtype)
            task_ids = ids[3] if count == 4 else None

            def definition(weight: Tensor, bias: Tensor, *tables: Tensor) -> Tensor:
                task_table = tables[3] if count == 4 else None
                return registry.OPS["embed_layer_norm"].reference(
                    *ids[:3], *tables[:3], weight, bias, task_ids, task_table, eps, *given, dropout_p, mask
                )

            wanted = (*ctx.needs_input_grad[4:6], *ctx.needs_input_grad[7 + count :])
            grads = torch_ops.definition_gradients(definition, (weight, bias, *tables), wanted, (grad,))
            return (None, None, None, None, *grads[:2], None, *[None] * count, *grads[2:])
        grad_sum, grad_weight, grad_bias = _bwd(grad, ids, tables, weight, mean, rstd, dropout_p, seeds)
        wanted = ctx.needs_input_grad[7 + count :]
        # Rows of padding take no gradient: words and positions may have one, types and tasks have none.
        grads = [
            _table_gradient(grad_sum, index, table.shape[0], padding) if wants else None
            for index, table, padding, wants in zip(ids, tables, (*paddings, -1, -1), wanted)
        ]
        return (None, None, None, None, grad_weight, grad_bias, None, *[None] * count, *grads)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return triton_rows.why_no_row("word_embeddings", args["word_embeddings"])


def _row(index: int | None, table: Tensor) -> int:
    """A row of a table as the embedding gradient wants it: from the start, -1 for none."""
    return -1 if index is None else index % table.shape[0]


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_type_ids: Tensor | None,
    task_type_embeddings: Tensor | None,
    eps: float,
    padding_idx: int | None,
    position_padding_idx: int | None,
    dropout_p: float,
) -> Tensor:
    """See ``ctxfast.functional.embed_layer_norm``."""
    ids, tables = [input_ids, position_ids, token_type_ids], [word_embeddings, position_embeddings]
    tables.append(token_type_embeddings)
    if task_type_ids is not None:
        ids.append(task_type_ids)
        tables.append(task_type_embeddings)
    seeds = philox.draw_seeds(weight, dropout_p)
    if registry.needs_grad(tables, weight, bias):
        paddings = (_row(padding_idx, word_embeddings), _row(position_padding_idx, position_embeddings))
        return _EmbedLayerNorm.apply(eps, paddings, dropout_p, seeds, weight, bias, len(ids), *ids, *tables)
    return _fwd(ids, tables, weight, bias, eps, dropout_p, seeds, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    names = [("input_ids", "word_embeddings"), ("position_ids", "position_embeddings")]
    names += [("token_type_ids", "token_type_embeddings"), ("task_type_ids", "task_type_embeddings")]
    pairs = [(args[index], args[table]) for index, table in names if args[index] is not None]
    ids, tables = [index for index, _ in pairs], [table for _, table in pairs]
    weight, dropout_p = args["weight"], args["dropout_p"]
    seeds = philox.draw_seeds(weight, dropout_p)
    forward = (ids, tables, weight, args["bias"], args["eps"], dropout_p, seeds, True)
    out, mean, rstd = _fwd(*forward)
    return [(_fwd, forward), (_bwd, (torch.randn_like(out), ids, tables, weight, mean, rstd, dropout_p, seeds))]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: BERT-Base's row size and the largest."""
    for size in (768, 8192):
        for dropout in (True, False):
            shared = dict(N=size, DROPOUT=dropout, HAS_TASK=True)
            where = f"N={size} {'dropout' if dropout else 'plain'}"
            yield f"forward {where}", triton_kernels.forward, shared | dict(SAVE=True), triton_rows.forward_tile(size)
            yield f"backward {where}", triton_kernels.backward, shared, triton_rows.backward_tile(size)
