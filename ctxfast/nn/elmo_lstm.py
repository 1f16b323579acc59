# SPDX-License-Identifier: Apache-2.0
"""ELMo's stacked LSTM, whose two directions never see each other, under the names of AllenNLP's ElmoLstm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from . import tools

State = tuple[Tensor, Tensor]
Sides = tuple[Tensor, Tensor]  # what each direction reads
# (sides, lengths, initial state) -> (B, T, 2P) and the final state
Layer = Callable[[Sides, "Tensor | None", "State | None"], tuple[Tensor, State]]


class Cell(Protocol):
    """One direction of one layer, under AllenNLP's names."""

    input_linearity: nn.Linear
    state_linearity: nn.Linear
    state_projection: Any  # a linear layer, None, or not there


def run_layer(
    cells: tuple[Cell, Cell],
    inputs: Tensor | Sides,
    lengths: Tensor | None,
    state: State | None,
    **options: Any,
) -> tuple[Tensor, State]:
    """``functional.lstm`` of the two cells of a layer, under AllenNLP's names: ``input_linearity``, ``state_linearity``
    and, where they have one, ``state_projection``."""
    is_projected = getattr(cells[0], "state_projection", None) is not None
    return functional.lstm(
        inputs,
        [cell.input_linearity.weight for cell in cells],
        [cell.state_linearity.weight for cell in cells],
        [_bias(cell) for cell in cells],
        [cell.state_projection.weight for cell in cells] if is_projected else None,
        lengths,
        state,
        **options,
    )


def _bias(cell: Cell) -> Tensor:
    own, other = cell.state_linearity.bias, cell.input_linearity.bias
    return own if other is None else own + other


def run_layers(
    layers: Iterable[Layer],
    inputs: Tensor | Sides,
    lengths: Tensor | None,
    initial_state: State | None,
    *,
    use_skip_connections: bool = True,
    input_dropout: float = 0.0,
) -> tuple[list[Tensor], State]:
    """Run a stack of bidirectional layers, each direction reading its own output of the layer below.

    Args:
        layers: see ``Layer``.
        inputs, lengths, initial_state: as for ``ElmoLstm.forward``; a pair of inputs gives each direction its own.
        use_skip_connections: add a layer's input to its output, from the second layer on.
        input_dropout: probability of dropping an element of a layer's input, both into the layer and along its skip
            connection (as in bilm-tf).

    Returns:
        L tensors (B, T, 2P), and the state as ``ElmoLstm.forward`` gives it.
    """
    sides: Sides = inputs if isinstance(inputs, tuple) else (inputs, inputs)
    outputs: list[Tensor] = []
    h_n, c_n = [], []
    for k, layer in enumerate(layers):
        below = outputs[-1] if outputs else None
        if input_dropout > 0:
            sides = (F.dropout(sides[0], input_dropout), F.dropout(sides[1], input_dropout))
            below = None if below is None else torch.cat(sides, dim=2)
        before = None if initial_state is None else (initial_state[0][k], initial_state[1][k])
        output, (h, c) = layer(sides, lengths, before)
        if below is not None and use_skip_connections:
            output = output + below
        outputs.append(output)
        h_n.append(h)
        c_n.append(c)
        # One matrix product over all rows needs them contiguous; a strided view takes one product per text.
        forward, backward = output.chunk(2, dim=2)
        sides = (forward.contiguous(), backward.contiguous())
    return outputs, (torch.stack(h_n), torch.stack(c_n))


class _Cell(nn.Module):
    """Parameters of one direction of one layer, under the names of AllenNLP's LstmCellWithProjection."""

    def __init__(self, input_size: int, hidden_size: int, cell_size: int, has_projection: bool, place: dict) -> None:
        super().__init__()
        self.input_linearity = nn.Linear(input_size, 4 * cell_size, bias=False, **place)
        self.state_linearity = nn.Linear(hidden_size, 4 * cell_size, bias=True, **place)
        self.state_projection = nn.Linear(cell_size, hidden_size, bias=False, **place) if has_projection else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.input_linearity, self.state_linearity):
            for gate in linear.weight.chunk(4):
                if not gate.is_meta:
                    nn.init.orthogonal_(gate)
        self.state_linearity.bias.zero_()
        cells = self.state_linearity.bias.shape[0] // 4
        self.state_linearity.bias[cells : 2 * cells].fill_(1)


class ElmoLstm(tools.NotScriptable):
    """A stacked bidirectional LSTM in which a direction reads only its own output of the layer below.

    From the second layer on a layer's input is added to its output (skip connection), but not to its recurrent state.

    Args:
        input_size: size of the input.
        hidden_size: P, size of a direction's output.
        cell_size: H, cells of a direction.
        num_layers: L.
        requires_grad: whether the parameters are trained.
        recurrent_dropout_probability: in training, probability of dropping an element of h before it is output and
            passed to the next step; one mask per text, direction and layer, shared by all steps. With it the layer
            runs step by step in plain PyTorch, without a kernel.
        state_projection_clip_value: bound on ``|h|`` after the projection; None or 0 for none. Without a projection
            there is nothing to clip, as in TensorFlow's cell.
        memory_cell_clip_value: bound on ``|c|``; None or 0 for none.
        use_skip_connections: whether inputs are added to outputs.
        has_projection: whether cells are projected; if not, ``hidden_size`` must equal ``cell_size``.
        weight_dtype: see ``ctxfast.lstm``.
        impl: implementation of ``lstm``; None chooses.

    Parameters: ``{forward,backward}_layer_l.{input_linearity.weight (4H, I), state_linearity.weight (4H, P),
    state_linearity.bias (4H,), state_projection.weight (P, H)}``, gates in the order i, f, g, o.

    The module keeps no state: it is passed in and returned.

    Reference: Peters et al. 2018; AllenNLP's ElmoLstm, which keeps its state.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_size: int,
        num_layers: int,
        requires_grad: bool = False,
        recurrent_dropout_probability: float = 0.0,
        state_projection_clip_value: float | None = None,
        memory_cell_clip_value: float | None = None,
        *,
        use_skip_connections: bool = True,
        has_projection: bool = True,
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not has_projection and hidden_size != cell_size:
            raise ValueError(
                f"ctxfast.ElmoLstm: hidden_size is {hidden_size}; expected cell_size {cell_size} without a projection."
            )
        if not 0.0 <= recurrent_dropout_probability < 1.0:
            raise ValueError(
                f"ctxfast.ElmoLstm: recurrent_dropout_probability is {recurrent_dropout_probability!r}; expected a "
                f"probability, 0 <= p < 1."
            )
        self.input_size, self.hidden_size, self.cell_size = input_size, hidden_size, cell_size
        self.num_layers, self.use_skip_connections = num_layers, use_skip_connections
        self.recurrent_dropout_probability = recurrent_dropout_probability
        self.cell_clip = memory_cell_clip_value or None
        self.proj_clip = (state_projection_clip_value or None) if has_projection else None
        self.has_projection, self.weight_dtype, self.impl = has_projection, weight_dtype, impl
        place = {"device": device, "dtype": dtype}
        for layer in range(num_layers):
            size = input_size if layer == 0 else hidden_size
            for side in ("forward", "backward"):
                cell = _Cell(size, hidden_size, cell_size, has_projection, place)
                self.add_module(f"{side}_layer_{layer}", cell)
        self.requires_grad_(requires_grad)

    def _cells(self, layer: int) -> tuple[_Cell, _Cell]:
        return getattr(self, f"forward_layer_{layer}"), getattr(self, f"backward_layer_{layer}")

    @tools.fx_leaf
    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, initial_state: State | None = None
    ) -> tuple[Tensor, State]:
        """Run all layers.

        Args:
            inputs: (B, T, input_size), read by both directions.
            lengths: (B,) int64, steps of each row; None: all have T. The backward direction starts at each row's end.
            initial_state: (h (L, 2, B, P), c (L, 2, B, H)); None for zeros.

        Returns:
            (L, B, T, 2P), every layer's [forward | backward], zeros past a row's length; and the state at each row's
            own end, shaped as ``initial_state``.
        """
        outputs, state = self.layers(inputs, lengths, initial_state)
        return torch.stack(outputs), state

    def layers(
        self,
        inputs: Tensor | Sides,
        lengths: Tensor | None = None,
        initial_state: State | None = None,
        *,
        input_dropout: float = 0.0,
    ) -> tuple[list[Tensor], State]:
        """Like ``forward``, but returns the layers as a list of L tensors (B, T, 2P).

        Args:
            inputs, lengths, initial_state: as for ``forward``; a pair of inputs gives each direction its own.
            input_dropout: in training, probability of dropping an element of a layer's input, both into the layer and
                along its skip connection (as in bilm-tf).
        """
        sides = inputs if isinstance(inputs, tuple) else (inputs, inputs)
        self.check_cells()
        self._check_state(sides[0], initial_state)
        layers = [partial(self._layer, self._cells(layer)) for layer in range(self.num_layers)]
        return run_layers(
            layers, sides, lengths, initial_state, use_skip_connections=self.use_skip_connections,
            input_dropout=input_dropout if self.training else 0.0,
        )  # fmt: skip

    def _check_state(self, inputs: Tensor, state: State | None) -> None:
        if state is None:
            return
        for name, value, size in zip("hc", state, (self.hidden_size, self.cell_size)):
            expected = (self.num_layers, 2, inputs.shape[0], size)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"ctxfast.ElmoLstm: initial_state {name} has shape {tuple(value.shape)}; expected (layers, 2, "
                    f"batch, size) = {expected}."
                )

    def check_cells(self) -> None:
        """Raise RuntimeError if a linear layer of a cell has been replaced, for example by a quantised one."""
        way = " For 8-bit products set weight_dtype=torch.int8 instead of quantising the module."
        cells: dict[str, Any] = self._modules
        for path, cell in cells.items():
            for name, linear in cell._modules.items():
                if linear is not None:
                    tools.readable(self, f"{path}.{name}", linear, nn.Linear, way)

    def _layer(
        self, cells: tuple[_Cell, _Cell], sides: Sides, lengths: Tensor | None, initial_state: State | None
    ) -> tuple[Tensor, State]:
        if self.training and self.recurrent_dropout_probability > 0:
            return self._layer_with_dropout(cells, sides, lengths, initial_state)
        return run_layer(
            cells, sides, lengths, initial_state, cell_clip=self.cell_clip, proj_clip=self.proj_clip,
            weight_dtype=self.weight_dtype, impl=self.impl,
        )  # fmt: skip

    def _layer_with_dropout(
        self, cells: tuple[_Cell, _Cell], sides: Sides, lengths: Tensor | None, initial_state: State | None
    ) -> tuple[Tensor, State]:
        if self.weight_dtype is not None:
            raise ValueError(
                "ctxfast.ElmoLstm: weight_dtype is set; expected None while recurrent dropout is on, which runs the "
                "plain definition. Call .eval(), or leave one of them out."
            )
        outputs, h_n, c_n = [], [], []
        for direction, (cell, x) in enumerate(zip(cells, sides)):
            before = None
            if initial_state is not None:
                before = (initial_state[0][direction], initial_state[1][direction])
            output, h, c = self._direction_with_dropout(cell, x, lengths, before, direction == 1)
            outputs.append(output)
            h_n.append(h)
            c_n.append(c)
        return torch.cat(outputs, dim=2), (torch.stack(h_n), torch.stack(c_n))

    def _direction_with_dropout(
        self, cell: _Cell, x: Tensor, lengths: Tensor | None, state: State | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One direction step by step: the definition of ``ctxfast.lstm`` with a mask on h, (B, T, I) -> (B, T, P)."""
        batch, steps, _ = x.shape
        gates_in = cell.input_linearity(x)
        h = gates_in.new_zeros(batch, self.hidden_size) if state is None else state[0]
        c = gates_in.new_zeros(batch, self.cell_size) if state is None else state[1]
        keep = F.dropout(torch.ones_like(h), self.recurrent_dropout_probability, training=True)
        if lengths is None:
            lengths = torch.full((batch,), steps, device=x.device)
        outputs: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            i, f, g, o = (gates_in[:, t] + cell.state_linearity(h)).chunk(4, dim=1)
            c_new = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c
            if self.cell_clip is not None:
                c_new = c_new.clamp(-self.cell_clip, self.cell_clip)
            h_new = torch.sigmoid(o) * torch.tanh(c_new)
            if cell.state_projection is not None:
                h_new = cell.state_projection(h_new)
            if self.proj_clip is not None:
                h_new = h_new.clamp(-self.proj_clip, self.proj_clip)
            h_new = h_new * keep
            active = (t < lengths)[:, None]
            h, c = torch.where(active, h_new, h), torch.where(active, c_new, c)
            outputs[t] = torch.where(active, h_new, torch.zeros_like(h_new))
        stacked = torch.stack(outputs, dim=1) if steps else x.new_zeros(batch, 0, h.shape[1])
        return stacked, h, c

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, cell_size={self.cell_size}, num_layers={self.num_layers}, "
            f"cell_clip={self.cell_clip}, proj_clip={self.proj_clip}, skip={self.use_skip_connections}, "
            f"recurrent_dropout={self.recurrent_dropout_probability}, impl={self.impl or 'auto'}"
        )
