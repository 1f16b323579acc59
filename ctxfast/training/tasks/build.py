# SPDX-License-Identifier: Apache-2.0
"""Predictors: made from a pretrained model, or opened as they were stored."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..._core.reading import read_json, reading
from ...embedding.embedder import Embedder
from ...embedding.encoders import ElmoEncoder
from ...models.bert.config import BertConfig
from ...models.bert.heads import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification
from ...models.bert.tokenization import BertTokenizer
from ...models.lstm_heads import LstmClassifier, LstmSpanFinder, LstmTagger, OverElmo
from .classify import BertClassifier, FeatureClassifier
from .features import FEATURES, FrozenLayers
from .predictor import FORMAT, SETTINGS_FILE, Predictor
from .span import BertSpanFinder, FeatureSpanFinder
from .tag import BertTagger, FeatureTagger, is_bio

_WHO = "ctxfast.finetune"
TASKS = ("classify", "pair", "tag", "span")
_FORMS = ("bert", "features", "elmo")
# What settings are, in a stored model: the types, and what to call them.
_WHOLE, _NUMBER, _TRUTH = (int, "a whole number"), ((int, float), "a number"), (bool, "true or false")
_TEXT, _WHOLE_OR_NONE = (str, "a name"), ((int, type(None)), "a whole number, or null")
_OPTIONS = {
    "features": ((str, type(None)), "a name, or null"),
    "max_length": _WHOLE_OR_NONE,
    "predicate": _TEXT,
    "is_spans": _TRUTH,
    "doc_stride": _WHOLE,
    "max_query": _WHOLE,
    "max_answer": _WHOLE,
    "n_best": _WHOLE,
    "null_threshold": ((int, float, type(None)), "a number, or null"),
}
_HEAD_OPTIONS = {
    "hidden_size": _WHOLE,
    "lstm_layers": _WHOLE,
    "dropout": _NUMBER,
    "crf": _TRUTH,
    "marks_predicate": _TRUTH,
}
_RECURRENT = re.compile(r"^reader\.lstm\.weight_hh_l\d+$")
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
            if not getattr(self, name) >= 1:
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
        return _over_elmo(task, Embedder(model, device=device, state="zero", compute_dtype="float32"), labels, choice)
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
    torch.empty(0, device=device)  # a device that is not there is no damage to the files
    if not file.is_file():
        with reading(directory, _WHO, "fine-tuned model"):
            return _load_foreign(directory, task, device, dict(changes or {}))
    with reading(file, _WHO, "settings of a fine-tuned model"):
        settings = _read_settings(file)
        _check_task(directory, settings["task"], task)
        form, labels = settings["form"], settings["labels"]
        options = {**settings["options"], **(changes or {})}
        head = dict(options.pop("head", {}))
        marks = head.pop("marks_predicate", False)
        if form == "bert":
            predictor = _whole_bert(settings["task"], directory, labels, Choice(**options), device)
        else:
            weights = directory / "head.safetensors"
            if not weights.is_file():
                raise FileNotFoundError(f"{_WHO}: {weights} does not exist; expected the head that {file} describes.")
            choice = Choice(**options, predicate="type" if marks else "none", **head)
            _check_head_size(weights, choice)
            predictor = build(settings["task"], directory / "encoder", labels, choice, device=device)
            _load_head(predictor.model.head if form == "elmo" else predictor.model, weights)
    predictor.model.eval()
    return predictor


def _read_settings(file: Path) -> dict[str, Any]:
    """The settings in ``file``, once every one of them is of its kind."""
    settings = read_json(file, _WHO, "settings of a fine-tuned model")
    found = settings.get("format")
    if found != FORMAT:
        raise ValueError(f"{_WHO}: {file} has format {found}; expected {FORMAT}.")
    missing = {"task", "form", "labels", "options"} - set(settings)
    if missing:
        raise ValueError(f"{_WHO}: {file} has no {', '.join(sorted(missing))}; expected what training wrote.")
    form, labels, options = settings["form"], settings["labels"], settings["options"]
    _check_setting(file, "task", settings["task"] in TASKS, settings["task"], f"one of {', '.join(TASKS)}")
    _check_setting(file, "form", form in _FORMS, form, f"one of {', '.join(_FORMS)}")
    are_names = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    _check_setting(file, "labels", are_names and len(set(labels)) == len(labels), labels, "a list of different names")
    _check_setting(file, "options", isinstance(options, dict), options, "an object")
    has_features = form != "features" or options.get("features") in FEATURES
    _check_setting(file, "features", has_features, options.get("features"), f"one of {', '.join(FEATURES)}")
    head = options.get("head")
    _check_setting(file, "head", isinstance(head, dict) if form != "bert" else head is None, head, "the head's sizes")
    for group, kinds in ((options, _OPTIONS), (head or {}, _HEAD_OPTIONS)):
        for name, value in group.items():
            if name == "head" and group is options:
                continue
            kind, expected = kinds.get(name, ((), "no such option"))
            is_right = isinstance(value, kind) and (isinstance(value, bool) == (kind is bool))
            _check_setting(file, name, is_right, value, expected)
    return settings


def _check_setting(file: Path, name: str, is_right: bool, value: Any, expected: str) -> None:
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 100 else shown[:100] + "..."
        raise ValueError(f"{_WHO}: {name} in {file} is {shown}; expected {expected}.")


def _check_head_size(file: Path, choice: Choice) -> None:
    """Hold the sizes that the settings give against the head's file, before a head of these sizes is made."""
    with reading(file, _WHO, "file of a head"), safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if _RECURRENT.match(name)]
        shapes = {tuple(stored.get_slice(name).get_shape()) for name in names}
    size, layers = choice.hidden_size, choice.lstm_layers
    if len(names) != layers or shapes != {(4 * size, size)}:
        raise ValueError(
            f"{_WHO}: {file} has {len(names)} LSTM layers with recurrent weights of {sorted(shapes)}; expected "
            f"{layers} of {(4 * size, size)}, as lstm_layers {layers} and hidden_size {size} in {SETTINGS_FILE} say."
        )


def _load_head(model: torch.nn.Module, file: Path) -> None:
    """Fill ``model`` from ``file``, which must hold its tensors, all of them and no others."""
    with reading(file, _WHO, "file of a head"):
        tensors, own = load_file(file), model.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in tensors or name not in own:
                what = "also holds" if name in tensors else "has no"
                raise ValueError(f"{_WHO}: {file} {what} {name}; expected the head that {SETTINGS_FILE} describes.")
            value, wanted = tensors[name], own[name]
            if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
                raise ValueError(
                    f"{_WHO}: {name} in {file} is {value.dtype} of shape {tuple(value.shape)}; expected {wanted.dtype} "
                    f"of {tuple(wanted.shape)}, as {SETTINGS_FILE} says."
                )
            if not torch.isfinite(value).all():
                warnings.warn(f"{_WHO}: {name} in {file} holds NaN or infinity.", stacklevel=3)
        model.load_state_dict(tensors)


def _whole_bert(task: str, directory: Path, labels: Sequence[str], choice: Choice, device: Any) -> Predictor:
    """``_bert`` for a model that was trained: its head is in the files, for the very labels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*They start at random.*")
        try:
            return _bert(task, directory, labels, choice, device)
        except UserWarning as warning:
            raise ValueError(
                f"{_WHO}: {directory} has no trained head for {task!r} and labels {', '.join(labels) or '(none)'}: "
                f"{warning}"
            ) from warning


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
    predictor = _whole_bert(found, directory, labels, Choice(**changes), device)
    predictor.model.eval()
    return predictor
