# SPDX-License-Identifier: Apache-2.0
"""torch's own modules made faster in place, for ``ctxfast.swap_in``: LSTM and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import nn as ctxfast_nn
from .._core import torch_ops
from ..nn import tools
from ..nn.lstm import State
from . import identity

_FORWARD = nn.LSTM.forward


class LSTM(ctxfast_nn.LSTM, nn.LSTM):
    """A swapped ``torch.nn.LSTM``: ``ctxfast.nn.LSTM`` that is still one, as code that asks by ``isinstance`` expects.

    So torch.compile leaves it out of its graphs, like every ``torch.nn.LSTM``, unless
    ``torch._dynamo.config.allow_rnn`` is set. torch.export gets torch's own operations.
    """

    @tools.fx_leaf
    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """As ``torch.nn.LSTM``."""
        kind = type(self)
        if not issubclass(kind, LSTM):  # restored, and somebody kept this function
            return kind.forward(self, input, hx)
        if torch.compiler.is_compiling():
            return self._as_torch().forward(input, hx) if torch_ops.is_exporting() else super().forward(input, hx)
        # Somebody replaced the forward of all torch.nn.LSTM, or sees torch's functions as they are called.
        if nn.LSTM.forward is not _FORWARD or identity.is_overridden():
            return self._as_torch().forward(input, hx)
        # One of the same parts, whose class no other thread restores meanwhile.
        one = kind.__new__(kind)
        object.__setattr__(one, "__dict__", self.__dict__)
        return ctxfast_nn.LSTM.forward(one, input, hx)


class LayerNorm(ctxfast_nn.LayerNorm):
    """A swapped ``torch.nn.LayerNorm``."""

    @tools.fx_leaf
    def forward(self, input: Tensor) -> Tensor:
        """As ``torch.nn.LayerNorm``."""
        return super().forward(input) if isinstance(self, LayerNorm) else type(self).forward(self, input)
