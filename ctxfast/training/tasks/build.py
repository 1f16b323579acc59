# SPDX-License-Identifier: Apache-2.0
"""Predictors: made from a pretrained model, or opened as they were stored."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...embed import Embedder
from ...encoders import ElmoEncoder
from ...models.bert.config import BertConfig
from ...models.bert.heads import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from ...models.bert.tokenization import BertTokenizer
from ...models.lstm_heads import LstmClassifier, LstmSpanFinder, LstmTagger, OverElmo
from .classify import BertClassifier, FeatureClassifier
from .features import FrozenLayers
from .predictor import FORMAT, SETTINGS_FILE, Predictor
from .span import BertSpanFinder, FeatureSpanFinder
from .tag import BertTagger, FeatureTagger, is_bio

TASKS = ("classify", "pair", "tag", "span")
_ARCHITECTURES = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "span",
}


@dataclass(frozen=True)
class Choice:
    """How a pretrained model is used.

    Attributes:
        features: None: BERT with all layers trained, or ELMo with its weights trained too. A name of
            ``features.FEATURES``: vectors of a frozen encoder, and an LSTM over them.
        hidden_size, lstm_layers, dropout: of the LSTM.
        crf: whether tags are scored together (with ``features``, or ELMo).
        max_length: tokens of a text or window; None for the task's default.
        predicate: see ``BertTagger``; with ``features`` or ELMo anything but "none" is a learned mark.
        is_spans: whether tags are BIO spans.
        doc_stride, max_query, max_answer, n_best, null_threshold: see ``BertSpanFinder``.

    Raises:
        ValueError: a size below 1, a dropout that is no probability below 1.
    """

    features: str | None = None
    hidden_size: int = 256
    lstm_layers: int = 2
    dropout: float = 0.3
    crf: bool = False
    max_length: int | None = None
    predicate: str = "none"
    is_spans: bool = True
    doc_stride: int = 128
    max_query: int = 64
    max_answer: int = 30
    n_best: int = 20
    null_threshold: float | None = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "lstm_layers", "doc_stride", "max_query", "max_answer", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"ctxfast.finetune: {name} is {getattr(self, name)}; expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ctxfast.finetune: dropout is {self.dropout}; expected a probability, 0 <= p < 1.")


def build(
    task: str,
    model: str | os.PathLike[str],
    labels: Sequence[str] = (),
    choice: Choice | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Predictor:
    """A predictor around a pretrained model, with a new head from torch's generator.

    Args:
        task: "classify", "pair", "tag" or "span".
        model: BERT or ELMo, as ``Embedder`` takes it.
        labels: names of classes or tags; () for "span", and for numbers in "classify" and "pair".
        choice: how.
        device: of the model.

    Raises:
        FileNotFoundError, ValueError: as ``Embedder``; a choice that the model or the task does not have; one label.
    """
    choice = choice or Choice()
    if task not in TASKS:
        raise ValueError(f"ctxfast.finetune: task is {task!r}; expected one of {', '.join(TASKS)}.")
    if (Path(model) / "head.safetensors").is_file():
        raise ValueError(
            f"ctxfast.finetune: model {model} is a finished one with an LSTM over its encoder; expected a pretrained "
            f"one. Its encoder is {Path(model) / 'encoder'}."
        )
    if len(labels) == 1:
        raise ValueError(f"ctxfast.finetune: labels is {labels[0]!r} alone; expected two or more to tell apart.")
    if choice.features is not None:
        return _over_features(task, Embedder(model, device=device), labels, choice)
    if _is_elmo(model):
        return _over_elmo(task, Embedder(model, device=device, state="zero"), labels, choice)
    if choice.crf:
        raise ValueError("ctxfast.finetune: crf is asked for with all of BERT trained; expected features, or ELMo.")
    with warnings.catch_warnings():  # that the head is new is the point of it
        warnings.filterwarnings("ignore", message=r".*They start at random.*")
        return _bert(task, model, labels, choice, device)


def _is_elmo(model: str | os.PathLike[str]) -> bool:
    folder = Path(model).expanduser()
    return folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*options*.json"))


def _bert(task: str, model: Any, labels: Sequence[str], choice: Choice, device: Any) -> Predictor:
    with warnings.catch_warnings():  # refused below, before a text meets a row that is not there
        warnings.filterwarnings("ignore", message=".*tokens beyond it cannot be embedded")
        tokenizer = BertTokenizer.from_pretrained(model)
    options: dict[str, Any] = {} if choice.max_length is None else {"max_length": choice.max_length}
    place = {"dtype": torch.float32, "device": device}
    if task == "tag":
        tagger = BertForTokenClassification.from_pretrained(model, num_labels=list(labels), **place)
        _check_vocabulary(model, tokenizer, tagger)
        return BertTagger(tagger, tokenizer, labels, predicate=choice.predicate, is_spans=choice.is_spans, **options)
    if task == "span":
        names = ("doc_stride", "max_query", "max_answer", "n_best", "null_threshold")
        options |= {name: getattr(choice, name) for name in names}
        finder = BertForQuestionAnswering.from_pretrained(model, **place)
        _check_vocabulary(model, tokenizer, finder)
        return BertSpanFinder(finder, tokenizer, **options)
    classifier = BertForSequenceClassification.from_pretrained(model, num_labels=list(labels) or 1, **place)
    # The file may be of another kind of problem; Hugging Face's pipelines look here, too.
    problem = "single_label_classification" if labels else "regression"
    extra = {**classifier.config.extra, "problem_type": problem}
    classifier.config = dataclasses.replace(classifier.config, extra=extra)
    _check_vocabulary(model, tokenizer, classifier)
    return BertClassifier(classifier, tokenizer, labels, is_pair=task == "pair", **options)


def _check_vocabulary(model: Any, tokenizer: BertTokenizer, network: Any) -> None:
    """Refuse a vocabulary of another model, before the first text with a token of its own ends a long run."""
    rows = network.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"ctxfast.finetune: the vocabulary of {model} has {tokenizer.vocab_size} tokens and the model's word table "
            f"{rows} rows; expected no more tokens than rows. Use the vocabulary that the model was trained with."
        )


def _head(task: str, num_layers: int, dim: int, labels: Sequence[str], choice: Choice) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {
        "hidden_size": choice.hidden_size,
        "lstm_layers": choice.lstm_layers,
        "dropout": choice.dropout,
    }
    if choice.max_length is not None:
        raise ValueError(
            "ctxfast.finetune: max_length is given with features or ELMo, which read every word. Leave it out."
        )
    if task == "tag":
        options |= {"crf": choice.crf, "marks_predicate": choice.predicate != "none"}
        return LstmTagger(num_layers, dim, labels, **options), options
    if choice.crf:
        raise ValueError(f"ctxfast.finetune: crf is asked for with task {task!r}; expected 'tag' for it.")
    if task == "span":
        return LstmSpanFinder(num_layers, dim, **options), options
    return LstmClassifier(num_layers, dim, max(len(labels), 1), is_pair=task == "pair", **options), options


def _over_features(task: str, embedder: Embedder, labels: Sequence[str], choice: Choice) -> Predictor:
    frozen = FrozenLayers(embedder, choice.features)
    head, options = _head(task, frozen.num_layers, frozen.dim, labels, choice)
    head.to(embedder.device)
    return _predictor(task, head, frozen, labels, choice, options)


def _over_elmo(task: str, embedder: Embedder, labels: Sequence[str], choice: Choice) -> Predictor:
    assert isinstance(embedder.encoder, ElmoEncoder)
    bilm = embedder.encoder.model.requires_grad_(True)
    head, options = _head(task, bilm.num_layers, bilm.get_output_dim(), labels, choice)
    model = OverElmo(bilm, head.to(embedder.device))
    return _predictor(task, model, None, labels, choice, options)


def _predictor(
    task: str, model: Any, frozen: FrozenLayers | None, labels: Sequence[str], choice: Choice, head: dict[str, Any]
) -> Predictor:
    if task == "tag":
        return FeatureTagger(model, frozen, labels, head=head, is_spans=choice.is_spans)
    if task == "span":
        names = ("max_answer", "n_best", "null_threshold")
        return FeatureSpanFinder(model, frozen, head=head, **{name: getattr(choice, name) for name in names})
    return FeatureClassifier(model, frozen, labels, is_pair=task == "pair", head=head)


def load(
    directory: str | os.PathLike[str],
    *,
    task: str | None = None,
    device: str | torch.device = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> Predictor:
    """Open what ``Predictor.save`` wrote, or a BERT that Hugging Face's library fine-tuned; the model is in eval mode.

    Args:
        directory: the model's.
        task: what it is to be for; None for what it is. (Hugging Face has one class for texts and for pairs.)
        device: of the model.
        changes: fields of ``Choice`` that reading and deciding depend on, to replace those stored.

    Raises:
        FileNotFoundError: no such model.
        ValueError: of another task, written by another version, or damaged.
    """
    directory = Path(directory)
    file = directory / SETTINGS_FILE
    if not file.is_file():
        return _load_foreign(directory, task, device, dict(changes or {}))
    settings = _read_settings(file)
    _check_task(directory, settings["task"], task)
    form, labels = settings["form"], settings["labels"]
    options = {**settings["options"], **(changes or {})}
    fields = {name: value for name, value in options.items() if name in Choice.__dataclass_fields__}
    if form == "bert":
        predictor = _bert(settings["task"], directory, labels, Choice(**fields), device)
    else:
        head = dict(options["head"])
        marks = head.pop("marks_predicate", False)
        choice = Choice(**fields, predicate="type" if marks else "none", **head)
        predictor = build(settings["task"], directory / "encoder", labels, choice, device=device)
        model = predictor.model.head if form == "elmo" else predictor.model
        model.load_state_dict(load_file(directory / "head.safetensors", device=str(device)))
    predictor.model.eval()
    return predictor


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"ctxfast.finetune: {file} is damaged ({error}); expected what training wrote.") from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise ValueError(f"ctxfast.finetune: {file} has format {found}; expected {FORMAT}.")
    missing = {"task", "form", "labels", "options"} - set(settings)
    if missing:
        raise ValueError(f"ctxfast.finetune: {file} has no {', '.join(sorted(missing))}; expected what training wrote.")
    return settings


def _check_task(directory: Path, found: str, task: str | None) -> None:
    if task is not None and found != task:
        raise ValueError(f"ctxfast.finetune: model {directory} is one for {found!r}; expected one for {task!r}.")


def _load_foreign(directory: Path, task: str | None, device: Any, changes: dict[str, Any]) -> Predictor:
    """A BERT with a head that was not trained here: its config.json says of what kind."""
    file = directory / "config.json"
    config = BertConfig.from_json_file(file) if file.is_file() else None
    kinds = config.extra.get("architectures") or [""] if config is not None else [""]
    found = next((own for end, own in _ARCHITECTURES.items() if str(kinds[0]).endswith(end)), None)
    if config is None or found is None:
        inner = [name for name in ("best", "final") if (directory / name / SETTINGS_FILE).is_file()]
        hint = f" Did you mean {directory / inner[0]}?" if inner else ""
        raise FileNotFoundError(
            f"ctxfast.finetune: {directory} has no {SETTINGS_FILE}, nor a config.json of a model with a head that is "
            f"known here; expected a fine-tuned model.{hint}"
        )
    if found == "classify" and task == "pair":
        found = "pair"
    _check_task(directory, found, task)
    labels: tuple[str, ...] = ()
    if found != "span" and not (found != "tag" and config.num_labels == 1):
        names = config.id2label or {k: f"LABEL_{k}" for k in range(config.num_labels)}
        labels = tuple(names[k] for k in range(config.num_labels))
    if labels and config.extra.get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"ctxfast.finetune: {directory} gives a text several labels; expected a model of one label each."
        )
    if found == "tag":
        changes = {"is_spans": is_bio(labels), **changes}
    elif found == "span":
        changes = {"null_threshold": None, **changes}
    predictor = _bert(found, directory, labels, Choice(**changes), device)
    predictor.model.eval()
    return predictor
