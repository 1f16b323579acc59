# SPDX-License-Identifier: Apache-2.0
"""``ctxfast.attention`` as an attention implementation of Hugging Face's Transformers (version 5).

For models whose encoder ``swap_in`` does not know: their attention alone is computed over real tokens only, laid out
anew in every layer. ``swap_in`` packs once and is faster where it can be used.

What a model does with its mask is not known: some hand it to the attention function, some add it to scores of their
own. So masks are those of Transformers' eager attention, which are right in both, and ``attention`` reads the real
tokens back from them. What happens at padding is not known either (convolutions and heads read it), so those rows get
eager attention's values, too.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._core import torch_ops
from ..nn.all_rows import AllRows
from ..packing import Packing
from .masks import kept_keys

NAME = "ctxfast"
_WHO = "ctxfast.register_attention"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # where Transformers' models look the attention function up

# Arguments of attention functions that change what is computed, and what they ask for. Other ones are either for other
# implementations or say what the mask says.
_REFUSED = {
    "position_bias": "a position bias",
    "output_attentions": "attention weights",
    "softcap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "attention to some keys",
    "block_indices": "attention to some keys",
    "cu_seq_lens_q": "packed sequences",
    "cu_seqlens": "packed sequences",
}


class _Seen(threading.local):
    """The mask that this thread saw last and the layout made from it: every layer of a model gets the same mask."""

    mask: weakref.ref | None = None
    facts: tuple[Any, ...] = ()
    rows: AllRows | None = None
    layers: frozenset[int] = frozenset()  # whose attention has used the layout


_seen = _Seen()


def register_attention() -> str:
    """Make "ctxfast" a value of ``attn_implementation`` in Transformers.

    Afterwards ``AutoModel.from_pretrained(..., attn_implementation="ctxfast")`` and
    ``model.set_attn_implementation("ctxfast")`` work for models whose attention looks both ways over padded texts. All
    rows have the values of ``attn_implementation="eager"``, those at padding too.

    Models that never call an attention function (MPNet, DeBERTa, XLNet, ...) raise a ValueError when the name is chosen
    for them: ``get_correct_attn_implementation`` and ``set_attn_implementation`` of Transformers' ``PreTrainedModel``
    are wrapped for it. Decoders, cross attention, sliding windows, biases of the scores and masks that differ by query
    raise a ValueError when they run.

    Where a mask's values cannot be read (torch.compile, torch.export, torch.jit.trace) torch's own attention computes.

    Returns:
        The name. Calling it again changes nothing.

    Raises:
        ImportError: Transformers is not installed, or older than version 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    except ImportError as error:
        raise ImportError(f"{_WHO}: it needs Transformers 5; run: pip install -U transformers") from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    # The first chooses for a model that is made, and for those inside another; the second would only log a warning of a
    # model that it cannot set.
    for name in ("get_correct_attn_implementation", "set_attn_implementation"):
        method = getattr(PreTrainedModel, name)
        if not getattr(method, "is_ctxfast", False):
            setattr(PreTrainedModel, name, _checked(method))
    return NAME


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of models that is given a name of an attention implementation; ours is refused if it is never called."""

    @functools.wraps(method)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if (given.get("") if isinstance(given, dict) else given) == NAME:
                _check_model(type(self))
        return method(self, *args, **kwargs)

    checked.is_ctxfast = True  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def _check_model(model: type) -> None:
    """Raise for a class of Transformers' models, or of code that came with weights, that never calls the function."""
    own = {base.__module__ for base in model.__mro__ if issubclass(base, nn.Module)}
    if all(name.partition(".")[0] in ("torch", "transformers", "transformers_modules") for name in own):
        if not any(_INTERFACE in source for source in _sources(own)):
            raise ValueError(
                f"{_WHO}: {model.__name__} never calls an attention function: it computes its attention itself, or has "
                f"none; expected a model that looks the function up in {_INTERFACE}. Leave attn_implementation out."
            )


def _sources(modules: set[str]) -> Iterator[str]:
    """Sources of these modules and of those that the classes named in them come from, as far as they are models' parts.

    What cannot be read may call anything: it stands for the interface's name.
    """
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = set(modules)
    for name in modules - {"transformers.modeling_utils"}:
        for value in vars(sys.modules[name]).values() if name in sys.modules else ():
            if isinstance(value, type) and issubclass(value, _BaseAutoModelClass):
                yield _INTERFACE  # any model may be a part
            elif isinstance(value, type) and issubclass(value, nn.Module):
                found.add(value.__module__)
    for name in found:
        if name != "transformers.modeling_utils" and not name.startswith("torch."):  # the first defines the interface
            try:
                yield inspect.getsource(sys.modules[name])
            except (KeyError, OSError, TypeError):
                yield _INTERFACE


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that Transformers hands a model: eager attention's, (B, 1, Q, K), added to scores; None without padding.

    Raises:
        ValueError: a mask function that is more than looking both ways.
    """
    from transformers import masking_utils

    if mask_function is not masking_utils.bidirectional_mask_function:
        raise ValueError(
            f"{_WHO}: the model's attention follows {getattr(mask_function, '__name__', mask_function)}; expected "
            "bidirectional attention over padded texts. Use attn_implementation='sdpa' for it."
        )
    # All queries have the same mask: one row, seen Q times. A tensor of inference mode has no version by which later
    # layers could know it again.
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        mask = masking_utils.eager_mask(
            batch_size, 1, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
        return None if mask is None else mask.expand(-1, -1, q_length, -1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function over (B, H, L, D) and a padding mask.

    Masks: (B, L), 1 or True for a token; or up to (B, H, L, L), bool or added to scores, if all heads and queries of a
    text have the same.

    Where a mask's values cannot be read (torch.compile, torch.export, torch.jit.trace, meta tensors) it is torch's
    scaled_dot_product_attention with that mask, whatever it holds.

    Returns:
        (B, L, H, D), the values of eager attention in every row; and None: attention weights are never held.

    Raises:
        ValueError: causal or cross attention, another kind of mask or one whose gradient is wanted, an argument that
            asks for something else.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal:
        raise ValueError(f"{_WHO}: the attention is causal; expected a bidirectional encoder. Use 'sdpa' for it.")
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"{_WHO}: query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}; "
            "expected the same: cross and grouped attention are not supported. Use 'sdpa' for it."
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{_WHO}: {name} asks for {what}; expected None: it has none. Use 'eager' for it.")
    if attention_mask is not None and attention_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_WHO}: attention_mask requires a gradient; expected a padding mask. Use 'eager' for it.")
    batch, heads, length, _ = query.shape
    if torch_ops.is_jit_tracing() or query.is_meta or (attention_mask is not None and torch.compiler.is_compiling()):
        mask = None if attention_mask is None else _added(attention_mask, query)
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return context.transpose(1, 2), None
    rows = None if attention_mask is None else _rows(module, attention_mask, batch, heads, length)
    qkv = torch.stack([part.transpose(1, 2) for part in (query, key, value)], dim=2).flatten(0, 1)  # (B * L, 3, H, D)
    if rows is None:
        full = Packing.full(batch, length, query.device)
        context = functional.attention(qkv, full.cu_seqlens, length, softmax_scale=scaling, dropout_p=dropout)
    else:
        context = rows.attend(qkv, blank_is_zero=False, softmax_scale=scaling, dropout_p=dropout)
    return context.unflatten(0, (batch, length)), None


def _rows(module: nn.Module, mask: Tensor, batch: int, heads: int, length: int) -> AllRows | None:
    """The layout for a mask; None where it hides nothing. Made once for a mask that is seen again unchanged.

    A mask of inference mode has no version by which a change in place would be seen: there the layout is that of one
    forward pass, of layers with one config each of which comes once.
    """
    # A slice of a mask is another tensor each time; what it is a slice of stays.
    whole = mask if mask._base is None else mask._base
    version = id(getattr(module, "config", module)) if mask.is_inference() else mask._version
    where = (mask.data_ptr(), mask.storage_offset(), mask.shape, mask.stride(), mask.dtype)
    facts = (mask.is_inference(), version, *where, batch, heads, length)
    is_known = _seen.mask is not None and _seen.mask() is whole and _seen.facts == facts
    if not is_known or (mask.is_inference() and id(module) in _seen.layers):
        rows = _layout(mask, batch, heads, length)
        _seen.mask, _seen.facts, _seen.rows, _seen.layers = weakref.ref(whole), facts, rows, frozenset()
    _seen.layers |= {id(module)}
    return _seen.rows


def _layout(mask: Tensor, batch: int, heads: int, length: int) -> AllRows | None:
    packing = Packing.from_mask(_real_tokens(mask, batch, heads, length))
    return None if packing.is_full else AllRows.of(packing)


def _check_kind(mask: Tensor, batch: int, heads: int, length: int) -> None:
    """Raise for a mask of another shape or dtype than (B, L), or up to (B, H, L, L), bool or added to scores."""
    shape, wanted = tuple(mask.shape), (batch, heads, length, length)
    if shape == (batch, length):
        return
    is_known = mask.dtype == torch.bool or mask.is_floating_point()
    if not is_known or len(shape) != 4 or shape[3] != length or any(n not in (1, m) for n, m in zip(shape, wanted)):
        raise ValueError(
            f"{_WHO}: attention_mask has shape {shape} and dtype {mask.dtype}; expected the padding mask (batch, "
            f"seqlen) = {(batch, length)}, or one that broadcasts to {wanted}, bool or added to scores. Use 'sdpa' for "
            "it."
        )


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A mask that is added to scores of a query (B, H, L, D), from one of any kind."""
    _check_kind(mask, *query.shape[:3])
    lowest = torch.finfo(query.dtype).min
    if mask.dim() == 2:
        mask = mask[:, None, None].bool()
    return (
        torch.where(mask, 0.0, lowest).to(query.dtype)
        if mask.dtype == torch.bool
        else mask.clamp(lowest).to(query.dtype)
    )


def _real_tokens(mask: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """(B, L), 1 or True for a token."""
    _check_kind(mask, batch, heads, length)
    if mask.dim() == 2:
        return mask
    row, is_padding_mask = kept_keys(mask)
    if not is_padding_mask:
        raise ValueError(
            f"{_WHO}: attention_mask, of shape {tuple(mask.shape)}, differs by query or head or holds a bias; expected "
            "a padding mask: for each key 0, or the lowest number. Use 'sdpa' for it."
        )
    return row.expand(batch, length)
