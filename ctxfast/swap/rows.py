# SPDX-License-Identifier: Apache-2.0
"""The general road of ``ctxfast.swap_in`` (``unknown="rows"``): encoders that it does not know, whose attention stays
their own, and whose other parts run over real tokens alone.

Which parts work row by row is found out, not told: a model is run once on a small ragged batch, and a part is one of
them if it holds nothing but products, norms, activations and dropouts, and gives the same for real tokens laid side by
side in one row as it gave in the batch. Such a part gets a class that packs its inputs and puts its outputs back, zeros
at padding, in calls of the encoder whose mask tells where tokens are. Then the model runs both ways: where real tokens
get other values, everything is left as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.watched import Snapshot, is_watched
from ..packing import Packing
from . import identity, padding_readers, unknown_encoders
from .transformers import is_dense, real_tokens

_MASKS = ("attention_mask", "mask")
_now = threading.local()
_STATE = "_ctxfast_layers"  # in the __dict__ of a part, and not in that of an original
# How far a part's, and a model's, results may lie apart, relative to the largest, where only the order of sums differs.
_PART = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_MODEL = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def _packing_of_call() -> Packing | None:
    return getattr(_now, "packing", None)


class _Class:
    """What made classes share. The first of their bases; the second is the original."""

    _original: Any

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Made classes have no name to be found under again: copies and pickles name the original.
        return _blank, (type(self).__mro__[1], self._original), self.__dict__


class _Inside:
    """What stood in a part when it was tried. Copies and pickles of it are empty: a copy is as it was copied."""

    def __init__(self, part: nn.Module) -> None:
        self._children, self._before = part._modules, dict(part._modules)
        self._below = Snapshot(list(part.modules())[1:])

    def is_still(self) -> bool:
        """Whether all is as it was, and nobody looks at it."""
        return self._children == self._before and self._below.is_still()

    def __reduce__(self) -> tuple:
        return _nothing, ()

    def __deepcopy__(self, memo: dict) -> None:
        return None


def _nothing() -> None:
    return None


def _is_still(part: nn.Module) -> bool:
    """Whether what stands in a part is what was tried."""
    inside = part.__dict__.get(_STATE)
    if inside is None:
        inside = part.__dict__[_STATE] = _Inside(part)
    return inside.is_still()


class RowWise(_Class):
    """A part that works row by row, of an encoder that is not known."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        packing = None if torch.compiler.is_compiling() else _packing_of_call()
        kind = type(self)
        if not issubclass(kind, RowWise):  # restored, and somebody kept this function
            return kind.forward(self, *args, **kwargs)
        if packing is None or not _are_rows((*args, *kwargs.values()), packing) or not _is_still(self):
            return kind._original.forward(self, *args, **kwargs)
        given = [_packed(value, packing) for value in args]
        named = {name: _packed(value, packing) for name, value in kwargs.items()}
        seen = getattr(_now, "seen", None)
        if seen is not None:
            seen.append(packing)
        return packing.unpack(kind._original.forward(self, *given, **named)[0])


class RowsEncoder(_Class):
    """An encoder that is not known: it tells its parts where the tokens of a call are."""

    impl: str | None = None
    padding: str = "zero"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        if not issubclass(kind, RowsEncoder):
            return kind.forward(self, *args, **kwargs)
        packing = None if torch.compiler.is_compiling() else _where(self, kind._original, args, kwargs)
        before, _now.packing = _packing_of_call(), packing
        try:
            return kind._original.forward(self, *args, **kwargs)
        finally:
            _now.packing = before


def _where(module: Any, original: type, args: tuple, kwargs: dict[str, Any]) -> Packing | None:
    """Where the tokens of a call are; None where it runs as before."""
    if not identity.is_ordinary(*args, *kwargs.values()) or torch.nn.modules.module._has_any_global_hook():
        return None
    if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        return None  # recomputed in the backward pass, parts would not know where tokens are
    try:
        given = inspect.signature(original.forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # the call itself will say what is wrong
        return None
    given = {**given, **given.get("kwargs", {})}
    lead = next((value for value in given.values() if isinstance(value, Tensor) and value.dim() >= 2), None)
    mask = next((given[name] for name in _MASKS if isinstance(given.get(name), Tensor)), None)
    if lead is None or mask is None or given.get("output_attentions"):
        return None
    found = real_tokens(mask, *lead.shape[:2])
    packing = None if found is None else Packing.from_tokens(*found)
    if packing is None or packing.is_full or is_dense(lead, packing.total):
        return None
    is_seen = bool(given.get("output_hidden_states"))
    return None if padding_readers.is_read(module.__dict__.get("padding", "zero"), is_seen) else packing


def _is_rows(value: Any, packing: Packing) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and tuple(value.shape[:2]) == (packing.batch_size, packing.seqlen)
    )


def _are_rows(values: tuple, packing: Packing) -> bool:
    """Whether all tensors among the arguments of a part hold a row for each token of the batch, and there is one."""
    found = [_is_rows(value, packing) for value in values if isinstance(value, Tensor)]
    return bool(found) and all(found)


def _packed(value: Any, packing: Packing) -> Any:
    return packing.pack(value)[None] if isinstance(value, Tensor) else value


_made: dict[tuple[type, type], type] = {}


def made_class(own: type, original: type) -> type:
    """The class that modules of a class are given."""
    values = {"__module__": __name__, "_original": original}
    return _made.setdefault((own, original), type(original.__name__, (own, original), values))


def _blank(own: type, original: type) -> nn.Module:
    made: Any = made_class(own, original)
    return made.__new__(made)


_LEAVES = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module without others in it is a product, norm, activation or dropout."""
    name = type(module).__name__
    place = type(module).__module__
    is_activation = place in ("torch.nn.modules.activation", "transformers.activations")
    is_norm = name.endswith(("LayerNorm", "RMSNorm"))
    return type(module) in _LEAVES or (is_activation and not _is_attention(module)) or is_norm or "Dropout" in name


def _is_attention(module: nn.Module) -> bool:
    return unknown_encoders.is_attention(module)


def _may_be(module: nn.Module) -> bool:
    """Whether a module may work row by row and is worth a class: there is a product in it, and no attention."""
    parts = list(module.modules())
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or any(map(_is_attention, parts)) or is_watched(module):
        return False
    leaves = [part for part in parts if not part._modules]
    if not all(map(_is_leaf, leaves)) or any(part._parameters and part._modules for part in parts):
        return False
    return any(type(part) is nn.Linear for part in parts)


def _candidates(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Modules that may work row by row; those in others that do are left out later."""
    for layer in layers:
        yield from filter(_may_be, layer.modules())


def _inputs(model: Any) -> dict[str, Tensor]:
    """A small ragged batch for a model of Transformers that takes ids."""
    weight = next(model.parameters())
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    ids = torch.randint(3, max(4, config.vocab_size), (2, 6), generator=torch.Generator().manual_seed(0), device="cpu")
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
    return {"input_ids": ids.to(weight.device), "attention_mask": mask.to(weight.device)}


def _tensors(out: Any) -> list[Tensor]:
    """The tensors that a model returns; the first is that of its hidden states."""
    values = [out] if isinstance(out, Tensor) else out.to_tuple()
    return [value for value in values if isinstance(value, Tensor)]


def _apart(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    gap = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float(gap)


def _is_same(part: Any, packing: Packing, args: tuple, kwargs: dict[str, Any], out: Any) -> bool:
    """Whether a part gives for real tokens in one row what it gave for them in a batch."""
    if not _is_rows(out, packing) or not _are_rows((*args, *kwargs.values()), packing):
        return False
    given = [_packed(value, packing) for value in args]
    found = part(*given, **{name: _packed(value, packing) for name, value in kwargs.items()})
    return _apart(found[0], packing.pack(out)) <= _PART.get(out.dtype, 0.0)


@contextlib.contextmanager
def _changed(stack: nn.Module, parts: list[nn.Module]) -> Iterator[list[Packing]]:
    """Within, an encoder and its parts have their classes; gives the packings of the calls that were packed."""
    before, padding = [type(module) for module in (stack, *parts)], stack.__dict__.get("padding")
    _now.seen = seen = []
    for module, own in ((stack, RowsEncoder), *((part, RowWise) for part in parts)):
        module.__class__ = made_class(own, type(module))
    try:
        yield seen
    finally:
        _now.seen = None
        for module, kind in zip((stack, *parts), before):
            module.__class__ = kind
        assert padding == stack.__dict__.get("padding")


def model_of(stack: nn.Module, above: Sequence[nn.Module]) -> Any | None:
    """A model of Transformers that takes ids and holds an encoder, or is it: the outermost without a head and without
    a decoder, else the innermost."""
    kinds = import_module("transformers").PreTrainedModel
    inside = [stack, *sorted(above, key=lambda module: sum(1 for _ in module.modules()))]
    found: list[Any] = [each for each in inside if isinstance(each, kinds) and each.main_input_name == "input_ids"]
    bare = [each for each in found if type(each).__name__.endswith("Model") and not each.config.is_encoder_decoder]
    return next(iter([*reversed(bare), *found]), None)


def parts_of(stack: nn.Module, layers: list[nn.Module], above: Sequence[nn.Module]) -> list[nn.Module] | str:
    """The parts of an encoder that work row by row, or a sentence where it cannot be run so.

    Args:
        stack, layers: the encoder and its layers.
        above: the modules that it stands in.
    """
    model = model_of(stack, above)
    if model is None:
        return "no model of Transformers around it takes ids, by which it could be tried."
    if any(map(is_watched, model.modules())) or torch.nn.modules.module._has_any_global_hook():
        return "it has hooks, which would see a trial run."
    try:
        return _tried(model, stack, layers)
    except Exception as error:  # whatever somebody's forward raises
        return f"a trial run raised {type(error).__name__}: {str(error):.200}"


def _tried(model: Any, stack: nn.Module, layers: list[nn.Module]) -> list[nn.Module] | str:
    inputs = _inputs(model)
    real = inputs["attention_mask"].bool()
    packing = Packing.from_mask(real)
    calls: dict[nn.Module, list[tuple[tuple, dict[str, Any], Any]]] = {}

    def seen(part: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        calls.setdefault(part, []).append((args, kwargs, out))

    with identity.undisturbed(model):
        hooks = [part.register_forward_hook(seen, with_kwargs=True) for part in dict.fromkeys(_candidates(layers))]
        try:
            expected = _tensors(model(**inputs))
        finally:
            for hook in hooks:
                hook.remove()
        parts = [part for part, given in calls.items() if all(_is_same(part, packing, *call) for call in given)]
        within = {inner for part in parts for inner in part.modules() if inner is not part}
        parts = [part for part in parts if part not in within]
        if not parts:
            return "no part of its layers works row by row on hidden states of shape (batch, tokens, size)."
        with _changed(stack, parts) as packed:
            found = _tensors(model(**inputs))
    if not packed:
        return "no mask among its arguments tells where tokens are."
    if len(found) != len(expected):
        return "with its parts on real tokens alone it returns something else."
    pairs = [[each[real] if each.shape[:2] == real.shape else each for each in pair] for pair in zip(found, expected)]
    apart = max(_apart(*pair) for pair in pairs)
    if apart <= _MODEL.get(found[0].dtype, 0.0):
        for part in parts:
            part.__dict__[_STATE] = _Inside(part)
        return parts
    return f"with its parts on real tokens alone a small batch's results are {apart:.2g} of the largest value apart."
