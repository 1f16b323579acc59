# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm`` on the CPU: gather, sum and LayerNorm in one compiled pass; torch's own with a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import layer_norm_cpu


def _output(ids: list[Tensor], weight: Tensor) -> Tensor:
    return torch_ops.allocate((ids[0].shape[0], weight.shape[0]), weight)


def _forward(ids: list[Tensor], tables: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """ids (T,) and tables (V, N) of words, types, positions and, if there are any, tasks."""
    out = _output(ids, weight)
    ids = [each.contiguous() for each in ids]
    tables = [table if table.stride(1) == 1 else table.contiguous() for table in tables]
    sources = [
        (table.data_ptr(), table.stride(0), index.data_ptr(), table.shape[0], index.dtype is torch.int64)
        for index, table in zip(ids, tables)
    ]
    return layer_norm_cpu.layer_norm(out.shape[0], sources, None, weight, bias, eps, out)


_fwd = torch_ops.define("embed_layer_norm_cpu_fwd", _forward, _output, "CPU")


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled kernel cannot run this call."""
    return layer_norm_cpu.why_not("word_embeddings", args["word_embeddings"], args["dropout_p"])


def _operands(args: Mapping[str, Any]) -> tuple[Any, ...]:
    kinds = (("input_ids", "word"), ("token_type_ids", "token_type"), ("position_ids", "position"))
    ids, tables = [args[name] for name, _ in kinds], [args[f"{kind}_embeddings"] for _, kind in kinds]
    if args["task_type_ids"] is not None:
        ids.append(args["task_type_ids"])
        tables.append(args["task_type_embeddings"])
    return ids, tables, args["weight"], args["bias"], args["eps"]


def embed_layer_norm(**args: Any) -> Tensor:
    """See ``ctxfast.functional.embed_layer_norm``."""
    ids, tables, weight, bias, eps = _operands(args)
    if registry.needs_grad(*args.values()):
        paddings = (args["padding_idx"], None, args["position_padding_idx"], None)
        x = sum(F.embedding(*each) for each in zip(ids, tables, paddings))
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    forward = _forward if torch_ops.is_direct(*ids, *tables, weight, bias) else _fwd
    return forward(ids, tables, weight, bias, eps)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return [(_fwd, _operands(args))]
