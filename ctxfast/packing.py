# SPDX-License-Identifier: Apache-2.0
"""Tokens without padding: the real tokens of a padded batch, one after another, packed once at a model's edge.

Shape letters: B batch, L columns of the padded batch, T real tokens, "..." any trailing dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._core import checks, torch_ops, transfer

_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# ``host_lengths`` that a traced packing has, which stands for any number of tokens.
UNKNOWN = (-1,)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each real token of a padded batch stands, before and after packing.

    Make one with ``from_mask``, ``from_lengths`` or ``full``.

    Attributes:
        indices: (T,) int64, place of every packed token in the batch flattened to (B * L,).
        cu_seqlens: (B + 1,) int32, packed row where each text starts; the last entry is T.
        max_seqlen: tokens of the longest text (no padding counted); 0 without any.
        batch_size: B.
        seqlen: L.
        host_lengths: tokens of each text, on the host; None where all have ``seqlen`` (see ``lengths``).
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    seqlen: int
    host_lengths: tuple[int, ...] | None = None

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> Packing:
        """Packing of the tokens where a mask is 1; waits for a GPU once.

        Args:
            attention_mask: (B, L) bool, or integer or floating of 0 and 1. Zeros may be anywhere (left padding, holes)
                and a row may be all zeros.

        Raises:
            TypeError: not a tensor, or of a complex dtype.
            ValueError: another number of dimensions (masks per query are not supported), or other values.
        """
        if not isinstance(attention_mask, Tensor):
            raise TypeError(
                f"ctxfast.Packing: attention_mask is a {type(attention_mask).__name__}; expected a torch.Tensor."
            )
        if attention_mask.dim() != 2:
            raise ValueError(
                f"ctxfast.Packing: attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, seqlen). "
                f"Masks that differ by query (3-D or 4-D, decoder masks) are not supported: pass the padding mask."
            )
        is_bool = attention_mask.dtype == torch.bool
        if not (is_bool or attention_mask.is_floating_point() or attention_mask.dtype in _INTEGER):
            raise TypeError(
                f"ctxfast.Packing: attention_mask has dtype {attention_mask.dtype}; expected bool, or integers or "
                f"floating-point numbers that are 0 and 1."
            )
        why_no_values = None if torch.compiler.is_compiling() else checks.why_no_values(attention_mask)
        if why_no_values is not None:
            raise TypeError(
                f"ctxfast.Packing: attention_mask is {why_no_values}, where its tokens cannot be counted; expected a "
                f"plain tensor. Leave it out where no text has padding."
            )
        batch_size, seqlen = attention_mask.shape
        is_real = attention_mask if is_bool else attention_mask != 0
        # torch before 2.7 does not tell of an export: there a mask cannot be exported.
        if torch_ops.is_jit_tracing() or torch_ops.is_exporting():
            return cls._traced(is_real, batch_size, seqlen)
        packing = cls.from_tokens(is_real, None if is_bool else ~(is_real & (attention_mask != 1)).any())
        if packing is None:
            raise ValueError(
                "ctxfast.Packing: attention_mask holds other values than 0 and 1; expected 1 for a token, 0 for "
                "padding. An additive mask becomes one with: mask == 0."
            )
        return packing

    @classmethod
    def from_tokens(cls, is_real: Tensor, holds: Tensor | None = None) -> Packing | None:
        """As ``from_mask`` of a bool mask (B, L), unchecked; None where ``holds``, a bool on its device, is False.

        The verdict travels with the lengths: a GPU is waited for once, and all that follows was launched before.
        """
        batch_size, seqlen = is_real.shape
        per_row = is_real.sum(dim=1)
        is_early = is_real.is_cuda and not torch.compiler.is_compiling()
        indices = _places(is_real, batch_size * seqlen) if is_early else None
        offsets = _offsets(per_row)
        if holds is None:
            host_lengths = per_row.tolist()
        else:
            *host_lengths, is_good = torch.cat((per_row, holds[None].long())).tolist()
            if not is_good:
                return None
        total = sum(host_lengths)
        if total == batch_size * seqlen:
            return cls.full(batch_size, seqlen, is_real.device)
        indices = _places(is_real, total) if indices is None else indices[:total]
        return cls(indices, offsets, max(host_lengths), batch_size, seqlen, tuple(host_lengths))

    @classmethod
    def _traced(cls, is_real: Tensor, batch_size: int, seqlen: int) -> Packing:
        """What torch.jit.trace and torch.export record: found anew from every mask, however many tokens it has."""
        indices = torch.nonzero(is_real.flatten()).squeeze(1)
        return cls(indices, _offsets(is_real.sum(dim=1)), seqlen, batch_size, seqlen, UNKNOWN)

    @classmethod
    def from_lengths(
        cls, lengths: Tensor | Sequence[int], seqlen: int | None = None, device: torch.device | str | None = None
    ) -> Packing:
        """Packing of right-padded texts; waits for a GPU once if ``lengths`` lies there, else not at all.

        Args:
            lengths: (B,) int64 or int32, or a sequence of B integers: tokens of each text, 0..seqlen.
            seqlen: columns of the padded batch; None for the longest text.
            device: where the packing lies; None for the device of ``lengths`` (a sequence: the CPU).

        Raises:
            TypeError: lengths that are not integers.
            ValueError: lengths of another shape or outside 0..seqlen.
        """
        if isinstance(lengths, Tensor):
            if lengths.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"ctxfast.Packing: lengths has dtype {lengths.dtype}; expected int64 or int32.")
            if lengths.dim() != 1:
                raise ValueError(f"ctxfast.Packing: lengths has shape {tuple(lengths.shape)}; expected (batch,).")
            device = lengths.device if device is None else device
            lengths = lengths.tolist()
        try:
            host_lengths = tuple(map(operator.index, lengths))
        except TypeError as error:
            raise TypeError(f"ctxfast.Packing: lengths is {lengths!r:.80}; expected integers.") from error
        longest = max(host_lengths, default=0)
        seqlen = longest if seqlen is None else seqlen
        if longest > seqlen or min(host_lengths, default=0) < 0:
            wrong = longest if longest > seqlen else min(host_lengths)
            raise ValueError(f"ctxfast.Packing: lengths holds {wrong}; expected values in 0..{seqlen} (seqlen).")
        device = torch.device("cpu" if device is None else device)
        if sum(host_lengths) == len(host_lengths) * seqlen:
            return cls.full(len(host_lengths), seqlen, device)
        # By NumPy, which takes a fraction of torch's time for a few numbers.
        counts = np.array(host_lengths, dtype=np.int64)
        ends = counts.cumsum()
        # Each text moves on by the padding of all texts before it.
        shift = np.arange(len(counts)) * seqlen - (ends - counts)
        places = np.arange(int(ends[-1])) + shift.repeat(counts)
        offsets = np.concatenate(([0], ends)).astype(np.int32)
        indices, cu_seqlens = transfer.to_device(places, device), transfer.to_device(offsets, device)
        return cls(indices, cu_seqlens, longest, len(host_lengths), seqlen, host_lengths)

    @classmethod
    def full(cls, batch_size: int, seqlen: int, device: torch.device | str | None = None) -> Packing:
        """Packing of a batch without padding; reads nothing on the host, so it compiles and captures."""
        indices = torch.arange(batch_size * seqlen, device=device)
        cu_seqlens = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * seqlen
        return cls(indices, cu_seqlens, seqlen, batch_size, seqlen)

    @property
    def is_full(self) -> bool:
        """Whether there is no padding, so that packing is only a reshape."""
        return self.host_lengths is None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text, known on the host without waiting for a device."""
        if self.host_lengths is UNKNOWN:
            raise RuntimeError(
                "ctxfast.Packing: lengths was asked for under torch.jit.trace or torch.export; expected code that "
                "reads cu_seqlens, as a recorded graph stands for texts of any length."
            )
        return (self.seqlen,) * self.batch_size if self.host_lengths is None else self.host_lengths

    @property
    def has_empty(self) -> bool:
        """Whether some text has no token (with no texts at all: no)."""
        # Not `0 in lengths`: torch.compile (2.13) sets no guard for it and reuses a stale answer.
        if self.host_lengths is None:
            return self.seqlen == 0 and self.batch_size > 0
        return self.host_lengths is UNKNOWN or min(self.host_lengths) == 0

    @property
    def total(self) -> int:
        """T, the number of real tokens."""
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def columns(self) -> Tensor:
        """(T,) int64, column of every packed token in the padded batch: its position in the text."""
        return self.indices % max(self.seqlen, 1)

    @property
    def rows(self) -> Tensor:
        """(T,) int64, text that every packed token belongs to."""
        return self.indices // max(self.seqlen, 1)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...): the real tokens, row by row. Differentiable; a view where there is no padding.

        Raises:
            ValueError: x has other first two dimensions, or lies on another device.
        """
        if tuple(x.shape[:2]) != (self.batch_size, self.seqlen):
            raise ValueError(
                f"ctxfast.Packing.pack: x has shape {tuple(x.shape)}; expected (batch, seqlen, ...) = "
                f"({self.batch_size}, {self.seqlen}, ...)."
            )
        self._check_device("pack", "x", x)
        flat = x.reshape(self.batch_size * self.seqlen, *x.shape[2:])
        return flat if self.is_full else flat.index_select(0, self.indices)

    def unpack(self, x_packed: Tensor, fill: float | int | bool = 0.0) -> Tensor:
        """(T, ...) -> (B, L, ...): every token back in its place, ``fill`` at padding. Differentiable.

        Raises:
            ValueError: x_packed has another number of rows, or lies on another device.
        """
        if x_packed.dim() < 1 or x_packed.shape[0] != self.total:
            raise ValueError(
                f"ctxfast.Packing.unpack: x_packed has shape {tuple(x_packed.shape)}; expected (tokens, ...) = "
                f"({self.total}, ...)."
            )
        self._check_device("unpack", "x_packed", x_packed)
        if not self.is_full:
            flat = x_packed.new_full((self.batch_size * self.seqlen, *x_packed.shape[1:]), fill)
            x_packed = flat.index_copy_(0, self.indices, x_packed)
        return x_packed.reshape(self.batch_size, self.seqlen, *x_packed.shape[1:])

    def first(self, x_packed: Tensor) -> Tensor:
        """(T, ...) -> (B, ...): the first real token of every text, zeros for a text without any. Differentiable."""
        if self.is_full and self.seqlen > 0:
            return x_packed.reshape(self.batch_size, self.seqlen, *x_packed.shape[1:])[:, 0]
        rows = self.cu_seqlens[:-1]
        if self.has_empty:
            # One more row, of zeros, stands in for the first token that an empty text does not have.
            rows = torch.where(self.cu_seqlens[1:] == rows, self.total, rows)
            x_packed = torch.cat((x_packed, x_packed.new_zeros(1, *x_packed.shape[1:])))
        return x_packed.index_select(0, rows.long())

    def _check_device(self, method: str, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(
                f"ctxfast.Packing.{method}: {name} is on {value.device}; expected {self.device}, where the packing is."
            )


def _places(is_real: Tensor, count: int) -> Tensor:
    """(count,) places of the first real tokens, where the running count first reaches 1, 2, ...: as nonzero, but how
    many there are need not be known."""
    counts = is_real.flatten().cumsum(0)
    return torch.searchsorted(counts, torch.arange(1, count + 1, device=counts.device))


def _offsets(per_row: Tensor) -> Tensor:
    """(B,) lengths -> (B + 1,) int32 offsets."""
    offsets = torch.zeros(per_row.shape[0] + 1, dtype=torch.int32, device=per_row.device)
    torch.cumsum(per_row, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


# torch.export wants to know what an output is made of: a Packing is among a model's outputs.
pytree.register_pytree_node(
    Packing,
    lambda packing: ([getattr(packing, field.name) for field in fields(packing)], None),
    lambda values, _: Packing(*values),
    serialized_type_name="ctxfast.packing.Packing",
)
