# SPDX-License-Identifier: Apache-2.0
"""The original ELMo: ctxfast beside plain PyTorch, all with the same random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ctxfast
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.modeling import ElmoBiLm

from ..arrivals import Arrivals
from ..cases import SEED, Case, Row, Work
from ..inputs import EVERY_WEIGHT
from ..ops.char_cnn import CHARACTERS, word_characters
from ..ops.lstm import loop_direction, module_lstm
from ..provider import Call, Outputs, Provider, on_references

ROWS = (
    Row("original 1x20 words", dict(B=1, words=20), "small", cpu=EVERY_WEIGHT),
    Row("original 32x20 words", dict(B=32, words=20), cpu=EVERY_WEIGHT),
    Row("original 32x128 words", dict(B=32, words=128), cpu=()),
    *(
        Row(
            f"original 1x20 words, {arrivals.words}",
            dict(B=1, words=20),
            "latency",
            cpu=EVERY_WEIGHT,
            cuda=(),
            arrivals=arrivals,
        )
        for arrivals in (Arrivals(), Arrivals(1), Arrivals(10), Arrivals(100), Arrivals(10, busy=1))
    ),
)


def make(random: torch.Generator, B: int, words: int) -> dict[str, Any]:
    return dict(char_ids=word_characters(random, B * words).view(B, words, CHARACTERS))


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    return Work(tokens=sizes["B"] * sizes["words"])


@functools.lru_cache(maxsize=1)
def _weights() -> dict[str, Tensor]:
    """Random weights of the original model's size, under AllenNLP's names."""
    return ctxfast.Elmo.from_config(ElmoConfig.preset("original"), seed=SEED, dropout=0.0).state_dict()


def _ours(case: Case, args: Mapping[str, Any]) -> ctxfast.Elmo:
    # Every text starts from zeros, so that a call's result does not depend on the calls before it.
    with torch.device("meta"):
        bilm = ElmoBiLm(ElmoConfig.preset("original"), state="zero", weight_dtype=args.get("weight_dtype"))
        model = ctxfast.Elmo(module=bilm, dropout=0.0)
    weights = {name: value.to(case.device, case.dtype) for name, value in _weights().items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _call(model: ctxfast.Elmo, args: Mapping[str, Any]) -> Call:
    return Call(lambda: tuple(model(args["char_ids"])["elmo_representations"]))


def _build_ours(case: Case, args: Mapping[str, Any]) -> Call:
    return _call(_ours(case, args), args)


def _build_reference(case: Case, args: Mapping[str, Any]) -> Call:
    return on_references(_build_ours(case, args))


def _build_plain(recurrence: str, dtype: torch.dtype | None = None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        place = (case.device, dtype or case.dtype)
        weights = {name.removeprefix("_elmo_lstm."): value.to(*place) for name, value in _weights().items()}
        lstm = _loop_layers(weights) if recurrence == "loop" else _module_layers(weights)
        ids = args["char_ids"]
        return Call(lambda: (_plain(weights, ids, lstm),))

    return build


# One layer of one direction: (layer, direction, (B, T, P)) -> (B, T, P).
_Layer = Callable[[int, int, Tensor], Tensor]


def _layer_weights(weights: Mapping[str, Tensor], layer: int, direction: int) -> tuple[Tensor, ...]:
    name = f"_elmo_lstm.{('forward', 'backward')[direction]}_layer_{layer}."
    parts = ("input_linearity.weight", "state_linearity.weight", "state_linearity.bias", "state_projection.weight")
    return tuple(weights[name + part] for part in parts)


def _loop_layers(weights: Mapping[str, Tensor]) -> _Layer:
    def run(layer: int, direction: int, x: Tensor) -> Tensor:
        lengths = [x.shape[1]] * x.shape[0]
        return loop_direction(x, *_layer_weights(weights, layer, direction), lengths, direction == 1, 3.0, 3.0)[0]

    return run


def _module_layers(weights: Mapping[str, Tensor]) -> _Layer:
    modules = {}
    for layer in range(2):
        for direction in range(2):
            names = ("weight_ih", "weight_hh", "bias", "weight_proj")
            one = {name: (value,) for name, value in zip(names, _layer_weights(weights, layer, direction))}
            modules[layer, direction] = module_lstm(one, (0,), trained=False)[0]

    def run(layer: int, direction: int, x: Tensor) -> Tensor:
        module = modules[layer, direction]
        return module(x.flip(1))[0].flip(1) if direction else module(x)[0]

    return run


def _plain(weights: Mapping[str, Tensor], char_ids: Tensor, lstm: _Layer) -> Tensor:
    """(B, T, 50) characters of full rows -> (B, T, 1024): every word through the CNN, sentence marks in, mixed, out."""
    batch = char_ids.shape[0]
    mark = char_ids.new_full((2, CHARACTERS), 261)
    mark[:, 0], mark[0, 1], mark[1, 1], mark[:, 2] = 259, 257, 258, 260
    begin, end = (row.expand(batch, 1, -1) for row in mark)
    words = torch.cat((begin, char_ids, end), dim=1).flatten(0, 1)
    encoder = "_token_embedder."
    x = F.embedding(words, weights[encoder + "_char_embedding_weights"]).transpose(1, 2)
    pooled = []
    for i in range(7):
        conv = F.conv1d(x, weights[f"{encoder}char_conv_{i}.weight"], weights[f"{encoder}char_conv_{i}.bias"])
        pooled.append(torch.relu(conv.max(dim=-1).values))
    vectors = torch.cat(pooled, dim=-1)
    for k in range(2):
        name = f"{encoder}_highways._layers.{k}."
        transform, gate = F.linear(vectors, weights[name + "weight"], weights[name + "bias"]).chunk(2, dim=-1)
        gate = torch.sigmoid(gate)
        vectors = gate * vectors + (1 - gate) * torch.relu(transform)
    vectors = F.linear(vectors, weights[encoder + "_projection.weight"], weights[encoder + "_projection.bias"])
    token = vectors.unflatten(0, (batch, -1))
    layers = [torch.cat((token, token), dim=-1)]
    sides = [token, token]
    for layer in range(2):
        outputs = [lstm(layer, direction, sides[direction]) for direction in range(2)]
        sides = [output + before for output, before in zip(outputs, sides)] if layer else outputs
        layers.append(torch.cat(sides, dim=-1))
    scalars = torch.cat([weights[f"scalar_mix_0.scalar_parameters.{k}"] for k in range(3)])
    mix = torch.softmax(scalars, dim=0)
    return (weights["scalar_mix_0.gamma"] * sum(w * layer for w, layer in zip(mix, layers)))[:, 1:-1]


def oracle(case: Case, args: Mapping[str, Any]) -> Outputs:
    """ctxfast's model on plain references; its peers, which share no code with it, are held to it as well."""
    call = _build_reference(case, args)
    return call.to_case(call.forward())


OURS = (
    Provider("ctxfast", _build_ours, "what Elmo() runs", ours=True),
    Provider("ctxfast reference", _build_reference, "every op on plain PyTorch", ours=True),
)
PEERS = (
    Provider("plain PyTorch, Python loop", _build_plain("loop"), "as AllenNLP ran it"),
    Provider("plain PyTorch, nn.LSTM", _build_plain("module"), "no clipping"),
    Provider("plain PyTorch, Python loop, bfloat16", _build_plain("loop", torch.bfloat16), dtype=torch.bfloat16),
    Provider(
        "plain PyTorch, nn.LSTM, bfloat16",
        _build_plain("module", torch.bfloat16),
        "no clipping",
        dtype=torch.bfloat16,
    ),
)
COMPILED = ()
