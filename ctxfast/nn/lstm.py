# SPDX-License-Identifier: Apache-2.0
"""LSTM under torch's name: several layers, one or two directions, padded or packed, run by ``ctxfast.lstm``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from .._core import torch_ops
from . import tools

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Positions of the rows of a PackedSequence in its padded, batch-first form."""

    places: Tensor  # (rows,) int64, place of every packed row in the batch flattened to (B * T,)
    lengths: Tensor  # (B,) int64
    batch: int
    steps: int

    @classmethod
    def of(cls, batch_sizes: Tensor, rows: int, device: torch.device) -> _Rows:
        """From the batch sizes of a PackedSequence, which lie on the host; waits for no device."""
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
        sizes = batch_sizes.to(device, non_blocking=True)
        step = torch.arange(steps, device=device).repeat_interleave(sizes, output_size=rows)
        first = sizes.cumsum(0) - sizes
        row = torch.arange(rows, device=device) - first.index_select(0, step)
        lengths = (sizes > torch.arange(batch, device=device)[:, None]).sum(1)
        return cls(row * steps + step, lengths, batch, steps)

    def pad(self, data: Tensor) -> Tensor:
        """(rows, N) -> (B, T, N), zeros at padding."""
        flat = data.new_zeros(self.batch * self.steps, data.shape[1]).index_copy(0, self.places, data)
        return flat.view(self.batch, self.steps, data.shape[1])

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, N) -> (rows, N)."""
        return padded.flatten(0, 1).index_select(0, self.places)


class LSTM(nn.RNNBase):
    """A drop-in ``torch.nn.LSTM`` with the same constructor, parameters, initialization, state_dict and forms of input,
    both directions run at once by ``ctxfast.lstm``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            ``torch.nn.LSTM``.
        cell_clip: bound on ``|c|``; None for none.
        proj_clip: bound on ``|h|``, after the projection; None for none.
        weight_dtype: see ``ctxfast.lstm``.
        impl: implementation of ``lstm``; None chooses.

    Called with (T, B, I), (B, T, I) with ``batch_first``, (T, I), or a PackedSequence, and optionally ``(h_0, c_0)``;
    returns what torch's module returns. Packed rows are computed without padding, whatever their order.

    On a CPU, dropout between layers draws the same mask as torch's module. It is not a subclass of ``torch.nn.LSTM``,
    which torch.compile refuses to trace.

    TorchScript gets torch's operators: torch.jit.trace records ``torch.nn.LSTM`` (or, with clips or a ``weight_dtype``,
    a loop over the steps), and torch.jit.script compiles a ``torch.nn.LSTM`` with the same parameters and leaves it in
    the model, with a warning. torch.export records ``torch.nn.LSTM`` when gradients are enabled, with a warning, and
    ctxfast's kernel under torch.no_grad(). torch.fx.symbolic_trace records one call. torch.ao.quantization leaves the
    module as it is, with a warning.

    Reference: Hochreiter & Schmidhuber 1997; torch.nn.LSTM.
    """

    # On the class, for a torch.nn.LSTM whose class was changed.
    cell_clip: float | None = None
    proj_clip: float | None = None
    weight_dtype: torch.dtype | None = None
    impl: str | None = None

    # Any: torch annotates them for one tensor in RNNBase and for a pair in LSTM.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device=device, dtype=dtype,
        )  # fmt: skip
        for name, clip in (("cell_clip", cell_clip), ("proj_clip", proj_clip)):
            if clip is not None and not clip > 0:
                raise ValueError(
                    f"ctxfast.nn.LSTM: {name} is {clip!r}; expected a number above 0, or None for no clipping."
                )
        if weight_dtype not in (None, torch.bfloat16, torch.int8):
            raise ValueError(
                f"ctxfast.nn.LSTM: weight_dtype is {weight_dtype!r}; expected None, torch.bfloat16 or torch.int8."
            )
        self.cell_clip, self.proj_clip = cell_clip, proj_clip
        self.weight_dtype, self.impl = weight_dtype, impl

    def flatten_parameters(self) -> None:
        """Does nothing: the weights need not be contiguous in memory."""

    def _as_torch(self) -> nn.LSTM:
        """A ``torch.nn.LSTM`` that shares these parameters."""
        twin = nn.LSTM.__new__(nn.LSTM)
        own = ("cell_clip", "proj_clip", "weight_dtype", "impl", "_ctxfast_original")
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        twin.__dict__["_flat_weights"] = [getattr(self, name) for name in self._flat_weights_names]
        return twin

    def _is_torchs(self) -> bool:
        return self.cell_clip is None and self.proj_clip is None and self.weight_dtype is None

    def __prepare_scriptable__(self) -> nn.LSTM:
        """What torch.jit.script compiles, and also leaves in the model."""
        for name in ("cell_clip", "proj_clip", "weight_dtype"):
            if getattr(self, name) is not None:
                raise RuntimeError(
                    f"ctxfast.nn.LSTM: {name} is {getattr(self, name)} where torch.jit.script compiles it; expected "
                    f"None, as torch.nn.LSTM has none. torch.jit.trace records it."
                )
        if not all(name in self._parameters for name in self._flat_weights_names):
            raise RuntimeError(
                "ctxfast.nn.LSTM: weights are computed at every call (parametrised or pruned) where torch.jit.script "
                "compiles it; expected parameters. Make them permanent first: torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
        warnings.warn(
            "ctxfast.nn.LSTM: TorchScript cannot call ctxfast. torch.jit.script compiles a torch.nn.LSTM of the same "
            "parameters and leaves it in the model that is scripted, too; script copy.deepcopy(model) to keep that.",
            stacklevel=2,
        )
        return self._as_torch()

    # torch.ao.quantization looks modules up by type, and notes on each what it found: nothing here.
    @property
    def qconfig(self) -> Any:
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value
        warnings.warn(
            "ctxfast.nn.LSTM: torch.ao.quantization converts modules by type, torch.nn.LSTM among them, and leaves "
            "this one as it is. Call ctxfast.restore(model) first; or set module.weight_dtype = torch.int8, by which "
            "ctxfast multiplies in 8 bits.",
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]

    @tools.fx_leaf
    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """As ``torch.nn.LSTM``: output and ``(h_n, c_n)``, in the forms that the input came in."""
        if self._is_torchs():
            is_exported = torch_ops.exports_gradient(self.parameters()) and torch_ops.warn_of_export()
            if is_exported or torch_ops.is_traced():
                return self._as_torch().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            if not all(state.dim() == input.dim() for state in hx):
                kind, wanted = ("batched", 3) if is_batched else ("unbatched", 2)
                raise RuntimeError(
                    f"For {kind} {wanted}-D input, hx and cx should also be {wanted}-D but got "
                    f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = hx if is_batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        x = input if is_batched else input.unsqueeze(batch_dim)
        if hx is None:
            self.check_input(x, None)
        else:
            self.check_forward_args(x, hx, None)
        x = x if self.batch_first else x.transpose(0, 1)
        if x.shape[1] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, state = self._layers(x, None, hx)
        output = output if self.batch_first else output.transpose(0, 1)
        if not is_batched:
            return output.squeeze(batch_dim), (state[0].squeeze(1), state[1].squeeze(1))
        return output, state

    def _forward_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(data, batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        rows = _Rows.of(batch_sizes, data.shape[0], data.device)
        output, state = self._layers(rows.pad(data), rows, hx)
        packed = PackedSequence(rows.pack(output), batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(state, unsorted_indices)

    def _layers(self, x: Tensor, rows: _Rows | None, hx: State | None) -> tuple[Tensor, State]:
        """(B, T, I) and states of all layers -> (B, T, R * P) of the last and states of all."""
        directions = 2 if self.bidirectional else 1
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = self._drop(x, rows)
            before = None
            if hx is not None:
                own = slice(layer * directions, (layer + 1) * directions)
                before = (hx[0][own], hx[1][own])
            x, (h, c) = functional.lstm(
                x,
                *self._weights(layer),
                None if rows is None else rows.lengths,
                before,
                cell_clip=self.cell_clip,
                proj_clip=self.proj_clip,
                weight_dtype=self.weight_dtype,
                impl=self.impl,
            )
            h_n.append(h)
            c_n.append(c)
        return x, (torch.cat(h_n), torch.cat(c_n))

    def _weights(self, layer: int) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor] | None]:
        """weight_ih, weight_hh, bias and weight_proj of a layer, a list of one per direction or None each."""
        names = [f"l{layer}{side}" for side in ("", "_reverse")[: 2 if self.bidirectional else 1]]

        def gather(kind: str) -> list[Tensor]:
            return [getattr(self, f"{kind}_{name}") for name in names]

        bias = [one + two for one, two in zip(gather("bias_ih"), gather("bias_hh"))] if self.bias else None
        return gather("weight_ih"), gather("weight_hh"), bias, gather("weight_hr") if self.proj_size else None

    def _drop(self, x: Tensor, rows: _Rows | None) -> Tensor:
        """Dropout of (B, T, N), drawn in the order of torch's module: by step, then by row."""
        if rows is not None:
            return rows.pad(F.dropout(rows.pack(x), self.dropout))
        return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1).contiguous()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("cell_clip", "proj_clip", "weight_dtype"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, impl={self.impl or 'auto'}"
