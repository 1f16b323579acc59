# SPDX-License-Identifier: Apache-2.0
"""Modules with the names, parameters and results of AllenNLP's, as plain loops (AllenNLP itself installs no more)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class LstmCellWithProjection(nn.Module):
    def __init__(self, size, hidden, cells, go_forward, dropout=0.0, proj_clip=None, cell_clip=None) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.cell_size, self.go_forward = size, hidden, cells, go_forward
        self.recurrent_dropout_probability = dropout
        self.state_projection_clip_value, self.memory_cell_clip_value = proj_clip, cell_clip
        self.input_linearity = nn.Linear(size, 4 * cells, bias=False)
        self.state_linearity = nn.Linear(hidden, 4 * cells)
        self.state_projection = nn.Linear(cells, hidden, bias=False)

    def forward(self, x: Tensor, mask: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.ones_like(h)
        if self.training and self.recurrent_dropout_probability:
            keep = torch.bernoulli(keep * (1 - self.recurrent_dropout_probability))
            keep = keep / (1 - self.recurrent_dropout_probability)
        outputs = [torch.zeros_like(h)] * x.shape[1]
        for t in range(x.shape[1]) if self.go_forward else reversed(range(x.shape[1])):
            i, f, g, o = (self.input_linearity(x[:, t]) + self.state_linearity(h)).chunk(4, 1)
            new_c = i.sigmoid() * g.tanh() + f.sigmoid() * c
            if self.memory_cell_clip_value:
                new_c = new_c.clamp(-self.memory_cell_clip_value, self.memory_cell_clip_value)
            new_h = self.state_projection(o.sigmoid() * new_c.tanh())
            if self.state_projection_clip_value:
                new_h = new_h.clamp(-self.state_projection_clip_value, self.state_projection_clip_value)
            new_h = new_h * keep
            real = mask[:, t, None]
            h, c = torch.where(real, new_h, h), torch.where(real, new_c, c)
            outputs[t] = torch.where(real, new_h, torch.zeros_like(new_h))
        return torch.stack(outputs, 1), h, c


class ElmoLstm(nn.Module):
    """Stateful: each row goes on from where the same row of the batch before ended."""

    def __init__(self, size, hidden, cells, layers, dropout=0.0, proj_clip=None, cell_clip=None) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.cell_size, self.num_layers = size, hidden, cells, layers
        self.stateful, self._states = True, None
        for layer in range(layers):
            for go_forward, side in ((True, "forward"), (False, "backward")):
                cell = LstmCellWithProjection(
                    size if layer == 0 else hidden, hidden, cells, go_forward, dropout, proj_clip, cell_clip
                )
                self.add_module(f"{side}_layer_{layer}", cell)

    def reset_states(self) -> None:
        self._states = None

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        batch = inputs.shape[0]
        rows = batch if self._states is None else max(batch, self._states[0].shape[1])
        h_all = inputs.new_zeros(self.num_layers, rows, 2 * self.hidden_size)
        c_all = inputs.new_zeros(self.num_layers, rows, 2 * self.cell_size)
        if self._states is not None:
            h_all[:, : self._states[0].shape[1]] = self._states[0]
            c_all[:, : self._states[1].shape[1]] = self._states[1]
        outputs, sides = [], [inputs, inputs]
        kept_h, kept_c = h_all.clone(), c_all.clone()
        for layer in range(self.num_layers):
            results = []
            for direction, side in enumerate(("forward", "backward")):
                cell = getattr(self, f"{side}_layer_{layer}")
                own_h = slice(direction * self.hidden_size, (direction + 1) * self.hidden_size)
                own_c = slice(direction * self.cell_size, (direction + 1) * self.cell_size)
                y, h, c = cell(sides[direction], mask, h_all[layer, :batch, own_h], c_all[layer, :batch, own_c])
                kept_h[layer, :batch, own_h], kept_c[layer, :batch, own_c] = h.detach(), c.detach()
                results.append(y if layer == 0 else y + sides[direction])
            sides = results
            outputs.append(torch.cat(results, -1))
        self._states = (kept_h.detach(), kept_c.detach())
        return torch.stack(outputs)


class _Highway(nn.Module):
    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            transform, gate = layer(x).chunk(2, -1)
            x = gate.sigmoid() * x + (1 - gate.sigmoid()) * transform.relu()
        return x


class _ElmoCharacterEncoder(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self._options = options
        cnn = options["char_cnn"]
        width = cnn["max_characters_per_token"]

        def marks(symbol: int) -> Tensor:
            return torch.tensor([259, symbol, 260] + [261] * (width - 3))

        self._beginning_of_sentence_characters, self._end_of_sentence_characters = marks(257), marks(258)
        dim = cnn["embedding"]["dim"]
        self._char_embedding_weights = nn.Parameter(torch.randn(262, dim))
        self._convolutions = []
        for i, (size, count) in enumerate(cnn["filters"]):
            self.add_module(f"char_conv_{i}", nn.Conv1d(dim, count, size))
            self._convolutions.append(getattr(self, f"char_conv_{i}"))
        filters = sum(count for _, count in cnn["filters"])
        self._highways = _Highway(filters, cnn["n_highway"])
        self._projection = nn.Linear(filters, options["lstm"]["projection_dim"])

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        mask = (inputs > 0).any(-1)
        batch, steps, width = inputs.shape
        marked = inputs.new_zeros(batch, steps + 2, width)
        longer = torch.zeros(batch, steps + 2, dtype=torch.bool, device=inputs.device)
        for row, length in enumerate(mask.sum(1).tolist()):
            marked[row, 0] = self._beginning_of_sentence_characters.to(inputs)
            marked[row, 1 : length + 1] = inputs[row, :length]
            marked[row, length + 1] = self._end_of_sentence_characters.to(inputs)
            longer[row, : length + 2] = True
        characters = nn.functional.embedding(marked.view(-1, width), self._char_embedding_weights).transpose(1, 2)
        activation = torch.relu if self._options["char_cnn"]["activation"] == "relu" else torch.tanh
        found = torch.cat([activation(conv(characters).amax(-1)) for conv in self._convolutions], -1)
        found = self._projection(self._highways(found))
        return {"mask": longer, "token_embedding": found.view(batch, steps + 2, -1)}


class _ElmoBiLm(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        lstm = options["lstm"]
        self._token_embedder = _ElmoCharacterEncoder(options)
        size = lstm["projection_dim"]
        self._elmo_lstm = ElmoLstm(
            size, size, lstm["dim"], lstm["n_layers"], 0.0, lstm.get("proj_clip"), lstm.get("cell_clip")
        )
        self.num_layers = lstm["n_layers"] + 1
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> dict:
        found = self._token_embedder(inputs)
        mask, tokens = found["mask"], found["token_embedding"]
        layers = self._elmo_lstm(tokens, mask)
        first = torch.cat([tokens, tokens], -1) * mask[:, :, None]
        return {"activations": [first, *layers.unbind(0)], "mask": mask}


class Elmo(nn.Module):
    """A mix of all layers, sentence marks removed, dropout."""

    def __init__(self, options: dict, dropout: float = 0.5) -> None:
        super().__init__()
        self._elmo_lstm = _ElmoBiLm(options)
        self._dropout = nn.Dropout(dropout)
        self.scalar_parameters = nn.Parameter(torch.zeros(self._elmo_lstm.num_layers))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> dict:
        found = self._elmo_lstm(inputs)
        weights = self.scalar_parameters.softmax(0)
        mixed = self.gamma * sum(weight * layer for weight, layer in zip(weights, found["activations"]))
        lengths = found["mask"].sum(1) - 2
        mask = torch.arange(mixed.shape[1] - 2, device=mixed.device) < lengths[:, None]
        return {"elmo_representations": [self._dropout(mixed[:, 1:-1] * mask[:, :, None])], "mask": mask}


class AugmentedLSTMCell(nn.Module):
    def __init__(self, size: int, hidden: int, use_bias: bool) -> None:
        super().__init__()
        self.input_linearity = nn.Linear(size, 4 * hidden, bias=use_bias)
        self.state_linearity = nn.Linear(hidden, 4 * hidden)


class AugmentedLstm(nn.Module):
    def __init__(self, size, hidden, go_forward, dropout, use_highway=False, use_bias=True) -> None:
        super().__init__()
        self.hidden_size, self.go_forward, self.use_highway = hidden, go_forward, use_highway
        self.recurrent_dropout_probability = dropout
        self.cell = AugmentedLSTMCell(size, hidden, use_bias)

    def forward(self, inputs: PackedSequence) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        x, lengths = pad_packed_sequence(inputs, batch_first=True)
        h = c = x.new_zeros(x.shape[0], self.hidden_size)
        outputs = [h] * x.shape[1]
        for t in range(x.shape[1]) if self.go_forward else reversed(range(x.shape[1])):
            i, f, g, o = (self.cell.input_linearity(x[:, t]) + self.cell.state_linearity(h)).chunk(4, 1)
            new_c = i.sigmoid() * g.tanh() + f.sigmoid() * c
            new_h = o.sigmoid() * new_c.tanh()
            real = (t < lengths)[:, None]
            h, c = torch.where(real, new_h, h), torch.where(real, new_c, c)
            outputs[t] = torch.where(real, new_h, torch.zeros_like(new_h))
        return pack_padded_sequence(torch.stack(outputs, 1), lengths, batch_first=True), (h[None], c[None])


class StackedBidirectionalLstm(nn.Module):
    def __init__(
        self, input_size, hidden_size, num_layers, recurrent_dropout_probability=0.0, layer_dropout_probability=0.0,
        use_highway=True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_layers = num_layers
        for layer in range(num_layers):
            for side in ("forward", "backward"):
                part = AugmentedLstm(
                    input_size if layer == 0 else 2 * hidden_size, hidden_size, side == "forward",
                    recurrent_dropout_probability, use_highway, use_bias=False,
                )  # fmt: skip
                self.add_module(f"{side}_layer_{layer}", part)
        self.layer_dropout = nn.Dropout(layer_dropout_probability)

    def forward(self, inputs: PackedSequence, initial_state=None):
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            both = [getattr(self, f"{side}_layer_{layer}")(inputs) for side in ("forward", "backward")]
            padded = [pad_packed_sequence(output, batch_first=True) for output, _ in both]
            x, lengths = torch.cat([one for one, _ in padded], -1), padded[0][1]
            if layer < self.num_layers - 1:
                x = self.layer_dropout(x)
            inputs = pack_padded_sequence(x, lengths, batch_first=True)
            h_n += [state[0] for _, state in both]
            c_n += [state[1] for _, state in both]
        return inputs, (torch.cat(h_n), torch.cat(c_n))
