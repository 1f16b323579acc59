# SPDX-License-Identifier: Apache-2.0
"""What ``swap_in`` swaps: a line for each class, with what replaces it and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import functional
from .._core import registry
from ..nn.transformer import TransformerLayer
from . import allennlp, identity, torch_encoder, transformers
from .torch_modules import LSTM, LayerNorm


@dataclass(frozen=True)
class Entry:
    """One line of the table: what a class is replaced by, and what speaks against it.

    ``replacement(kind)`` is the class; ``objection(module, impl)`` a sentence, or None; ``ops`` what the replacement
    runs. ``on_request``: swapped only where ``only`` names it. ``narrow(module, impl, weight_dtype)``: a sentence why
    it cannot compute so, or None; no such function for what has no products of that kind.
    """

    replacement: Callable[[type[nn.Module]], type[nn.Module]]
    objection: Callable[[nn.Module, str | None], str | None]
    ops: tuple[str, ...]
    on_request: bool = False
    narrow: Callable[[Any, str | None, torch.dtype], str | None] | None = None


def why_not(op: str, impl: str | None, **args: Any) -> str | None:
    """None if a compiled implementation (or the one asked for) runs such a call, else the sentence why not."""
    spec, device = registry.OPS[op], next(registry.tensors(args)).device.type
    with torch.no_grad():
        rows = functional.explain(op, **args).rows
    if any(name == impl for name, _, _ in rows):
        refusals = [reason for name, verdict, reason in rows if name == impl and verdict == "no"]
        return f"impl={impl!r} was asked for: {refusals[0]}" if refusals else None
    compiled = [row for row in rows if row[0] != "reference" and spec.impl(row[0]).device == device]
    if any(verdict != "no" for _, verdict, _ in compiled):
        return None
    reasons = "; ".join(f"{name}: {reason.rstrip('.')}" for name, _, reason in compiled)
    return f"no compiled implementation of {op} runs it ({reasons or f'there is none for {device}'})."


def _lstm_narrow(module: Any, impl: str | None, weight_dtype: torch.dtype) -> str | None:
    return _lstm_why_not(module, impl, weight_dtype=weight_dtype)


def _lstm_why_not(module: Any, impl: str | None, **options: Any) -> str | None:
    args = dict(weight_ih=module.weight_ih_l0, weight_hh=module.weight_hh_l0, **options)
    if module.proj_size:
        args["weight_proj"] = module.weight_hr_l0
    return why_not("lstm", impl, input=module.weight_ih_l0.new_zeros(1, 1, module.input_size), **args)


def _lstm_objection(module: Any, impl: str | None) -> str | None:
    reason = identity.why_not_stock(nn.LSTM, "torch")
    if reason is not None:
        return reason
    tensors = dict(module.named_parameters())
    weights = [tensor for name, tensor in tensors.items() if name.startswith("weight")]
    if any(type(tensor) is not nn.Parameter for tensor in tensors.values()) or set(tensors) != set(
        module._flat_weights_names
    ):
        return "its weights are not plain parameters (parametrised, pruned or lazy)."
    if weights[0].is_meta:
        return "its parameters are on the meta device; load them first."
    return _lstm_why_not(module, impl)


def _encoder_narrow(module: nn.Module, impl: str | None, weight_dtype: torch.dtype) -> str | None:
    if weight_dtype is not torch.int8:
        return (
            f"weight_dtype is {weight_dtype}; expected torch.int8 for an encoder. Convert the model, "
            f"model.to({weight_dtype}), and its products are computed in that."
        )
    weight = transformers.parts_of(module).qkv[0].weight
    return why_not("linear_act", impl, x=weight.new_zeros(1, weight.shape[1]), weight=weight, weight_dtype=weight_dtype)


def _encoder_objection(module: nn.Module, impl: str | None) -> str | None:
    objection = transformers.objection(module)
    if objection is not None:
        return objection
    parts = transformers.parts_of(module)
    weight = parts.project.weight
    if any(tensor.is_meta for tensor in module.parameters()):
        return "its parameters are on the meta device; load them first."
    size, kv_heads = weight.shape[1] // parts.heads, parts.kv_heads
    kv_heads = None if kv_heads == parts.heads else kv_heads
    rows = (3, parts.heads) if kv_heads is None else (parts.heads + 2 * kv_heads,)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=weight.device)
    rotary = None if parts.rotary is None else torch.zeros(1, 2, size // 2, device=weight.device)
    windows = transformers.windows_of(module)
    reason = why_not(
        "attention", impl, qkv=weight.new_zeros(1, *rows, size), cu_seqlens=offsets, max_seqlen=1,
        window=next(iter(windows), None), rotary=rotary, num_kv_heads=kv_heads,
    )  # fmt: skip
    return transformers.difference(module, impl) if reason is None else reason


def _allennlp_objection(module: nn.Module, impl: str | None) -> str | None:
    objection = allennlp.objection(module)
    return _allennlp_why_not(module, impl) if objection is None else objection


def _allennlp_narrow(module: nn.Module, impl: str | None, weight_dtype: torch.dtype) -> str | None:
    return _allennlp_why_not(module, impl, weight_dtype=weight_dtype)


def _allennlp_why_not(module: nn.Module, impl: str | None, **args: Any) -> str | None:
    if not hasattr(module, "forward_layer_0"):
        return None
    layer: Any = module.forward_layer_0
    cell = getattr(layer, "cell", layer)
    weight = cell.input_linearity.weight
    if hasattr(cell, "state_projection"):
        args["weight_proj"] = cell.state_projection.weight
    x = weight.new_zeros(1, 1, weight.shape[1])
    return why_not("lstm", impl, input=x, weight_ih=weight, weight_hh=cell.state_linearity.weight, **args)


def _encoder(name: str) -> Entry:
    ops = TransformerLayer.ops
    return Entry(lambda kind: transformers.packed_class(name), _encoder_objection, ops, narrow=_encoder_narrow)


# Full name of a class -> what becomes of its modules.
TABLE: dict[str, Entry] = {
    "torch.nn.modules.rnn.LSTM": Entry(lambda kind: LSTM, _lstm_objection, ("lstm",), narrow=_lstm_narrow),
    # By itself it gains nothing over torch's; it is there to choose an implementation of add_layer_norm.
    "torch.nn.modules.normalization.LayerNorm": Entry(
        lambda kind: LayerNorm, lambda module, impl: None, ("add_layer_norm",), on_request=True
    ),
    **{name: _encoder(name) for name in transformers.ENCODERS},
    **{
        name: Entry(
            torch_encoder.swapped_class,
            partial(torch_encoder.objection, why_not),
            TransformerLayer.ops,
            narrow=partial(torch_encoder.narrow_objection, why_not),
        )
        for name in torch_encoder.SWAPPED
    },
    # AllenNLP's by their name alone, see there.
    **{
        name: Entry(
            allennlp.swapped_class,
            _allennlp_objection,
            ("char_cnn", "linear_act", "lstm"),
            narrow=_allennlp_narrow if "Lstm" in name else None,
        )
        for name in allennlp.KINDS
    },
}
