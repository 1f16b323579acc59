# SPDX-License-Identifier: Apache-2.0
"""Heads and losses against Hugging Face's classes, their files, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.hf_models import pair
from torch import Tensor

from ctxfast.models.bert import heads
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.heads import BertForMaskedLM, BertForPreTraining
from ctxfast.models.bert.modeling import Bert

SIZES = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=96, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
NAMES = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1, 0, 1, 1, 0, 1, 0, 0, 0, 0]])
B, L = MASK.shape


def _pair(name: str, **fields: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return pair(head=name.removeprefix("Bert"), **{**SIZES, **fields})


def _ids() -> Tensor:
    return torch.randint(1, 120, (B, L))


def _mlm_labels() -> Tensor:
    labels = torch.randint(120, (B, L))
    labels[torch.rand(B, L) > 0.4] = -100
    labels[MASK == 0] = -100
    labels[0, 1] = 7
    return labels


def _close(mine: Tensor, want: Tensor, mask: Tensor | None = None, bound: float = 1e-5) -> None:
    assert mine.shape == want.shape
    difference = (mine - want).abs()
    if mask is not None:
        assert not mine[mask == 0].any()
        difference = difference[mask == 1]
    assert float(difference.detach().max()) <= bound


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    double = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(double.parameters(), model.parameters()):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    return double.state_dict()


def _compare_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, want = _gradients(ours), _gradients(theirs)
    assert mine.keys() == want.keys()
    # What only shifts all scores of a softmax (a key's bias, a span head's bias) has a gradient of
    # rounding errors alone: the floor is for those.
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in want.values())
    for name in want:
        scale = float(want[name].abs().max())
        error = float((mine[name] - want[name]).abs().max())
        assert error <= max(1e-4 * scale, floor), (name, error, scale)


# Logits and losses


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_hugging_face_names(name: str) -> None:
    ours, theirs = _pair(name)
    mine, want = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == want.keys()
    for key in want:
        assert torch.equal(mine[key], want[key]), key
    theirs.load_state_dict(mine, strict=True)


def test_masked_lm() -> None:
    ours, theirs = _pair("BertForMaskedLM")
    ids, labels = _ids(), _mlm_labels()
    want = theirs(ids, attention_mask=MASK, labels=labels)
    got = ours(ids, MASK, labels=labels)
    assert got.logits is None, "logits of the whole vocabulary are made only when asked for"
    _close(got.loss, want.loss)
    _close(ours(ids, MASK).logits, want.logits, MASK)
    _close(ours(ids, MASK, labels=labels, return_logits=True).logits, want.logits, MASK)
    assert ours(ids, MASK, return_logits=False).logits is None
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)


def test_masked_lm_with_the_other_gelu() -> None:
    ours, theirs = _pair("BertForMaskedLM", hidden_act="gelu_new")
    ids, labels = _ids(), _mlm_labels()
    _close(ours(ids, MASK, labels=labels).loss, theirs(ids, MASK, labels=labels).loss)


def test_only_labelled_rows_go_through_the_head() -> None:
    ours, _ = _pair("BertForMaskedLM")
    ids, labels = _ids(), _mlm_labels()
    seen = []
    ours.cls.predictions.transform.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    ours(ids, MASK, labels=labels)
    assert seen == [int((labels != -100).sum())]
    at_padding = torch.where(MASK == 0, 5, -100)
    assert float(ours(ids, MASK, labels=at_padding).loss.detach()) == 0.0
    assert seen[-1] == 0


def test_pretraining() -> None:
    ours, theirs = _pair("BertForPreTraining")
    ids, labels, following = _ids(), _mlm_labels(), torch.tensor([0, 1, 1])
    types = torch.randint(2, (B, L))
    inputs = dict(attention_mask=MASK, token_type_ids=types, labels=labels)
    want = theirs(ids, next_sentence_label=following, **inputs)
    got = ours(ids, next_sentence_label=following, return_logits=True, **inputs)
    _close(got.loss, want.loss)
    torch.testing.assert_close(got.loss, got.mlm_loss + got.nsp_loss)
    _close(got.prediction_logits, want.prediction_logits, MASK)
    _close(got.seq_relationship_logits, want.seq_relationship_logits)
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)
    assert torch.equal(ours(ids, **inputs).loss, ours(ids, **inputs).mlm_loss)
    only_nsp = ours(ids, MASK, types, next_sentence_label=following)
    assert torch.equal(only_nsp.loss, only_nsp.nsp_loss) and only_nsp.mlm_loss is None
    assert ours(ids, MASK).loss is None


def test_next_sentence() -> None:
    ours, theirs = _pair("BertForNextSentencePrediction")
    ids, labels = _ids(), torch.tensor([1, 0, 1])
    want = theirs(ids, attention_mask=MASK, labels=labels)
    got = ours(ids, MASK, labels=labels)
    _close(got.logits, want.logits)
    _close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 5}, torch.tensor([4, 0, 2])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 3.0])),
        ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]])),
        ({"num_labels": 2, "problem_type": "regression"}, torch.randn(3, 2)),
    ],
    ids=["classes", "regression", "several-labels", "two-numbers"],
)
def test_sequence_classification(fields: dict, labels: Tensor) -> None:
    ours, theirs = _pair("BertForSequenceClassification", **fields)
    ids = _ids()
    want = theirs(ids, attention_mask=MASK, labels=labels)
    got = ours(ids, MASK, labels=labels)
    _close(got.logits, want.logits)
    _close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)
    assert ours(ids, MASK).loss is None


def test_token_classification() -> None:
    ours, theirs = _pair("BertForTokenClassification", num_labels=7)
    ids, labels = _ids(), torch.randint(7, (B, L))
    labels[MASK == 0] = -100
    labels[0, 0] = -100
    want = theirs(ids, attention_mask=MASK, labels=labels)
    got = ours(ids, MASK, labels=labels)
    _close(got.logits, want.logits, MASK)
    _close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)
    counted = torch.where(MASK == 0, 3, labels)
    assert torch.equal(ours(ids, MASK, labels=counted).loss, got.loss)
    assert float(ours(ids, MASK, labels=torch.full((B, L), -100)).loss.detach()) == 0.0


def test_question_answering_without_padding() -> None:
    ours, theirs = _pair("BertForQuestionAnswering")
    ids = _ids()
    # Outside on the right: left out. Negative: column 0.
    start, end = torch.tensor([2, 40, -3]), torch.tensor([4, 9, 10])
    want = theirs(ids, start_positions=start, end_positions=end)
    got = ours(ids, start_positions=start, end_positions=end)
    _close(got.start_logits, want.start_logits)
    _close(got.end_logits, want.end_logits)
    _close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    _compare_gradients(ours, theirs)


def test_question_answering_gives_padding_no_probability() -> None:
    ours, theirs = _pair("BertForQuestionAnswering")
    ids = _ids()
    want, got = theirs(ids, attention_mask=MASK), ours(ids, MASK)
    for mine, logits in ((got.start_logits, want.start_logits), (got.end_logits, want.end_logits)):
        assert float((mine - logits)[MASK == 1].detach().abs().max()) <= 1e-5
        assert torch.isfinite(mine).all()
        assert not mine.softmax(-1)[MASK == 0].any()
    start, end = torch.tensor([3, 5, 0]), torch.tensor([4, 5, 8])  # the last end is padding
    parts = []
    for logits, positions in ((want.start_logits, start), (want.end_logits, end)):
        scores = logits.masked_fill(MASK == 0, -torch.inf)
        losses = torch.nn.functional.cross_entropy(scores, positions, reduction="none")
        parts.append(losses[losses.isfinite()].mean())
    loss = ours(ids, MASK, start_positions=start, end_positions=end).loss
    _close(loss, sum(parts) / 2)
    nothing = ours(ids, torch.zeros_like(MASK), start_positions=start, end_positions=end)
    assert float(nothing.loss.detach()) == 0.0


def test_hidden_states_are_padded_when_asked_for() -> None:
    ours, _ = _pair("BertForTokenClassification")
    ids = _ids()
    assert ours(ids, MASK).encoder.last_hidden_state is None
    encoder = ours(ids, MASK, output_hidden_states=True).encoder
    assert [state.shape for state in encoder.hidden_states] == [(B, L, 48)] * 3


# Tied weights


def test_the_decoder_stays_tied() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES))

    def is_tied(model: torch.nn.Module) -> bool:
        predictions = model.cls.predictions
        words = model.bert.embeddings.word_embeddings.weight
        return predictions.decoder.weight is words and predictions.decoder.bias is predictions.bias

    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert is_tied(model) and is_tied(copy.deepcopy(model)) and is_tied(model.double().float())
    assert "cls.predictions.decoder.weight" not in dict(model.named_parameters())
    without = {name: value for name, value in state.items() if ".decoder." not in name}
    for loaded, assign in ((state, False), (state, True), (without, False), (without, True)):
        model.load_state_dict(loaded, strict=True, assign=assign)
        assert is_tied(model)
    del without["cls.predictions.bias"]
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict(without)
    assert "cls.predictions.bias" in str(caught.value)
    free = BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False))
    assert not is_tied(free)
    with pytest.raises(RuntimeError, match=r"cls\.predictions\.decoder\.weight"):
        free.load_state_dict({k: v for k, v in state.items() if ".decoder." not in k})


# Files


@pytest.mark.parametrize("name", NAMES)
def test_save_and_read(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    ours, _ = _pair(name, num_labels=2 if name == "BertForQuestionAnswering" else 3)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert not again.training and not recwarn.list
    for key, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta_heads_from_hugging_face_files(model_type: str, tmp_path: Path) -> None:
    prefix = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[model_type]
    config = getattr(transformers, f"{prefix}Config")(
        **SIZES, type_vocab_size=1, num_labels=4, attn_implementation="eager"
    )
    ids = torch.randint(2, 120, (B, L)).masked_fill(MASK == 0, 1)
    labels = torch.tensor([3, 0, 1])
    for task, mine in (
        ("ForMaskedLM", BertForMaskedLM),
        ("ForSequenceClassification", heads.BertForSequenceClassification),
        ("ForTokenClassification", heads.BertForTokenClassification),
    ):
        theirs = getattr(transformers, prefix + task)(config).eval()
        theirs.save_pretrained(tmp_path / task)
        ours = mine.from_pretrained(tmp_path / task)
        with torch.no_grad():
            got, want = ours(ids, MASK), theirs(ids, attention_mask=MASK)
        is_text = task == "ForSequenceClassification"
        _close(got.logits, want.logits, None if is_text else MASK)
        if is_text:
            loss = theirs(ids, attention_mask=MASK, labels=labels).loss
            _close(ours(ids, MASK, labels=labels).loss, loss)
        ours.save_pretrained(tmp_path / f"{task}-again")
        again, report = type(theirs).from_pretrained(tmp_path / f"{task}-again", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for key, value in theirs.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


def test_missing_heads_start_at_random_with_a_warning(tmp_path: Path) -> None:
    encoder = Bert(BertConfig(**SIZES))
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning) as caught:
        model = heads.BertForTokenClassification.from_pretrained(tmp_path, num_labels=["O", "B", "I"])
    assert len(caught) == 1
    assert str(caught[0].message) == (
        f"ctxfast.BertForTokenClassification: {tmp_path} has no classifier.weight, classifier.bias. "
        "They start at random: train them before use."
    )
    assert model.classifier.weight.shape == (3, 48) and model.config.id2label[2] == "I"
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.1, rel=0.3)
    assert not model.classifier.bias.any()
    for key, value in encoder.state_dict().items():
        if not key.startswith("pooler"):
            assert torch.equal(value, model.state_dict()[f"bert.{key}"])
    with pytest.warns(UserWarning, match=r"has no cls\.predictions\.bias, .*seq_relationship\.bias\. They"):
        model = BertForPreTraining.from_pretrained(tmp_path)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)
    assert all(not parameter.is_meta for parameter in model.parameters())
    assert torch.isfinite(model(_ids()).prediction_logits).all()


def test_another_number_of_labels_replaces_the_classifier(tmp_path: Path) -> None:
    names = {0: "low", 1: "middle", 2: "high"}
    model, _ = _pair("BertForSequenceClassification", num_labels=3, id2label=names)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no classifier\.weight, classifier\.bias"):
        other = heads.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert other(_ids()).logits.shape == (B, 5)
    same = heads.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert same.config.id2label == names


# Training


def test_dropout_before_the_classifier() -> None:
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name in ("BertForSequenceClassification", "BertForTokenClassification"):
        model, _ = _pair(name, **off, classifier_dropout=0.5)
        ids = _ids()
        still = model(ids).logits
        assert not torch.equal(still, model.train()(ids).logits)


def test_a_few_steps_lower_the_loss() -> None:
    model = BertForPreTraining(BertConfig(**SIZES)).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, labels, following = _ids(), _mlm_labels(), torch.tensor([0, 1, 0])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(ids, MASK, labels=labels, next_sentence_label=following).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_bfloat16_losses_are_float32() -> None:
    model, ids = BertForMaskedLM(BertConfig(**SIZES)).bfloat16().eval(), _ids()
    loss = model(ids, MASK, labels=_mlm_labels()).loss
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()
    assert model.cls.predictions.bias.grad is not None


# Refusals

_X = torch.zeros(2, 4, dtype=torch.int64)
_C = torch.zeros(2, dtype=torch.int64)
ERRORS: dict[str, tuple[str, Callable[[torch.nn.Module], object], type[Exception], str]] = {
    "mlm-shape": (
        "BertForMaskedLM",
        lambda m: m(_X, labels=_C),
        ValueError,
        "ctxfast.BertForMaskedLM: labels has shape (2,); expected (batch, seqlen) = (2, 4).",
    ),
    "mlm-dtype": (
        "BertForMaskedLM",
        lambda m: m(_X, labels=_X.float()),
        TypeError,
        "ctxfast.BertForMaskedLM: labels has dtype torch.float32; expected int64 or int32. Convert it with .long().",
    ),
    "mlm-range": (
        "BertForMaskedLM",
        lambda m: m(_X, labels=_X + 120),
        ValueError,
        "ctxfast.linear_cross_entropy: labels holds 120; expected values in 0..119.",
    ),
    "nsp-range": (
        "BertForPreTraining",
        lambda m: m(_X, next_sentence_label=_C + 2),
        ValueError,
        "ctxfast.BertForPreTraining: next_sentence_label holds 2; expected values in 0..1. "
        "-100 marks what has no label.",
    ),
    "text-shape": (
        "BertForSequenceClassification",
        lambda m: m(_X, labels=_X),
        ValueError,
        "ctxfast.BertForSequenceClassification: labels has shape (2, 4); expected (batch,) = (2,).",
    ),
    "text-several": (
        "BertForSequenceClassification",
        lambda m: m(_X, labels=torch.zeros(2, 7)),
        ValueError,
        "ctxfast.BertForSequenceClassification: labels has shape (2, 7); expected (batch, num_labels) = (2, 3).",
    ),
    "token-range": (
        "BertForTokenClassification",
        lambda m: m(_X, labels=_X + 3),
        ValueError,
        "ctxfast.BertForTokenClassification: labels holds 3; expected values in 0..2.",
    ),
    "token-device": (
        "BertForTokenClassification",
        lambda m: m(_X, labels=_X.to("meta")),
        ValueError,
        "ctxfast.BertForTokenClassification: labels is on meta; expected cpu, where the model is.",
    ),
    "span-one": (
        "BertForQuestionAnswering",
        lambda m: m(_X, start_positions=_C),
        ValueError,
        "ctxfast.BertForQuestionAnswering: end_positions is None; expected both start_positions and "
        "end_positions, or neither.",
    ),
    "ids": (
        "BertForMaskedLM",
        lambda m: m([[1]], labels=_X),
        TypeError,
        "ctxfast.Bert: input_ids is a list; expected a torch.Tensor.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case: str) -> None:
    name, call, kind, text = ERRORS[case]
    with pytest.raises(kind) as caught:
        call(getattr(heads, name)(BertConfig(**SIZES, num_labels=3)))
    assert str(caught.value).startswith(text)


def test_unknown_problem_type() -> None:
    with pytest.raises(ValueError, match="problem_type is 'ranking'; expected one of 'regression'"):
        BertConfig(**SIZES, extra={"problem_type": "ranking"})
