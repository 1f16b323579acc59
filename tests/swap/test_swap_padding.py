# SPDX-License-Identifier: Apache-2.0
"""Who reads hidden states at padding gets Hugging Face's, whoever it is; who does not gets a packed encoder."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast
from ctxfast.swap import padding_readers

transformers = pytest.importorskip("transformers")

PADDED = MASK == 0


class _Around(nn.Module):
    """A model of somebody's own around an encoder; ``read`` makes its output from (B, L, N) and the mask."""

    def __init__(self, read, *parts: nn.Module) -> None:
        super().__init__()
        self.bert = tiny_model("Bert")
        self.parts = nn.ModuleList(parts)
        self.read = read

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.read(self.bert(**inputs).last_hidden_state, *self.parts)


# Heads over hidden states that see padding, though their output at real tokens is all that anybody uses.
READERS = {
    "log-softmax over positions": lambda: _Around(lambda x, part: part(x).log_softmax(1), nn.Linear(16, 2)),
    "an unpacked biLSTM": lambda: _Around(
        lambda x, part: part(x)[0], nn.LSTM(16, 8, batch_first=True, bidirectional=True)
    ),
    "an unpacked GRU": lambda: _Around(lambda x, part: part(x)[0], nn.GRU(16, 8, batch_first=True, bidirectional=True)),
    "a convolution": lambda: _Around(
        lambda x, part: part(x.transpose(1, 2)).transpose(1, 2), nn.Conv1d(16, 8, 3, padding=1)
    ),
    "a mean without mask": lambda: _Around(lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "a maximum without mask": lambda: _Around(lambda x: x.amax(1, keepdim=True).expand_as(x)),
    "attention without mask": lambda: _Around(
        lambda x, part: part(x, x, x)[0], nn.MultiheadAttention(16, 2, batch_first=True)
    ),
}


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_models_of_somebodys_own_read_what_they_read(name) -> None:
    model = READERS[name]().eval()
    expected = model(input_ids=IDS, attention_mask=MASK)
    report = ctxfast.swap_in(model, only="BertEncoder")
    assert ("bert.encoder", padding_readers._MAY_READ.format(name="_Around")) in report.near_misses
    found = model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(found[~PADDED], expected[~PADDED], rtol=1e-4, atol=1e-5)
    ctxfast.swap_in(model, padding="zero")
    found = model(input_ids=IDS, attention_mask=MASK)
    assert (found - expected)[~PADDED].abs().max() > 1e-3, "it does read padding"


@torch.no_grad()
def test_a_bare_encoder_says_what_stands_at_padding() -> None:
    model = tiny_model("Bert")
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    report = ctxfast.swap_in(model)
    assert report.near_misses == () and report.notes == (("encoder", padding_readers.BARE),)
    assert padding_readers.BARE in str(report)
    assert not model(IDS, attention_mask=MASK).last_hidden_state[PADDED].any()
    assert ctxfast.swap_in(model, padding="keep").notes == ()
    assert torch.equal(model(IDS, attention_mask=MASK).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"ctxfast\.swap_in: padding is 'zeros'; expected None, 'zero' or 'keep'\."):
        ctxfast.swap_in(model, padding="zeros")


@torch.no_grad()
def test_swapped_first_and_built_in_afterwards() -> None:
    """A second call sees what stands around the encoder by then."""
    model = READERS["a convolution"]().eval()
    expected = model(input_ids=IDS, attention_mask=MASK)
    assert ctxfast.swap_in(model.bert).notes
    assert ctxfast.swap_in(model).near_misses
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK), expected)


@torch.no_grad()
def test_an_encoder_in_two_places() -> None:
    """One of two models around the same encoder reads padding: that one counts."""
    answers = tiny_model("Bert", "ForQuestionAnswering")
    both = nn.ModuleDict(dict(classes=tiny_model("Bert", "ForSequenceClassification"), answers=answers))
    both["classes"].bert = answers.bert
    expected = answers(IDS, attention_mask=MASK).start_logits
    assert "question-answering" in str(ctxfast.swap_in(both))
    assert torch.equal(answers(IDS, attention_mask=MASK).start_logits, expected)


def _labels(head: str) -> Tensor:
    return torch.randint(0, 2, IDS.shape, generator=torch.Generator().manual_seed(8))


LABELLED = [("Bert", "ForMaskedLM"), ("Roberta", "ForTokenClassification"), ("DistilBert", "ForMaskedLM")]
LABELLED += [("Electra", "ForTokenClassification"), ("Bert", "ForPreTraining")]


@pytest.mark.parametrize(("kind", "head"), LABELLED)
@torch.no_grad()
def test_labels_at_padding(kind, head) -> None:
    """A loss over padding reads what is there; one that leaves padding out gets a packed encoder."""
    model = tiny_model(kind, head)
    more = {"next_sentence_label": torch.tensor([0, 1, 0])} if head == "ForPreTraining" else {}
    everywhere, own = _labels(head), torch.where(PADDED, -100, _labels(head))
    inputs = dict(input_ids=IDS, attention_mask=MASK, **more)
    expected = [model(**inputs, labels=labels) for labels in (everywhere, own)]
    report = ctxfast.swap_in(model)
    assert len(report.notes) == 1 and "labels at padding that are not -100" in report.notes[0][1]
    name = "prediction_logits" if head == "ForPreTraining" else "logits"
    for labels, right, is_kept in ((everywhere, expected[0], True), (own, expected[1], False)):
        found = model(**inputs, labels=labels)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found[name], right[name], atol=1e-4) is is_kept
    by_place = model(IDS, MASK, **more, labels=everywhere)
    torch.testing.assert_close(by_place.loss, expected[0].loss, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_are_taken_away_and_travel() -> None:
    model = tiny_model("Bert", "ForMaskedLM")
    model.register_forward_hook(_seen)
    before = [len(table) for table in _tables(model)]
    expected = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    ctxfast.swap_in(model)
    ctxfast.swap_in(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert list(each._forward_pre_hooks.values()) == [padding_readers.before_call]
        found = each(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        ctxfast.restore(each)
        assert [len(table) for table in _tables(each)] == before


def _seen(module: nn.Module, args: tuple, output: object) -> None:
    """A hook of somebody else's, which stays."""


def _tables(model: nn.Module) -> list[dict]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return [getattr(model, name) for name in (*names, "_forward_pre_hooks_with_kwargs")]


@torch.no_grad()
def test_an_error_leaves_nothing_behind_and_threads_do_not_mix() -> None:
    model = tiny_model("Bert", "ForMaskedLM")
    ctxfast.swap_in(model)
    with pytest.raises(Exception):  # noqa: B017
        model(input_ids=IDS + 1000, attention_mask=MASK, labels=IDS)
    assert padding_readers._now.calls == ()
    expected = {labels is None: model(IDS, attention_mask=MASK, labels=labels).logits for labels in (None, IDS)}
    assert not torch.allclose(expected[True], expected[False], atol=1e-4)
    start, wrong = threading.Barrier(4), []

    def work(labels: Tensor | None) -> None:
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                found = model(IDS, attention_mask=MASK, labels=labels).logits
            if not torch.allclose(found, expected[labels is None], atol=1e-5):
                wrong.append(labels is None)

    threads = [threading.Thread(target=work, args=(labels,)) for labels in (None, IDS, None, IDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class _Head(transformers.BertForSequenceClassification):
    """A head of somebody's own: a maximum over positions."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return self.classifier(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.amax(1))


@pytest.mark.parametrize("change", ["subclass", "on the object", "on the class"])
@torch.no_grad()
def test_changed_heads_are_not_known(change, monkeypatch) -> None:
    model = tiny_model("Bert", "ForSequenceClassification")
    forward = _Head.forward
    if change == "subclass":
        model.__class__ = _Head
    elif change == "on the object":
        model.forward = forward.__get__(model)
    else:
        monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", forward)
    expected = model(IDS, attention_mask=MASK)
    report = ctxfast.swap_in(model)
    assert len(report.swapped) == 1 and len(report.near_misses) == 1
    assert torch.equal(model(IDS, attention_mask=MASK), expected)


# sentence-transformers

sentence_transformers = pytest.importorskip("sentence_transformers")


class _Maximum(nn.Module):
    """A step of somebody's own: a maximum over all positions."""

    def forward(self, features: dict) -> dict:
        features["sentence_embedding"] = features["token_embeddings"].amax(1)
        return features


def _pipelines() -> dict:
    from sentence_transformers.sentence_transformer import modules as parts

    modes = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    pooled = {mode: (lambda size, mode=mode: [parts.Pooling(size, mode)], False) for mode in modes}
    return pooled | {
        "dense": (lambda size: [parts.Pooling(size), parts.Dense(size, 8), parts.Normalize()], False),
        "cnn": (lambda size: [parts.CNN(size, 8), parts.Pooling(24)], True),
        "own": (lambda size: [_Maximum()], True),
    }


TEXTS = ["The bank of the river.", "A bank lends money to people who need none of it.", "Short."]


@pytest.mark.parametrize("name", _pipelines())
def test_pipelines_of_sentence_transformers(minilm_dir, name) -> None:
    from sentence_transformers.sentence_transformer import modules as parts

    make, is_kept = _pipelines()[name]
    torch.manual_seed(0)
    transformer = parts.Transformer(str(minilm_dir))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, *make(384)], device="cpu")
    expected = model.encode(TEXTS)
    report = ctxfast.swap_in(model, only="BertEncoder")
    assert len(report.swapped) == 1 and bool(report.near_misses) is is_kept
    assert [sentence for _, sentence in report.notes] == ([] if is_kept else [padding_readers.TOKENS])
    assert abs(model.encode(TEXTS) - expected).max() < 1e-4


def test_query_expansion(minilm_dir) -> None:
    """ColBERT reads the hidden states of masked expansion tokens; settings may change after the swap."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    expansion = {"strategy": "fixed", "attend": False, "length": 16}
    model = MultiVectorEncoder(modules=[Transformer(str(minilm_dir)), MultiVectorMask()], device="cpu")
    for setting in (expansion, None, {**expansion, "attend": True}):
        model[0].query_expansion = setting
        right = [model.encode_query(TEXTS), model.encode_document(TEXTS)]
        ctxfast.swap_in(model)
        model[0].query_expansion = None
        model[0].query_expansion = setting
        for found, expected in zip([model.encode_query(TEXTS), model.encode_document(TEXTS)], right):
            for one, other in zip(found, expected):
                assert abs(one - other).max() < 1e-4
        ctxfast.restore(model)
