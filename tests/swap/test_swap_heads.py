# SPDX-License-Identifier: Apache-2.0
"""What stands in a known model beside its encoder: heads and poolers of somebody's own, put there before or after
``swap_in``, get Hugging Face's hidden states at padding; so does whoever looks at them there."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast
from ctxfast.swap import padding_readers
from ctxfast.swap.transformers_layers import Layers

transformers = pytest.importorskip("transformers")

PADDED = MASK == 0


class Mean(nn.Module):
    """A head over the mean of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(16, 2)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.part(x.mean(1))


class Maximum(nn.Module):
    """A pooler over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(1)


class Convolution(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


def _set(place: str, part: Callable[[], object]) -> Callable[[nn.Module], None]:
    owner, _, name = place.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, part())


def _linear(model: nn.Module) -> None:
    model.classifier.__class__ = OwnLinear


def _normalise(model: nn.Module) -> None:
    model.dropout = nn.LayerNorm((7, 16))
    nn.init.normal_(model.dropout.weight)


def _hook(model: nn.Module) -> None:
    model.dropout.register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))


def _forward(model: nn.Module) -> None:
    model.classifier.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x.cumsum(1)), model.classifier)


# model, head, change, what may read padding
ODD = {
    "a head": ("Roberta", "ForSequenceClassification", _set("classifier", Mean), "Mean"),
    "a head in a Sequential": (
        "Roberta", "ForSequenceClassification", _set("classifier", lambda: nn.Sequential(Mean(), nn.Tanh())), "Mean"
    ),
    "a linear layer of its own": ("Electra", "ForTokenClassification", _linear, "OwnLinear"),
    "a head of Transformers' own that takes the last row": (
        "Electra", "ForMultipleChoice", _set("sequence_summary.summary_type", lambda: "mean"), "ElectraSequenceSummary"
    ),
    "a pooler": ("Bert", "ForSequenceClassification", _set("bert.pooler", Maximum), "Maximum"),
    "a pooler without a head": ("Bert", "Model", _set("pooler", Maximum), "Maximum"),
    "a convolution": ("Bert", "ForTokenClassification", _set("classifier", Convolution), "Convolution"),
    "a normalisation over positions": ("Bert", "ForTokenClassification", _normalise, "LayerNorm"),
    "an LSTM": (
        "Bert", "ForTokenClassification",
        _set("classifier", lambda: nn.Sequential(nn.LSTM(16, 2, batch_first=True), _First())), "LSTM",
    ),
    "a hook on a dropout": ("Bert", "ForTokenClassification", _hook, "Dropout"),
    "another forward on the object": ("Bert", "ForTokenClassification", _forward, "Linear"),
}  # fmt: skip


class _First(nn.Module):
    def forward(self, pair: tuple) -> Tensor:
        return pair[0]


def _outputs(model: nn.Module) -> list[Tensor]:
    """Every tensor that a call returns, at real tokens."""
    ids, mask = (each[:, None] if "MultipleChoice" in type(model).__name__ else each for each in (IDS, MASK))
    found = model(input_ids=ids, attention_mask=mask).to_tuple()
    return [each[MASK == 1] if each.shape[:2] == MASK.shape else each for each in found]


@pytest.mark.parametrize("when", ["before", "afterwards"])
@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_what_may_read_padding_gets_it(name, when) -> None:
    kind, head, change, odd = ODD[name]
    model = tiny_model(kind, head)
    plain = _outputs(model)
    if when == "afterwards":
        assert not ctxfast.swap_in(model, only=f"{kind}Encoder").near_misses
        _outputs(model)
    torch.manual_seed(6)
    change(model)
    report = ctxfast.swap_in(model, only=f"{kind}Encoder") if when == "before" else None
    found = _outputs(model)
    if report is not None:
        assert report.near_misses[0][1] == padding_readers._MAY_READ.format(name=odd) and not report.notes
    ctxfast.restore(model)
    expected = _outputs(model)
    assert any((one - two).abs().max() > 1e-2 for one, two in zip(expected, plain)), "the change itself must show"
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two)


KNOWN = [
    ("Bert", "Model"), ("Bert", "ForSequenceClassification"), ("Bert", "ForMultipleChoice"), ("Bert", "ForMaskedLM"),
    ("Bert", "ForNextSentencePrediction"), ("Bert", "ForPreTraining"), ("Bert", "ForTokenClassification"),
    ("Roberta", "ForSequenceClassification"), ("XLMRoberta", "ForMaskedLM"), ("Camembert", "ForTokenClassification"),
    ("Electra", "ForSequenceClassification"), ("Electra", "ForPreTraining"), ("Electra", "ForMultipleChoice"),
    ("Electra", "ForMaskedLM"), ("Ernie", "ForPreTraining"), ("Ernie", "ForMultipleChoice"),
    ("DistilBert", "ForSequenceClassification"), ("DistilBert", "ForMaskedLM"), ("DistilBert", "ForMultipleChoice"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), KNOWN)
@torch.no_grad()
def test_known_heads_are_packed(kind, head, monkeypatch) -> None:
    model = tiny_model(kind, head)
    assert not ctxfast.swap_in(model).near_misses
    assert _is_packed(model, lambda: _outputs(model), monkeypatch)


def _is_packed(model: nn.Module, call: Callable[[], object], monkeypatch) -> bool:
    seen, examined = [], Layers.examined
    with monkeypatch.context() as patch:
        patch.setattr(Layers, "examined", lambda *args: seen.append(1) or examined(*args))
        call()
    return bool(seen)


@pytest.mark.parametrize("change", ["a layer on top", "a Sequential", "float64", "its own mixed precision", "LoRA"])
@torch.no_grad()
def test_heads_that_work_row_by_row_are_packed(change, monkeypatch) -> None:
    model = tiny_model("Bert", "ForSequenceClassification")
    ctxfast.swap_in(model)
    if change == "a layer on top":
        model.classifier = nn.Linear(16, 5)
    elif change == "a Sequential":
        model.classifier = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(8), nn.Linear(8, 2))
    elif change == "float64":
        model.double()
    elif change == "LoRA":  # in the pooler and the head, too
        peft = pytest.importorskip("peft")
        options = dict(target_modules=["query", "dense"], modules_to_save=["classifier"])
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options)).eval()
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model.train())
        assert "forward" in model.__dict__
    assert _is_packed(model, lambda: model(IDS, attention_mask=MASK), monkeypatch)


def _hooked(place: str) -> Callable[[nn.Module], list[Tensor]]:
    def call(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple, output) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])

        handle = model.get_submodule(place).register_forward_hook(see)
        model(IDS, attention_mask=MASK)
        handle.remove()
        return seen

    return call


def _wide(mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None].expand(-1, 1, 7, 7)


# Calls that read hidden states at padding, under a head that itself reads none.
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "hidden states are asked for": lambda model: model(IDS, MASK, output_hidden_states=True).hidden_states,
    "the model below is called": lambda model: model.bert(IDS, attention_mask=MASK).last_hidden_state,
    "the encoder is called": lambda model: model.bert.encoder(model.bert.embeddings(IDS), _wide(MASK))[0],
    "a hook on the model below": _hooked("bert"),
    "a hook on the encoder": _hooked("bert.encoder"),
    "a hook on a layer": _hooked("bert.encoder.layer.1"),
    "a hook on a part of a layer": _hooked("bert.encoder.layer.0.output"),
    "a hook on a part of the head": _hooked("dropout"),
    "forward itself, with labels": lambda model: model.forward(IDS, attention_mask=MASK, labels=IDS % 2).loss,
    "a mask of four dimensions, with labels": lambda model: model(IDS, attention_mask=_wide(MASK), labels=IDS % 2).loss,
    "an additive mask, with labels": lambda model: (
        model(IDS, attention_mask=torch.where(_wide(MASK), 0.0, -1e9), labels=IDS % 2).loss
    ),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls_that_read_padding_get_it(name) -> None:
    model = tiny_model("Bert", "ForTokenClassification")
    expected = CALLS[name](model)
    ctxfast.swap_in(model)
    for _ in range(2):
        torch.testing.assert_close(CALLS[name](model), expected)
    assert not padding_readers._now.calls


@torch.no_grad()
def test_an_interrupted_call_allows_nothing_later() -> None:
    model = tiny_model("Bert", "ForTokenClassification")
    expected = model.bert(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model)

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    handle = model.bert.embeddings.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, attention_mask=MASK)
    handle.remove()
    torch.testing.assert_close(model.bert(IDS, attention_mask=MASK).last_hidden_state, expected)
    assert not padding_readers._now.calls
