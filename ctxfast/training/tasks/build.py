# SPDX-License-Identifier: Apache-2.0
"""Predictors: made from a pretrained model, or opened as they were stored."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..._core.reading import read_json, reading
from ...embedding.embedder import Embedder
from ...embedding.encoders import ElmoEncoder
from ...models.bert.config import BertConfig
from ...models.bert.tokenization import BertTokenizer
from ...models.lstm_heads import OverElmo
from .builder import Choice, TaskBuilder
from .classify import ClassifierBuilder
from .features import FEATURES, FrozenLayers
from .predictor import FORMAT, SETTINGS_FILE, Predictor
from .span import SpanFinderBuilder
from .tag import TaggerBuilder

_WHO = "ctxfast.finetune"
BUILDERS: dict[str, TaskBuilder] = {
    "classify": ClassifierBuilder(is_pair=False),
    "pair": ClassifierBuilder(is_pair=True),
    "tag": TaggerBuilder(),
    "span": SpanFinderBuilder(),
}
TASKS = tuple(BUILDERS)
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
        return _over_elmo(task, Embedder(model, device=device, state="zero", dtype="float32"), labels, choice)
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
    builder = BUILDERS[task]
    network = builder.network(model, labels, dtype=torch.float32, device=device)
    _check_vocabulary(model, tokenizer, network)
    options = {} if choice.max_length is None else choice.fields("max_length")
    return builder.over_bert(network, tokenizer, labels, choice, **options)


def _check_vocabulary(model: Any, tokenizer: BertTokenizer, network: Any) -> None:
    """Refuse a vocabulary of another model, before the first text with a token of its own ends a long run."""
    rows = network.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"ctxfast.finetune: the vocabulary of {model} has {tokenizer.vocab_size} tokens and the model's word table "
            f"{rows} rows; expected no more tokens than rows. Use the vocabulary that the model was trained with."
        )


def _head(task: str, num_layers: int, dim: int, labels: Sequence[str], choice: Choice) -> tuple[Any, dict[str, Any]]:
    """An LSTM head, and the options to make it again."""
    builder = BUILDERS[task]
    if choice.max_length is not None:
        raise ValueError(
            "ctxfast.finetune: max_length is given with features or ELMo, which read every word. Leave it out."
        )
    if choice.crf and not builder.has_crf:
        known = " or ".join(repr(name) for name, other in BUILDERS.items() if other.has_crf)
        raise ValueError(f"ctxfast.finetune: crf is asked for with task {task!r}; expected {known} for it.")
    options = choice.fields("hidden_size", "lstm_layers", "dropout") | builder.head_options(choice)
    return builder.head(num_layers, dim, labels, **options), options


def _over_features(task: str, embedder: Embedder, labels: Sequence[str], choice: Choice) -> Predictor:
    assert choice.features is not None
    frozen = FrozenLayers(embedder, choice.features)
    head, options = _head(task, frozen.num_layers, frozen.dim, labels, choice)
    return BUILDERS[task].over_features(head.to(embedder.device), frozen, labels, choice, options)


def _over_elmo(task: str, embedder: Embedder, labels: Sequence[str], choice: Choice) -> Predictor:
    assert isinstance(embedder.encoder, ElmoEncoder)
    bilm = embedder.encoder.model.requires_grad_(True)
    head, options = _head(task, bilm.num_layers, bilm.get_output_dim(), labels, choice)
    model = OverElmo(bilm, head.to(embedder.device))
    return BUILDERS[task].over_features(model, None, labels, choice, options)


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
            model = predictor.model
            _load_head(model.head if isinstance(model, OverElmo) else model, weights)
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
    found = next((name for name, own in BUILDERS.items() if str(kinds[0]).endswith(own.architecture)), None)
    if config is None or found is None:
        inner = [name for name in ("best", "final") if (directory / name / SETTINGS_FILE).is_file()]
        hint = f" Did you mean {directory / inner[0]}?" if inner else ""
        raise FileNotFoundError(
            f"ctxfast.finetune: {directory} has no {SETTINGS_FILE}, nor a config.json of a model with a head that is "
            f"known here; expected a fine-tuned model.{hint}"
        )
    if task in BUILDERS and BUILDERS[task].architecture == BUILDERS[found].architecture:
        found = task  # one class serves both
    _check_task(directory, found, task)
    builder, labels = BUILDERS[found], ()
    if builder.has_classes(config.num_labels):
        names = config.id2label or {k: f"LABEL_{k}" for k in range(config.num_labels)}
        labels = tuple(names[k] for k in range(config.num_labels))
    if labels and config.extra.get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"ctxfast.finetune: {directory} gives a text several labels; expected a model of one label each."
        )
    choice = Choice(**{**builder.foreign_changes(labels), **changes})
    predictor = _whole_bert(found, directory, labels, choice, device)
    predictor.model.eval()
    return predictor
