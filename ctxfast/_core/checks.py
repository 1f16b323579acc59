# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by every op: one place, one wording.

A message always reads ``ctxfast.<op>: <argument> has <what came>; expected <what was wanted>. <way out>``.
The checks look at shapes, dtypes and devices only. They never read a tensor's values on a GPU (that
would wait for the device); ``in_range`` reads values on the CPU and is skipped while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from . import capability, torch_ops

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32)
_LONGEST_SHOWN = 100


def shown(value: Any) -> str:
    """A value as errors show it: its ``repr``, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor, else raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"ctxfast.{op}: {name} is a {type(value).__name__}; expected a torch.Tensor.")
    return value


def shape(op: str, name: str, value: Any, expected: Sequence[int | None], legend: str) -> Tensor:
    """Return ``value`` if it is a tensor (else TypeError) of the shape ``expected`` (else ValueError; None: any size).

    ``legend`` names the sizes.
    """
    value = tensor(op, name, value)
    ok = value.dim() == len(expected)
    if ok:
        for have, want in zip(value.shape, expected):
            if want is not None and have != want:
                ok = False
    if not ok:
        sizes = ", ".join("any" if want is None else str(int(want)) for want in expected)
        comma = "," if len(expected) == 1 else ""
        raise ValueError(f"ctxfast.{op}: {name} has shape {tuple(value.shape)}; expected {legend} = ({sizes}{comma}).")
    return value


def floating(op: str, name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a float64, float32, float16 or bfloat16 tensor, else raise TypeError."""
    if tensor(op, name, value).dtype not in FLOATING:
        raise TypeError(
            f"ctxfast.{op}: {name} has dtype {value.dtype}; expected float32, float16, bfloat16 or float64. "
            f"Convert it with .float()."
        )
    return value


def integer(op: str, name: str, value: Any) -> Tensor:
    """Return ``value`` if it is an int64 or int32 tensor, else raise TypeError."""
    if tensor(op, name, value).dtype not in INTEGER:
        raise TypeError(
            f"ctxfast.{op}: {name} has dtype {value.dtype}; expected int64 or int32. Convert it with .long()."
        )
    return value


def same(
    op: str, lead: str, leader: Tensor, others: Iterable[tuple[str, Tensor | None]], *, dtype: bool = True
) -> None:
    """Raise unless every tensor lies on ``leader``'s device (ValueError) and, if asked, has its dtype (TypeError)."""
    for name, value in others:
        if value is None:
            continue
        if value.device != leader.device:
            raise ValueError(
                f"ctxfast.{op}: {name} is on {value.device}; expected {leader.device}, where {lead} is. "
                f"Move it with .to({str(leader.device)!r})."
            )
        if dtype and value.dtype != leader.dtype:
            raise TypeError(
                f"ctxfast.{op}: {name} has dtype {value.dtype}; expected {leader.dtype}, that of {lead}. "
                f"Convert one of them, or run under torch.autocast."
            )


def choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"ctxfast.{op}: {name} is {value!r}; expected one of {listed}.")


def positive(op: str, name: str, value: float | None, *, none_means: str | None = None) -> None:
    """Raise ValueError unless ``value`` is a number above zero, or None where that means something."""
    if value is None and none_means is not None:
        return
    if value is None or not value > 0:
        tail = f", or None for {none_means}" if none_means is not None else ""
        raise ValueError(f"ctxfast.{op}: {name} is {value!r}; expected a number above 0{tail}.")


def probability(op: str, name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value < 1``."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"ctxfast.{op}: {name} is {value!r}; expected a probability, 0 <= {name} < 1.")


def is_readable(value: Tensor) -> bool:
    """Whether values may be read: on the CPU, outside tracing and transforms. A GPU is never waited for."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(value)


def has_values(value: Tensor) -> bool:
    """Whether a tensor holds values of its own that can be read: see ``why_no_values``."""
    return why_no_values(value) is None


def why_no_values(value: Tensor) -> str | None:
    """None, or what a tensor is whose values nobody can read, as words after "is"."""
    if value.is_meta:
        return "on the meta device"
    inner = value
    while is_functorch_wrapped_tensor(inner):
        if is_batchedtensor(inner):
            return "batched by torch.func.vmap"
        inner = get_unwrapped(inner)
    if isinstance(value, torch._subclasses.FakeTensor) or torch_ops.is_foreign(value):
        return f"a {type(value).__name__}"
    return None


def _extremes(value: Tensor) -> tuple[int, int]:
    extension = capability.extension()
    # For some ten ids, torch takes ten times as long.
    if extension is not None and value.dtype in INTEGER and value.is_contiguous() and torch_ops.is_direct(value):
        return extension.extremes(value.data_ptr(), value.numel(), value.dtype is torch.int64)
    least, most = torch.aminmax(value)
    return int(least), int(most)


def in_range(op: str, name: str, value: Tensor, low: int, high: int, hint: str = "") -> None:
    """Raise ValueError unless every element lies in ``low..high``, where values may be read."""
    if not is_readable(value) or value.numel() == 0:
        return
    least, most = _extremes(value)
    if least < low or most > high:
        got = least if least < low else most
        tail = f" {hint}" if hint else ""
        raise ValueError(f"ctxfast.{op}: {name} holds {got}; expected values in {low}..{high}.{tail}")


def packed(op: str, rows_name: str, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise TypeError or ValueError unless these could say where sequences lie in ``rows``; see ``offsets``."""
    integer(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"ctxfast.{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (sequences + 1,).")
    same(op, rows_name, rows, [("cu_seqlens", cu_seqlens)], dtype=False)
    is_traced = torch_ops.is_jit_tracing() and isinstance(max_seqlen, Tensor)  # torch.jit.trace's form of a size
    if not isinstance(max_seqlen, (int, torch.SymInt)) and not is_traced:
        raise TypeError(f"ctxfast.{op}: max_seqlen is a {type(max_seqlen).__name__}; expected an int.")


def offsets(op: str, cu_seqlens: Tensor, max_seqlen: int, rows_name: str, rows: int) -> None:
    """Raise ValueError unless offsets, where they may be read, rise from 0 to ``rows`` in steps up to max_seqlen."""
    if not is_readable(cu_seqlens):
        return
    found = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(found, found[1:])]
    if not found or found[0] != 0 or found[-1] != rows or min(lengths, default=0) < 0:
        ends = f"runs from {found[0]} to {found[-1]}" if found else "is empty"
        raise ValueError(
            f"ctxfast.{op}: cu_seqlens {ends}; expected offsets that never fall, from 0 to the {rows} rows of "
            f"{rows_name}."
        )
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"ctxfast.{op}: max_seqlen is {max_seqlen}; expected at least {longest}, "
            f"the longest sequence in cu_seqlens."
        )
