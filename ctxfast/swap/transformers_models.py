# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers that run their layers themselves (ModernBERT and others), for ``transformers``.

Their own ``forward`` stays what embeds ids and norms what the layers give: it is run over a view of the model, whose
list of layers holds one that computes all of them, over packed tokens. So nothing of a model is written down here but
what its layers are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

# Arguments that say which tokens there are; where they stand, whether they are given or not, their positions are 0, 1,
# 2 and so on.
_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids")


@lru_cache(maxsize=64)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def given(forward: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict] | None:
    """Of a model's call: its ids (B, L) or embeddings (B, L, N), the mask and all other arguments; None for one with
    other positions than 0, 1, 2, ..., or that is none."""
    try:
        named = dict(_signature(forward).bind(model, *args, **kwargs).arguments)
    except TypeError:  # the call itself will say what is wrong
        return None
    named.pop("self", None)
    named |= named.pop("kwargs", {})
    tokens = [named[name] for name in _TOKENS[:2] if named.get(name) is not None]
    mask = named.pop("attention_mask", None)
    if len(tokens) != 1 or not isinstance(tokens[0], Tensor) or tokens[0].dim() not in (2, 3):
        return None
    if named.pop("position_ids", None) is not None or not (mask is None or getattr(mask, "ndim", 0) == 2):
        return None
    return tokens[0], mask, named


def others(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments besides those that say which tokens there are."""
    return {name: value for name, value in named.items() if name not in _TOKENS}


def is_asked(model: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Whether an output that is not always there is asked for, in a call or by the model's config."""
    return bool(kwargs.get(name, getattr(model.config, name, False)))


def rotary(model: Any, x: Tensor, types: Sequence[str]) -> dict[str, Tensor]:
    """Cosines and sines of the angles of x's positions, (L, 2, R/2) float32, by types of layers, as the model has
    them."""
    places = torch.arange(x.shape[1], device=x.device)[None]
    like = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    found = {}
    with torch.no_grad():
        for each in types:
            pair = model.rotary_emb(like, places, each) if each else model.rotary_emb(like, places)
            half = pair[0].shape[-1] // 2
            found[each] = torch.stack([part[0, :, :half] for part in pair], dim=1)
    return found


class _Loop(nn.ModuleList):
    """In a view of a model in place of its layers: the modules are those, and who runs them all runs one that computes
    them all."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self,))

    def __getitem__(self, index: Any) -> Any:
        return self

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(hidden_states)


def run(model: nn.Module, original: type, arguments: dict[str, Any], layers: Callable[[Tensor], Tensor]) -> Any:
    """``original.forward(model, **arguments)``, with ``layers`` for what its layers compute."""
    own = model.__dict__
    stack, view = own["_modules"]["layers"], original.__new__(original)
    loop = _Loop.__new__(_Loop)
    # An attribute of the first layer by which the model chooses the mask that it hands on, which is None for all.
    kind = getattr(next(iter(stack._modules.values())), "attention_type", None)
    loop.__dict__.update(stack.__dict__, run=layers, attention_type=kind)
    view.__dict__.update(own, _modules={**own["_modules"], "layers": loop})
    known = view.__dict__.keys() - {"_modules"}
    try:
        return original.forward(view, **arguments)
    finally:
        # Whatever it notes on itself with the first call: that hooks which collect outputs are there.
        own.update({name: value for name, value in view.__dict__.items() if name not in known | {"_modules"}})


def record_as(kind: type, original: type) -> None:
    """Lets Transformers collect outputs of objects of ``kind`` as it does of the original's."""
    registry = import_module("transformers.utils.output_capturing")._CAN_RECORD_REGISTRY
    dict.__setitem__(registry, str(kind), getattr(original, "_can_record_outputs", None))
