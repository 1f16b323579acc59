# SPDX-License-Identifier: Apache-2.0
"""``ctxfast.attention`` as an attention implementation of Hugging Face's Transformers (version 5).

For models whose encoder ``swap_in`` does not know: their attention alone runs without padding, packed and unpacked in
every layer. ``swap_in`` packs once and is faster where it can be used.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..packing import Packing

NAME = "ctxfast"
_WHO = "ctxfast.register_attention"
# The packing of the mask seen last: every layer of a model gets the same one.
_last: tuple[weakref.ref, int, Packing] | None = None


def register_attention() -> str:
    """Make "ctxfast" a value of ``attn_implementation`` in Transformers.

    Afterwards ``AutoModel.from_pretrained(..., attn_implementation="ctxfast")`` and
    ``model.set_attn_implementation("ctxfast")`` work for models whose attention looks both ways over padded texts.
    Decoders, cross attention and masks that differ by query raise a ValueError when they run.

    Returns:
        The name. Calling it again changes nothing.

    Raises:
        ImportError: Transformers is not installed, or older than version 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"{_WHO}: it needs Transformers 5; run: pip install -U transformers") from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    return NAME


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
    """What Transformers hands the layers as their mask: the (B, L) padding mask as it is.

    Raises:
        ValueError: a mask function that is more than looking both ways.
    """
    name = getattr(mask_function, "__name__", "bidirectional_mask_function")
    if name != "bidirectional_mask_function":
        raise ValueError(
            f"{_WHO}: the model's attention follows {name}; expected bidirectional attention over padded texts. Use "
            "attn_implementation='sdpa' for it."
        )
    return attention_mask


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
    """Transformers' attention function over (B, H, L, D) and a (B, L) padding mask.

    Returns:
        (B, L, H, D), zeros at padding, and None: attention weights are never held.

    Raises:
        ValueError: causal or cross attention, another kind of mask.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal:
        raise ValueError(f"{_WHO}: the attention is causal; expected a bidirectional encoder. Use 'sdpa' for it.")
    if key.shape != query.shape:
        raise ValueError(
            f"{_WHO}: query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected the same: cross and "
            "grouped attention are not supported. Use 'sdpa' for it."
        )
    if kwargs.get("position_bias") is not None or kwargs.get("output_attentions"):
        what = "a position bias" if kwargs.get("position_bias") is not None else "attention weights"
        raise ValueError(f"{_WHO}: {what} is asked for, which packed attention does not have. Use 'eager' for it.")
    batch, _, length, _ = query.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{_WHO}: attention_mask has shape {tuple(attention_mask.shape)}; expected the padding mask (batch, "
            "seqlen). Masks that differ by query are not supported. Use 'sdpa' for it."
        )
    packing = Packing.full(batch, length, query.device) if attention_mask is None else _packing(attention_mask)
    qkv = torch.stack([part.transpose(1, 2) for part in (query, key, value)], dim=2)  # (B, L, 3, H, D)
    context = functional.attention(
        packing.pack(qkv), packing.cu_seqlens, packing.max_seqlen, softmax_scale=scaling, dropout_p=dropout
    )
    return packing.unpack(context), None


def _packing(mask: Tensor) -> Packing:
    global _last
    if mask.is_inference():  # it has no version to compare
        return Packing.from_mask(mask)
    last = _last
    if last is not None and last[0]() is mask and last[1] == mask._version:
        return last[2]
    packing = Packing.from_mask(mask)
    _last = (weakref.ref(mask), mask._version, packing)
    return packing
