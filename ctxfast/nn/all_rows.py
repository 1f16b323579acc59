# SPDX-License-Identifier: Apache-2.0
"""Attention for every row of a padded batch, padding included, by the op for packed sequences.

Where values at padding are wanted, each row's query looks at the real tokens of its text. The op attends inside
sequences whose rows are all queries and keys, so a text of n real tokens in L columns becomes ceil(L / n) sequences of
n rows: the same n keys every time, and the next n of its rows as queries, the real tokens first. The first sequence is
the one that packed attention computes, so its results are the same; all of them take about n * L products a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional
from .._core import transfer
from ..packing import Packing


@dataclass(frozen=True, eq=False)
class AllRows:
    """How the rows of a padded batch are laid out for the op. B texts, L columns, R packed rows, S sequences.

    Attributes:
        source: (R, 3) int64, the rows of the batch flattened to (B * L,) whose query, key and value a packed row takes.
        result: (B * L,) int64, the packed row that holds a row's result.
        cu_seqlens: (S + 1,) int32, where each sequence starts.
        max_seqlen: rows of the longest sequence.
        is_blank: (R,) bool, rows of texts without any token; None where every text has one.
    """

    source: Tensor
    result: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    is_blank: Tensor | None

    @classmethod
    def of(cls, packing: Packing) -> AllRows:
        """The layout for the texts of a packing; waits for no device."""
        batch, columns, device = packing.batch_size, packing.seqlen, packing.device
        # A text without any token looks at all its columns: see attend.
        host_keys = [length or columns for length in packing.lengths]
        repeats = [-(-columns // count) for count in host_keys]
        sequences = [count for count, repeat in zip(host_keys, repeats) for _ in range(repeat)]
        keys, rows = transfer.to_device(torch.tensor((host_keys, repeats), device="cpu"), device)
        rows = keys * rows
        starts = rows.cumsum(0) - rows

        texts = torch.arange(batch, device=device)
        is_padding = torch.ones(batch * columns, dtype=torch.bool, device=device).index_fill(0, packing.indices, False)
        # (B, L): a text's rows, its real tokens first.
        order = is_padding.view(batch, columns).byte().argsort(dim=1, stable=True) + columns * texts[:, None]
        text = texts.repeat_interleave(rows, output_size=sum(sequences))
        place = torch.arange(len(text), device=device) - starts[text]
        # What fills the last sequence up is its text's last row once more; nobody reads that result.
        query, key = order[text, place.clamp(max=columns - 1)], order[text, place % keys[text]]
        result = torch.empty_like(order).flatten()
        result[order.flatten()] = (starts[:, None] + torch.arange(columns, device=device)).flatten()
        lengths = transfer.to_device(torch.tensor([0, *sequences], device="cpu"), device)
        cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
        is_blank = (packing.cu_seqlens.diff() == 0)[text] if packing.has_empty else None
        source = torch.stack((query, key, key), dim=1)
        return cls(source, result, cu_seqlens, max(sequences), is_blank)

    def attend(
        self,
        qkv: Tensor,
        *,
        blank_is_zero: bool,
        softmax_scale: float | None = None,
        dropout_p: float = 0.0,
        impl: str | None = None,
    ) -> Tensor:
        """(B * L, 3, H, D) -> (B * L, H, D): each row's attention over the real tokens of its text. Differentiable.

        A text without any token: with ``blank_is_zero`` its rows are zeros, as in torch's scaled_dot_product_attention
        where every key is masked; otherwise they attend to all its columns equally, as where the dtype's lowest value
        is added to every score and drowns it (Hugging Face's eager attention).
        """
        rows, _, *heads = qkv.shape
        part = torch.arange(3, device=qkv.device)
        packed = qkv.reshape(rows * 3, *heads).index_select(0, (self.source * 3 + part).flatten()).unflatten(0, (-1, 3))
        if self.is_blank is not None and not blank_is_zero:
            is_query = (self.is_blank[:, None] & (part == 0))[..., None, None]
            packed = packed.masked_fill(is_query, 0.0)  # every score is 0
        context = functional.attention(
            packed, self.cu_seqlens, self.max_seqlen, softmax_scale=softmax_scale, dropout_p=dropout_p, impl=impl
        ).index_select(0, self.result)
        if self.is_blank is not None and blank_is_zero:
            context = context.masked_fill(self.is_blank[self.result, None, None], 0.0)
        return context
