# SPDX-License-Identifier: Apache-2.0
"""Every type of encoder that ``swap_in`` takes, against itself before it was swapped: outputs, gradients, hidden
states, names and values in state_dict, whatever the dtype and mode."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from support.hf_models import IDS, MASK
from torch import Tensor, nn

import ctxfast
from ctxfast.nn.relative import relative_bias
from ctxfast.swap import transformers as swap_transformers
from ctxfast.swap.transformers_kinds import ENCODERS

transformers = pytest.importorskip("transformers")

REAL = MASK.bool()
SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40, pad_token_id=1,
    max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    bos_token_id=0, eos_token_id=2,
)  # fmt: skip
_ALBERT = dict(embedding_size=8, num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
_LUKE = dict(entity_vocab_size=30, entity_emb_size=8)
# Layers with and without windows, each smaller than the texts.
_MODERNBERT = dict(num_hidden_layers=3, local_attention=4, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2)
# Class of a model -> where it is if Transformers does not export it, and options of its configuration.
TABLE: dict[str, tuple[str, dict]] = {
    "AlbertModel": ("", _ALBERT),
    "AlignTextModel": ("", {}),
    "AltRobertaModel": ("altclip.modeling_altclip", {}),
    "BertGenerationEncoder": ("", {}),
    "BertModel": ("", {}),
    "CamembertModel": ("", {}),
    "ChineseCLIPTextModel": ("", {}),
    "ClapTextModel": ("", {}),
    "Data2VecTextModel": ("", {}),
    "DistilBertModel": ("", dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0)),
    "ElectraModel": ("", {}),
    "EuroBertModel": ("", dict(num_attention_heads=4, num_key_value_heads=2, mask_token_id=3)),
    "ErnieModel": ("", {}),
    "GteModel": ("", {}),
    "JinaEmbeddingsV3Model": ("", {}),
    "LayoutLMModel": ("", {}),
    "LukeModel": ("", _LUKE),
    "MPNetModel": ("", {}),
    "MarkupLMModel": ("", dict(max_depth=4, xpath_unit_hidden_size=4)),
    "MegatronBertModel": ("", {}),
    "ModernBertModel": ("", _MODERNBERT),
    "NomicBertModel": ("", {}),
    "RemBertModel": ("", dict(input_embedding_size=12)),
    "RoCBertModel": ("", dict(shape_vocab_size=40, pronunciation_vocab_size=40)),
    "RobertaModel": ("", {}),
    "RobertaPreLayerNormModel": ("", {}),
    "SplinterModel": ("", dict(question_token_id=3)),
    "TapasModel": ("", {}),
    "VisualBertModel": ("", dict(visual_embedding_dim=8)),
    "XLMRobertaModel": ("", {}),
    "XLMRobertaXLModel": ("", {}),
}


def _model(name: str, **options) -> nn.Module:
    kind, own = _class(name), TABLE.get(name, ("", {}))[1]
    torch.manual_seed(4)
    model = kind(kind.config_class(**{**SIZES, **own, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and LayerNorm start at 0 and 1, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _outputs(model: nn.Module, mask: Tensor = MASK, **inputs) -> list[Tensor]:
    """What a model returns of real tokens."""
    found: list[Tensor] = []
    for value in model(**(dict(input_ids=IDS, attention_mask=mask) | inputs)).values():
        for tensor in value if isinstance(value, tuple) else (value,):
            if tensor is not None:  # Luke's entities
                found.append(tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor)
    return found


def _gradients(model: nn.Module, **inputs) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    outputs = _outputs(model, **inputs)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found) if grad is not None}


def _near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def _class(name: str) -> type[nn.Module]:
    place = TABLE.get(name, ("", {}))[0]
    return getattr(import_module(f"transformers.models.{place}") if place else transformers, name)


def test_every_kind_is_in_the_table() -> None:
    assert sorted(_class(name).__module__ for name in TABLE) == sorted(kind.modeling for kind in ENCODERS.values())


@pytest.mark.parametrize("name", TABLE)
def test_outputs_gradients_and_identity(name: str) -> None:
    model = _model(name)
    state, objects = copy.deepcopy(model.state_dict()), {key: id(value) for key, value in model.named_parameters()}
    expected = _outputs(model.eval()), _gradients(model.train())
    ((path, _, _),) = ctxfast.swap_in(model).swapped
    with torch.no_grad():
        padded = model.eval()(IDS, attention_mask=MASK).last_hidden_state
        # The packed road was taken: zeros at padding, or what a norm after the encoder makes of them.
        assert (padded[~REAL] == padded[~REAL][0]).all()
        for one, two in zip(_outputs(model), expected[0], strict=True):
            _near(one, two)
    found = _gradients(model.train())
    assert found.keys() == expected[1].keys()
    for key, right in expected[1].items():
        _near(found[key], right)
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert ctxfast.restore(model.eval()) == (path,)
    assert all(map(torch.equal, _outputs(model), expected[0]))


@pytest.mark.parametrize("name", TABLE)
@torch.no_grad()
def test_hidden_states_padding_sides_and_half_precision(name: str) -> None:
    model = _model(name)
    left = MASK.flip(1)
    calls = [dict(output_hidden_states=True), dict(mask=left), dict(mask=torch.ones_like(MASK)), dict(return_dict=True)]
    expected = [_outputs(model, **call) for call in calls]
    assert ctxfast.swap_in(model, impl="cpu").swapped
    for call, right in zip(calls, expected):
        for one, two in zip(_outputs(model, **call), right, strict=True):
            _near(one, two)
    as_tuple = model(IDS, attention_mask=MASK, return_dict=False)
    _near(as_tuple[0][REAL], expected[0][0])
    ctxfast.restore(model)
    half = copy.deepcopy(model).bfloat16()
    theirs = _outputs(half)
    ctxfast.swap_in(half)
    for one, two, exact in zip(_outputs(half), theirs, _outputs(model.double()), strict=True):
        bound = 2 * float((two.double() - exact).abs().max()) + 2**-7 * max(1.0, float(exact.abs().max()))
        assert one.dtype == torch.bfloat16 and float((one.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("name", ["AlbertModel", "AlignTextModel", "TapasModel"])
def test_dropout_in_training_is_that_of_the_configuration(name: str) -> None:
    """Each way of saying the probability of dropping an attention weight: with the others 0, two calls differ."""
    model = _model(name, attention_probs_dropout_prob=0.5)
    ctxfast.swap_in(model)
    with torch.no_grad():
        one, two = (model.train()(IDS, attention_mask=MASK)[0] for _ in range(2))
        assert not one[~REAL].any() and not torch.equal(one, two)
        one, two = (model.eval()(IDS, attention_mask=MASK)[0] for _ in range(2))
    assert torch.equal(one, two)


@torch.no_grad()
def test_luke_with_entities_is_its_own_and_said_to_be() -> None:
    model = _model("LukeModel")
    entities = dict(
        entity_ids=torch.tensor([[3], [4], [5]]),
        entity_attention_mask=torch.ones(3, 1, dtype=torch.long),
        entity_position_ids=torch.tensor([[[1, 2]], [[1, -1]], [[0, -1]]]),
    )
    expected = model(IDS, attention_mask=MASK, **entities)
    report = ctxfast.swap_in(model)
    assert ("encoder", "calls with entities run as before.") in report.notes
    found = model(IDS, attention_mask=MASK, **entities)
    assert torch.equal(found[0], expected[0]) and torch.equal(found.entity_last_hidden_state, expected[2])


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("place", ["encoder.albert_layer_groups.1", "encoder.embedding_hidden_mapping_in"])
@torch.no_grad()
def test_what_stands_around_albert_layers_is_called_where_it_is_watched(place: str) -> None:
    model = _model("AlbertModel")
    ctxfast.swap_in(model)
    before = _outputs(model)
    _hook(model.get_submodule(place))
    found = _outputs(model)
    ctxfast.restore(model)
    assert all(map(torch.equal, found, _outputs(model))) and not torch.equal(found[0], before[0])


@torch.no_grad()
def test_albert_follows_its_number_of_layers() -> None:
    model = _model("AlbertModel")
    ctxfast.swap_in(model)
    before = _outputs(model)
    model.config.num_hidden_layers = 2
    found = _outputs(model)
    ctxfast.restore(model)
    for one, two in zip(found, _outputs(model), strict=True):
        _near(one, two)
    assert not torch.allclose(found[0], before[0])


HEADS = [
    ("AlbertForMaskedLM", _ALBERT), ("AlbertForSequenceClassification", _ALBERT), ("RemBertForTokenClassification", {}),
    ("Data2VecTextForSequenceClassification", {}), ("LukeForTokenClassification", _LUKE),
    ("ChineseCLIPTextModel", {}), ("TapasForSequenceClassification", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), HEADS)
@torch.no_grad()
def test_heads_that_read_their_own_rows_run_packed(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(name, **options)
    expected = _outputs(model)
    report = ctxfast.swap_in(model)
    assert len(report.swapped) == 1 and not report.near_misses
    tokens, run = [], swap_transformers._run

    def spied(*args: Any, **options: Any) -> Any:
        tokens.append(len(args[2]))
        return run(*args, **options)

    monkeypatch.setattr(swap_transformers, "_run", spied)
    for one, two in zip(_outputs(model), expected, strict=True):
        _near(one, two)
    assert tokens == [MASK.sum()]


def test_distances_over_holes_are_hugging_faces() -> None:
    """MPNet's bias goes by columns: packed rows would move together what stands around a hole."""
    model, holes = _model("MPNetModel"), MASK.clone()
    holes[0, 2] = 0
    with torch.no_grad():
        expected = _outputs(model, holes)
        assert ctxfast.swap_in(model).swapped
        assert all(map(torch.equal, _outputs(model, holes), expected))


@pytest.mark.parametrize("length", [1, 40, 300])
def test_buckets_of_relative_positions_are_mpnets(length: int) -> None:
    encoder = _model("MPNetModel", max_position_embeddings=400).encoder
    expected = encoder.compute_position_bias(torch.zeros(1, length, 1))[0]
    table = relative_bias(encoder.relative_attention_bias.weight)
    reach = table.shape[1] // 2
    distance = (torch.arange(length) - torch.arange(length)[:, None]).clamp(-reach, reach)
    assert torch.equal(table[:, distance + reach], expected)
