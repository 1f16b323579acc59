# SPDX-License-Identifier: Apache-2.0
"""Stacks of attention layers in Transformers' models that ``swap_in`` does not run: each is named, with a reason.

They are known by their look, not by their names: a module of Transformers, or of code that came with weights, with a
list of layers that hold attention. So one that is new stays no more without a word than one that is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_PACKAGES = ("transformers.", "transformers_modules.")
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_RELATIVE = "its attention scores hold terms of relative positions, which ctxfast.attention does not."
_SPARSE = "its attention is over some keys only, chosen by blocks, windows or hashes."
_DECODER = "it is a decoder: its attention looks back only, or across to an encoder."
# Better reasons than the general one. Others are none the less named.
_REASONS = {
    "BigBirdEncoder": _SPARSE,
    "ConvBertEncoder": "its layers join attention with convolutions over neighbours.",
    "DebertaEncoder": _RELATIVE,
    "DebertaV2Encoder": _RELATIVE,
    "EsmEncoder": "its layers normalise before they compute, and its positions are rotary.",
    "FunnelEncoder": "its layers pool the sequence between blocks, and its scores hold terms of relative positions.",
    "IBertEncoder": "its layers compute in simulated integers.",
    "LayoutLMv2Encoder": "it adds biases by place on the page to attention scores, which ctxfast.attention does not.",
    "LayoutLMv3Encoder": "it adds biases by place on the page to attention scores, which ctxfast.attention does not.",
    "LongformerEncoder": _SPARSE,
    "ReformerEncoder": _SPARSE,
    "RoFormerEncoder": "its positions are rotary, which ctxfast.attention does not compute.",
    "T5Stack": "it adds a relative position bias to every attention score, and normalises without a mean.",
    "XLNetModel": _RELATIVE,
    "XmodEncoder": "each of its layers has an adapter by language.",
}


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a stack of attention layers: what stands in those lists of a module of Transformers that hold
    attention; none if it is no such stack."""
    if not any(kind.__module__.startswith(_PACKAGES) for kind in type(module).__mro__):
        return []
    lists = [child for child in module.children() if isinstance(child, _LISTS)]
    return [layer for each in lists if any(map(is_attention, each.modules())) for layer in each.children()]


def reason(module: nn.Module, layers: list[nn.Module]) -> str:
    """Why a stack with these layers stays as it is."""
    parts = [module, *(part for layer in layers for part in layer.modules())]
    if any(getattr(part, "is_causal", False) is True or _is_decoder(part) for part in parts):
        return _DECODER
    name = type(module).__name__
    if name in _REASONS:
        return _REASONS[name]
    kinds = ", ".join(sorted({type(layer).__name__ for layer in _flat(layers)}))
    return f"its layers, {kinds}, are none of those that ctxfast computes packed."


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one of attention, by its name."""
    return _ATTENTION.search(type(module).__name__) is not None


def _is_decoder(module: nn.Module) -> bool:
    return getattr(module, "is_decoder", False) is True


def _flat(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Layers, those in lists of lists too."""
    for layer in layers:
        if isinstance(layer, _LISTS):
            yield from _flat(list(layer.children()))
        else:
            yield layer
